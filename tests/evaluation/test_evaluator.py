"""DiagnosisEvaluator: from boxes to the files and numbers of an evaluation."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from ich_det2.evaluation import DiagnosisEvaluator, boxes
from ich_det2.evaluation.diagnosis import METRICS
from ich_det2.evaluation.evaluator import format_summary
from ich_det2.evaluation.predictions import Predictions, read_predictions, write_predictions

IMAGES = [
    # image, patient, label, box scores
    ("b", "p1", 1, [0.2, 0.75]),
    ("a", "p1", 0, []),
    ("c", "p2", 0, [0.5, 0.1]),
    ("d", "p2", 0, [0.125]),
    ("e", "p3", 1, [0.25]),
]


def feed(evaluator, images=IMAGES):
    for image, patient, label, scores in images:
        x = {"image_id": image, "file_name": f"/some/where/{image}.dcm", "image_label": label}
        if patient is not None:
            x["patient_id"] = patient
        y = Instances((8, 8), scores=torch.tensor(scores, dtype=torch.float32))
        evaluator.process([x], [{"instances": y}])
    return evaluator


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Factory of an evaluator; drawing takes most of its time, so it is off unless asked for."""

    def make(plots=False, **kwargs):
        for name in () if plots else ("plot_roc", "plot_thresholds"):
            monkeypatch.setattr(f"ich_det2.evaluation.evaluator.{name}", lambda *args: None)
        kwargs = {"thresholds": [0.25, 0.8], "operating_threshold": 0.5} | kwargs
        return DiagnosisEvaluator(output_dir=tmp_path / "inference" / "ich_val", **kwargs)

    return make


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_image_scores_have_one_row_per_image(make):
    evaluator = feed(make())
    evaluator.evaluate()
    # The highest box score, 0 where there is no box; names without folders.
    assert read_csv(evaluator.output_dir / "image_scores.csv") == [
        ["image_id", "file_name", "patient_id", "label", "score"],
        ["a", "a.dcm", "p1", "0", "0.0"],
        ["b", "b.dcm", "p1", "1", "0.75"],
        ["c", "c.dcm", "p2", "0", "0.5"],
        ["d", "d.dcm", "p2", "0", "0.125"],
        ["e", "e.dcm", "p3", "1", "0.25"],
    ]


def test_thresholds_table_has_both_levels_and_the_operating_threshold(make):
    evaluator = feed(make())
    evaluator.evaluate()
    header, *rows = read_csv(evaluator.output_dir / "diagnosis_thresholds.csv")
    assert ",".join(header) == (
        "level,threshold,tp,fp,tn,fn,accuracy,recall,precision,specificity,npv,f1"
        ",f2,balanced_accuracy,mcc,expected_cost"
    )
    assert [row[:6] for row in rows] == [
        # Images: lesions 0.75, 0.25, healthy 0, 0.5, 0.125. Equal is positive.
        ["image", "0.25", "2", "1", "2", "0"],
        ["image", "0.5", "1", "1", "2", "1"],
        ["image", "0.8", "0", "0", "3", "2"],
        # Patients: p1 sick 0.75, p2 healthy 0.5, p3 sick 0.25.
        ["patient", "0.25", "2", "1", "0", "0"],
        ["patient", "0.5", "1", "1", "0", "1"],
        ["patient", "0.8", "0", "0", "1", "2"],
    ]
    assert rows[2][header.index("precision")] == "nan"  # nobody called positive


def test_returned_numbers_are_what_the_hook_stores(make):
    results = feed(make()).evaluate()
    assert set(results) == {"diagnosis"}
    values = results["diagnosis"]
    assert all(type(v) is float for v in values.values())
    names = {"auc", "average_precision", "recall_at_specificity_0.90", "tp", "fp", "tn", "fn"}
    names |= set(METRICS)
    assert set(values) == {f"{level}_{name}" for level in ("image", "patient") for name in names}
    # Images: 0.75 beats 0, 0.5, 0.125; 0.25 beats 0, 0.125: 5 of 6 pairs.
    assert values["image_auc"] == pytest.approx(5 / 6)
    assert values["image_accuracy"] == 3 / 5 and values["image_recall"] == 1 / 2
    assert values["patient_auc"] == 1 / 2 and values["patient_specificity"] == 0


