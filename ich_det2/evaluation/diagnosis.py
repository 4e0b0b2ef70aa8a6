"""Image- and patient-level diagnosis from scores (pure numpy).

An image's score is its highest box score, 0 without boxes; a patient's follows from the scores of
its images by a rule. A metric whose denominator is 0 is NaN, never 0 or 1.

Shape glossary: M images or patients, T thresholds, P patients. ``weights`` say how often each
image counts, sized (..., M), integers; the leading axes (say, of bootstrap draws) are kept.
"""

import re
from collections.abc import Collection, Sequence

import numpy as np

COST_RATIO = 10.0
"""Cost of a missed bleed, in false alarms, unless a caller says otherwise."""

METRICS = (
    *("accuracy", "recall", "precision", "specificity", "npv", "f1"),
    *("f2", "balanced_accuracy", "mcc", "expected_cost"),
)


def diagnose(scores, theta: float) -> bool:
    """Whether an image is positive: any of its boxes scores at least theta, eq. (8).

    Args:
        scores: box scores of one image (or image scores of one patient), any number of them.
        theta: threshold; a score equal to it is positive.
    """
    return bool((np.asarray(scores, dtype=np.float64) >= theta).any())


# ---- counts and metrics ----------------------------------------------------------------------


def confusion_at_thresholds(y_true, y_score, thresholds, weights=None) -> dict[str, np.ndarray]:
    """Counts of the diagnosis ``y_score >= threshold`` at each threshold.

    Args:
        y_true: 1 hemorrhage, 0 none, sized (M,).
        y_score: sized (M,).
        thresholds: sized (T,), in any order.
        weights: sized (..., M); None counts each image once.

    Returns:
        "tp", "fp", "tn", "fn", each int64 sized (..., T).

    Raises:
        ValueError: if sizes differ, a label is not 0 or 1, or a score or threshold is NaN.
    """
    y_true, y_score = _check(y_true, y_score)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    if np.isnan(thresholds).any():
        raise ValueError(f"thresholds are {thresholds}, expected numbers, got NaN.")
    fn, n_positive = _weight_below(y_score, y_true, thresholds, weights)
    tn, n_negative = _weight_below(y_score, ~y_true, thresholds, weights)
    return {"tp": n_positive - fn, "fp": n_negative - tn, "tn": tn, "fn": fn}


def _weight_below(y_score, chosen, thresholds, weights):
    """Weight of the chosen images that score below each threshold (..., T), and in all (..., 1)."""
    if weights is None:
        scores = np.sort(y_score[chosen])
        # "left" counts the scores below a threshold: those diagnosed as negative.
        return np.searchsorted(scores, thresholds, side="left"), len(scores)
    scores, total = _cumulate(y_score, chosen, weights)
    return total[..., np.searchsorted(scores, thresholds, side="left")], total[..., -1:]


def _cumulate(y_score, chosen, weights):
    """Sorted scores of the chosen, sized (N,), and the weight of the first n, sized (..., N+1)."""
    where = np.flatnonzero(chosen)
    where = where[np.argsort(y_score[where], kind="stable")]
    weights = np.asarray(weights)
    total = np.zeros((*weights.shape[:-1], len(where) + 1), dtype=np.int64)
    np.cumsum(weights[..., where], axis=-1, out=total[..., 1:])
    return y_score[where], total


def diagnosis_metrics(tp, fp, tn, fn, *, cost_ratio: float = COST_RATIO) -> dict[str, np.ndarray]:
    """Metrics of counts, named in ``METRICS``, each of the counts' shape.

    Args:
        tp, fp, tn, fn: counts, any common shape.
        cost_ratio: cost of a missed bleed, in false alarms. "expected_cost" is the cost of an
            image's (patient's) errors in false alarms, (cost_ratio fn + fp) / n; lower is better.
    """
    tp, fp, tn, fn = (np.asarray(x, dtype=np.float64) for x in (tp, fp, tn, fn))
    recall, specificity = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
    return {
        "accuracy": _ratio(tp + tn, tp + fp + tn + fn),
        "recall": recall,
        "precision": _ratio(tp, tp + fp),
        "specificity": specificity,
        "npv": _ratio(tn, tn + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "f2": _ratio(5 * tp, 5 * tp + fp + 4 * fn),
        "balanced_accuracy": (recall + specificity) / 2,
        "mcc": _ratio(
            tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn)) * np.sqrt((tn + fp) * (tn + fn))
        ),
        "expected_cost": _ratio(cost_ratio * fn + fp, tp + fp + tn + fn),
    }


