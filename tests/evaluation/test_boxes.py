"""Average precision, against pycocotools, Detectron2's VOC evaluation, and by hand."""

import contextlib
import io
import math

import numpy as np
import pytest
from detectron2.evaluation.pascal_voc_evaluation import voc_ap, voc_eval
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ich_det2.evaluation.boxes import (
    COCO_IOUS,
    average_precision,
    box_recall,
    coco_precision,
    voc_average_precision,
)


def some_boxes(seed, images=40):
    """True boxes of whole pixels, and predictions around some of them and elsewhere."""
    rng = np.random.default_rng(seed)
    predicted, true = [], []
    for _ in range(images):
        low = rng.integers(0, 80, (rng.integers(0, 4), 2))
        targets = np.c_[low, rng.integers(10, 30, low.shape)].astype(float)
        near = np.repeat(targets, 2, axis=0) + rng.integers(-4, 5, (2 * len(targets), 4))
        away = np.c_[rng.integers(0, 80, (5, 2)), rng.integers(10, 30, (5, 2))]
        rows = np.r_[near, away]
        scores = (0.4 * (np.arange(len(rows)) < len(near)) + 0.6 * rng.random(len(rows))).round(6)
        predicted.append(np.c_[scores, rows])
        true.append(targets)
    return predicted, true


def pycocotools_ap(predicted, true):
    """AP and AP50 as pycocotools summarizes them."""
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in range(len(true))],
        "categories": [{"id": 7}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": 7, "bbox": list(b), "area": b[2] * b[3],
             "iscrowd": 0}
            for n, (i, b) in enumerate(
                ((i, b) for i, targets in enumerate(true) for b in targets), start=1
            )
        ],
    }  # fmt: skip
    results = [
        {"image_id": i, "category_id": 7, "score": b[0], "bbox": list(b[1:])}
        for i, rows in enumerate(predicted)
        for b in rows
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:2]


@pytest.mark.parametrize("seed", range(3))
def test_coco_ap_equals_pycocotools(seed):
    predicted, true = some_boxes(seed)
    ap, ap50 = pycocotools_ap(predicted, true)
    assert 0.1 < ap < ap50 < 1
    assert average_precision(predicted, true, iou_threshold=COCO_IOUS) == pytest.approx(
        ap, abs=1e-6
    )
    assert average_precision(predicted, true, iou_threshold=0.5) == pytest.approx(ap50, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_one_run_gives_the_ap_of_each_iou_to_the_last_bit(seed):
    predicted, true = some_boxes(seed)
    precision = coco_precision(predicted, true)
    for row, iou in zip(precision, COCO_IOUS, strict=True):
        assert row.mean() == average_precision(predicted, true, iou_threshold=iou)
    assert precision.mean() == average_precision(predicted, true, iou_threshold=COCO_IOUS)


@pytest.mark.parametrize("seed", range(3))
def test_voc_ap_equals_detectron2s(tmp_path, seed):
    predicted, true = some_boxes(seed)
    voc_eval.__globals__["parse_rec"].cache_clear()
    detections = []
    for i, (rows, targets) in enumerate(zip(predicted, true)):
        # VOC counts pixels from 1 and the last one in.
        objects = "".join(
            "<object><name>x</name><pose>-</pose><truncated>0</truncated><difficult>0</difficult>"
            f"<bndbox><xmin>{x + 1:.0f}</xmin><ymin>{y + 1:.0f}</ymin><xmax>{x + w:.0f}</xmax>"
            f"<ymax>{y + h:.0f}</ymax></bndbox></object>"
            for x, y, w, h in targets
        )
        (tmp_path / f"{i}.xml").write_text(f"<annotation>{objects}</annotation>")
        detections += [f"{i} {s} {x + 1} {y + 1} {x + w} {y + h}" for s, x, y, w, h in rows]
    (tmp_path / "det_x.txt").write_text("\n".join(detections))
    (tmp_path / "all.txt").write_text("\n".join(map(str, range(len(true)))))
    *_, expected = voc_eval(
        f"{tmp_path}/det_{{}}.txt", f"{tmp_path}/{{}}.xml", f"{tmp_path}/all.txt", "x",
        ovthresh=0.5 - 1e-9, use_07_metric=False,
    )  # fmt: skip
    ours = voc_average_precision(predicted, true)
    assert ours == pytest.approx(expected, abs=1e-12) and 0.1 < ours < 1


def test_hand_worked_voc_ap():
    true = [np.array([[0, 0, 10, 10], [20, 0, 10, 10]], float), np.empty((0, 4))]
    predicted = [
        np.array([[0.9, 0, 0, 10, 10], [0.7, 0, 0, 10, 10], [0.6, 20, 0, 10, 10]], float),
        np.array([[0.8, 0, 0, 5, 5]], float),
    ]
    # By score: right, wrong, wrong (has one already), right. Precision 1, 1/2, 1/3, 2/4; recall
    # 1/2, 1/2, 1/2, 1. Area 1/2 * 1 + 1/2 * 1/2.
    assert voc_average_precision(predicted, true) == 3 / 4
    assert voc_ap(np.array([0.5, 0.5, 0.5, 1]), np.array([1, 1 / 2, 1 / 3, 1 / 2])) == 3 / 4


@pytest.mark.parametrize("ap", [average_precision, voc_average_precision, box_recall])
def test_no_true_box_is_nan_and_no_prediction_is_nothing(ap):
    none, one = np.empty((0, 5)), np.array([[0.0, 0, 5, 5]])
    assert math.isnan(ap([none], [np.empty((0, 4))], iou_threshold=0.5))
    assert ap([none], [one], iou_threshold=0.5) == 0


@given(order=st.permutations(range(12)))
def test_order_of_images_does_not_matter(order):
    predicted, true = some_boxes(1, images=12)
    shuffled = [predicted[i] for i in order], [true[i] for i in order]
    assert voc_average_precision(*shuffled) == pytest.approx(voc_average_precision(predicted, true))
