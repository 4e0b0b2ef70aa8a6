"""Anchors clustered from boxes, and how well anchors fit boxes (pure numpy).

Two ways: areas and aspect ratios apart, as the paper does, or widths and heights jointly by IoU.
Both are deterministic, whatever the order of the boxes. Sizes and boxes are in network-input
pixels, that is, after the resize. A ratio is height / width and a size is sqrt(area), as in
Detectron2.
"""

from typing import NamedTuple

import numpy as np

RATIO_SPACES = ("linear", "log")

MAX_DISTINCT = 10_000
"""So many distinct values are clustered; of more, so many groups of neighbours, with weights: for
numbers the groups' means, for boxes one of each group. A million boxes then take seconds."""

# Joint clustering: starts, of which the best counts; steps of each; mean IoU a step has to gain.
STARTS, MAX_STEPS, MIN_GAIN = 20, 100, 1e-6


class Anchors(NamedTuple):
    """Every size goes with every ratio: len(sizes) * len(aspect_ratios) anchors."""

    sizes: tuple[float, ...]  # sqrt(area), network-input pixels, ascending
    aspect_ratios: tuple[float, ...]  # height / width, ascending

    def wh(self) -> np.ndarray:
        """Widths and heights in network-input pixels, sized (A, 2), sizes outermost."""
        sizes = np.asarray(self.sizes)[:, None]
        ratios = np.asarray(self.aspect_ratios)[None]
        return np.stack([sizes / np.sqrt(ratios), sizes * np.sqrt(ratios)], axis=-1).reshape(-1, 2)


class AnchorPairs(NamedTuple):
    """Anchors of any shape, which sizes times ratios could not express."""

    pairs: tuple[tuple[float, float], ...]  # (width, height), network-input pixels, area ascending

    def wh(self) -> np.ndarray:
        """Widths and heights in network-input pixels, sized (A, 2)."""
        return np.asarray(self.pairs)


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


def cluster_pairs(boxes_wh: np.ndarray, num_pairs: int = 9, *, seed: int = 0) -> AnchorPairs:
    """Clusters widths and heights jointly, with 1 - IoU as the distance.

    As the anchors of YOLO (Redmon and Farhadi, "YOLO9000: Better, Faster, Stronger", section 2),
    but a cluster's centre is the median of its widths and of its heights instead of their means:
    with equal heights, 1 - IoU grows about as |log(width / width')|, which the median minimises.

    Args:
        boxes_wh: widths and heights, sized (M, 2), network-input pixels, > 0.
        num_pairs: centres.
        seed: of the starts.

    Returns:
        AnchorPairs, fewer than asked for if there are fewer distinct boxes.

    Raises:
        ValueError: if there are no boxes, or one has no positive finite side.
    """
    boxes_wh = _check_boxes(boxes_wh)
    if num_pairs < 1:
        raise ValueError(f"expected at least 1 pair, got {num_pairs}.")
    boxes_wh, weights = np.unique(boxes_wh, axis=0, return_counts=True)
    if len(boxes_wh) > MAX_DISTINCT:
        first = _group_starts(len(boxes_wh))
        boxes_wh, weights = boxes_wh[first], np.add.reduceat(weights, first)
    rng = np.random.default_rng(seed)
    pairs, best = boxes_wh, -1.0
    for _ in range(STARTS):
        centres, mean_iou = _lloyd(boxes_wh, weights, _spread(boxes_wh, weights, num_pairs, rng))
        if mean_iou > best:
            pairs, best = centres, mean_iou
    return AnchorPairs(tuple(sorted(map(tuple, pairs.tolist()), key=lambda p: (p[0] * p[1], p))))


def best_iou(boxes_wh: np.ndarray, anchors: Anchors | AnchorPairs) -> np.ndarray:
    """IoU of each box with its best anchor, both centred on one point.

    Args:
        boxes_wh: sized (M, 2), network-input pixels.
        anchors: sizes and ratios, or pairs.

    Returns:
        Sized (M,), in (0, 1]: what an anchor right at the box's centre would reach.
    """
    return _nearest(_check_boxes(boxes_wh), anchors.wh())[1]


def anchor_recall(
    boxes_wh: np.ndarray, anchors: Anchors | AnchorPairs, iou_threshold: float
) -> float:
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
    """K-means of numbers, sized (M,); the centres ascend."""
    from sklearn.cluster import KMeans  # not for those who only read anchors: it takes a second

    values, weights = np.unique(values, return_counts=True)
    if len(values) > MAX_DISTINCT:
        first = _group_starts(len(values))
        sums, weights = np.add.reduceat(values * weights, first), np.add.reduceat(weights, first)
        values = sums / weights
    means = KMeans(min(num_clusters, len(values)), n_init=10, tol=0, random_state=seed)
    means.fit(values[:, None], sample_weight=weights)
    return np.sort(means.cluster_centers_[:, 0])


def _group_starts(count: int) -> np.ndarray:
    """Where each of MAX_DISTINCT groups of neighbours, about equal in number, begins."""
    return np.linspace(0, count, MAX_DISTINCT, endpoint=False, dtype=np.int64)


def _nearest(boxes_wh: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the pair, of (A, 2), that fits each box of (M, 2) best, and their IoU."""
    width, height = np.ascontiguousarray(boxes_wh.T)
    area = width * height
    index, best = np.zeros(len(boxes_wh), dtype=np.int64), np.zeros(len(boxes_wh))
    for i, (w, h) in enumerate(pairs):
        intersection = np.minimum(width, w) * np.minimum(height, h)
        iou = intersection / (area + w * h - intersection)
        index[iou > best] = i
        np.maximum(best, iou, out=best)
    return index, best


def _spread(
    boxes_wh: np.ndarray, weights: np.ndarray, num_pairs: int, rng: np.random.Generator
) -> np.ndarray:
    """Starts as of k-means++: boxes drawn by their squared distance to those drawn before."""
    pairs: list[np.ndarray] = []
    distance = np.ones(len(boxes_wh))
    while len(pairs) < num_pairs and distance.any():
        chances = weights * distance**2
        pairs.append(boxes_wh[rng.choice(len(boxes_wh), p=chances / chances.sum())])
        distance = np.minimum(distance, 1 - _nearest(boxes_wh, np.array(pairs[-1:]))[1])
    return np.array(pairs)


def _lloyd(
    boxes_wh: np.ndarray, weights: np.ndarray, pairs: np.ndarray
) -> tuple[np.ndarray, float]:
    """Moves pairs to the medians of their boxes while the mean IoU rises; returns both."""
    best, best_mean = pairs, -1.0
    for _ in range(MAX_STEPS):
        index, iou = _nearest(boxes_wh, pairs)
        mean = float(np.average(iou, weights=weights))
        if mean <= best_mean + MIN_GAIN:
            break
        best, best_mean = pairs, mean
        pairs = pairs.copy()
        for i in np.unique(index):
            own = index == i
            pairs[i] = [_median(side, weights[own]) for side in boxes_wh[own].T]
    return best, best_mean


def _median(values: np.ndarray, weights: np.ndarray) -> float:
    """The least value that at least half of the weight does not exceed."""
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(weights[order])
    return values[order[np.searchsorted(cumulative, cumulative[-1] / 2)]]
