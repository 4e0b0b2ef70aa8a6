"""Scores smoothed along the series: by hand, at ends and gaps, and weights that are learnt."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ich_det2.evaluation.diagnosis import roc_auc_score
from ich_det2.evaluation.smoothing import (
    check_weights,
    fit_smoothing,
    smooth_boxes,
    smooth_scores,
)

QUARTERS = [0.25, 0.5, 0.25]
nan = np.nan


def smooth(scores, positions, weights=QUARTERS, series=None):
    return smooth_scores(scores, series or ["s"] * len(scores), positions, weights).tolist()


def test_a_single_weight_leaves_scores_as_they_are():
    scores = [0.1, 0.7, 0.3]
    assert smooth(scores, [0, 5, 10], [1.0]) == scores
    assert smooth([], [], QUARTERS) == []


def test_hand_worked_means():
    # Ends: (0.5 * 0 + 0.25 * 0.8) / 0.75 and (0.5 * 0.4 + 0.25 * 0.8) / 0.75.
    # Within: 0.25 * 0 + 0.5 * 0.8 + 0.25 * 0.4.
    assert smooth([0, 0.8, 0.4], [0, 5, 10]) == pytest.approx([0.2 / 0.75, 0.5, 0.4 / 0.75])
    # Before, itself, after, ascending along the normal, however they are handed in.
    weights = [0.1, 0.2, 0.7]
    assert smooth([0.4, 0, 0.8], [10, 0, 5], weights) == pytest.approx(
        [(0.1 * 0.8 + 0.2 * 0.4) / 0.3, 0.7 * 0.8 / 0.9, 0.2 * 0.8 + 0.7 * 0.4]
    )
    # Two on either side; of the second slice one before and two after.
    weights = [0.1, 0.2, 0.4, 0.2, 0.1]
    assert smooth([1, 0, 0, 1, 0], range(5), weights)[1:3] == pytest.approx([0.3 / 0.9, 0.3])


def test_beyond_a_gap_there_is_no_neighbour():
    # 5 mm is usual; 8 mm is more than one and a half times that, 7 mm is not.
    near = [0, 5, 10, 17]
    assert smooth([0, 0, 0, 1], near) == pytest.approx([0, 0, 0.25, 0.5 / 0.75])
    assert smooth([0, 0, 0, 1], [0, 5, 10, 18]) == [0, 0, 0, 1]
    # Nor for the second neighbour, on the other side of it.
    assert smooth([1, 0, 0, 0, 1], [0, 5, 10, 20, 25], [0.2] * 5)[2:4] == [1 / 3, 0.5]


def test_a_slice_that_was_not_read_is_a_missing_neighbour():
    assert smooth([1, nan, 0, 1], range(4)) == pytest.approx([1, nan, 0.25 / 0.75, 0.5 / 0.75],
                                                             nan_ok=True)  # fmt: skip
    # As beyond a gap, what lies behind it does not count.
    assert smooth([1, nan, 0, 0], range(4), [0.2] * 5)[2:] == [0, 0]


def test_slices_of_unknown_place_keep_their_scores():
    assert smooth([0.1, 0.9, 0.2], [nan, nan, nan]) == [0.1, 0.9, 0.2]
    assert smooth([0, 1, 0.3], [0, 5, nan]) == pytest.approx([0.25 / 0.75, 0.5 / 0.75, 0.3])


def test_weights_of_which_none_is_there_leave_the_score():
    assert smooth([0.3, 0.9], [0, 5], [1, 0, 0]) == [0.3, 0.3]


@pytest.mark.parametrize(
    "weights",
    [[], [0.5, 0.5], [0.5, 0.5, 0.5], [-0.5, 2, -0.5], [nan, 1, 0], ["a"], [[1.0]], 0.5, None],
)
def test_what_are_no_weights_is_refused(weights):
    with pytest.raises(ValueError, match=r"expected an odd number of them.*such as \[0.25"):
        check_weights(weights)


def test_rounded_weights_are_of_sum_1():
    assert check_weights([0.333] * 3).tolist() == pytest.approx([1 / 3] * 3)


scores_in_series = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from("ab"),
        st.sampled_from([0.0, 5.0, 5.0, 10.0, 12.5, 15.0, 40.0, nan]),
    ),
    min_size=1,
    max_size=12,
)
kernels = st.integers(0, 2).flatmap(
    lambda reach: st.lists(
        st.floats(0, 1), min_size=2 * reach + 1, max_size=2 * reach + 1
    ).filter(lambda w: sum(w) > 0.1).map(lambda w: [x / sum(w) for x in w])
)  # fmt: skip


# ---- boxes ---------------------------------------------------------------------------------------


def rows(*boxes):
    return np.array(boxes, dtype=float).reshape(-1, 5)


def test_hand_worked_boxes():
    # A bleed in the first two slices, IoU 80 / 120; what is bright elsewhere in the third.
    boxes = [
        rows((0.8, 0, 0, 10, 10)),
        rows((0.6, 0, 2, 10, 10), (0.4, 50, 50, 10, 10)),
        rows((0.9, 80, 80, 10, 10), (0.2, 50, 50, 10, 10), (0.1, 50, 51, 10, 10)),
    ]
    scores = [0.8, 0.6, 0.9]
    args = (["s"] * 3, [0, 5, 10], QUARTERS)
    moved, found = smooth_boxes(scores, boxes, *args, 0.5)
    # (0.5 * 0.8 + 0.25 * 0.6) / 0.75; 0.5 * 0.6 + 0.25 * 0.8 and 0.5 * 0.4 + 0.25 * 0.2;
    # 0.5 * 0.9 / 0.75, and with 0.25 * 0.4 of the second slice.
    expected = [[0.55 / 0.75], [0.5, 0.25], [0.6, 0.2 / 0.75, 0.15 / 0.75]]
    for smoothed, before, values in zip(found, boxes, expected):
        assert smoothed[:, 0] == pytest.approx(values)
        assert smoothed[:, 1:].tolist() == before[:, 1:].tolist()
    assert moved == pytest.approx([values[0] for values in expected])
    # Beyond an IoU of 2/3 the first two are no neighbours of one another.
    _, apart = smooth_boxes(scores, boxes, *args, 0.7)
    assert apart[0][:, 0] == pytest.approx([0.4 / 0.75])


def test_a_bleed_goes_on_in_a_slice_of_another_matrix():
    # The same field in 512 x 256 and 256 x 256 pixels.
    boxes = [rows((0.8, 10, 20, 10, 40)), rows((0.8, 10, 10, 10, 20))] * 2
    args = boxes, ["s"] * 4, [0, 5, 10, 15], QUARTERS, 0.9
    _, found = smooth_boxes([0.8] * 4, *args, sizes=[(512, 256), (256, 256)] * 2)
    for before, after in zip(boxes, found):
        assert after == pytest.approx(before)


def test_a_score_of_the_slices_own_moves_as_its_highest_box():
    boxes = [rows((0.5, 0, 0, 10, 10)), rows((0.8, 0, 0, 10, 10)), rows()]
    moved, found = smooth_boxes([0.3, 0.8, 0.25], boxes, ["s"] * 3, [0, 5, 10], QUARTERS, 0.5)
    # The first box goes from odds of 1 to those of 0.45 / 0.75 = 0.6, 3/2; the slice's are 3/7.
    odds = 3 / 7 * 3 / 2
    assert moved == pytest.approx([odds / (1 + odds), 0.5 * 0.8 + 0.25 * 0.5, 0.25])
    assert len(found[2]) == 0


def test_boxes_of_slices_that_were_not_read_or_are_elsewhere_have_no_say():
    boxes = [rows((0.8, 0, 0, 9, 9)), rows((0.4, 0, 0, 9, 9)), rows((0.6, 0, 0, 9, 9))]
    for series, positions, scores in (
        ("sts", [0, 5, 10], [0.8, 0.4, 0.6]),
        ("sss", [nan, nan, nan], [0.8, 0.4, 0.6]),
        ("sss", [0, 50, 100.5], [0.8, 0.4, nan]),
    ):
        moved, found = smooth_boxes(scores, boxes, series, positions, QUARTERS, 0.5)
        apart = [b.copy() for b in boxes]
        if series == "sts":
            apart[0][0, 0], apart[2][0, 0] = (1.6 + 0.6) / 3, (1.2 + 0.8) / 3
        if np.isnan(scores).any():
            apart[0][0, 0], apart[1][0, 0] = (1.6 + 0.4) / 3, (0.8 + 0.8) / 3
        for smoothed, expected in zip(found, apart):
            assert smoothed == pytest.approx(expected)
        assert np.isnan(moved).tolist() == np.isnan(scores).tolist()
    assert smooth_boxes([], [], [], [], QUARTERS, 0.5)[1] == []


some_boxes = st.lists(
    st.tuples(st.floats(0, 1), *[st.integers(0, 9)] * 2, *[st.integers(1, 9)] * 2), max_size=3
)


@given(
    st.lists(st.tuples(st.floats(0, 1), some_boxes), min_size=1, max_size=8),
    kernels,
    st.floats(0.05, 1),
)
def test_scores_stay_scores_and_lonely_boxes_do_not_gain(slices, weights, threshold):
    scores, boxes = [score for score, _ in slices], [rows(*own) for _, own in slices]
    args = (["s"] * len(slices), range(len(slices)), weights, threshold)
    moved, found = smooth_boxes(scores, boxes, *args)
    assert ((moved >= 0) & (moved <= 1)).all()
    best = max((b[:, 0].max(initial=0) for b in boxes), default=0)
    for before, after in zip(boxes, found):
        assert (after[:, 0] >= 0).all() and (after[:, 0] <= best + 1e-12).all()
        assert (after[:, 1:] == before[:, 1:]).all()
    top = [b[:, 0].max(initial=0) for b in boxes]
    moved, found = smooth_boxes(top, boxes, *args)
    assert moved == pytest.approx([b[:, 0].max(initial=0) for b in found])


# ---- scores --------------------------------------------------------------------------------------


@given(scores_in_series, kernels, st.randoms(use_true_random=False))
def test_order_does_not_matter_and_each_series_is_alone(rows, weights, random):
    scores, series, positions = zip(*rows)
    smoothed = smooth_scores(scores, series, positions, weights)
    order = list(range(len(rows)))
    random.shuffle(order)
    again = smooth_scores(*zip(*(rows[i] for i in order)), weights)
    # Of slices at one place with one score, either may be the first.
    expected = sorted(zip((rows[i] for i in order), smoothed[order]), key=str)
    assert sorted(zip((rows[i] for i in order), again), key=str) == expected
    for name in set(series):
        own = [i for i, row in enumerate(rows) if row[1] == name]
        alone = smooth_scores(*zip(*(rows[i] for i in own)), weights)
        assert alone.tolist() == smoothed[own].tolist()


@given(scores_in_series, kernels)
def test_means_lie_between_the_scores_and_constant_ones_stay(rows, weights):
    scores, series, positions = zip(*rows)
    smoothed = smooth_scores(scores, series, positions, weights)
    for name in set(series):
        own = [i for i, row in enumerate(rows) if row[1] == name]
        values = [scores[i] for i in own]
        assert min(values) <= smoothed[own].min() and smoothed[own].max() <= max(values)
    constant = smooth_scores([0.3] * len(rows), series, positions, weights)
    assert constant.tolist() == [0.3] * len(rows)


# ---- learnt weights --------------------------------------------------------------------------


def simulate(weights, seed, n_series=150, n=30):
    """Scores at random, and labels that the smoothed scores are the probabilities of."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(size=n_series * n)
    series = np.repeat(np.arange(n_series), n)
    places = series, np.tile(5.0 * np.arange(n), n_series)
    labels = rng.uniform(size=len(scores)) < smooth_scores(scores, *places, weights)
    return labels.astype(int), scores, *places


