"""The brain in a slice and what is dense in it: a drawn head, and measures by hand."""

import cv2
import numpy as np
import pytest

from ich_det2.modeling.segmentation import (
    density_above_brain,
    find_brain,
    head_area,
    measure_lesions,
    perimeter,
    split_lesions,
)


def draw(side=160):
    """HU of air, scalp, skull and brain."""
    hu = np.full((side, side), -20.0, np.float32)
    middle, r = (side // 2, side // 2), side // 160
    for radius, value in ((76, 40), (70, 100), (62, 30)):
        cv2.circle(hu, middle, radius * r, value, -1)
    return hu


def test_the_skull_and_the_scalp_are_stripped():
    brain = find_brain(draw())
    y, x = np.mgrid[:160, :160] - 80
    radius = np.hypot(x, y)
    assert brain[radius < 59].all() and not brain[radius > 62].any()


def test_a_narrow_gap_of_the_skull_is_closed_and_a_wide_one_lets_the_outside_in():
    for gap, found in ((2, True), (24, False)):
        hu = draw()
        hu[:40, 80 - gap // 2 : 80 + gap // 2] = 40
        assert find_brain(hu).any() == found


def test_muscle_in_the_temples_hollow_is_outside():
    hu = draw()
    cv2.circle(hu, (145, 80), 20, 100, -1)  # bone that bulges inwards, and muscle in it
    cv2.circle(hu, (148, 80), 14, 60, -1)
    cv2.rectangle(hu, (150, 70), (159, 90), 60, -1)
    brain = find_brain(hu)
    assert brain[80, 80] and not brain[66:95, 134:].any()


def test_an_orbit_beside_the_brain_is_apart():
    hu = draw()
    hu[30:42, 20:140] = 100  # a wall in front of which a small hole remains, with a narrow opening
    hu[30:42, 79:81] = 40
    brain = find_brain(hu)
    assert brain[80, 80] and not brain[:30].any()


@pytest.mark.parametrize("value", [-20.0, 30.0, 100.0])
def test_a_constant_slice_has_no_brain_and_no_lesion(value):
    hu = np.full((32, 32), value, np.float32)
    brain = find_brain(hu)
    density = density_above_brain(hu, brain)
    assert not brain.any() and not density.any()
    assert split_lesions(density > 20, 1).shape == (0, 32, 32)
    assert measure_lesions(np.zeros((0, 32, 32), bool), density, head_area(hu)).shape == (0, 3)


def test_densities_are_those_beyond_the_brains_median_whatever_the_calibration():
    hu = draw()
    hu[70:90, 70:90] = 60
    first, second = (density_above_brain(x, find_brain(x)) for x in (hu, hu + 3))
    np.testing.assert_allclose(first, second, atol=1e-4)
    assert first[80, 80] == pytest.approx(30, abs=0.1) and first[80, 120] == pytest.approx(0, abs=1)
    assert first[80, 25] == 0  # beside bone, which does not shine into it
    assert not first[~find_brain(hu)].any()


def test_lesions_are_the_connected_parts_of_some_size():
    mask = np.zeros((40, 40), bool)
    mask[2:12, 2:12] = mask[20:24, 20:24] = True
    mask[30, 5:35] = True  # a line
    found = split_lesions(mask, least_area=13)
    # The opening with a cross takes the corners: 100 - 4 and 16 - 4 pixels.
    assert [int(m.sum()) for m in found] == [96]
    assert [int(m.sum()) for m in split_lesions(mask, 12)] == [96, 12]


def test_measures_by_hand():
    lesion, density = np.zeros((40, 40), bool), np.zeros((40, 40))
    lesion[10:20, 10:30] = True
    density[10:20, 10:30] = 25.0
    # 200 of 20 000 pixels: 3 + log10(0.01) = 1; 25 / 10; a perimeter of 60 pi / 4, so
    # 4 pi 200 / (15 pi)^2 = 800 / (225 pi).
    (row,) = measure_lesions(lesion[None], density, 20_000)
    np.testing.assert_allclose(row, [1.0, 2.5, 800 / (225 * np.pi)], rtol=1e-6)


def test_a_disk_is_compact():
    y, x = np.mgrid[:80, :80] - 40
    lesion = np.hypot(x, y) <= 30
    assert perimeter(lesion) == pytest.approx(2 * np.pi * 30, rel=0.03)
    assert measure_lesions(lesion[None], lesion * 1.0, 6400)[0, 2] == pytest.approx(1, abs=0.05)
