"""Lesions: which true boxes are found, at how many false positives a scan (FROC, CPM).

A lesion is a true box on a slice; boxes of one bleed on neighbouring slices are not linked. A scan
is what false positives are counted over: an image or a patient. Boxes are pixels, x, y, width,
height, as in COCO's JSON; a predicted row has its score in front.

Shape glossary: M images, per image D_i predicted and G_i true boxes; D and G over all images; K
points of a curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

FALSE_POSITIVE, DUPLICATE = -1, -2
"""In :class:`Matches`: a prediction on no lesion, and one on a lesion that a better one found."""

HITS = {"iou": "IoU of at least 0.5", "centre": "centre in the true box"}
"""Of :func:`match_detections`: when a box finds a lesion, in words."""

CPM_RATES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""False positives a scan whose sensitivities the competition performance metric averages."""


@dataclass(frozen=True)
class Matches:
    """The predictions of all images, by falling score, and what each one hits.

    Attributes:
        score: float64 (D,).
        image: int (D,), position of the prediction's image.
        lesion: int (D,), position of the lesion found, ``FALSE_POSITIVE`` or ``DUPLICATE``.
        lesion_image: int (G,), position of each lesion's image.
        n_images: M.
    """

    score: np.ndarray
    image: np.ndarray
    lesion: np.ndarray
    lesion_image: np.ndarray
    n_images: int


@dataclass(frozen=True)
class FrocCurve:
    """A point for every distinct score.

    Attributes:
        thresholds: (K,), falling; the first is infinite.
        false_positives: (K,), a scan.
        sensitivity: (K,), share of the lesions found; NaN without lesions.
    """

    thresholds: np.ndarray
    false_positives: np.ndarray
    sensitivity: np.ndarray

    def sensitivity_at(self, rates: Sequence[float] = CPM_RATES) -> np.ndarray:
        """Sensitivity at the lowest threshold with at most so many false positives a scan.

        Nothing is interpolated: only operating points that exist count.

        Args:
            rates: false positives a scan, sized (R,).

        Returns:
            Sized (R,).
        """
        place = np.searchsorted(self.false_positives, np.asarray(rates) + 1e-9, side="right")
        return self.sensitivity[place - 1]

    @property
    def cpm(self) -> float:
        """Mean sensitivity at ``CPM_RATES``: the competition performance metric.

        Source: Niemeijer et al., IEEE Trans. Med. Imaging 30 (2011) 215.
        """
        return float(self.sensitivity_at().mean())


def match_detections(
    predicted: Sequence[np.ndarray],
    true: Sequence[np.ndarray],
    *,
    hit: str = "iou",
    iou_threshold: float = 0.5,
) -> Matches:
    """Assigns predictions to lesions, one to one within an image, the highest score first.

    A prediction takes, of the lesions it hits and that are free, the one with the largest IoU (the
    nearest centre); if all it hits are taken, it is a duplicate. Equal scores go in the given
    order. A lower score never changes what a higher one found, so one assignment serves every
    threshold.

    Args:
        predicted: per image (D_i, 5): score, x, y, width, height.
        true: per image (G_i, 4).
        hit: "iou" (at least ``iou_threshold``) or "centre" (that of the predicted box lies in the
            true one, its edge included).
        iou_threshold: for "iou"; an IoU equal to it is a hit.

    Raises:
        ValueError: if ``hit`` is neither, the numbers of images differ, or a score is NaN.
    """
    if hit not in HITS:
        raise ValueError(f"hit is '{hit}', expected 'iou' or 'centre'.")
    if len(predicted) != len(true):
        raise ValueError(
            f"predictions are of {len(predicted)} images and true boxes of {len(true)}, expected"
            " as many."
        )
    predicted = [np.asarray(boxes, dtype=np.float64).reshape(-1, 5) for boxes in predicted]
    true = [np.asarray(boxes, dtype=np.float64).reshape(-1, 4) for boxes in true]
    first = np.cumsum([0, *map(len, true)])
    lesions = []
    for i, (boxes, targets) in enumerate(zip(predicted, true)):
        if np.isnan(boxes).any():
            raise ValueError(f"a predicted box of image {i} holds NaN, expected numbers.")
        found = np.full(len(boxes), FALSE_POSITIVE)
        if len(boxes) and len(targets):
            hits, quality = _hits(boxes[:, 1:], targets, hit, iou_threshold)
            found = _assign(np.argsort(-boxes[:, 0], kind="stable"), hits, quality)
            found[found >= 0] += first[i]
        lesions.append(found)
    score = np.concatenate([np.empty(0), *(boxes[:, 0] for boxes in predicted)])
    order = np.argsort(-score, kind="stable")
    return Matches(
        score=score[order],
        image=np.repeat(np.arange(len(predicted)), [len(b) for b in predicted])[order],
        lesion=np.concatenate([np.empty(0, dtype=int), *lesions])[order],
        lesion_image=np.repeat(np.arange(len(true)), [len(t) for t in true]),
        n_images=len(predicted),
    )


def _hits(boxes, targets, hit, iou_threshold):
    """Which targets each box hits, and how well, both (D_i, G_i)."""
    if hit == "iou":
        iou = coco_mask.iou(boxes, targets, np.zeros(len(targets), dtype=np.uint8))
        return iou >= iou_threshold, iou
    centre = (boxes[:, :2] + boxes[:, 2:] / 2)[:, None]
    low, high = targets[:, :2], targets[:, :2] + targets[:, 2:]
    inside = ((low <= centre) & (centre <= high)).all(axis=-1)
    return inside, -np.linalg.norm(centre - (low + high) / 2, axis=-1)


def _assign(order, hits, quality):
    found = np.full(len(hits), FALSE_POSITIVE)
    free = np.ones(hits.shape[1], dtype=bool)
    for d in order[hits[order].any(axis=1)]:
        candidates = np.flatnonzero(hits[d] & free)
        if len(candidates):
            found[d] = candidates[np.argmax(quality[d, candidates])]
            free[found[d]] = False
        else:
            found[d] = DUPLICATE
    return found


def froc_curve(matches: Matches, scans=None, weights=None) -> FrocCurve:
    """The free-response ROC curve.

    All scans count in the false positives a scan, those without a lesion too. A duplicate is no
    false positive, as in LUNA16.

    Args:
        matches: of :func:`match_detections`.
        scans: scan of each image, 0 to the number of scans - 1, sized (M,); None: an image each.
        weights: how often each image counts, sized (M,), alike within a scan; None: once.

    Returns:
        The curve; predictions of one score enter together.
    """
    scans = np.arange(matches.n_images) if scans is None else np.asarray(scans)
    weights = np.ones(matches.n_images, dtype=int) if weights is None else np.asarray(weights)
    _, of_scan = np.unique(scans, return_index=True)
    n_scans, n_lesions = weights[of_scan].sum(), weights[matches.lesion_image].sum()
    weight = weights[matches.image]
    false = matches.lesion == FALSE_POSITIVE
    # The last of equal scores stands for all of them.
    last = np.flatnonzero(np.append(matches.score[1:] != matches.score[:-1], True))
    last = last[: len(matches.score)]
    false_positives = np.cumsum(weight * false)[last]
    found = np.cumsum(weight * (matches.lesion >= 0))[last]
    with np.errstate(invalid="ignore"):
        return FrocCurve(
            thresholds=np.r_[np.inf, matches.score[last]],
            false_positives=np.r_[0, false_positives] / n_scans,
            sensitivity=np.r_[0, found] / n_lesions,
        )
