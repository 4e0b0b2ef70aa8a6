"""The operating point belongs to the weights it was chosen with."""

from dataclasses import replace

import numpy as np
import pytest

from ich_det2.engine.operating_point import (
    check_operating_point,
    choose_operating_point,
    find_operating_point,
)
from ich_det2.evaluation.predictions import Predictions, read_predictions, write_predictions


@pytest.fixture
def run(tiny_cfg, tmp_path):
    """A config, and weights with stored predictions of the validation."""

    def make(*opts):
        cfg = tiny_cfg("OUTPUT_DIR", str(tmp_path), *opts)
        folder = tmp_path / "inference" / "ich_val"
        folder.mkdir(parents=True, exist_ok=True)
        ids, scores = list("abcd"), np.array([0.9, 0.4, 0.3, 0.1])
        write_predictions(Predictions(ids, ids, ids, np.array([1, 1, 0, 0]), scores), folder)
        weights = tmp_path / "model_best.pth"
        weights.write_bytes(b"weights")
        return cfg, weights

    return make


RULE = "TEST.DIAGNOSIS.OPERATING_POINT.RULE"


def test_what_was_chosen_on_validation_is_found_with_the_weights(run):
    cfg, weights = run(RULE, "youden")
    point = choose_operating_point(cfg, weights)
    assert point.threshold == pytest.approx(0.35)  # between 0.4 and 0.3
    assert cfg.TEST.DIAGNOSIS.OPERATING_THRESHOLD == point.threshold
    later, _ = run(RULE, "youden")
    assert find_operating_point(later, weights) == point
    assert later.TEST.DIAGNOSIS.OPERATING_THRESHOLD == point.threshold


def test_it_is_chosen_on_smoothed_scores_and_the_raw_ones_stay(run, tmp_path):
    cfg, weights = run(RULE, "youden")
    folder = tmp_path / "inference" / "ich_val"
    found = read_predictions(folder)
    write_predictions(replace(found, raw_scores=found.scores, scores=found.scores / 2), folder)
    assert choose_operating_point(cfg, weights).threshold == pytest.approx(0.175)
    again = read_predictions(folder)
    assert again.raw_scores.tolist() == [0.9, 0.4, 0.3, 0.1] == (2 * again.scores).tolist()


def test_other_weights_do_not_get_it(run, caplog):
    cfg, weights = run(RULE, "youden")
    choose_operating_point(cfg, weights)
    weights.write_bytes(b"trained again")
    later, _ = run(RULE, "youden")
    weights.write_bytes(b"trained again")
    assert find_operating_point(later, weights) is None
    assert later.TEST.DIAGNOSIS.OPERATING_THRESHOLD == 0.5
    assert "belongs to other weights" in caplog.text


def test_a_fixed_threshold_follows_the_config(run):
    cfg, weights = run()
    assert choose_operating_point(cfg, weights).threshold == 0.5
    later, _ = run("TEST.DIAGNOSIS.OPERATING_THRESHOLD", "0.85")
    assert find_operating_point(later, weights).rule == "fixed"
    assert later.TEST.DIAGNOSIS.OPERATING_THRESHOLD == 0.85


def test_another_patient_rule_than_it_was_chosen_with_is_said(run, caplog):
    cfg, weights = run(RULE, "youden")
    choose_operating_point(cfg, weights)
    later, _ = run(RULE, "youden", "TEST.DIAGNOSIS.PATIENT_RULES", "['noisy_or']")
    find_operating_point(later, weights)
    assert "chosen with the patient rule any, PATIENT_RULES begins with noisy_or" in caplog.text


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ((RULE, "best"), "OPERATING_POINT: the rule is 'best'"),
        (("TEST.DIAGNOSIS.COST_RATIO", "0.0"), "COST_RATIO is 0.0, expected above 0"),
        (("TEST.DIAGNOSIS.PATIENT_RULES", "['most']"), "the patient rule is 'most'"),
        (("TEST.DIAGNOSIS.PATIENT_RULES", "[]"), "expected at least one"),
        (("TEST.DIAGNOSIS.SMOOTHING", "[0.5, 0.2]"), r"SMOOTHING: the weights are \[0.5, 0.2\]"),
        (("TEST.DIAGNOSIS.SMOOTHING_IOU", "1.5"), "SMOOTHING_IOU is 1.5"),
    ],
)
def test_a_wrong_key_is_named_before_training(run, opts, message):
    cfg, _ = run(*opts)
    with pytest.raises(ValueError, match=message):
        check_operating_point(cfg)
