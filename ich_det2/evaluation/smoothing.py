"""Scores of slices and boxes smoothed along their series: a bleed seldom ends where a slice does.

Shape glossary: N slices; C neighbours on either side; D boxes of a slice.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from pycocotools import mask as coco_mask
from scipy.special import expit, logit

from ..data.dicom import neighbours

_EDGE = 1e-6
"""Scores are kept so far from 0 and 1, where the logit is infinite (a slice without boxes)."""

_BOX_EDGE = 1e-4
"""As :data:`_EDGE`, of the highest box; boxes of smaller scores say nothing of a slice."""


def check_weights(weights: ArrayLike) -> np.ndarray:
    """The weights of :func:`smooth_scores` as float64 (2 C + 1,), of sum 1.

    Raises:
        ValueError: with what is expected.
    """
    try:
        found = np.asarray(weights, dtype=float)
    except (TypeError, ValueError):
        found = np.zeros(0)
    good = found.ndim == 1 and found.size % 2 == 1 and (found >= 0).all()
    # A thousandth is left to rounding.
    if not good or not abs(found.sum() - 1) <= 1e-3 + 1e-9:
        raise ValueError(
            f"the weights are {weights!r}, expected an odd number of them, none below 0, of sum 1,"
            " the slice's own in the middle, such as [0.25, 0.5, 0.25]."
        )
    return found / found.sum()


def smooth_scores(
    scores: ArrayLike,
    series: Sequence[Hashable],
    positions_mm: ArrayLike,
    weights: ArrayLike,
) -> np.ndarray:
    """Each slice's score as the weighted mean of its own and of its neighbours' in the series.

    Beyond the ends, beyond a gap (see ``data.dicom.neighbours``) and beyond a slice that was not
    read there is no neighbour: its weight is left out, and the others count for more.

    Args:
        scores: (N,), in any order; NaN for a slice that was not read, which stays so.
        series: N names.
        positions_mm: (N,), along the slice normal; NaN where it is not known: the score stays.
        weights: (2 C + 1,), see :func:`check_weights`; ascending along the normal, the slice's own
            in the middle.

    Returns:
        float64 (N,), each between the least and the greatest score that it is the mean of.

    Raises:
        ValueError: if the weights are none.
    """
    kernel = check_weights(weights)
    beside = _beside(scores, series, positions_mm, len(kernel) // 2)
    smoothed = _mean(beside, kernel)
    there = ~np.isnan(beside)
    low = np.where(there, beside, np.inf).min(axis=1, initial=np.inf)
    high = np.where(there, beside, -np.inf).max(axis=1, initial=-np.inf)
    # Sums of fractions are not exact.
    return np.where(there.any(axis=1), np.clip(smoothed, low, high), np.nan)


def smooth_boxes(
    scores: ArrayLike,
    boxes: Sequence[np.ndarray],
    series: Sequence[Hashable],
    positions_mm: ArrayLike,
    weights: ArrayLike,
    iou_threshold: float,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Each box's score as the weighted mean of its own and of what lies there in the neighbours.

    Of a neighbouring slice that is the highest score of a box that overlaps it, 0 if there is none:
    what is a bleed goes on in the next slice, at the same place. The logit of the slice's score
    moves by as much as that of its highest box.

    Args:
        scores: (N,), of the slices, in [0, 1]; NaN for one that was not read, which stays so.
        boxes: N arrays (D, 5): score, x, y, width, height, in pixels.
        series, positions_mm, weights: as :func:`smooth_scores`, by which the slices are smoothed
            after this.
        iou_threshold: the least IoU with a box to lie there, in (0, 1].
        sizes: (H, W) of the slices in pixels, since those of a series may differ in their matrix;
            they are taken to show the same field. None: all are of one size.

    Returns:
        float64 (N,), and N arrays (D, 5), in the order given.

    Raises:
        ValueError: if the weights are none.
    """
    kernel, values = check_weights(weights), np.asarray(scores, dtype=float)
    table = _neighbours(values, series, positions_mm, len(kernel) // 2)
    smoothed = []
    for index, (own, row) in enumerate(zip(boxes, table)):
        weight, total = 0.0, np.zeros(len(own))
        for column, neighbour in enumerate(row):
            if neighbour < 0 or not len(own):
                continue
            weight += kernel[column]
            other = boxes[neighbour]
            if column == len(kernel) // 2:
                total += kernel[column] * own[:, 0]
            elif len(other):
                crowd = np.zeros(len(other), dtype=np.uint8)
                theirs = other[:, 1:]
                if sizes is not None and tuple(sizes[index]) != tuple(sizes[neighbour]):
                    (height, width), (rows, columns) = sizes[index], sizes[neighbour]
                    theirs = theirs * np.array([width / columns, height / rows] * 2)
                there = coco_mask.iou(own[:, 1:], theirs, crowd) >= iou_threshold
                total += kernel[column] * (there * other[:, 0]).max(axis=1)
        smoothed.append(np.c_[total / weight, own[:, 1:]] if weight > 0 else own)
    before, after = (
        np.array([b[:, 0].max(initial=0.0) for b in found]) for found in (boxes, smoothed)
    )
    shift = logit(np.clip(after, _BOX_EDGE, 1 - _BOX_EDGE))
    shift -= logit(np.clip(before, _BOX_EDGE, 1 - _BOX_EDGE))
    moved = expit(logit(np.clip(values, _EDGE, 1 - _EDGE)) + shift)
    # A detector's own score of a slice is that of its highest box.
    moved = np.where(values == before, after, np.where(shift == 0, values, moved))
    return moved, smoothed


def fit_smoothing(
    labels: ArrayLike,
    scores: ArrayLike,
    series: Sequence[Hashable],
    positions_mm: ArrayLike,
    reach: int = 2,
) -> np.ndarray:
    """The symmetric weights whose smoothed scores have the least log loss.

    The slope and the offset that calibrate the smoothed scores' logits (Platt's) are fitted with
    them, so that scores need not be probabilities: it is how well they tell bleeds apart that
    counts. Fit on validation or out-of-fold scores, never on those that are tested on.

    Args:
        labels: 1 hemorrhage, 0 none, sized (N,).
        scores: in [0, 1], sized (N,).
        series, positions_mm: as :func:`smooth_scores`.
        reach: neighbours on either side, C.

    Returns:
        float64 (2 C + 1,), none below 0, of sum 1.

    Raises:
        ValueError: if the labels are of one class, or a score is not in [0, 1].
    """
    from scipy.optimize import minimize  # not for those who only smooth: it takes a second

    positive, values = np.asarray(labels).astype(bool), np.asarray(scores, dtype=float)
    if positive.all() or not positive.any():
        raise ValueError(
            f"smoothing is fitted on slices of both classes, got {positive.sum()} positive of"
            f" {len(positive)}."
        )
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            f"smoothing is fitted on scores from 0 to 1, got {values.min():g} to {values.max():g}."
        )
    beside = _beside(values, series, positions_mm, reach)
    sign = np.where(positive, 1.0, -1.0)

    def loss(x: np.ndarray) -> float:
        smoothed = np.clip(_mean(beside, _mirror(x[2:])), _EDGE, 1 - _EDGE)
        return np.logaddexp(0, -sign * (x[0] * logit(smoothed) + x[1])).mean()

    # The slice's own weight, and those at a distance of 1 to C on both sides together.
    starts = [np.eye(reach + 1)[0], np.full(reach + 1, 1 / (reach + 1))]
    fits = [
        minimize(
            loss,
            np.r_[1.0, 0.0, start],
            method="SLSQP",
            bounds=[(0.01, 100), (-100, 100), *[(0, 1)] * (reach + 1)],
            constraints={"type": "eq", "fun": lambda x: x[2:].sum() - 1},
            options={"ftol": 1e-10, "maxiter": 500},
        )
        for start in starts
    ]
    best = np.clip(min(fits, key=lambda fit: fit.fun).x[2:], 0, None)
    return _mirror(best / best.sum())


