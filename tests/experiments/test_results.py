"""Tables, selection and curves of hand-made results."""

import json
import math

import numpy as np
import pytest

from ich_det2.engine.run_folder import RunFolder
from ich_det2.evaluation.predictions import Predictions
from ich_det2.evaluation.yardstick import Yardstick
from ich_det2.experiments.results import (
    differences_to,
    not_above_chance,
    patterns,
    select,
    spread,
    spread_table,
    threshold_curves,
)


def make_predictions(scores, labels=(1, 1, 0, 0)):
    ids = [f"i{n}" for n in range(len(scores))]
    return Predictions(ids, ids, ids, np.array(labels), np.array(scores, dtype=float))


ROWS = [
    {"alpha": 1, "seed": 0, "val/lesion/voc_ap50": 0.2, "test/lesion/voc_ap50": 0.9},
    {"alpha": 1, "seed": 1, "val/lesion/voc_ap50": 0.4, "test/lesion/voc_ap50": 0.9},
    {"alpha": 5, "seed": 0, "val/lesion/voc_ap50": 0.5, "test/lesion/voc_ap50": 0.1},
    {"alpha": 5, "seed": 1, "val/lesion/voc_ap50": 0.3, "test/lesion/voc_ap50": 0.1},
    {"alpha": 20, "seed": 0, "val/lesion/voc_ap50": 0.9, "test/lesion/voc_ap50": 0.5},
]


def test_spread_by_hand():
    # Mean 4; squares 4 + 0 + 4 over n - 1 = 2: variance 4.
    assert spread([2.0, math.nan, 4.0, 6.0]) == {"mean": 4.0, "std": 2.0, "n": 3}
    alone, nothing = spread([0.5]), spread([math.nan])
    assert (alone["mean"], alone["n"]) == (0.5, 1) and math.isnan(alone["std"])
    assert nothing["n"] == 0 and math.isnan(nothing["mean"])


def test_the_table_averages_over_seeds_alone():
    table = spread_table(ROWS, ["alpha", "seed"], {"mAP": "val/lesion/voc_ap50", "AUC": "none"})
    assert [row["alpha"] for row in table] == [1, 5, 20]
    assert [row["mAP n"] for row in table] == [2, 2, 1]
    assert table[0]["mAP mean"] == pytest.approx(0.3)
    # (0.1^2 + 0.1^2) / 1 = 0.02
    assert table[0]["mAP std"] == pytest.approx(math.sqrt(0.02))
    assert table[0]["AUC n"] == 0


def test_alpha_is_picked_on_validation():
    # 5: mean 0.4 of two seeds; 1: 0.3, though better on test; 20 has one seed only.
    picked = select(ROWS, "alpha", "val/lesion/voc_ap50")
    assert (picked["alpha"], picked["n"], picked["candidates"]) == (5, 2, 2)
    assert picked["mean"] == pytest.approx(0.4)
    with pytest.raises(ValueError, match="expected a metric of the validation"):
        select(ROWS, "alpha", "test/lesion/voc_ap50")
    with pytest.raises(ValueError, match="no training has a 'val/none'"):
        select(ROWS, "alpha", "val/none")


def test_of_equal_values_the_smallest_is_picked():
    rows = [{"alpha": alpha, "seed": 0, "val/x": 0.0} for alpha in (50, 1, 5)]
    assert select(rows, "alpha", "val/x")["alpha"] == 1


def test_results_are_named_by_split_and_level(tmp_path):
    for name in ("ich_val", "ich_test"):
        folder = tmp_path / "inference" / name
        folder.mkdir(parents=True)
        content = {"operating_threshold": 0.5, "image": {"auc": None, "recall": 0.25}}
        (folder / "diagnosis.json").write_text(json.dumps(content))
    found = RunFolder(tmp_path).read_results()
    assert found["val/operating_threshold"] == 0.5 and found["test/image/recall"] == 0.25
    assert math.isnan(found["test/image/auc"]) and len(found) == 6
    masks = {"dice": 0.75, "slice_dice": 0.5, "volume_error": None, "threshold": 0.5}
    (tmp_path / "inference/ich_test/masks.json").write_text(json.dumps(masks))
    more = RunFolder(tmp_path).read_results()
    assert more["test/masks/dice"] == 0.75 and math.isnan(more["test/masks/volume_error"])
    assert more.keys() - found.keys() == {
        f"test/masks/{key}" for key in ("dice", "slice_dice", "volume_error")
    }


