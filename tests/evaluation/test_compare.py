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

# Aneurysmal subarachnoid hemorrhage, 113 patients: WFNS grade, S100B and NDKA in 0.01 ug/l at
# admission (Turck et al., Intensive Care Med. 36 (2010) 107; the values are those of "aSAH" in the
# R package pROC 1.18.0).
GOOD_OUTCOME = """
    1,13,301 1,14,854 1,10,809 1,4,1042 5,47,600 1,18,1554 2,10,601 2,10,1786 1,4,1341 2,8,2075
    2,4,1611 1,9,4994 1,11,947 1,7,629 2,17,1253 1,7,654 2,11,630 1,13,8030 1,19,1280 3,5,980
    4,16,981 1,14,1821 4,34,503 1,9,802 5,50,659 5,46,963 1,16,1312 1,7,796 2,43,1434 4,45,4143
    1,11,763 1,8,706 2,9,1259 2,8,944 1,6,766 2,13,1298 1,10,2719 2,14,2227 2,15,995 1,6,1173
    1,5,5883 1,9,639 1,4,1721 2,9,970 1,8,1051 2,16,1060 1,9,1457 1,8,461 3,33,1730 2,11,1271
    4,28,944 2,7,1107 1,10,1946 4,32,1083 1,7,1197 1,5,775 5,24,983 4,38,1055 2,10,2849 2,15,853
    1,8,1257 1,14,1290 1,10,4683 3,7,1168 1,4,1267 2,19,901 2,15,2458 4,47,1033 4,17,1387
    1,15,2243 1,50,679 1,48,1345
"""
POOR_OUTCOME = """
    3,13,1740 2,10,1275 4,16,1320 5,12,1596 5,44,518 5,71,890 5,49,1160 2,7,3237 5,33,5482
    2,9,3241 1,7,4034 2,41,985 5,35,1404 4,48,2193 4,96,742 2,25,838 5,86,1356 5,52,387
    5,207,41919 2,7,2122 5,77,1040 2,30,1109 5,3,1222 2,9,1367 4,23,2263 5,70,1290 4,27,2157
    4,71,823 1,8,7257 4,26,1554 4,13,519 2,10,963 2,11,2148 5,22,537 5,56,957 2,14,3406
    2,58,1172 5,32,1426 5,82,4761 5,74,1167 5,44,1589
"""

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


@pytest.mark.parametrize(
    ("first", "other", "expected"),
    [
        ("wfns", "s100b", (2.208983591441, 0.027175782229, 0.010406176956, 0.174214419249)),
        ("wfns", "ndka", (2.797775918689, 0.005145579707, 0.063401170934, 0.360040563483)),
        ("ndka", "s100b", (-1.390770025736, 0.164295175223, -0.287691744634, 0.048870606423)),
    ],
)
def test_delong_gives_the_published_contrasts(first, other, expected):
    # Z, p and 95 % interval that pROC's own tests expect: github.com/xrobin/pROC, commit 0bc764d,
    # tests/testthat/test-roc.test.R, "roc.test statistic and p are as expected with defaults".
    good, poor = (
        np.array([row.split(",") for row in text.split()], dtype=float)
        for text in (GOOD_OUTCOME, POOR_OUTCOME)
    )
    y_true = np.repeat([0, 1], [len(good), len(poor)])
    markers = dict(zip(("wfns", "s100b", "ndka"), np.concatenate([good, poor]).T))
    result = delong_test(y_true, markers[first], markers[other])
    ours = [result[key] for key in ("z", "p_value", "low", "high")]
    assert ours == pytest.approx(expected, rel=0, abs=1e-11)


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
