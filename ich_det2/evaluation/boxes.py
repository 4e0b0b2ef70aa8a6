"""Which true boxes the predicted ones find, over all images of a set.

Boxes are rows of pixels, x, y, width, height, as in COCO's JSON; a predicted row has its score in
front. Shape glossary: per image, D predicted and G true boxes.
"""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def box_recall(
    predicted: Sequence[np.ndarray],
    true: Sequence[np.ndarray],
    *,
    iou_threshold: float,
    score_threshold: float = 0.0,
) -> float:
    """Share of the true boxes that some predicted box overlaps enough; NaN without true boxes.

    Args:
        predicted: per image (D, 5): score, x, y, width, height.
        true: per image (G, 4).
        iou_threshold: an IoU equal to it is a hit.
        score_threshold: predicted boxes scored below are left out.
    """
    found = total = 0
    for boxes, targets in zip(predicted, true, strict=True):
        total += len(targets)
        boxes = boxes[boxes[:, 0] >= score_threshold, 1:]
        if len(boxes) and len(targets):
            iou = coco_mask.iou(boxes, targets, np.zeros(len(targets), dtype=np.uint8))
            found += int((iou.max(axis=0) >= iou_threshold).sum())
    return found / total if total else float("nan")


def average_precision(
    predicted: Sequence[np.ndarray], true: Sequence[np.ndarray], *, iou_threshold: float
) -> float:
    """COCO's AP (101 recalls, 100 boxes an image) at one IoU, in [0, 1]; NaN without true boxes.

    Args: as :func:`box_recall`.
    """
    if not any(len(targets) for targets in true):
        return float("nan")
    images = [{"id": i} for i in range(len(true))]
    annotations = [
        {"image_id": i, "category_id": 1, "bbox": list(b), "area": b[2] * b[3], "iscrowd": 0}
        for i, targets in enumerate(true)
        for b in targets
    ]
    results = [
        {"image_id": i, "category_id": 1, "score": b[0], "bbox": list(b[1:])}
        for i, boxes in enumerate(predicted)
        for b in boxes
    ]
    if not results:
        return 0.0
    truth = COCO()
    truth.dataset = {
        "images": images,
        "categories": [{"id": 1}],
        "annotations": [{"id": i, **a} for i, a in enumerate(annotations, 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.iouThrs = np.array([iou_threshold])
        evaluation.evaluate()
        evaluation.accumulate()
    # Precision: (IoU, recall, category, area, detections); all areas, 100 boxes an image.
    return float(evaluation.eval["precision"][0, :, 0, 0, -1].mean())
