"""The numbers that forms of a detector are compared by: slices, patients, boxes; by type and size.

A bleeding slice without true boxes counts among slices and patients. No number of the boxes sees
it: what is predicted there is neither right nor wrong.

Shape glossary: M images, P patients, B draws of a bootstrap, S numbers; of the judged images (all
but those), D predicted and G true boxes in sum, K right predictions.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from pycocotools import mask as coco_mask

from .boxes import SIZES, thirds
from .diagnosis import (
    confusion_at_thresholds,
    group_index,
    group_scores,
    recall_at_specificity,
    roc_auc_score,
    specificity_at_recall,
)
from .intervals import paired_by_group
from .predictions import Predictions

RECALL = "recall @ specificity 0.90"
BOX_IOUS = (0.3, 0.5)
_RULES = {"patient AUC (any)": "any", "patient AUC (top 3)": "top_3_mean"}
_TOP_IOU = 0.3
_BOXES_AN_IMAGE = 100  # as COCO
_RECALLS = np.linspace(0, 1, 101)


class Yardstick:
    """Predictions of one model, or pooled over folds, made ready for weights of the patients."""

    def __init__(self, found: Predictions):
        """
        Args:
            found: with boxes and true boxes for the numbers of boxes.
        """
        self.found = found
        names, self._patient = group_index(found.patients)
        self._first = np.unique(self._patient, return_index=True)[1]
        self._n_patients = len(names)

    @property
    def has_boxes(self) -> bool:
        """Whether predicted and true boxes are known."""
        return self.found.boxes is not None and self.found.true_boxes is not None

    def metrics(self, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The headline numbers by name, NaN where undefined.

        Args:
            weights: int (B, M), how often each image is drawn, the same for all of a patient; None
                takes each once.

        Returns:
            name -> (B,), or () without weights.
        """
        found, single = self.found, weights is None
        weights = np.ones((1, len(found.labels)), dtype=int) if weights is None else weights
        drawn = weights[:, self._first]
        scored = found.labels, found.scores
        metrics = {
            "AUC": roc_auc_score(*scored, weights),
            RECALL: recall_at_specificity(*scored, 0.90, weights),
            "specificity @ recall 0.95": specificity_at_recall(*scored, 0.95, weights),
        }
        for name, rule in _RULES.items():
            _, *patients = group_scores(found.patients, *scored, rule)
            metrics[name] = roc_auc_score(*patients, drawn)
        if self.has_boxes:
            metrics |= {f"AP{100 * iou:.0f}": self._precision(iou, drawn) for iou in BOX_IOUS}
            true = self._counts(self._of_true)
            for iou in BOX_IOUS:
                found_boxes = self._counts(self._of_true[self.best_iou >= iou])
                metrics[_box_recall(iou)] = _share(drawn @ found_boxes, drawn @ true)
            slices, right = self._top_boxes
            metrics[f"top box @ {_TOP_IOU}"] = _share(drawn @ right, drawn @ slices)
        return {name: value[0] for name, value in metrics.items()} if single else metrics

    def by_type(self) -> list[dict]:
        """Rows of each type of bleed: slices that are found, and boxes.

        A slice is found if it scores at least the lowest threshold of specificity 0.90 or more.
        """
        found = self.found
        if found.types is None:
            return []
        thresholds = np.append(np.unique(found.scores), np.inf)
        counts = confusion_at_thresholds(*(found.labels, found.scores), thresholds)
        enough = counts["tn"] / max(1, int((found.labels == 0).sum())) >= 0.90
        # Without healthy slices no threshold is enough.
        called = np.where(enough.any(), found.scores >= thresholds[enough.argmax()], np.nan)
        of_box = np.array([name for names in found.types for name in names], dtype=str)
        rows = []
        for name in np.unique(of_box).tolist():
            has = np.array([name in names for names in found.types])
            row = {"type": name, "slices": int(has.sum()), RECALL: float(called[has].mean())}
            rows.append(row | self._recalls(of_box == name))
        return rows

    def by_size(self) -> list[dict]:
        """Rows of the thirds of the true boxes by area, with their bounds, in squared pixels."""
        if not self.has_boxes or not len(self._of_true):
            return []
        area = np.concatenate([boxes[:, 2] * boxes[:, 3] for boxes in self.found.true_boxes])
        third, bounds = thirds(area)
        return [
            {"size": name, "from": a, "to": b, **self._recalls(third == i)}
            for i, (name, (a, b)) in enumerate(zip(SIZES, bounds))
        ]

    def _recalls(self, chosen: np.ndarray) -> dict[str, float]:
        """Recall of the chosen true boxes (G,)."""
        row: dict = {"boxes": int(chosen.sum())}
        if self.has_boxes and chosen.any():
            row |= {_box_recall(u): float((self.best_iou[chosen] >= u).mean()) for u in BOX_IOUS}
        return row

    # ---- boxes ---------------------------------------------------------------------------------

    @cached_property
    def _ious(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Falling scores (D_i,) and IoUs (D_i, G_i) of each judged image."""
        pairs = []
        for i in self.found.judged:
            boxes, targets = self.found.boxes[i], self.found.true_boxes[i]
            boxes = boxes[np.argsort(-boxes[:, 0], kind="stable")]
            iou = np.zeros((len(boxes), len(targets)))
            if iou.size:
                iou = coco_mask.iou(boxes[:, 1:], targets, np.zeros(len(targets), dtype=np.uint8))
            pairs.append((boxes[:, 0], iou))
        return pairs

    @cached_property
    def best_iou(self) -> np.ndarray:
        """The largest IoU of any predicted box with each true one, (G,)."""
        return np.concatenate([iou.max(axis=0, initial=0.0) for _, iou in self._ious] or [[]])

    @cached_property
    def _of_true(self) -> np.ndarray:
        """Patient of each true box, (G,)."""
        number = [iou.shape[1] for _, iou in self._ious]
        return np.repeat(self._patient[self.found.judged], number)

    @cached_property
    def _top_boxes(self) -> tuple[np.ndarray, np.ndarray]:
        """Slices with true boxes, and those whose top box meets one, of each patient, (P,)."""
        pairs = [(self._patient[i], iou) for i, (_, iou) in zip(self.found.judged, self._ious)]
        slices = [patient for patient, iou in pairs if iou.shape[1]]
        right = [p for p, iou in pairs if iou.shape[1] and iou[:1].max(initial=0.0) >= _TOP_IOU]
        return self._counts(slices), self._counts(right)

    def _counts(self, patients) -> np.ndarray:
        return np.bincount(np.asarray(patients, dtype=int), minlength=self._n_patients)

    def _precision(self, iou: float, drawn: np.ndarray) -> np.ndarray:
        """COCO's AP, (B,), where each patient is there so often, (B, P)."""
        right, wrong = self._curves[iou]
        right, wrong = drawn @ right, drawn @ wrong
        n_true = drawn @ self._counts(self._of_true)
        precision = np.divide(right, right + wrong, out=np.zeros(right.shape), where=right > 0)
        # No recall is gained at a wrong box, so the envelope is that of the right ones.
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        envelope = np.pad(envelope, ((0, 0), (0, 1)))
        areas = np.full(len(drawn), np.nan)
        for b in np.flatnonzero(n_true):
            places = np.searchsorted(right[b] / n_true[b], _RECALLS, side="left")
            areas[b] = envelope[b, places].mean()
        return areas

    @cached_property
    def _curves(self) -> dict[float, tuple[np.ndarray, np.ndarray]]:
        """IoU -> right and wrong predictions of each patient down to each right one, (P, K)."""
        kept = [(scores[:_BOXES_AN_IMAGE], iou[:_BOXES_AN_IMAGE]) for scores, iou in self._ious]
        scores = np.concatenate([s for s, _ in kept] or [[]])
        order = np.argsort(-scores, kind="stable")
        patient = np.repeat(self._patient[self.found.judged], [len(s) for s, _ in kept])[order]
        curves = {}
        for threshold in BOX_IOUS:
            hit = np.concatenate([match_boxes(u, threshold) for _, u in kept] or [[]])
            hit = hit.astype(bool)[order]
            counts = np.zeros((2, self._n_patients, int(hit.sum()) + 1))
            np.add.at(counts, ((~hit).astype(int), patient, np.cumsum(hit) - hit), 1)
            right, wrong = counts.cumsum(axis=2)[..., :-1]
            curves[threshold] = right, wrong
        return curves


def match_boxes(iou: np.ndarray, threshold: float) -> np.ndarray:
    """Which predicted boxes are right, as COCO: by falling score, each takes the best free box.

    Args:
        iou: (D, G) of one image, the highest score first.
        threshold: an IoU equal to it is a hit.

    Returns:
        bool (D,).
    """
    hit, free = np.zeros(len(iou), dtype=bool), np.ones(iou.shape[1], dtype=bool)
    for d in np.flatnonzero(iou.max(axis=1, initial=0.0) >= threshold):
        left = np.where(free, iou[d], -1.0)
        if left.max() >= threshold:
            hit[d] = True
            free[left.argmax()] = False
    return hit


def paired_differences(
    pairs: Sequence[tuple[Yardstick, Yardstick]], *, n_resamples: int = 2000, seed: int = 0
) -> list[dict]:
    """Differences of a form to a reference over the same drawn patients, the mean over seeds.

    Args:
        pairs: of each seed, the form and the reference, all of the same images in one order.
        n_resamples, seed: of ``paired_by_group``.

    Returns:
        Rows with "metric", "difference", "low", "high" (95 %) and "p_value" (two-sided); a number
        that one of both lacks is left out.
    """
    names = [
        name
        for name, value in pairs[0][0].metrics().items()
        if not np.isnan(value + pairs[0][1].metrics().get(name, np.nan))
    ]

    def statistic(weights):
        both = [(form.metrics(weights), other.metrics(weights)) for form, other in pairs]
        return [np.mean([a[name] - b[name] for a, b in both], axis=0) for name in names]

    found = pairs[0][0].found
    points = np.ravel(statistic(np.ones((1, len(found.labels)), dtype=int)))
    bounds = paired_by_group(statistic, found.patients, n_resamples=n_resamples, seed=seed)
    return [
        {"metric": name, "difference": float(point), "low": low, "high": high, "p_value": p}
        for name, point, (low, high, p) in zip(names, points, bounds.tolist())
    ]


def _box_recall(iou: float) -> str:
    return f"box recall @ {iou}"


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
