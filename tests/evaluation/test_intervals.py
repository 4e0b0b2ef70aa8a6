"""Intervals: against other implementations, a published example, and by coverage."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ich_det2.evaluation.diagnosis import confusion_at_thresholds, roc_auc_score
from ich_det2.evaluation.intervals import (
    bootstrap_by_group,
    delong_covariance,
    delong_interval,
    wilson_interval,
)


def delong_by_pairs(y_true, y_scores):
    """Equations 3 to 6 of DeLong et al. as written: every pair, one after the other."""
    pos = [[s for s, y in zip(scores, y_true) if y] for scores in y_scores]
    neg = [[s for s, y in zip(scores, y_true) if not y] for scores in y_scores]

    def kernel(x, y):
        return 1.0 if y < x else 0.5 if y == x else 0.0

    areas, v10, v01 = [], [], []
    for x, y in zip(pos, neg):
        v10.append([sum(kernel(a, b) for b in y) / len(y) for a in x])
        v01.append([sum(kernel(a, b) for a in x) / len(x) for b in y])
        areas.append(sum(v10[-1]) / len(x))
    k = len(areas)
    return areas, [
        [
            sum((a - areas[r]) * (b - areas[s]) for a, b in zip(v10[r], v10[s]))
            / (len(v10[r]) - 1) / len(v10[r])
            + sum((a - areas[r]) * (b - areas[s]) for a, b in zip(v01[r], v01[s]))
            / (len(v01[r]) - 1) / len(v01[r])
            for s in range(k)
        ]
        for r in range(k)
    ]  # fmt: skip


# ---- Wilson ------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize("n", [1, 7, 250])
def test_wilson_equals_scipy(n, confidence):
    k = np.arange(n + 1)
    bounds = wilson_interval(k, n, confidence)
    for successes, ours in zip(k, bounds):
        theirs = stats.binomtest(int(successes), n).proportion_ci(confidence, method="wilson")
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    assert bounds[0, 0] == 0 and bounds[-1, 1] == 1


def test_wilson_without_cases_is_nan_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(wilson_interval(0, 0)).all()


# ---- DeLong ------------------------------------------------------------------------------------


def test_delong_of_three_models_equals_its_definition():
    rng = np.random.default_rng(0)
    y_true, scores = rng.integers(0, 2, 40), rng.integers(0, 9, (3, 40))
    areas, covariance = delong_covariance(y_true, scores)
    expected, by_pairs = delong_by_pairs(y_true, scores)
    np.testing.assert_allclose(areas, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(covariance, by_pairs, rtol=0, atol=1e-12)


@given(
    data=st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from([0.1, 0.2, 0.3]), st.floats(0, 1)),
        min_size=6,
        max_size=25,
    )
)
def test_delong_equals_its_definition_pair_by_pair(data):
    y_true, *scores = (np.array(x) for x in zip(*data))
    areas, covariance = delong_covariance(y_true, scores)
    if min(y_true.sum(), (1 - y_true).sum()) < 2:
        assert np.isnan(covariance).all()
        return
    expected = delong_by_pairs(y_true, scores)
    np.testing.assert_allclose(areas, expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(covariance, expected[1], rtol=0, atol=1e-12)
    # A patient for each image is no grouping.
    _, grouped = delong_covariance(y_true, scores, [f"p{i}" for i in range(len(y_true))])
    np.testing.assert_allclose(grouped, covariance, rtol=0, atol=1e-12)


def test_copies_of_images_bring_no_certainty_when_grouped():
    rng = np.random.default_rng(0)
    y_true = np.repeat([0, 1], 40)
    scores = y_true * 0.8 + rng.normal(size=80)
    _, single = delong_covariance(y_true, [scores])
    copies = np.tile(np.arange(80), 5)
    _, naive = delong_covariance(y_true[copies], [scores[copies]])
    _, grouped = delong_covariance(y_true[copies], [scores[copies]], copies)
    assert naive[0, 0] == pytest.approx(single[0, 0] / 5, rel=0.05)
    assert grouped[0, 0] == pytest.approx(single[0, 0], rel=1e-9)


def test_grouped_delong_covers_where_the_naive_does_not():
    # 30 patients of 6 images; half of the variance is the patient's. True AUC from a large sample.
    rng = np.random.default_rng(1)

    def draw(n):
        y = np.tile([0, 0, 0, 1, 1, 1], n)
        patient = np.repeat(np.arange(n), 6)
        return y, y + rng.normal(size=n)[patient] * (2 * y - 1) + rng.normal(size=6 * n), patient

    y, s, _ = draw(50_000)
    truth = roc_auc_score(y, s)
    hits = np.zeros(2)
    for _ in range(500):
        y, s, patient = draw(30)
        for i, groups in enumerate((patient, None)):
            low, high = delong_interval(y, s, groups)
            hits[i] += low <= truth <= high
    assert 0.92 <= hits[0] / 500 <= 0.97
    assert hits[1] / 500 < 0.85


def test_perfect_separation_gives_no_delong_interval():
    # Its variance is 0, which would claim certainty.
    assert np.isnan(delong_interval([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])).all()
    assert np.isnan(delong_interval([1, 1], [0.1, 0.2])).all()


# ---- bootstrap ---------------------------------------------------------------------------------


def recall_statistic(y_true, y_score):
    def statistic(weights):
        counts = confusion_at_thresholds(y_true, y_score, [0.5], weights)
        with np.errstate(invalid="ignore"):
            return [counts["tp"][:, 0] / (counts["tp"] + counts["fn"])[:, 0]]

    return statistic


def test_bootstrap_equals_drawing_patients_one_by_one():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 12, 60)
    y_true, y_score = rng.integers(0, 2, 60), rng.random(60)
    statistic = recall_statistic(y_true, y_score)
    bounds = bootstrap_by_group(
        lambda w: [*statistic(w), roc_auc_score(y_true, y_score, w)], groups, n_resamples=300
    )
    names = np.unique(groups)
    drawn = np.random.default_rng(0).integers(len(names), size=(300, len(names)))
    values = []
    for draw in drawn:
        images = np.concatenate([np.flatnonzero(groups == names[i]) for i in draw])
        y, s = y_true[images], y_score[images]
        values.append([(s[y == 1] >= 0.5).mean(), roc_auc_score(y, s)])
    np.testing.assert_allclose(bounds, np.percentile(values, (2.5, 97.5), axis=0).T, atol=1e-12)


def test_bootstrap_is_reproducible_and_the_seed_matters():
    rng = np.random.default_rng(0)
    y_true, y_score, groups = rng.integers(0, 2, 50), rng.random(50), rng.integers(0, 20, 50)
    run = {
        seed: bootstrap_by_group(
            lambda w: [roc_auc_score(y_true, y_score, w)], groups, n_resamples=200, seed=seed
        )
        for seed in (0, 1)
    }
    again = bootstrap_by_group(
        lambda w: [roc_auc_score(y_true, y_score, w)], groups, n_resamples=200, seed=0
    )
    assert (run[0] == again).all() and (run[0] != run[1]).any()


def test_one_patient_gives_a_point_and_no_image_an_error():
    y_true, y_score = np.array([1, 1, 0]), np.array([0.9, 0.1, 0.2])
    bounds = bootstrap_by_group(recall_statistic(y_true, y_score), ["p"] * 3, n_resamples=10)
    assert bounds.tolist() == [[0.5, 0.5]]
    with pytest.raises(ValueError, match="at least one image, got none"):
        bootstrap_by_group(lambda w: [w.sum(axis=1)], [])


def test_what_no_draw_defines_is_nan_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bounds = bootstrap_by_group(
            lambda w: [np.full(len(w), math.nan), w[:, 0] * 0.0], ["a", "b"], n_resamples=5
        )
        nothing = bootstrap_by_group(
            lambda w: [np.full(len(w), math.nan)] * 2, ["a", "b"], n_resamples=5
        )
    assert np.isnan(bounds[0]).all() and bounds[1].tolist() == [0, 0]
    assert nothing.shape == (2, 2) and np.isnan(nothing).all()


def test_bootstrap_covers_a_known_recall():
    # 150 bleeding patients of 4 to 12 slices; a patient's own recall varies around 0.8 (beta 8, 2).
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(600):
        size = rng.integers(4, 13, 150)
        groups = np.repeat(np.arange(150), size)
        hit = rng.random(len(groups)) < np.repeat(rng.beta(8, 2, 150), size)
        statistic = recall_statistic(np.ones(len(groups), dtype=int), hit.astype(float))
        ((low, high),) = bootstrap_by_group(statistic, groups, n_resamples=500, seed=seed)
        covered += low <= 0.8 <= high
    assert 0.93 <= covered / 600 <= 0.97