def _mirror(shares: np.ndarray) -> np.ndarray:
    """Weights (2 C + 1,) from the shares (C + 1,) of the distances 0 to C."""
    half = shares[1:] / 2
    return np.r_[half[::-1], shares[0], half]


def _mean(beside: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means (N,) of what is there; a slice whose weights are all 0 keeps its score."""
    there = ~np.isnan(beside)
    total = there @ weights
    with np.errstate(invalid="ignore"):
        means = np.where(there, beside, 0) @ weights / total
    return np.where(total > 0, means, beside[:, len(weights) // 2])


def _beside(
    scores: ArrayLike, series: Sequence[Hashable], positions_mm: ArrayLike, reach: int
) -> np.ndarray:
    """Scores (N, 2 C + 1) of each slice, in the middle, and of its neighbours; NaN for none."""
    values = np.asarray(scores, dtype=float)
    table = _neighbours(values, series, positions_mm, reach)
    return np.where(table >= 0, values[table], np.nan) if len(values) else np.zeros(table.shape)


def _neighbours(
    values: np.ndarray, series: Sequence[Hashable], positions_mm: ArrayLike, reach: int
) -> np.ndarray:
    """Indices (N, 2 C + 1) of each slice, in the middle, and of its neighbours; -1 for none, and
    for a slice without a score."""
    positions = np.asarray(positions_mm, dtype=float)
    beside = np.full((len(values), 2 * reach + 1), -1)
    beside[:, reach] = np.where(np.isnan(values), -1, np.arange(len(values)))
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i in np.flatnonzero(~np.isnan(positions)).tolist():
        members[series[i]].append(i)
    for own in map(np.array, members.values()):
        # Slices at one place follow one another by their scores, whatever the order given.
        own = own[np.lexsort((values[own], positions[own]))]
        table = neighbours(positions[own], reach)
        found = np.where(np.isnan(values[own][table]), -1, own[table])
        for step in (-1, 1):
            for column in range(reach + step, reach + step * (reach + 1), step):
                before = column - step
                # Where there is none the nearest stands in, which is no neighbour here.
                found[(table[:, column] == table[:, before]) | (found[:, before] < 0), column] = -1
        beside[own] = found
    return beside
