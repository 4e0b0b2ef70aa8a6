"""Parts of a segmented slice, and the slice's score, by hand."""

import numpy as np
import pytest

from ich_det2.modeling.components import find_components, slice_score


def test_parts_of_two_types_with_their_mean_probabilities():
    labels = np.array([
        [1, 1, 0, 0, 2],
        [0, 0, 1, 0, 2],
        [0, 0, 0, 0, 2],
        [1, 0, 0, 0, 0],
    ])  # fmt: skip
    probabilities = np.zeros((2, 4, 5), np.float32)
    probabilities[0][labels == 1] = 0.6, 0.8, 0.7, 0.9  # row by row
    probabilities[1][labels == 2] = 0.5, 0.75, 1.0
    found = find_components(labels, probabilities)
    # (0.6 + 0.8 + 0.7) / 3, which touch at a corner; 2.25 / 3; and a single pixel, the highest.
    assert found.scores.tolist() == pytest.approx([0.9, 0.75, 0.7])
    assert found.boxes.tolist() == [[0, 3, 1, 4], [4, 0, 5, 3], [0, 0, 3, 2]]
    assert found.classes.tolist() == [0, 1, 0]
    assert np.array_equal(found.masks[1], labels == 2)
    assert found.masks[2].sum() == 3 and not found.masks[2][3, 0]
    assert [len(values) for values in find_components(labels, probabilities, most=2)] == [2] * 4
    assert find_components(labels, probabilities, min_pixels=2).classes.tolist() == [1, 0]


def test_a_slice_without_bleed_has_no_part():
    found = find_components(np.zeros((4, 6), int), np.zeros((1, 4, 6)))
    assert [values.shape for values in found] == [(0, 4), (0,), (0,), (0, 4, 6)]


def test_a_speck_does_not_make_a_bleed():
    foreground = np.full((4, 4), 0.1)
    foreground[1, 1] = 0.9
    assert slice_score(foreground) == pytest.approx(0.9)
    assert slice_score(foreground, 4) == pytest.approx((0.9 + 3 * 0.1) / 4)
    assert slice_score(foreground, 99) == pytest.approx((0.9 + 15 * 0.1) / 16)
