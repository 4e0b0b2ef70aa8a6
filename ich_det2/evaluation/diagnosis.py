"""Image- and patient-level diagnosis from scores (pure numpy).

An image's score is its highest box score, 0 without boxes; a patient's is the highest of its
images. A metric whose denominator is 0 is NaN.

Shape glossary: M images or patients, T thresholds.
"""

from collections.abc import Sequence

import numpy as np

METRICS = ("accuracy", "recall", "precision", "specificity", "npv", "f1")


def diagnose(scores, theta: float) -> bool:
    """Whether an image is positive: any of its boxes scores at least theta, eq. (8).

    Args:
        scores: box scores of one image (or image scores of one patient), any number of them.
        theta: threshold; a score equal to it is positive.
    """
    return bool((np.asarray(scores, dtype=np.float64) >= theta).any())


def confusion_at_thresholds(y_true, y_score, thresholds) -> dict[str, np.ndarray]:
    """Counts of the diagnosis ``y_score >= threshold`` at each threshold.

    Args:
        y_true: 1 hemorrhage, 0 none, sized (M,).
        y_score: sized (M,).
        thresholds: sized (T,), in any order.

    Returns:
        "tp", "fp", "tn", "fn", each int64 sized (T,).

    Raises:
        ValueError: if sizes differ, a label is not 0 or 1, or a score is NaN.
    """
    y_true, y_score = _check(y_true, y_score)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    positive, negative = np.sort(y_score[y_true]), np.sort(y_score[~y_true])
    # searchsorted "left" counts the scores below a threshold: those diagnosed as negative.
    fn = np.searchsorted(positive, thresholds, side="left")
    tn = np.searchsorted(negative, thresholds, side="left")
    return {"tp": len(positive) - fn, "fp": len(negative) - tn, "tn": tn, "fn": fn}


def diagnosis_metrics(tp, fp, tn, fn) -> dict[str, np.ndarray]:
    """Accuracy, recall, precision, specificity, NPV and F1 of counts, each sized (T,)."""
    tp, fp, tn, fn = (np.asarray(x, dtype=np.float64) for x in (tp, fp, tn, fn))
    return {
        "accuracy": _ratio(tp + tn, tp + fp + tn + fn),
        "recall": _ratio(tp, tp + fn),
        "precision": _ratio(tp, tp + fp),
        "specificity": _ratio(tn, tn + fp),
        "npv": _ratio(tn, tn + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
    }


def roc_auc_score(y_true, y_score) -> float:
    """Area under the ROC curve; ties count half. NaN without both classes."""
    y_true, y_score = _check(y_true, y_score)
    positive, negative = y_score[y_true], np.sort(y_score[~y_true])
    if len(positive) == 0 or len(negative) == 0:
        return float("nan")
    below = np.searchsorted(negative, positive, side="left")
    not_above = np.searchsorted(negative, positive, side="right")
    return float((below + not_above).sum() / (2 * len(positive) * len(negative)))


def recall_at_specificity(y_true, y_score, specificity: float) -> float:
    """The highest recall among thresholds whose specificity is at least the one given.

    NaN without both classes.
    """
    y_true, y_score = _check(y_true, y_score)
    thresholds = np.append(np.unique(y_score), np.inf)
    counts = confusion_at_thresholds(y_true, y_score, thresholds)
    metrics = diagnosis_metrics(**counts)
    recall = metrics["recall"][metrics["specificity"] >= specificity]
    return float(recall.max()) if recall.size else float("nan")


def group_scores(groups: Sequence, y_true, y_score) -> tuple[list, np.ndarray, np.ndarray]:
    """Patients from images: positive if any image is, scored as their highest image.

    Args:
        groups: patient of each image, sized (M,).
        y_true: sized (M,).
        y_score: sized (M,).

    Returns:
        Sorted unique patients, their labels and their scores.
    """
    y_true, y_score = _check(y_true, y_score)
    names, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    labels, scores = np.zeros(len(names), dtype=int), np.full(len(names), -np.inf)
    np.maximum.at(labels, index, y_true.astype(int))
    np.maximum.at(scores, index, y_score)
    return names.tolist(), labels, scores


def diagnosis_table(level: str, y_true, y_score, thresholds) -> list[dict]:
    """Rows of ``diagnosis_thresholds.csv``: level, threshold, counts and metrics."""
    counts = confusion_at_thresholds(y_true, y_score, thresholds)
    columns = {**counts, **diagnosis_metrics(**counts)}
    return [
        {"level": level, "threshold": float(t), **{k: v[i].item() for k, v in columns.items()}}
        for i, t in enumerate(thresholds)
    ]


def summarize(y_true, y_score, operating_threshold: float) -> dict[str, float]:
    """What a reader asks first: AUC, and the diagnosis at the operating threshold."""
    row = diagnosis_table("", y_true, y_score, [operating_threshold])[0]
    row.pop("level")
    return {
        "n": len(np.atleast_1d(y_true)),
        "n_positive": int(np.sum(y_true)),
        "auc": roc_auc_score(y_true, y_score),
        "recall_at_specificity_0.90": recall_at_specificity(y_true, y_score, 0.90),
        **row,
    }


def _check(y_true, y_score) -> tuple[np.ndarray, np.ndarray]:
    y_true, y_score = np.asarray(y_true), np.asarray(y_score, dtype=np.float64)
    if y_true.shape != y_score.shape or y_true.ndim != 1:
        raise ValueError(
            f"y_true is of shape {y_true.shape} and y_score of {y_score.shape}, expected one (M,)."
        )
    if not np.isin(y_true, (0, 1)).all():
        raise ValueError("y_true holds a label that is neither 0 nor 1.")
    if np.isnan(y_score).any():
        raise ValueError(f"y_score is NaN at index {int(np.isnan(y_score).argmax())}.")
    return y_true.astype(bool), y_score


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    out = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)