def diagnosis_table(
    level: str, y_true, y_score, thresholds, *, cost_ratio: float = COST_RATIO
) -> list[dict]:
    """Rows of ``diagnosis_thresholds.csv``: level, threshold, counts and metrics."""
    counts = confusion_at_thresholds(y_true, y_score, thresholds)
    columns = {**counts, **diagnosis_metrics(**counts, cost_ratio=cost_ratio)}
    return [
        {"level": level, "threshold": float(t), **{k: v[i].item() for k, v in columns.items()}}
        for i, t in enumerate(thresholds)
    ]


def summarize(
    y_true, y_score, operating_threshold: float, *, cost_ratio: float = COST_RATIO
) -> dict[str, float]:
    """What a reader asks first: AUC, and the diagnosis at the operating threshold."""
    (row,) = diagnosis_table("", y_true, y_score, [operating_threshold], cost_ratio=cost_ratio)
    row.pop("level")
    return {
        "n": len(np.atleast_1d(y_true)),
        "n_positive": int(np.sum(y_true)),
        "auc": roc_auc_score(y_true, y_score),
        "average_precision": average_precision_score(y_true, y_score),
        "recall_at_specificity_0.90": float(recall_at_specificity(y_true, y_score, 0.90)),
        **row,
    }


# ---- curves ----------------------------------------------------------------------------------


def roc_curve(y_true, y_score) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ROC curve with a point for every distinct score.

    Returns:
        False positive rate, recall, and falling thresholds, the first infinite; each sized (K,).
        A rate without its class is NaN.

    Raises:
        ValueError: as :func:`confusion_at_thresholds`.
    """
    thresholds = np.r_[np.inf, np.unique(_check(y_true, y_score)[1])[::-1]]
    counts = confusion_at_thresholds(y_true, y_score, thresholds)
    false_alarms = _ratio(counts["fp"], counts["fp"] + counts["tn"])
    return false_alarms, _ratio(counts["tp"], counts["tp"] + counts["fn"]), thresholds


def pr_curve(y_true, y_score) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The precision-recall curve with a point for every distinct score.

    Returns:
        Precision and recall, sized (K + 1,), and rising thresholds, sized (K,); the last point, at
        precision 1 and recall 0, has none. Recall without a positive image is NaN.

    Raises:
        ValueError: as :func:`confusion_at_thresholds`.
    """
    thresholds = np.unique(_check(y_true, y_score)[1])
    counts: dict = confusion_at_thresholds(y_true, y_score, thresholds)
    metrics = diagnosis_metrics(**counts)
    last = 0.0 if np.any(y_true) else np.nan
    return np.r_[metrics["precision"], 1.0], np.r_[metrics["recall"], last], thresholds


def roc_auc_score(y_true, y_score, weights=None) -> float | np.ndarray:
    """Area under the ROC curve; ties count half. NaN without both classes.

    Args:
        y_true, y_score: sized (M,).
        weights: sized (..., M); None counts each image once.

    Returns:
        A float, or with weights sized (...).
    """
    y_true, y_score = _check(y_true, y_score)
    counts = np.ones(len(y_true), dtype=np.int64) if weights is None else np.asarray(weights)
    negative, n_negative = _cumulate(y_score, ~y_true, counts)
    positive, n_positive = _cumulate(y_score, y_true, counts)
    # Twice the negatives that each positive beats: ties are counted by "right" alone.
    wins = n_negative[..., np.searchsorted(negative, positive, side="left")]
    wins += n_negative[..., np.searchsorted(negative, positive, side="right")]
    wins = (np.diff(n_positive) * wins).sum(axis=-1)
    area = _ratio(wins, 2.0 * n_positive[..., -1] * n_negative[..., -1])
    return float(area) if weights is None else area


