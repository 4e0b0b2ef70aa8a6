"""Two models on the same patients."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ich_det2.evaluation.compare import COMPARED, delong_test, mcnemar_test, paired_bootstrap
from ich_det2.evaluation.diagnosis import roc_auc_score, summarize

# DeLong et al. 1988, as in the SAS/STAT User's Guide, "Comparing Receiver Operating Characteristic
# Curves": albumin, total protein, K-G score (taken as 10 - score), benefit from surgery.
OVARIAN = np.array(
    """
    3.0 5.8 10 0  3.2 6.3  5 1  3.9 6.8  3 1  2.8 4.8  6 0  3.2 5.8  3 1  0.9 4.0  5 0
    2.5 5.7  8 0  1.6 5.6  5 1  3.8 5.7  5 1  3.7 6.7  6 1  3.2 5.4  4 1  3.8 6.6  6 1
    4.1 6.6  5 1  3.6 5.7  5 1  4.3 7.0  4 1  3.6 6.7  4 0  2.3 4.4  6 1  4.2 7.6  4 0
    4.0 6.6  6 0  3.5 5.8  6 1  3.8 6.8  7 1  3.0 4.7  8 0  4.5 7.4  5 1  3.7 7.4  5 1
    3.1 6.6  6 1  4.1 8.2  6 1  4.3 7.0  5 1  4.3 6.5  4 1  3.2 5.1  5 1  2.6 4.7  6 1
    3.3 6.8  6 0  1.7 4.0  7 0  3.7 6.1  5 1  3.3 6.3  7 1  4.2 7.7  6 1  3.5 6.2  5 1
    2.9 5.7  9 0  2.1 4.8  7 1  2.8 6.2  8 0  4.0 7.0  7 1  3.3 5.7  6 1  3.7 6.9  5 1
    3.6 6.6  5 1
    """.split(),
    dtype=float,
).reshape(-1, 4)

CASES = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), max_size=30)


# ---- McNemar -----------------------------------------------------------------------------------


@given(cases=CASES)
def test_mcnemar_of_independent_cases_is_the_exact_binomial_test(cases):
    first, other = ([c[i] for c in cases] for i in (0, 1))
    result = mcnemar_test(first, other)
    b = sum(f and not o for f, o in zip(first, other))
    c = sum(o and not f for f, o in zip(first, other))
    assert (result["only_first"], result["only_other"]) == (b, c)
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert result["p_value"] == pytest.approx(expected, abs=1e-12)


@given(cases=CASES)
def test_grouped_mcnemar_equals_trying_every_swap(cases):
    first, other, groups = ([c[i] for c in cases] for i in range(3))
    d = [sum(int(f) - int(o) for f, o, g in cases if g == name) for name in sorted(set(groups))]
    sums = [abs(sum(x * s for x, s in zip(d, signs)))
            for signs in itertools.product((1, -1), repeat=len(d))]  # fmt: skip
    expected = np.mean([s >= abs(sum(d)) for s in sums])
    assert mcnemar_test(first, other, groups)["p_value"] == pytest.approx(expected, abs=1e-12)


def test_slices_of_one_patient_are_no_independent_evidence():
    # The first model alone is right on ten slices: of ten patients, or of one.
    right, wrong = [True] * 10, [False] * 10
    assert mcnemar_test(right, wrong, range(10))["p_value"] == pytest.approx(2 / 2**10)
    assert mcnemar_test(right, wrong, [0] * 10)["p_value"] == 1


# ---- DeLong ------------------------------------------------------------------------------------


def test_delong_gives_the_published_contrasts():
    # SAS/STAT User's Guide, "Comparing Receiver Operating Characteristic Curves", against the K-G
    # score: albumin 0.0108 (-0.1761, 0.1976), p 0.9102; protein -0.0780 (-0.2830, 0.1271), 0.4561.
    y_true, kg = OVARIAN[:, 3], 10 - OVARIAN[:, 2]
    for column, expected in (
        (0, (0.0108, -0.1761, 0.1976, 0.9102)),
        (1, (-0.0780, -0.2830, 0.1271, 0.4561)),
    ):
        result = delong_test(y_true, OVARIAN[:, column], kg)
        ours = [result[key] for key in ("difference", "low", "high", "p_value")]
        assert ours == pytest.approx(expected, abs=5.1e-5)


def test_delong_p_values_are_uniform_where_models_are_equal():
    rng = np.random.default_rng(0)
    p = []
    for _ in range(400):
        y_true = np.repeat([0, 1], [60, 40])
        common = y_true + rng.normal(size=100)
        scores = common + rng.normal(size=(2, 100))
        p.append(delong_test(y_true, *scores)["p_value"])
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.08


def test_delong_finds_a_better_model_and_says_which():
    rng = np.random.default_rng(0)
    y_true = np.repeat([0, 1], 100)
    noise = rng.normal(size=200)
    good, bad = 3 * y_true + noise, 1 * y_true + noise
    result = delong_test(y_true, good, bad)
    expected = roc_auc_score(y_true, good) - roc_auc_score(y_true, bad)
    assert result["difference"] == pytest.approx(expected) and expected > 0
    assert result["low"] > 0 and result["p_value"] < 1e-3 and result["z"] > 0
    turned = delong_test(y_true, bad, good)
    assert turned["p_value"] == pytest.approx(result["p_value"])
    assert turned["z"] == pytest.approx(-result["z"])


def test_models_that_rank_alike_do_not_differ():
    y_true, score = np.array([0, 1, 0, 1, 1]), np.array([0.1, 0.5, 0.6, 0.7, 0.2])
    result = delong_test(y_true, score, score**3)
    assert result["difference"] == 0 and result["p_value"] == 1


def test_one_class_is_nan():
    assert math.isnan(delong_test([1, 1], [0.1, 0.2], [0.3, 0.1])["p_value"])


# ---- paired bootstrap --------------------------------------------------------------------------


def test_paired_differences_are_those_of_the_metrics_and_pairing_narrows_them():
    rng = np.random.default_rng(0)
    y_true = np.repeat([0, 1], 60)
    groups = np.arange(120) // 3
    base = np.clip(0.3 * y_true + 0.7 * rng.random(120), 0, 1)
    near = np.clip(base + rng.normal(size=120) * 0.02, 0, 1)
    result = paired_bootstrap(
        y_true, (base, 0.5), (near, 0.6), groups, cost_ratio=10, n_resamples=400
    )
    assert set(result) == set(COMPARED)
    first, other = summarize(y_true, base, 0.5), summarize(y_true, near, 0.6)
    for name, value in result.items():
        assert value["difference"] == pytest.approx(first[name] - other[name], abs=1e-12)
        assert value["low"] <= value["high"]
    assert result["auc"]["high"] - result["auc"]["low"] < 0.05


def test_a_model_against_itself_differs_by_exactly_nothing():
    rng = np.random.default_rng(0)
    y_true, score = rng.integers(0, 2, 40), rng.random(40)
    result = paired_bootstrap(
        y_true, (score, 0.5), (score, 0.5), np.arange(40) // 2, cost_ratio=10, n_resamples=50
    )
    for value in result.values():
        assert value == {"difference": 0, "low": 0, "high": 0}