def test_json_has_both_levels(make):
    evaluator = feed(make())
    evaluator.evaluate()
    content = json.loads((evaluator.output_dir / "diagnosis.json").read_text())
    assert set(content) == {"operating_threshold", "image", "patient"}
    assert content["operating_threshold"] == 0.5
    assert (content["image"]["n"], content["image"]["n_positive"]) == (5, 2)
    assert (content["patient"]["n"], content["patient"]["n_positive"]) == (3, 2)
    assert content["image"]["tp"] == 1 and content["image"]["auc"] == pytest.approx(5 / 6)


def test_json_has_null_and_no_nan(make):
    evaluator = feed(make(), [("a", "p", 0, [0.1]), ("b", "p", 0, [])])
    values = evaluator.evaluate()["diagnosis"]

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (evaluator.output_dir / "diagnosis.json").read_text()
    content = json.loads(text, parse_constant=refuse)
    assert content["image"]["auc"] is None and content["image"]["recall"] is None
    assert content["image"]["specificity"] == 1.0
    assert math.isnan(values["image_auc"])


def test_images_handed_out_twice_count_once(make):
    once, twice = feed(make()), feed(make(), [*IMAGES, *IMAGES[:2]])
    assert twice.evaluate() == once.evaluate()
    assert len(read_csv(twice.output_dir / "image_scores.csv")) == 1 + 5


def test_rows_of_all_processes_are_gathered(make, monkeypatch):
    expected = feed(make()).evaluate()
    other = feed(make(), IMAGES[2:])._rows
    module = "ich_det2.evaluation.evaluator.comm"
    monkeypatch.setattr(f"{module}.gather", lambda rows, dst: [rows, other])
    assert feed(make(), IMAGES[:3]).evaluate() == expected  # "c" comes from both
    monkeypatch.setattr(f"{module}.is_main_process", lambda: False)
    assert feed(make(), IMAGES[:3]).evaluate() == {}
    # Each process for itself.
    assert feed(make(distributed=False), IMAGES).evaluate() == expected


def test_reset_forgets(make):
    evaluator = feed(make())
    evaluator.reset()
    feed(evaluator, IMAGES[:2]).evaluate()
    assert len(read_csv(evaluator.output_dir / "image_scores.csv")) == 1 + 2


def test_image_without_patient_is_a_patient_of_its_own(make):
    evaluator = feed(make(), [(image, None, label, s) for image, _, label, s in IMAGES])
    values = evaluator.evaluate()["diagnosis"]
    assert values["patient_auc"] == values["image_auc"]
    assert [r[2] for r in read_csv(evaluator.output_dir / "image_scores.csv")[1:]] == list("abcde")


def test_files_are_whole_and_nothing_else_is_left(make):
    evaluator = feed(make(plots=True))
    evaluator.evaluate()
    assert sorted(path.name for path in evaluator.output_dir.iterdir()) == [
        "diagnosis.json",
        "diagnosis_thresholds.csv",
        "diagnosis_thresholds.png",
        "image_scores.csv",
        "roc.png",
    ]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluator = DiagnosisEvaluator(thresholds=[0.5], operating_threshold=0.5)
    assert feed(evaluator).evaluate()["diagnosis"]["image_tp"] == 1
    assert list(tmp_path.iterdir()) == []


def test_summary_prints_as_a_table():
    results = {"n": 5, "n_positive": 2, "auc": 0.8333, "recall_at_specificity_0.90": math.nan}
    results |= dict.fromkeys(("recall", "specificity", "precision", "accuracy"), 0.5)
    results |= dict.fromkeys(("tp", "fp", "tn", "fn"), 1)
    lines = format_summary({"image": results, "patient": results}).splitlines()
    assert lines[0].split() == ["|", "|", "image", "|", "patient", "|"]
    assert any(line.split()[1:6:2] == ["auc", "0.833", "0.833"] for line in lines)
    assert len({len(line) for line in lines}) == 1