def average_precision_score(y_true, y_score, weights=None) -> float | np.ndarray:
    """Area under the precision-recall curve, by steps as scikit-learn's. NaN without a positive.

    Args:
        y_true, y_score: sized (M,).
        weights: sized (..., M); None counts each image once.

    Returns:
        A float, or with weights sized (...).
    """
    thresholds = np.unique(_check(y_true, y_score)[1])
    counts = confusion_at_thresholds(y_true, y_score, thresholds, weights)
    recall = _ratio(counts["tp"], counts["tp"] + counts["fn"])
    # Where nothing is called positive, no recall is gained.
    precision = np.nan_to_num(_ratio(counts["tp"], counts["tp"] + counts["fp"]))
    area = -(np.diff(recall, append=0.0) * precision).sum(axis=-1)
    area = area if len(thresholds) else area + np.nan
    return float(area) if weights is None else area


def recall_at_specificity(y_true, y_score, specificity: float, weights=None) -> float | np.ndarray:
    """The highest recall among thresholds whose specificity is at least the one given.

    NaN without both classes.

    Args:
        y_true, y_score: sized (M,).
        specificity: the least one allowed.
        weights: sized (..., M); None counts each image once.

    Returns:
        A float, or with weights sized (...).
    """
    y_true, y_score = _check(y_true, y_score)
    thresholds = np.append(np.unique(y_score), np.inf)
    counts = confusion_at_thresholds(y_true, y_score, thresholds, weights)
    enough = _ratio(counts["tn"], counts["tn"] + counts["fp"]) >= specificity
    recall = _ratio(counts["tp"], counts["tp"] + counts["fn"])
    # Where there is no healthy image, no threshold is enough.
    best = np.where(enough, recall, -1.0).max(axis=-1)
    best = np.where(best < 0, np.nan, best)
    return float(best) if weights is None else best


def specificity_at_recall(y_true, y_score, recall: float, weights=None) -> float | np.ndarray:
    """The highest specificity among thresholds whose recall is at least the one given.

    NaN without both classes. Sizes as :func:`recall_at_specificity`.
    """
    y_true, y_score = _check(y_true, y_score)
    return recall_at_specificity(~y_true, -y_score, recall, weights)


# ---- hemorrhage types ------------------------------------------------------------------------


def type_recall(types: Sequence[Collection[str]], y_score, thresholds) -> dict[str, dict]:
    """How many of the images with a type of hemorrhage are called positive.

    Args:
        types: the types in each of the M images, none in a healthy one.
        y_score: sized (M,).
        thresholds: sized (T,).

    Returns:
        type -> "n" (images with it), "tp" int64 (T,) and "recall" (T,), by name of type.

    Raises:
        ValueError: if sizes differ or a score is NaN.
    """
    recalls = {}
    for name in sorted(set().union(*types)):
        has = np.array([name in entry for entry in types])
        counts = confusion_at_thresholds(has, y_score, thresholds)
        recall = _ratio(counts["tp"], counts["tp"] + counts["fn"])
        recalls[name] = {"n": int(has.sum()), "tp": counts["tp"], "recall": recall}
    return recalls


# ---- patients --------------------------------------------------------------------------------


