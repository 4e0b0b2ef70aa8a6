"""The threshold is chosen on validation, written down and read back."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ich_det2.evaluation.analysis import Settings
from ich_det2.evaluation.diagnosis import confusion_at_thresholds, diagnosis_metrics
from ich_det2.evaluation.operating_point import RULES, OperatingPoint, Rule, choose_threshold
from ich_det2.evaluation.predictions import Predictions

# Bleeds 0.9 0.7 0.4 0.2, healthy 0.6 0.3 0.1 0.05.
Y_TRUE = [1, 1, 1, 1, 0, 0, 0, 0]
Y_SCORE = [0.9, 0.7, 0.4, 0.2, 0.6, 0.3, 0.1, 0.05]
AIMS = {
    "youden": lambda m: m["recall"] + m["specificity"],
    "f2": lambda m: m["f2"],
    "cost": lambda m: -m["expected_cost"],
}
cases = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9])),
    min_size=2,
    max_size=30,
).filter(lambda c: len({y for y, _ in c}) == 2 and any(s > 0 for _, s in c))


def test_hand_worked_thresholds_lie_halfway_to_the_next_lower_score():
    # Recall 3/4 from 0.4 down, next lower 0.3; recall 1 from 0.2 down, next lower 0.1.
    assert choose_threshold(Y_TRUE, Y_SCORE, "recall", target_recall=0.75) == pytest.approx(0.35)
    assert choose_threshold(Y_TRUE, Y_SCORE, "recall", target_recall=0.95) == pytest.approx(0.15)
    # Recall + specificity: 1.5 at 0.7, 0.4 and 0.2 alike; the lowest of equals.
    assert choose_threshold(Y_TRUE, Y_SCORE, "youden") == pytest.approx(0.15)
    # A miss as dear as a false alarm: two errors at 0.7, 0.4 and 0.2; dearer: no miss.
    assert choose_threshold(Y_TRUE, Y_SCORE, "cost", cost_ratio=10) == pytest.approx(0.15)
    assert choose_threshold(Y_TRUE, Y_SCORE, "cost", cost_ratio=0.1) == pytest.approx(0.65)


@given(cases=cases, rule=st.sampled_from(sorted(AIMS)))
def test_no_threshold_is_better(cases, rule):
    y_true, y_score = zip(*cases)
    chosen = choose_threshold(y_true, y_score, rule)
    aims = AIMS[rule](
        diagnosis_metrics(
            **confusion_at_thresholds(y_true, y_score, [chosen, *np.linspace(0.01, 0.95, 95)])
        )
    )
    assert aims[0] >= np.nanmax(aims) - 1e-12


@given(cases=cases, target=st.sampled_from([0.5, 0.8, 1.0]))
def test_recall_is_reached_with_the_fewest_false_alarms(cases, target):
    y_true, y_score = zip(*cases)
    chosen = choose_threshold(y_true, y_score, "recall", target_recall=target)
    # From the lowest positive score on, every higher threshold.
    above = np.unique([s for s in y_score if s >= chosen])
    counts = confusion_at_thresholds(y_true, y_score, [chosen, *above[1:], 0.01])
    recall = diagnosis_metrics(**counts)["recall"]
    if recall[-1] >= target:
        assert recall[0] >= target and (recall[1:-1] < target).all()
    else:  # out of reach: bleeds without a box
        assert recall[0] == recall[-1]
    assert chosen > 0


@pytest.mark.parametrize(
    ("y_true", "y_score", "rule", "message"),
    [
        ([0, 0], [0.1, 0.2], "recall", "needs positive cases, got 0 positive of 2"),
        ([1, 1], [0.1, 0.2], "youden", "needs both classes, got 2 positive of 2"),
        ([0, 1], [0.0, 0.0], "f2", "no score is above 0"),
        ([0, 1], [0.1, 0.2], "best", "'best', expected one of recall, youden, f2, cost"),
        ([0, 1], [0.1, math.nan], "f2", "NaN at index 1"),
    ],
)
def test_what_cannot_be_chosen_is_an_error(y_true, y_score, rule, message):
    with pytest.raises(ValueError, match=message):
        choose_threshold(y_true, y_score, rule)


def predictions(labels=Y_TRUE, scores=Y_SCORE):
    n = len(labels)
    ids = [f"i{i}" for i in range(n)]
    return Predictions(ids, [f"p{i // 2}" for i in range(n)], ids, np.array(labels),
                       np.array(scores))  # fmt: skip


def choose(rule, source=None):
    settings = Settings([0.5], 0.5, patient_rules=("any",))
    return OperatingPoint.choose(source or predictions(), settings, rule, dataset="ich_val")


def test_the_record_says_what_was_chosen_and_what_it_gave():
    point = choose(Rule("recall", target_recall=0.75))
    assert (point.rule, point.level, point.dataset) == ("recall", "image", "ich_val")
    assert point.threshold == pytest.approx(0.35)
    assert point.validation["image"]["recall"] == 0.75
    assert point.validation["image"]["threshold"] == point.threshold
    assert set(point.alternatives) == set(RULES) and 0.05 <= point.temperature <= 20


def test_a_rule_may_look_at_patients():
    # Patients: 0.9 and 0.4 bleed, 0.6 and 0.1 do not.
    point = choose(Rule("recall", "patient", 1.0))
    assert point.threshold == pytest.approx((0.4 + 0.1) / 2)


def test_fixed_and_impossible_rules_keep_the_given_threshold(caplog):
    assert (choose(Rule()).rule, choose(Rule()).threshold) == ("fixed", 0.5)
    healthy = predictions([0] * 8)
    point = choose(Rule("youden"), healthy)
    assert (point.rule, point.threshold, point.temperature) == ("fixed", 0.5, None)
    assert "needs both classes" in caplog.text


def test_it_reads_back_the_same_and_undefined_is_null(tmp_path):
    point = choose(Rule("cost"))
    point.save(tmp_path / "p.json")
    assert OperatingPoint.load(tmp_path / "p.json") == point
    choose(Rule(), predictions([0] * 8)).save(tmp_path / "q.json")
    assert json.loads((tmp_path / "q.json").read_text())["validation"]["image"]["auc"] is None


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"threshold": 0.5}'])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "operating_point.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"operating_point\.json: is no operating point"):
        OperatingPoint.load(path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "auc"}, "rule is 'auc', expected fixed, recall"),
        ({"level": "scan"}, "level is 'scan', expected image or patient"),
        ({"target_recall": 0}, "target recall is 0"),
    ],
)
def test_a_wrong_rule_is_an_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Rule(**kwargs)