def test_an_image_score_goes_before_boxes_and_needs_none(make, tmp_path):
    evaluator = make()
    for (image, patient, label, _), score in zip(IMAGES, (0.9, 0.2, 0.1, 0.4, 0.6)):
        x = {"image_id": image, "file_name": f"{image}.png", "image_label": label}
        y = {"image_score": torch.tensor(score, dtype=torch.float64)}
        if image == "a":
            y["instances"] = Instances((8, 8), scores=torch.tensor([0.99]))
        evaluator.process([x | {"patient_id": patient}], [y])
    results = evaluator.evaluate()["diagnosis"]
    assert results["image_auc"] == 1.0
    assert not [key for key in results if key.startswith("lesion")]
    rows = read_csv(tmp_path / "inference/ich_val/image_scores.csv")[1:]
    assert {row[0]: float(row[4]) for row in rows} == {
        "a": 0.2, "b": 0.9, "c": 0.1, "d": 0.4, "e": 0.6
    }  # fmt: skip


def test_coco_ap_is_computed_once_for_a_validation(make, monkeypatch):
    runs, evaluate = [], boxes.COCOeval.evaluate
    monkeypatch.setattr(
        boxes.COCOeval, "evaluate", lambda self: (runs.append(self), evaluate(self))[1]
    )
    truth = [
        {"image_id": i, "annotations": [{"bbox": [1, 1, 6, 6], "bbox_mode": 0, "category_id": 0}]}
        for i in "ab"
    ]
    evaluator = make(truth=truth)
    for image in "ab":
        x = {"image_id": image, "file_name": f"{image}.png"}
        found = Instances((8, 8), scores=torch.tensor([0.9]))
        found.pred_boxes = Boxes(torch.tensor([[1.0, 1, 6, 6]]))
        evaluator.process([x], [{"instances": found}])
    values = evaluator.evaluate()["diagnosis"]
    assert values["lesion_coco_ap"] == values["lesion_coco_ap50"] == 1
    assert values["image_recall"] == 1  # without "image_label", by the true boxes
    assert len(runs) == 1


# ---- smoothed scores -------------------------------------------------------------------------

PLACES = {"a": ("s", 5.0), "b": ("s", 0.0), "c": ("s", 0.0), "d": ("s", 5.0)}


def feed_places(evaluator, places=PLACES):
    for image, patient, label, scores in IMAGES:
        x = {"image_id": image, "file_name": f"{image}.dcm", "image_label": label}
        x |= {"patient_id": patient}
        if image in places:
            x["series"], x["position_mm"] = places[image]
        found = Instances((8, 8), scores=torch.tensor(scores, dtype=torch.float32))
        found.pred_boxes = Boxes(torch.tensor([[1.0, 1, 6, 6]]).repeat(len(scores), 1))
        evaluator.process([x], [{"instances": found}])
    return evaluator


def test_images_and_patients_are_diagnosed_by_smoothed_scores(make):
    evaluator = feed_places(make(smoothing=[0.25, 0.5, 0.25]))
    values = evaluator.evaluate()["diagnosis"]
    header, *rows = read_csv(evaluator.output_dir / "image_scores.csv")
    assert header == ["image_id", "file_name", "patient_id", "label", "score", "raw_score"]
    # Two slices of a series: 2/3 of the own score and 1/3 of the other's. Series of one name are
    # of two patients; the place of "e" is not known.
    expected = {"a": 0.75 / 3, "b": 1.5 / 3, "c": 1.125 / 3, "d": 0.75 / 3, "e": 0.25}
    assert {row[0]: float(row[4]) for row in rows} == pytest.approx(expected)
    raw = {"a": 0.0, "b": 0.75, "c": 0.5, "d": 0.125, "e": 0.25}
    assert {row[0]: float(row[5]) for row in rows} == raw
    assert values["image_tp"] == 1 and values["image_fp"] == 0  # "c" had 0.5
    assert values["patient_fp"] == 0
    # Boxes keep their scores.
    boxes = evaluator._predictions(evaluator._rows).boxes
    assert [found[:, 0].max(initial=0) for found in boxes] == list(raw.values())


