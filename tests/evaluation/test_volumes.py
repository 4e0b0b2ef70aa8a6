"""Volumes by Cavalieri's principle and Dice, worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ich_det2.evaluation.volumes import dice, relative_error, slice_widths, volumes_ml


def test_a_ball_in_equal_slices():
    # Areas 100, 200 and 100 mm^2, 5 mm apart: 400 * 5 = 2000 mm^3 = 2 ml; and twice as much.
    areas = [[100, 200], [200, 400], [100, 200]]
    volumes, gaps = volumes_ml(areas, [0, 5, 10])
    assert volumes.tolist() == [2.0, 4.0] and gaps == 0
    # In any order, and whatever the direction of the normal.
    assert volumes_ml(areas, [-10, -5, 0])[0].tolist() == [2.0, 4.0]
    assert volumes_ml([areas[1], areas[0], areas[2]], [5, 0, 10])[0].tolist() == [2.0, 4.0]


def test_cavalieri_approaches_the_volume_of_a_ball():
    z = np.arange(-29.5, 30, 1.0)  # radius 20 mm: 4 / 3 pi 8000 mm^3 = 33.51 ml
    areas = np.pi * np.clip(400 - z**2, 0, None)
    (volume,), _ = volumes_ml(areas[:, None], z)
    assert volume == pytest.approx(33.51, rel=1e-3)


@pytest.mark.parametrize(
    ("positions", "expected", "gaps"),
    [
        # Thin below, thick above: half of the way to either side; at an end twice the half inside.
        ([0, 5, 10, 20, 30], [5, 5, 7.5, 10, 10], 0),
        # 30 mm is more than 1.5 times the 5 mm beside it; what is beyond stands alone, for the
        # usual 5 mm.
        ([0, 5, 10, 40], [5, 5, 5, 5], 1),
        # A slice is missing: the gap of 10 mm beside 5 mm is not filled.
        ([0, 5, 15, 20, 25], [5, 5, 5, 5, 5], 1),
        # Two slices at one place share it.
        ([0, 0, 5, 10], [2.5, 2.5, 5, 5], 0),
        ([0, 5, 5, 10], [5, 2.5, 2.5, 5], 0),
    ],
)
def test_uneven_spacing_gaps_and_repeats(positions, expected, gaps):
    widths, found = slice_widths(positions)
    assert widths.tolist() == expected and found == gaps


@pytest.mark.parametrize("positions", [[3.0], [3.0, 3.0], [0, 5, np.nan], []])
def test_without_a_distance_there_is_no_volume(positions):
    widths, gaps = slice_widths(positions)
    assert widths.shape == (len(positions),) and np.isnan(widths).all() and gaps == 0


def test_an_area_that_is_not_known_makes_no_volume():
    volumes, _ = volumes_ml([[1, np.nan], [1, 1]], [0, 5])
    assert volumes[0] == pytest.approx(0.01) and np.isnan(volumes[1])


@given(st.lists(st.integers(0, 400), min_size=2, max_size=30, unique=True))
def test_slices_without_gaps_stand_for_their_span_and_half_a_step_beyond(places):
    positions = np.sort(places) / 2
    widths, gaps = slice_widths(positions)
    steps = np.diff(positions)
    assert (widths > 0).all()
    if gaps == 0:
        assert widths.sum() == pytest.approx(np.ptp(positions) + (steps[0] + steps[-1]) / 2)


def test_dice_and_relative_error():
    # 2 * 30 / (40 + 60) = 0.6; none of one; equal; both empty.
    found = dice([40, 10, 5, 0], [60, 0, 5, 0], [30, 0, 5, 0])
    assert found[:3].tolist() == [0.6, 0.0, 1.0] and np.isnan(found[3])
    errors = relative_error([10, 4, 0], [12, 1, 3])
    assert errors[:2].tolist() == [0.2, -0.75] and np.isnan(errors[2])
