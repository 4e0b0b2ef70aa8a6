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
    paired_by_group,
    wilson_by_group,
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

    def value(draw):
        images = np.concatenate([np.flatnonzero(groups == names[i]) for i in draw])
        y, s = y_true[images], y_score[images]
        return (s[y == 1] >= 0.5).mean(), roc_auc_score(y, s)

    values = np.array([value(draw) for draw in drawn])
    every = value(range(12))
    for k, ours in enumerate(bounds):
        # Hesterberg 2015: Phi(sqrt(n / (n - 1)) t), of 12 patients 0.0108 in place of 0.025.
        left_out = [value([i for i in range(12) if i != out])[k] for out in range(12)]
        n = sum(abs(v - every[k]) > 1e-9 for v in left_out)
        tail = 100 * stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf(0.025, n - 1))
        expected = np.percentile(values[:, k], (tail, 100 - tail))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)


def test_only_patients_that_a_number_depends_on_count_in_the_expansion():
    # Ten bleeding patients, then also 90 healthy ones: the interval of the recall hardly changes,
    # and is that of ten.
    rng = np.random.default_rng(0)
    hit = rng.random(50) < 0.7
    groups = np.repeat(np.arange(10), 5)
    (ten,) = bootstrap_by_group(recall_statistic(np.ones(50, int), hit), groups, n_resamples=4000)
    y_true, y_score = np.r_[np.ones(50, int), np.zeros(90, int)], np.r_[hit, np.zeros(90)]
    groups = np.r_[groups, np.arange(10, 100)]
    (all_,) = bootstrap_by_group(recall_statistic(y_true, y_score), groups, n_resamples=4000)
    np.testing.assert_allclose(all_, ten, rtol=0, atol=0.03)


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


def simulated(rng, n_patients, recall=0.8, alike=0.1):
    """Hits and patients of bleeding slices, 1 to 30 a patient, whose own recall is beta."""
    size = rng.integers(1, 31, n_patients)
    shape = (1 - alike) / alike
    own = rng.beta(recall * shape, (1 - recall) * shape, n_patients)
    return rng.random(size.sum()) < np.repeat(own, size), np.repeat(np.arange(n_patients), size)


@pytest.mark.parametrize(("n_patients", "n_samples"), [(20, 1500), (60, 600)])
def test_intervals_cover_a_known_recall(n_patients, n_samples):
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for seed in range(n_samples):
        hit, groups = simulated(rng, n_patients)
        every = np.ones(len(hit), dtype=int)
        (drawn,) = bootstrap_by_group(
            recall_statistic(every, hit.astype(float)), groups, n_resamples=400, seed=seed
        )
        wilson = wilson_by_group(hit, every, groups)
        covered += [low <= 0.8 <= high for low, high in (drawn, wilson)]
    # Plain percentiles cover 91 % with 20 patients; Wilson's own interval some 60 %.
    assert (0.93 <= covered / n_samples).all() and (covered / n_samples <= 0.97).all()


# ---- Wilson by group ---------------------------------------------------------------------------


def test_wilson_by_group_of_a_case_each_is_wilsons_with_t():
    # Variance n / (n - 1) p (1 - p) / n is that of n - 1 = 39 cases; z^2 / t^2 of 39 degrees.
    hits = np.arange(40) < 30
    effective = 39 * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, 39)) ** 2
    expected = wilson_interval(0.75 * effective, effective)
    np.testing.assert_allclose(wilson_by_group(hits, hits >= 0, range(40)), expected, atol=1e-12)


def test_copies_of_images_bring_no_certainty_to_a_proportion():
    hits = np.arange(40) < 30
    once = wilson_by_group(hits, hits >= 0, range(40))
    copies = wilson_by_group(np.tile(hits, 9), np.ones(360), np.tile(np.arange(40), 9))
    np.testing.assert_allclose(copies, once, atol=1e-12)


def test_all_found_is_no_certainty_and_counts_the_patients():
    # 200 of 200 slices of 10 patients: as wide as 10 of 10 or wider, by t.
    low, high = wilson_by_group(np.ones(200), np.ones(200), np.arange(200) // 20)
    assert high == 1 and 0.6 < low < wilson_interval(10, 10)[0]
    assert np.isnan(wilson_by_group(np.ones(5), np.ones(5), ["p"] * 5)).all()
    assert np.isnan(wilson_by_group([False] * 2, [False] * 2, ["p", "q"])).all()


def test_paired_p_values_by_hand():
    groups = ["a", "b"]

    def difference(weights):
        # +1 of one group, -1 of the other: 2, 0 or -2; then always 1; then nothing.
        return [weights @ [1, -1], np.ones(len(weights)), np.full(len(weights), np.nan)]

    even, sure, nothing = paired_by_group(difference, groups, n_resamples=199)
    # Each side of 0 holds about 3 of 4 draws, those at 0 on both.
    assert even[2] == 1
    # No draw on the other side: 2 (0 + 1) / (199 + 1).
    assert sure.tolist() == [1, 1, 0.01]
    assert np.isnan(nothing).all()
    assert paired_by_group(difference, groups)[0, :2].tolist() == (
        bootstrap_by_group(difference, groups)[0].tolist()
    )
