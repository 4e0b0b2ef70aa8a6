"""The diagnosis and its metrics, against scikit-learn and by hand."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from ich_det2.evaluation.diagnosis import (
    METRICS,
    average_precision_score,
    confusion_at_thresholds,
    diagnose,
    diagnosis_metrics,
    diagnosis_table,
    group_scores,
    patient_scores,
    pr_curve,
    recall_at_specificity,
    roc_auc_score,
    roc_curve,
    summarize,
    type_recall,
)

# Few distinct scores, so that ties are the rule.
coarse_scores = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
pairs = st.lists(
    st.tuples(st.integers(0, 1), st.one_of(coarse_scores, st.floats(0, 1))), min_size=1, max_size=60
)

SKLEARN = {
    "accuracy": sk.accuracy_score,
    "recall": lambda y, p: sk.recall_score(y, p, zero_division=np.nan),
    "precision": lambda y, p: sk.precision_score(y, p, zero_division=np.nan),
    "specificity": lambda y, p: sk.recall_score(y, p, pos_label=0, zero_division=np.nan),
    "npv": lambda y, p: sk.precision_score(y, p, pos_label=0, zero_division=np.nan),
    "f1": lambda y, p: sk.f1_score(y, p, zero_division=np.nan),
    "f2": lambda y, p: sk.fbeta_score(y, p, beta=2, zero_division=np.nan),
    # scikit-learn leaves an absent class out of the mean, and calls an undefined MCC 0.
    "balanced_accuracy": lambda y, p: (
        sk.balanced_accuracy_score(y, p) if len(set(y)) == 2 else math.nan
    ),
    "mcc": lambda y, p: sk.matthews_corrcoef(y, p) if len(set(y)) == len(set(p)) == 2 else math.nan,
    # As its weighted share of errors: a positive image weighs ten times.
    "expected_cost": lambda y, p: (
        (1 - sk.accuracy_score(y, p, sample_weight=np.where(np.equal(y, 1), 10, 1)))
        * np.where(np.equal(y, 1), 10, 1).mean()
    ),
}


def sklearn_auc(y_true, y_score):
    return sk.roc_auc_score(y_true, y_score) if len(set(y_true)) == 2 else math.nan


def assert_equal_to_sklearn(y_true, y_score, thresholds):
    counts = confusion_at_thresholds(y_true, y_score, thresholds)
    ours = diagnosis_metrics(**counts)
    assert set(ours) == set(METRICS) == set(SKLEARN)
    for i, threshold in enumerate(thresholds):
        called = (np.asarray(y_score) >= threshold).astype(int)
        tn, fp, fn, tp = sk.confusion_matrix(y_true, called, labels=[0, 1]).ravel()
        assert [counts[k][i] for k in ("tn", "fp", "fn", "tp")] == [tn, fp, fn, tp]
        for name, function in SKLEARN.items():
            expected = function(y_true, called)
            assert ours[name][i] == pytest.approx(expected, abs=1e-12, nan_ok=True), name
    assert roc_auc_score(y_true, y_score) == pytest.approx(
        sklearn_auc(y_true, y_score), abs=1e-12, nan_ok=True
    )
    assert_curves_equal_to_sklearn(np.array(y_true), np.array(y_score))


def assert_curves_equal_to_sklearn(y_true, y_score):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an absent class
        expected = sk.roc_curve(y_true, y_score, drop_intermediate=False)
        precision, recall, thresholds = sk.precision_recall_curve(y_true, y_score)
        area = sk.average_precision_score(y_true, y_score)
    for ours, theirs in zip(roc_curve(y_true, y_score), expected):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    if not y_true.any():  # theirs is 1 everywhere
        recall, area = np.full(len(recall), np.nan), math.nan
    for ours, theirs in zip(pr_curve(y_true, y_score), (precision, recall, thresholds)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    assert average_precision_score(y_true, y_score) == pytest.approx(area, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("decimals", [1, 12])
def test_metrics_equal_scikit_learn_on_random_scores(decimals):
    rng = np.random.default_rng(0)
    y_true = rng.integers(0, 2, 500)
    y_score = np.clip(0.3 * y_true + rng.random(500) * 0.7, 0, 1).round(decimals)
    assert_equal_to_sklearn(y_true, y_score, np.linspace(0, 1, 21).round(2))


@settings(max_examples=25)
@given(pairs=pairs)
def test_metrics_equal_scikit_learn_on_any_scores(pairs):
    y_true, y_score = zip(*pairs)
    assert_equal_to_sklearn(y_true, y_score, [0.25, 0.9])


def test_hand_worked_counts_and_metrics():
    y_true, y_score = [1, 1, 1, 0, 0], [0.9, 0.6, 0.1, 0.6, 0.2]
    counts = confusion_at_thresholds(y_true, y_score, [0.6, 0.61])
    # At 0.6: lesions 0.9, 0.6 found, 0.1 missed; healthy 0.6 a false alarm, 0.2 right.
    # At 0.61: 0.9 found alone, both healthy right.
    assert {k: v.tolist() for k, v in counts.items()} == {
        "tp": [2, 1],
        "fp": [1, 0],
        "tn": [1, 2],
        "fn": [1, 2],
    }
    metrics = {k: v.tolist() for k, v in diagnosis_metrics(**counts).items()}
    assert metrics["accuracy"] == [3 / 5, 3 / 5]
    assert metrics["recall"] == [2 / 3, 1 / 3]
    assert metrics["precision"] == [2 / 3, 1]
    assert metrics["specificity"] == [1 / 2, 1]
    assert metrics["npv"] == [1 / 2, 2 / 4]
    assert metrics["f1"] == [4 / (4 + 1 + 1), 2 / (2 + 0 + 2)]
    assert metrics["f2"] == [10 / (10 + 1 + 4), 5 / (5 + 0 + 8)]
    assert metrics["balanced_accuracy"] == [(2 / 3 + 1 / 2) / 2, (1 / 3 + 1) / 2]
    # (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2); (1 * 2 - 0 * 2) / sqrt(1 * 3 * 2 * 4).
    assert metrics["mcc"] == pytest.approx([1 / 6, 2 / math.sqrt(24)])
    # One missed bleed costs 10 false alarms: (10 * 1 + 1) / 5 and (10 * 2 + 0) / 5.
    assert metrics["expected_cost"] == [11 / 5, 4]
    assert diagnosis_metrics(**counts, cost_ratio=1)["expected_cost"].tolist() == [2 / 5, 2 / 5]
    # Pairs won: 0.9 beats both (2), 0.6 ties one and beats one (1.5), 0.1 none: 3.5 of 6.
    assert roc_auc_score(y_true, y_score) == pytest.approx(3.5 / 6, abs=1e-15)


def test_thresholds_may_come_in_any_order():
    y_true, y_score = [1, 0, 1, 0], [0.9, 0.4, 0.3, 0.1]
    up = confusion_at_thresholds(y_true, y_score, [0.2, 0.5])
    down = confusion_at_thresholds(y_true, y_score, [0.5, 0.2])
    assert all((up[k] == down[k][::-1]).all() for k in up)


@given(pairs=pairs)
def test_recall_falls_and_specificity_rises_with_the_threshold(pairs):
    counts = confusion_at_thresholds(*zip(*pairs), np.linspace(0, 1, 11))
    assert (np.diff(counts["tp"]) <= 0).all() and (np.diff(counts["tn"]) >= 0).all()


# ---- diagnose ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "theta", "positive"),
    [
        ([0.2, 0.85], 0.85, True),  # equal is positive
        ([0.2, 0.84], 0.85, False),
        ([0.2], 0.0, True),
        ([], 0.85, False),
        ([], 0.0, False),  # not a single box
    ],
)
def test_image_is_positive_if_any_box_reaches_theta(scores, theta, positive):
    assert diagnose(scores, theta) is positive


@given(scores=st.lists(coarse_scores), theta=coarse_scores)
def test_diagnosis_is_that_of_the_highest_score(scores, theta):
    assert diagnose(scores, theta) == (max(scores, default=-1) >= theta)


# ---- undefined ---------------------------------------------------------------------------------


def test_undefined_is_nan_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        healthy = summarize([0, 0], [0.1, 0.2], 0.5)
        sick = summarize([1, 1], [0.9, 0.8], 0.5)
        nobody = summarize([], [], 0.5)
    assert {k for k, v in healthy.items() if math.isnan(v)} == {
        "auc", "average_precision", "recall_at_specificity_0.90", "recall", "precision", "f1", "f2",
        "balanced_accuracy", "mcc",
    }  # fmt: skip
    assert {k for k, v in sick.items() if math.isnan(v)} == {
        "auc", "recall_at_specificity_0.90", "specificity", "npv", "balanced_accuracy", "mcc",
    }  # fmt: skip
    assert {k for k, v in nobody.items() if not math.isnan(v)} == {
        "n", "n_positive", "threshold", "tp", "fp", "tn", "fn",
    }  # fmt: skip


# ---- recall_at_specificity ---------------------------------------------------------------------


@given(pairs=pairs, specificity=st.sampled_from([0.0, 0.5, 0.8, 0.9, 1.0]))
def test_recall_at_specificity_equals_trying_every_threshold(pairs, specificity):
    y_true, y_score = (np.array(x) for x in zip(*pairs))
    best = math.nan
    if 0 < y_true.sum() < len(y_true):
        for threshold in [*y_score, 2.0]:
            called = y_score >= threshold
            if (~called[y_true == 0]).mean() >= specificity:
                best = np.nanmax([best, called[y_true == 1].mean()])
    ours = recall_at_specificity(y_true, y_score, specificity)
    assert ours == pytest.approx(best, abs=1e-12, nan_ok=True)


def test_hand_worked_recall_at_specificity():
    # Healthy 0.1 0.2 0.3 0.8; lesions 0.9 0.7 0.25. Specificity 3/4 allows one false alarm, so
    # thresholds above 0.3: recall 2/3. All four right needs a threshold above 0.8: 1/3.
    y_true = [0, 0, 0, 0, 1, 1, 1]
    y_score = [0.1, 0.2, 0.3, 0.8, 0.9, 0.7, 0.25]
    assert recall_at_specificity(y_true, y_score, 0.75) == pytest.approx(2 / 3)
    assert recall_at_specificity(y_true, y_score, 1.0) == pytest.approx(1 / 3)
    assert recall_at_specificity(y_true, y_score, 0.0) == 1


# ---- groups, tables ----------------------------------------------------------------------------


def test_patient_is_positive_if_any_image_is_and_scores_as_the_highest():
    names, labels, scores = group_scores(
        ["b", "a", "b", "a", "c"], [0, 0, 1, 0, 1], [0.9, 0.3, 0.2, 0.4, 0.0]
    )
    assert names == ["a", "b", "c"]
    assert labels.tolist() == [0, 1, 1] and scores.tolist() == [0.4, 0.9, 0.0]


@given(pairs=pairs)
def test_groups_of_one_change_nothing(pairs):
    y_true, y_score = zip(*pairs)
    groups = [f"{i:03}" for i in range(len(pairs))]
    names, labels, scores = group_scores(groups, y_true, y_score)
    assert (names, labels.tolist(), scores.tolist()) == (groups, list(y_true), list(y_score))


def test_no_image_is_no_patient():
    names, labels, scores = group_scores([], [], [])
    assert (names, len(labels), len(scores)) == ([], 0, 0)


def test_table_has_a_row_per_threshold():
    rows = diagnosis_table("image", [1, 0], [0.7, 0.4], [0.5, 0.8])
    common = {"level": "image", "fp": 0, "tn": 1, "specificity": 1.0}
    assert rows[0] == common | {
        "threshold": 0.5, "tp": 1, "fn": 0, "accuracy": 1.0, "recall": 1.0, "precision": 1.0,
        "npv": 1.0, "f1": 1.0, "f2": 1.0, "balanced_accuracy": 1.0, "mcc": 1.0,
        "expected_cost": 0.0,
    }  # fmt: skip
    # Nobody is called positive: precision and MCC are 0 / 0.
    assert math.isnan(rows[1].pop("precision")) and math.isnan(rows[1].pop("mcc"))
    assert rows[1] == common | {
        "threshold": 0.8, "tp": 0, "fn": 1, "accuracy": 0.5, "recall": 0.0, "npv": 0.5, "f1": 0.0,
        "f2": 0.0, "balanced_accuracy": 0.5, "expected_cost": 5.0,
    }  # fmt: skip
    assert all(type(rows[0][k]) is int for k in ("tp", "fp", "tn", "fn"))


def test_summary_is_the_row_at_the_operating_threshold():
    summary = summarize([1, 0, 1], [0.7, 0.7, 0.2], 0.7)
    assert (summary["n"], summary["n_positive"], summary["threshold"]) == (3, 2, 0.7)
    assert [summary[k] for k in ("tp", "fp", "tn", "fn")] == [1, 1, 0, 1]
    assert summary["auc"] == 0.25  # 0.7 ties 0.7, 0.2 loses: half of two pairs
    assert summary["recall_at_specificity_0.90"] == 0


# ---- patient rules -----------------------------------------------------------------------------

RULES = {
    "any": max,
    "at_least_1": max,
    "at_least_2": lambda s: sorted(s)[-2] if len(s) > 1 else -math.inf,
    "at_least_3": lambda s: sorted(s)[-3] if len(s) > 2 else -math.inf,
    "top_1_mean": max,
    "top_3_mean": lambda s: np.mean(sorted(s)[-3:]),
    "noisy_or": lambda s: 1 - math.prod(1 - x for x in s),
}


@pytest.mark.parametrize("rule", RULES)
@given(pairs=pairs, data=st.data())
def test_patient_rules_equal_their_definition_patient_by_patient(rule, pairs, data):
    y_true, y_score = zip(*pairs)
    groups = data.draw(
        st.lists(st.sampled_from("abcd"), min_size=len(pairs), max_size=len(pairs)), label="groups"
    )
    names, labels, scores = group_scores(groups, y_true, y_score, rule)
    assert names == sorted(set(groups))
    for name, label, score in zip(names, labels, scores):
        own = [(y, s) for g, y, s in zip(groups, y_true, y_score) if g == name]
        assert label == max(y for y, _ in own)
        assert score == pytest.approx(RULES[rule]([s for _, s in own]), abs=1e-12)


@given(pairs=pairs, theta=coarse_scores)
def test_at_least_m_counts_positive_slices(pairs, theta):
    _, y_score = zip(*pairs)
    index = np.arange(len(pairs)) % 3
    scores = patient_scores(index, y_score, min(3, len(pairs)), "at_least_2")
    for patient, score in enumerate(scores):
        positive_slices = (np.array(y_score)[index == patient] >= theta).sum()
        assert (score >= theta) == (positive_slices >= 2)


def test_noisy_or_of_a_certain_slice_is_certain():
    assert patient_scores([0, 0, 1], [1.0, 0.2, 0.0], 2, "noisy_or").tolist() == [1, 0]


def test_groups_may_be_numbers():
    names, labels, scores = group_scores(np.array([10, 9, 10]), [0, 0, 1], [0.1, 0.2, 0.3])
    assert (names, labels.tolist(), scores.tolist()) == (["9", "10"], [0, 1], [0.2, 0.3])


@pytest.mark.parametrize("rule", ["some", "at_least_0", "top_mean", "at_least_-1", ""])
def test_an_unknown_rule_is_an_error_that_lists_the_known(rule):
    with pytest.raises(ValueError, match=f"'{rule}', expected any, at_least_<m>"):
        group_scores(["a"], [1], [0.5], rule)


def test_noisy_or_of_what_is_no_probability_is_an_error():
    with pytest.raises(ValueError, match=r"noisy_or needs scores from 0 to 1, got 0\.5 to 3"):
        group_scores(["a", "a"], [1, 0], [0.5, 3.0], "noisy_or")


# ---- weights -----------------------------------------------------------------------------------


@given(pairs=pairs, data=st.data())
def test_weights_are_repetitions(pairs, data):
    y_true, y_score = (np.array(x) for x in zip(*pairs))
    draws = np.array(
        [
            data.draw(st.lists(st.integers(0, 3), min_size=len(pairs), max_size=len(pairs)))
            for _ in range(2)
        ]
    )
    thresholds = [0.25, 0.9]
    counts = confusion_at_thresholds(y_true, y_score, thresholds, draws)
    aucs = roc_auc_score(y_true, y_score, draws)
    recalls = recall_at_specificity(y_true, y_score, 0.8, draws)
    areas = average_precision_score(y_true, y_score, draws)
    for i, weights in enumerate(draws):
        y, s = np.repeat(y_true, weights), np.repeat(y_score, weights)
        expected = confusion_at_thresholds(y, s, thresholds)
        assert {k: v[i].tolist() for k, v in counts.items()} == {
            k: v.tolist() for k, v in expected.items()
        }
        assert aucs[i] == pytest.approx(roc_auc_score(y, s), abs=1e-12, nan_ok=True)
        expected = average_precision_score(y, s)
        assert areas[i] == pytest.approx(expected, abs=1e-12, nan_ok=True)
        expected = recall_at_specificity(y, s, 0.8)
        assert recalls[i] == pytest.approx(expected, abs=1e-12, nan_ok=True)


# ---- hemorrhage types --------------------------------------------------------------------------


def test_recall_of_each_type_counts_images_that_have_it():
    types = [{"EDH"}, {"EDH", "SAH"}, set(), {"SAH"}, {"SAH"}]
    recalls = type_recall(types, [0.9, 0.4, 0.8, 0.5, 0.1], [0.3, 0.5])
    assert list(recalls) == ["EDH", "SAH"]
    # EDH scores 0.9, 0.4; SAH 0.4, 0.5, 0.1. The healthy 0.8 counts for neither.
    assert recalls["EDH"]["n"] == 2 and recalls["EDH"]["tp"].tolist() == [2, 1]
    assert recalls["SAH"]["n"] == 3 and recalls["SAH"]["recall"].tolist() == [2 / 3, 1 / 3]
    assert type_recall([set(), set()], [0.1, 0.2], [0.5]) == {}


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y_true", "y_score", "message"),
    [
        ([1, 0], [0.5, math.nan], "y_score is NaN at index 1"),
        ([1, 2], [0.5, 0.5], "neither 0 nor 1"),
        ([1, -1], [0.5, 0.5], "neither 0 nor 1"),
        ([1, math.nan], [0.5, 0.5], "neither 0 nor 1"),
        ([1, 0], [0.5], r"shape \(2,\) and y_score of \(1,\)"),
        ([[1, 0]], [[0.5, 0.5]], r"expected one \(M,\)"),
    ],
)
@pytest.mark.parametrize(
    "function",
    [
        roc_auc_score,
        lambda y, s: confusion_at_thresholds(y, s, [0.5]),
        lambda y, s: recall_at_specificity(y, s, 0.9),
        lambda y, s: group_scores(["a"] * len(y), y, s),
        lambda y, s: summarize(y, s, 0.5),
        roc_curve,
        pr_curve,
    ],
    ids=["auc", "confusion", "recall_at_specificity", "groups", "summary", "roc", "pr"],
)
def test_bad_labels_and_scores_are_errors(function, y_true, y_score, message):
    with pytest.raises(ValueError, match=message):
        function(y_true, y_score)


def test_a_threshold_that_is_nan_is_an_error():
    with pytest.raises(ValueError, match="expected numbers, got NaN"):
        confusion_at_thresholds([1, 0], [0.5, 0.5], [0.5, math.nan])
