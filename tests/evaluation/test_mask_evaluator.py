"""Dice and volumes of a data set, worked by hand."""

import csv
import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from ich_det2.data.masks import encode_mask
from ich_det2.evaluation.mask_evaluator import MaskEvaluator, is_known


def mask(rows, columns):
    found = np.zeros((20, 30), bool)
    found[slice(*rows), slice(*columns)] = True
    return found


def annotation(which, kind="IPH"):
    known = {} if which is None else {"segmentation": encode_mask(which)}
    return {"type": kind, "category_id": 0, **known}


@pytest.fixture
def evaluate(tmp_path, write_ct):
    """Function: what is found of slices (patient, annotations, [(mask, score, class)]); those of a
    patient lie 5 mm apart and have pixels of 0.5 x 2 mm."""

    def run(slices, classes=("hemorrhage",), pictures=False, **settings):
        truth, outputs = [], []
        for i, (patient, annotations, found) in enumerate(slices):
            path = tmp_path / f"{i}.dcm"
            write_ct(path, np.zeros((20, 30)), PixelSpacing=[0.5, 2.0])
            d = {"image_id": f"s{i}", "file_name": str(path), "patient_id": patient}
            d |= {"annotations": annotations, "image_label": int(len(annotations) > 0)}
            if pictures:
                d["file_name"] = f"{i}.png"
            truth.append(d | {"series": patient, "position_mm": 5.0 * i})
            instances = Instances((20, 30))
            instances.pred_masks = torch.from_numpy(
                np.array([m for m, *_ in found] or np.zeros((0, 20, 30), bool))
            )
            instances.scores = torch.tensor([score for _, score, _ in found])
            instances.pred_boxes = Boxes(torch.tensor([[2.0, 2, 12, 12]]).repeat(len(found), 1))
            instances.pred_classes = torch.tensor([k for *_, k in found], dtype=torch.int64)
            outputs.append({"instances": instances})
        evaluator = MaskEvaluator(
            classes=classes, threshold=0.5, truth=truth, output_dir=tmp_path / "out",
            distributed=False, **settings,
        )  # fmt: skip
        evaluator.process(truth[:1], outputs[:1])
        evaluator.process(truth, outputs)  # the first twice, as samplers may do
        return evaluator.evaluate()

    return run


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_dice_and_volumes_worked_by_hand(evaluate, tmp_path):
    true, low = mask((0, 10), (0, 10)), mask((10, 20), (20, 30))
    slices = [
        # Two masks overlap: 10 x 12 pixels in all, 100 of them true; a faint one does not count.
        (
            "a",
            [annotation(true)],
            [(true, 0.9, 0), (mask((0, 10), (2, 12)), 0.5, 0), (low, 0.4, 0)],
        ),
        ("a", [annotation(true)], []),
        ("b", [], [(low, 0.8, 0)]),
        ("b", [], []),
    ]
    found = evaluate(slices)["masks"]
    # Slices: 200 / 220 and 0. Patient a: 2 * 100 / (200 + 120).
    assert found["slice_dice"] == pytest.approx((200 / 220) / 2)
    assert found["dice"] == pytest.approx(200 / 320)
    # 1 mm^2 a pixel, 5 mm a slice: 200 * 5 = 1 ml true and 120 * 5 = 0.6 ml found.
    assert found["volume_error"] == pytest.approx(0.4)
    rows = read(tmp_path / "out/volumes.csv")
    assert [(r["patient_id"], r["type"], r["true_ml"], r["predicted_ml"]) for r in rows] == [
        ("a", "all", "1", "0.6"), ("a", "IPH", "1", "0.6"), ("b", "all", "0", "0.5"),
    ]  # fmt: skip
    assert [r["relative_error"] for r in rows] == ["-0.4", "-0.4", ""]
    assert {r["series"] for r in rows} == {"1"}  # no UIDs
    rows = read(tmp_path / "out/masks.csv")
    assert [r["dice"] for r in rows] == ["0.909091", "0", "0", ""]
    summary = json.loads((tmp_path / "out/masks.json").read_text())
    assert summary["types"]["IPH"]["n_series"] == 1 and summary["n_slices"] == 4