@pytest.mark.parametrize(
    "truth",
    [[0.0, 0.25, 0.5, 0.25, 0.0], [0.1, 0.2, 0.4, 0.2, 0.1], [0, 0, 1, 0, 0]],
    ids=["one", "two", "none"],
)
def test_weights_that_made_the_labels_are_found(truth):
    weights = fit_smoothing(*simulate(truth, seed=0))
    assert weights == pytest.approx(truth, abs=0.05)
    assert weights.sum() == pytest.approx(1) and (weights == weights[::-1]).all()
    labels, scores, *places = simulate(truth, seed=1)
    smoothed = smooth_scores(scores, *places, weights)
    gain = roc_auc_score(labels, smoothed) - roc_auc_score(labels, scores)
    assert gain > (-0.003 if truth[2] == 1 else 0.02)


def test_scores_of_a_detector_need_not_be_probabilities():
    labels, scores, *places = simulate([0.25, 0.5, 0.25], seed=2)
    # Far too sure of itself: a third of the score.
    weights = fit_smoothing(labels, scores / 3, *places, reach=1)
    assert weights == pytest.approx([0.25, 0.5, 0.25], abs=0.05)


def test_what_cannot_be_fitted_on_is_refused():
    with pytest.raises(ValueError, match="both classes, got 0 positive of 2"):
        fit_smoothing([0, 0], [0.1, 0.2], "ss", [0, 5])
    with pytest.raises(ValueError, match="from 0 to 1, got 0.1 to 2"):
        fit_smoothing([0, 1], [0.1, 2], "ss", [0, 5])