def test_curves_over_thresholds_by_hand():
    runs = {"a": [make_predictions([0.9, 0.3, 0.3, 0.1]), make_predictions([0.9, 0.9, 0.3, 0.1])]}
    low, high = threshold_curves(runs, [0.2, 0.5], ["recall", "precision"])
    # At 0.2 both call 2 of 2 and one healthy slice; at 0.5 one finds 1 of 2, the other both.
    assert (low["recall mean"], low["precision mean"]) == (1.0, pytest.approx(2 / 3))
    assert (high["recall mean"], high["recall std"]) == (0.75, pytest.approx(math.sqrt(0.125)))
    assert (high["precision mean"], high["precision n"]) == (1.0, 2)


def test_precision_without_positive_calls_is_left_out():
    runs = {"a": [make_predictions([0.9, 0.0, 0, 0]), make_predictions([0.1, 0.0, 0, 0])]}
    (row,) = threshold_curves(runs, [0.5], ["recall", "precision"])
    assert (row["precision mean"], row["precision n"], row["recall n"]) == (1.0, 1, 2)


def test_patterns_of_found_and_missed():
    runs = {
        "plain": make_predictions([0.9, 0.1, 0.1, 0.1, 0.9], (1, 1, 1, 1, 0)),
        "cost": make_predictions([0.9, 0.9, 0.1, 0.6, 0.9], (1, 1, 1, 1, 0)),
    }
    found = patterns(runs, {"plain": 0.5, "cost": 0.7}, each=1)
    assert found == {
        "found by plain, cost": ["i0"],
        "found by cost; missed by plain": ["i1"],
        "missed by plain, cost": ["i2"],
    }
    # Evenly spaced: first and last of those missed by both.
    assert patterns(runs, {"plain": 0.5, "cost": 0.7}, each=2)["missed by plain, cost"] == [
        *("i2", "i3"),
    ]
    at = {"a": 0.5, "b": 0.5}
    with pytest.raises(ValueError, match="other images"):
        patterns({"a": runs["plain"], "b": make_predictions([1, 0, 0, 0])}, at, each=1)


def test_systems_are_compared_over_the_seeds_that_both_have():
    # The reference ranks all right (AUC 1); the other has one of 2 x 2 pairs wrong (0.75).
    best, worse = [Yardstick(make_predictions(s)) for s in ([4, 3, 2, 1], [4, 2, 3, 1])]
    found = {"ref": {0: best, 1: best}, "other": {0: worse, 2: worse}, "alone": {2: worse}}
    rows = differences_to(found, "ref", "method")
    assert {(row["method"], row["seeds"]) for row in rows} == {("other", 1)}
    (auc,) = (row for row in rows if row["metric"] == "AUC")
    assert auc["difference"] == -0.25 and auc["low"] <= -0.25 <= auc["high"] <= 0
    assert differences_to(found, "untested", "method") == []
    fewer = Yardstick(make_predictions([1, 0], (1, 0)))
    with pytest.raises(ValueError, match="'few' was tested on other images than 'ref'"):
        differences_to({"ref": {0: best}, "few": {0: fewer}}, "ref", "method")


def test_a_system_is_above_chance_if_one_seed_is():
    labels = (1,) * 20 + (0,) * 20
    # One of 400 pairs is wrong: far above chance. All alike: at chance.
    good = Yardstick(make_predictions([*range(40, 21, -1), 19.5, 20, *range(19, 0, -1)], labels))
    flat = Yardstick(make_predictions([0.5] * 40, labels))
    assert not not_above_chance([good]) and not not_above_chance([flat, good])
    assert not_above_chance([flat])


@pytest.mark.parametrize("positive, others, chance", [(3, 3, True), (3, 6, False), (20, 20, False)])
def test_a_system_without_error_is_above_chance_if_patients_are_many(positive, others, chance):
    number = positive + others
    labels = (1,) * positive + (0,) * others
    perfect = Yardstick(make_predictions([*range(number, 0, -1)], labels))
    assert not_above_chance([perfect]) is chance
