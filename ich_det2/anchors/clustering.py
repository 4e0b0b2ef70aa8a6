"""K-means of box areas and of aspect ratios, and how well anchors fit boxes (pure numpy).

Sizes and boxes are in network-input pixels, that is, after the resize. A ratio is height / width
and a size is sqrt(area), as in Detectron2.
"""

from typing import NamedTuple

import numpy as np
from sklearn.cluster import KMeans

RATIO_SPACES = ("linear", "log")


class Anchors(NamedTuple):
    """Every size goes with every ratio: len(sizes) * len(aspect_ratios) anchors a position."""

    sizes: tuple[float, ...]  # sqrt(area), network-input pixels, ascending
    aspect_ratios: tuple[float, ...]  # height / width, ascending


def cluster_anchors(
    boxes_wh: np.ndarray,
    num_sizes: int = 3,
    num_ratios: int = 3,
    *,
    ratio_space: str = "linear",
    seed: int = 0,
) -> Anchors:
    """Clusters areas and, separately, aspect ratios of boxes, as the paper does.

    Args:
        boxes_wh: widths and heights, sized (M, 2), network-input pixels, > 0.
        num_sizes: centres of the areas.
        num_ratios: centres of the ratios.
        ratio_space: "linear" clusters height / width (the paper), which over-weighs tall boxes;
            "log" treats h/w and w/h alike.
        seed: of the K-means' starts.

    Returns:
        Anchors, with fewer sizes or ratios than asked for if the boxes have fewer distinct ones.

    Raises:
        ValueError: if there are no boxes, or one has no positive finite side.
    """
    boxes_wh = _check_boxes(boxes_wh)
    if num_sizes < 1 or num_ratios < 1:
        raise ValueError(f"expected at least 1 size and 1 ratio, got {num_sizes}, {num_ratios}.")
    if ratio_space not in RATIO_SPACES:
        raise ValueError(f"ratio_space is '{ratio_space}', expected one of {RATIO_SPACES}.")
    areas = boxes_wh.prod(axis=1)
    ratios = boxes_wh[:, 1] / boxes_wh[:, 0]
    sizes = np.sqrt(_centres(areas, num_sizes, seed))
    if ratio_space == "log":
        ratios = np.exp(_centres(np.log(ratios), num_ratios, seed))
    else:
        ratios = _centres(ratios, num_ratios, seed)
    return Anchors(tuple(map(float, sizes)), tuple(map(float, ratios)))


def best_iou(boxes_wh: np.ndarray, anchors: Anchors) -> np.ndarray:
    """IoU of each box with its best anchor, both centred on one point.

    Args:
        boxes_wh: sized (M, 2), network-input pixels.
        anchors: sizes and ratios.

    Returns:
        Sized (M,), in (0, 1]: what an anchor right at the box's centre would reach.
    """
    boxes_wh = _check_boxes(boxes_wh)
    sizes = np.asarray(anchors.sizes)[:, None]
    ratios = np.asarray(anchors.aspect_ratios)[None]
    width, height = (sizes / np.sqrt(ratios)).ravel(), (sizes * np.sqrt(ratios)).ravel()
    best = np.zeros(len(boxes_wh))
    for w, h in zip(width, height):
        intersection = np.minimum(boxes_wh[:, 0], w) * np.minimum(boxes_wh[:, 1], h)
        union = boxes_wh.prod(axis=1) + w * h - intersection
        np.maximum(best, intersection / union, out=best)
    return best


def anchor_recall(boxes_wh: np.ndarray, anchors: Anchors, iou_threshold: float) -> float:
    """Best possible recall: share of boxes whose best anchor reaches an IoU."""
    return float((best_iou(boxes_wh, anchors) >= iou_threshold).mean())


def _check_boxes(boxes_wh: np.ndarray) -> np.ndarray:
    boxes_wh = np.asarray(boxes_wh, dtype=np.float64)
    if boxes_wh.ndim != 2 or boxes_wh.shape[1] != 2 or len(boxes_wh) == 0:
        raise ValueError(
            f"boxes_wh is of shape {boxes_wh.shape}, expected (M, 2) with at least one box."
        )
    if not (np.isfinite(boxes_wh).all() and (boxes_wh > 0).all()):
        raise ValueError("boxes_wh holds a width or height that is not a positive finite number.")
    return boxes_wh


def _centres(values: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    num_clusters = min(num_clusters, len(np.unique(values)))
    means = KMeans(num_clusters, n_init=10, tol=0, random_state=seed).fit(np.sort(values)[:, None])
    return np.sort(means.cluster_centers_[:, 0])