def test_boxes_are_smoothed_along_the_series_and_read_back(make):
    evaluator = make(smoothing=[0.25, 0.5, 0.25], smoothing_iou=0.5)
    feed_places(evaluator).evaluate()
    rows = {row[0]: row for row in read_csv(evaluator.output_dir / "image_scores.csv")[1:]}
    found = read_predictions(evaluator.output_dir)
    raw = dict(zip("abcde", found.raw_scores.tolist()))
    assert raw == {"a": 0.0, "b": 0.75, "c": 0.5, "d": 0.125, "e": 0.25}
    # "a" has no box for that of "b"; those of "c" and "d" lie at one place. Then the slices are
    # smoothed by these.
    top = {"a": 0.0, "b": 1.5 / 3, "c": 1.125 / 3, "d": 0.75 / 3, "e": 0.25}
    assert [b[:, 0].max(initial=0) for b in found.boxes] == pytest.approx(list(top.values()))
    expected = {"a": 0.5 / 3, "b": 1 / 3, "c": (2 * top["c"] + top["d"]) / 3, "e": 0.25}
    assert {i: float(rows[i][4]) for i in expected} == pytest.approx(expected)
    # An evaluation without it leaves none of it.
    again = make(smoothing=[0.25, 0.5, 0.25])
    again.output_dir = evaluator.output_dir
    feed_places(again).evaluate()
    assert not (evaluator.output_dir / "smoothed_boxes.json").exists()


def test_boxes_are_smoothed_by_weights_of_their_own(make):
    evaluator = make(
        smoothing=[0.1, 0.2, 0.4, 0.2, 0.1], smoothing_iou=0.5, smoothing_boxes=[0.25, 0.5, 0.25]
    )
    feed_places(evaluator).evaluate()
    found = evaluator._predictions(evaluator._rows)
    top = [b[:, 0].max(initial=0) for b in found.boxes]
    assert top == pytest.approx([0, 1.5 / 3, 1.125 / 3, 0.75 / 3, 0.25])
    assert found.scores[:2] == pytest.approx([0.5 / 3, 1 / 3])  # two slices: 2/3 and 1/3
    alone = make(smoothing=[0.25, 0.5, 0.25], smoothing_iou=0.5, smoothing_boxes=[1.0])
    found = feed_places(alone)._predictions(alone._rows)
    assert [b[:, 0].max(initial=0) for b in found.boxes] == [0, 0.75, 0.5, 0.125, 0.25]
    assert found.scores[1] == pytest.approx(1.5 / 3)
    with pytest.raises(ValueError, match="expected an odd number"):
        make(smoothing=[1.0], smoothing_iou=0.5, smoothing_boxes=[0.5, 0.5])


def test_raw_scores_are_read_back_taken_and_joined(make, tmp_path):
    evaluator = feed_places(make(smoothing=[0.25, 0.5, 0.25]))
    evaluator.evaluate()
    found = read_predictions(evaluator.output_dir)
    assert found.raw_scores.tolist() == [0, 0.75, 0.5, 0.125, 0.25]
    write_predictions(found, tmp_path)
    files = [folder / "image_scores.csv" for folder in (tmp_path, evaluator.output_dir)]
    assert read_csv(files[0]) == read_csv(files[1])
    parts = [found.take("ba"), found.take("c")]
    assert Predictions.joined(parts).raw_scores.tolist() == [0.75, 0, 0.5]
    plain = Predictions(["z"], ["z"], ["z"], np.array([0]), np.array([0.1]))
    assert Predictions.joined([*parts, plain]).raw_scores is None


def test_smoothing_needs_places_and_weights(make):
    with pytest.raises(ValueError, match="needs the place of each image in its series, got none"):
        feed_places(make(smoothing=[0.25, 0.5, 0.25]), places={}).evaluate()
    with pytest.raises(ValueError, match="expected an odd number"):
        make(smoothing=[0.5, 0.5])