def test_what_is_not_known_is_left_out_and_counted(evaluate, tmp_path):
    true = mask((0, 10), (0, 10))
    slices = [
        ("a", [annotation(true)], [(true, 0.9, 0)]),
        ("a", [annotation(true), annotation(None)], []),
        ("b", [annotation(true)], [(mask((0, 10), (0, 5)), 0.9, 0)]),
        ("b", [], []),
    ]
    found = evaluate(slices)["masks"]
    # Of a the first slice alone; its volume is not known. Of b 2 * 50 / 150, and half the volume.
    assert found["dice"] == pytest.approx((1 + 100 / 150) / 2)
    assert found["volume_error"] == pytest.approx(0.5)
    assert json.loads((tmp_path / "out/masks.json").read_text())["n_slices_without_truth"] == 1
    assert read(tmp_path / "out/volumes.csv")[0]["true_ml"] == ""
    assert not is_known({"annotations": [], "image_label": 1})


def test_a_model_that_tells_types_is_compared_type_by_type(evaluate, tmp_path):
    one, other = mask((0, 10), (0, 10)), mask((10, 20), (10, 20))
    slices = [
        ("a", [annotation(one), annotation(other, "SDH")], [(one, 0.9, 1), (other, 0.9, 1)]),
        ("a", [], []),
    ]
    assert evaluate(slices, classes=("IPH", "SDH"))["masks"]["dice"] == 1
    rows = read(tmp_path / "out/volumes.csv")
    assert [(r["type"], r["true_ml"], r["predicted_ml"], r["relative_error"]) for r in rows] == [
        ("all", "1", "1", "0"), ("IPH", "0.5", "0", "-1"), ("SDH", "0.5", "1", "1"),
    ]  # fmt: skip
    # One that does not is not, where there are several types.
    evaluate([(p, a, [(m, s, 0) for m, s, _ in f]) for p, a, f in slices])
    rows = read(tmp_path / "out/volumes.csv")
    assert [(r["type"], r["predicted_ml"]) for r in rows] == [
        ("all", "1"),
        ("IPH", ""),
        ("SDH", ""),
    ]


def test_without_spacing_there_is_dice_alone(evaluate, tmp_path):
    true = mask((0, 10), (0, 10))
    found = evaluate([("a", [annotation(true)], [(true, 0.9, 0)])], pictures=True)["masks"]
    assert found["dice"] == 1 and np.isnan(found["volume_error"])
    assert read(tmp_path / "out/volumes.csv") == []
    assert "volumes are not known" in json.loads((tmp_path / "out/masks.json").read_text())["note"]


def test_without_true_masks_nothing_is_evaluated(evaluate, tmp_path, caplog):
    assert evaluate([("a", [annotation(None)], [(mask((0, 1), (0, 1)), 0.9, 0)])]) == {}
    assert "No true mask is known" in caplog.text and not (tmp_path / "out").exists()


def test_a_model_without_masks_is_passed_over(caplog):
    evaluator = MaskEvaluator(classes=["a"], threshold=0.5, truth=[], distributed=False)
    found = Instances((20, 30), scores=torch.ones(1), pred_classes=torch.zeros(1).long())
    evaluator.process([{"image_id": "s"}] * 2, [{"instances": found}, {"image_score": 0.3}])
    assert evaluator.evaluate() == {} and "The model gives no masks" in caplog.text


def test_a_mask_counts_by_the_score_of_its_box_along_the_series(evaluate):
    lesion = mask((2, 12), (2, 12))
    slices = [("p", [annotation(lesion)], [(lesion, score, 0)]) for score in (0.9, 0.4, 0.9)]
    assert evaluate(slices)["masks"]["slice_dice"] == pytest.approx(2 / 3)
    # The middle one: 0.5 * 0.4 + 0.25 * (0.9 + 0.9) = 0.65.
    smoothed = evaluate(slices, smoothing=[0.25, 0.5, 0.25], smoothing_iou=0.3)
    assert smoothed["masks"]["slice_dice"] == 1
