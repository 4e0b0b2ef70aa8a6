"""Scores smoothed along the series: by hand, at ends and gaps, and weights that are learnt."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ich_det2.evaluation.diagnosis import roc_auc_score
from ich_det2.evaluation.smoothing import check_weights, fit_smoothing, smooth_scores

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