def patient_scores(index, y_score, n_patients: int, rule: str = "any") -> np.ndarray:
    """Scores of patients from those of their images: ``score >= theta`` is the rule's diagnosis.

    Args:
        index: patient of each image, 0 to P - 1, sized (M,); every patient has an image.
        y_score: sized (M,).
        n_patients: P.
        rule: "any" (a positive slice makes a positive patient: the highest score), "at_least_<m>"
            (at least m positive slices: the m-th highest; minus infinity with fewer slices),
            "top_<k>_mean" (mean of the k highest, or of all where there are fewer), or "noisy_or"
            (1 - prod(1 - score): some slice is right, if slices erred independently).

    Returns:
        Sized (P,).

    Raises:
        ValueError: if the rule is none of these, or scores for "noisy_or" are not in [0, 1].
    """
    kind, number = parse_rule(rule)
    index, y_score = np.asarray(index), np.asarray(y_score, dtype=np.float64)
    if kind == "noisy_or":
        if len(y_score) and not (0 <= y_score.min() and y_score.max() <= 1):
            raise ValueError(
                f"the patient rule noisy_or needs scores from 0 to 1, got {y_score.min():g} to"
                f" {y_score.max():g}."
            )
        with np.errstate(divide="ignore"):
            logs = np.log1p(-y_score)
        return -np.expm1(np.bincount(index, logs, n_patients))
    order = np.lexsort((-y_score, index))
    sizes = np.bincount(index, minlength=n_patients)
    first = np.cumsum(sizes) - sizes
    if kind == "top_mean":
        rank = np.arange(len(index)) - first[index[order]]
        top = order[rank < number]
        return np.bincount(index[top], y_score[top], n_patients) / np.minimum(sizes, number)
    scores = np.full(n_patients, -np.inf)
    enough = sizes >= number
    scores[enough] = y_score[order[first[enough] + number - 1]]
    return scores


def parse_rule(rule: str) -> tuple[str, int]:
    """A patient rule's kind ("at_least", "top_mean" or "noisy_or") and number.

    Raises:
        ValueError: if it is no rule of :func:`patient_scores`.
    """
    if rule == "any":
        return "at_least", 1
    if rule == "noisy_or":
        return "noisy_or", 0
    if match := re.fullmatch(r"at_least_([1-9]\d*)|top_([1-9]\d*)_mean", rule):
        return ("at_least", int(match[1])) if match[1] else ("top_mean", int(match[2]))
    raise ValueError(
        f"the patient rule is '{rule}', expected any, at_least_<m>, top_<k>_mean or noisy_or"
        " (e.g. at_least_2)."
    )


def group_scores(
    groups: Sequence, y_true, y_score, rule: str = "any"
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Patients from images: positive if any image is, scored by a rule.

    Args:
        groups: patient of each image, sized (M,).
        y_true: sized (M,).
        y_score: sized (M,).
        rule: of :func:`patient_scores`.

    Returns:
        Sorted unique patients, their labels and their scores.

    Raises:
        ValueError: as :func:`patient_scores` and :func:`confusion_at_thresholds`.
    """
    y_true, y_score = _check(y_true, y_score)
    names, index = group_index(groups)
    labels = (np.bincount(index, y_true, len(names)) > 0).astype(int)
    return names.tolist(), labels, patient_scores(index, y_score, len(names), rule)


def group_index(groups: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Sorted unique names of groups, as text, and the place of each image's group among them."""
    labels = np.asarray(groups)
    if labels.dtype.kind not in "iu":  # whole numbers sort much faster as such
        labels = labels.astype(str)
    names, index = np.unique(labels, return_inverse=True)
    return names.astype(str), index


def _check(y_true, y_score) -> tuple[np.ndarray, np.ndarray]:
    y_true, y_score = np.asarray(y_true), np.asarray(y_score, dtype=np.float64)
    if y_true.shape != y_score.shape or y_true.ndim != 1:
        raise ValueError(
            f"y_true is of shape {y_true.shape} and y_score of {y_score.shape}, expected one (M,)."
        )
    if not ((y_true == 0) | (y_true == 1)).all():
        raise ValueError("y_true holds a label that is neither 0 nor 1.")
    if np.isnan(y_score).any():
        raise ValueError(f"y_score is NaN at index {int(np.isnan(y_score).argmax())}.")
    return y_true.astype(bool), y_score


def _ratio(numerator, denominator) -> np.ndarray:
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    out = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)
