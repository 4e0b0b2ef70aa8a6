"""Which true boxes the predicted ones find, over all images of a set.

Boxes are rows of pixels, x, y, width, height, as in COCO's JSON; a predicted row has its score in
front. Shape glossary: per image, D predicted and G true boxes.
"""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

try:  # the same numbers, several times as fast
    from faster_coco_eval import COCO
    from faster_coco_eval import COCOeval_faster as COCOeval
except ImportError:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

COCO_IOUS = tuple(np.linspace(0.5, 0.95, 10))
"""IoU thresholds that COCO's AP averages over."""

SIZES = ("small", "medium", "large")
"""Names of :func:`thirds`."""


def thirds(areas: np.ndarray) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Deals areas, at least one, to three sizes, equally many to each but for ties.

    Args:
        areas: (G,), squared pixels.

    Returns:
        The size of each, index into ``SIZES``, and the bounds of each size: what is equal to the
        upper one belongs to it.
    """
    low, high = np.quantile(areas, (1 / 3, 2 / 3))
    bounds = [(areas.min(), low), (low, high), (high, areas.max())]
    return np.digitize(areas, (low, high), right=True), [(float(a), float(b)) for a, b in bounds]


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
    predicted: Sequence[np.ndarray],
    true: Sequence[np.ndarray],
    *,
    iou_threshold: float | Sequence[float],
) -> float:
    """COCO's AP (101 recalls, 100 boxes an image), in [0, 1]; NaN without true boxes.

    Args:
        predicted: per image (D, 5): score, x, y, width, height.
        true: per image (G, 4).
        iou_threshold: one, or several to average over, as ``COCO_IOUS``.
    """
    return float(coco_precision(predicted, true, np.atleast_1d(iou_threshold)).mean())


def coco_precision(
    predicted: Sequence[np.ndarray],
    true: Sequence[np.ndarray],
    iou_thresholds: Sequence[float] = COCO_IOUS,
) -> np.ndarray:
    """COCO's precision at 101 recalls, whose mean is the AP, with 100 boxes an image.

    Args:
        predicted: per image (D, 5): score, x, y, width, height.
        true: per image (G, 4).
        iou_thresholds: sized (T,).

    Returns:
        Sized (T, 101), in [0, 1]; NaN without true boxes.
    """
    if not any(len(targets) for targets in true):
        return np.full((len(iou_thresholds), 101), np.nan)
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
        return np.zeros((len(iou_thresholds), 101))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": images,
            "categories": [{"id": 1}],
            "annotations": [{"id": i, **a} for i, a in enumerate(annotations, 1)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.iouThrs = np.asarray(iou_thresholds)
        evaluation.evaluate()
        evaluation.accumulate()
    # Precision: (IoU, recall, category, area, detections); all areas, 100 boxes an image.
    return evaluation.eval["precision"][:, :, 0, 0, -1]


def voc_average_precision(
    predicted: Sequence[np.ndarray],
    true: Sequence[np.ndarray],
    *,
    iou_threshold: float = 0.5,
) -> float:
    """PASCAL VOC's AP, in [0, 1]; with one class this is the paper's mAP. NaN without true boxes.

    The area under the falling envelope of the curve, as in VOC 2010 and later. A prediction belongs
    to the true box it overlaps most, and is false if a better one has that box already (COCO would
    give it another free box). Source: Everingham et al., Int. J. Comput.
    Vis. 88 (2010) 303.

    Args:
        predicted: per image (D, 5): score, x, y, width, height.
        true: per image (G, 4).
        iou_threshold: an IoU equal to it counts.
    """
    n_true = sum(map(len, true))
    if not n_true:
        return float("nan")
    scores, right = [], []
    for boxes, targets in zip(predicted, true, strict=True):
        boxes = boxes[np.argsort(-boxes[:, 0], kind="stable")]
        hit = np.zeros(len(boxes), dtype=bool)
        if len(boxes) and len(targets):
            iou = coco_mask.iou(boxes[:, 1:], targets, np.zeros(len(targets), dtype=np.uint8))
            near = iou.argmax(axis=1)
            enough = np.flatnonzero(iou.max(axis=1) >= iou_threshold)
            # The first, highest scored prediction of each true box.
            hit[enough[np.unique(near[enough], return_index=True)[1]]] = True
        scores.append(boxes[:, 0])
        right.append(hit)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    found = np.cumsum(np.concatenate(right)[order])
    recall = found / n_true
    precision = found / np.arange(1, len(found) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float((np.diff(recall, prepend=0) * envelope[:-1]).sum())
