"""Distance-regularized level sets: terms by hand, one step, and outlines that find an edge."""

import numpy as np
import pytest

from ich_det2.modeling.level_set import (
    diffusion_rate,
    dirac,
    edge_indicator,
    evolve,
    initial_level_set,
)


def disk(radius, side=64):
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    return x**2 + y**2 <= radius**2


def test_the_terms_by_hand():
    # sin(pi/2) / (pi/2) at 1/4; sin(pi) / pi at 1/2; 1 - 1/2 at 2.
    rates = diffusion_rate(np.array([0.0, 0.25, 0.5, 1.0, 2.0]))
    np.testing.assert_allclose(rates, [1, 2 / np.pi, 0, 0, 0.5], atol=1e-12)
    # (1 + 1) / 3, (1 + cos(pi/2)) / 3, then 0.
    np.testing.assert_allclose(dirac(np.array([0.0, 0.75, 1.5, 2.0]), 1.5), [2 / 3, 1 / 3, 0, 0])
    assert abs(dirac(np.linspace(-3, 3, 601), 1.5).sum() * 0.01 - 1) < 1e-6


def test_edges_stop_and_flat_parts_do_not():
    image = np.zeros((16, 16))
    np.testing.assert_allclose(edge_indicator(image), 1)
    image += 3.0 * np.arange(16)  # in the middle a slope of 3: 1 / (1 + (3 / 3)^2)
    np.testing.assert_allclose(edge_indicator(image, contrast=3.0)[8, 8], 0.5, rtol=1e-5)


def test_one_step_by_hand():
    # phi = x - 5: its slope is 1, so the regularization and, of a straight contour, the length add
    # nothing. The area adds dt alpha g delta: 4 * -1.5 * 0.5 * (1 + cos(pi x / 1.5)) / 3, that is
    # -2 at x = 0, and at 1 from it -(1 + cos(2 pi / 3)) = -0.5; 0 from 1.5 on.
    phi = np.tile(np.arange(11.0) - 5, (7, 1))
    edges = np.full_like(phi, 0.5)
    moved = evolve(phi, edges, 1, area=-1.5)
    expected = phi[3] + [0, 0, 0, 0, -0.5, -2, -0.5, 0, 0, 0, 0]
    np.testing.assert_allclose(moved[3, 3:-3], expected[3:-3], atol=1e-5)
    # With mu = 0.05 and a slope of 1/4 of a ramp that is bent once: at the bend the Laplacian is
    # 1/4 and div((d_p - 1) grad) by differences over two pixels (d_p(1/4) - 1) / 8, d_p = 2 / pi.
    bent = np.tile(np.maximum(np.arange(11.0) - 5, 0) / 4, (7, 1)) + 9
    step = evolve(bent, edges, 1, length=0.0)[3, 5] - 9
    assert step == pytest.approx(4 * 0.05 * (1 / 4 + (2 / np.pi - 1) / 8), abs=1e-5)


def slopes(phi, within=1.0):
    dy, dx = np.gradient(phi)
    return np.hypot(dx, dy)[np.abs(phi) < within]


def test_distance_regularization_keeps_the_slope_near_one():
    phi, edges = initial_level_set(disk(16)), np.ones((64, 64))
    assert slopes(phi, 2.1).max() == pytest.approx(8**0.5)  # jumps of 4 over two pixels, aslant
    after = evolve(phi, edges, 60, length=0.0)
    np.testing.assert_allclose(slopes(after), 1, atol=0.15)
    assert abs((after < 0).sum() - disk(16).sum()) < 0.05 * disk(16).sum()  # nothing else moved
    without = evolve(phi, edges, 60, length=0.0, regularization=0.0)
    np.testing.assert_allclose(without, evolve(phi, edges, 0))


def test_a_seed_grows_to_the_edge_and_not_beyond():
    rng = np.random.default_rng(0)
    image = np.where(disk(20), 60.0, 30.0) + rng.normal(0, 1, (64, 64))
    edges = edge_indicator(image, sigma=1.0, contrast=3.0)
    outline = evolve(initial_level_set(disk(12)), edges, 120, area=-1.5) < 0
    both = 2 * (outline & disk(20)).sum() / (outline.sum() + disk(20).sum())
    assert both > 0.95
    assert (evolve(initial_level_set(disk(12)), np.ones((64, 64)), 40, area=1.5) < 0).sum() == 0


def test_a_constant_image_without_object_stays_so():
    edges = edge_indicator(np.full((8, 9), 30.0))
    phi = evolve(initial_level_set(np.zeros((8, 9), bool)), edges, 5, area=-1.0)
    assert (phi > 0).all() and np.isfinite(phi).all()
    thin = evolve(initial_level_set(np.eye(2, dtype=bool)), np.ones((2, 2)), 5)
    assert np.isfinite(thin).all()


def test_a_step_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="is 0.4, expected below 0.25"):
        evolve(np.ones((4, 4)), np.ones((4, 4)), 1, time_step=4.0, regularization=0.1)
