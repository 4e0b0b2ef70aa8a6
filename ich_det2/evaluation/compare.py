"""Two models on the same patients: is one better, or was it luck? (pure numpy)

Shape glossary: M images or patients.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from .diagnosis import confusion_at_thresholds, diagnosis_metrics, group_index, roc_auc_score
from .intervals import bootstrap_by_group, delong_covariance, normal_quantile

COMPARED = ("auc", "accuracy", "recall", "specificity", "precision", "f2", "mcc", "expected_cost")


def delong_test(
    y_true, y_score, y_score_other, groups: Sequence | None = None, *, confidence: float = 0.95
) -> dict[str, float]:
    """Whether two correlated AUCs differ.

    Source: DeLong et al. 1988; with groups Obuchowski 1997, see ``delong_covariance``.

    Returns:
        "difference" (first minus other), "low", "high", "z" and two-sided "p_value"; NaN where
        undefined. Models that rank alike differ by 0 with p 1.
    """
    areas, covariance = delong_covariance(y_true, [y_score, y_score_other], groups)
    difference = areas[0] - areas[1]
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    # What cancels leaves rounding errors.
    if variance <= 1e-14 * max(covariance[0, 0], covariance[1, 1]):
        z, error = (0.0, 0.0) if difference == 0 else (math.nan, math.nan)
    else:
        error = math.sqrt(variance) if variance > 0 else math.nan
        z = difference / error
    half = normal_quantile(confidence) * error
    p = math.nan if math.isnan(z) else 2 * NormalDist().cdf(-abs(z))
    return {
        "difference": float(difference),
        "low": float(difference - half),
        "high": float(difference + half),
        "z": float(z),
        "p_value": float(p),
    }


def mcnemar_test(right, right_other, groups: Sequence | None = None) -> dict[str, float]:
    """Exact McNemar test: are two models right equally often?

    Under the null hypothesis the models may be swapped within any group, so a group's d (cases
    that the first alone has right, less those that the other alone has) is as likely -d. The
    two-sided p is that of a sum of all d at least as far from 0, over all swaps. For groups of one
    this is McNemar's exact test (binomial with probability 1/2); images of one patient are not
    independent, so they are swapped together.

    Args:
        right, right_other: whether each model calls each case correctly, bool (M,).
        groups: group of each case; None takes cases as independent.

    Returns:
        "only_first" and "only_other" (cases) and "p_value"; 1 without any disagreement.
    """
    right, right_other = np.asarray(right, dtype=bool), np.asarray(right_other, dtype=bool)
    d = right.astype(int) - right_other.astype(int)
    by_group = d
    if groups is not None:
        names, index = group_index(groups)
        by_group = np.bincount(index, d, len(names)).astype(int)
    steps = np.abs(by_group[by_group != 0])
    # Probabilities of the sum over all swaps; the middle is 0.
    chances = np.ones(1)
    for step in steps:
        wider = np.zeros(len(chances) + 2 * step)
        wider[: len(chances)] = chances / 2
        wider[2 * step :] += chances / 2
        chances = wider
    distance = np.abs(np.arange(len(chances)) - len(chances) // 2)
    return {
        "only_first": int((d > 0).sum()),
        "only_other": int((d < 0).sum()),
        "p_value": float(min(1.0, chances[distance >= abs(by_group.sum())].sum())),
    }


def paired_bootstrap(
    y_true,
    first: tuple[np.ndarray, float],
    other: tuple[np.ndarray, float],
    groups: Sequence,
    *,
    cost_ratio: float,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Differences of the metrics at the operating points, over the same drawn patients.

    Args:
        y_true: sized (M,).
        first, other: scores, sized (M,), and operating threshold of each model.
        groups: patient of each case.
        cost_ratio: of ``diagnosis_metrics``.
        n_resamples, seed: of ``bootstrap_by_group``.

    Returns:
        metric of ``COMPARED`` -> "difference" (first minus other), "low", "high".
    """

    def statistic(weights):
        values = []
        for y_score, threshold in (first, other):
            counts = confusion_at_thresholds(y_true, y_score, [threshold], weights)
            metrics = diagnosis_metrics(**counts, cost_ratio=cost_ratio)
            metrics = {name: value[..., 0] for name, value in metrics.items()}
            metrics["auc"] = roc_auc_score(y_true, y_score, weights)
            values.append(metrics)
        return [values[0][name] - values[1][name] for name in COMPARED]

    points = statistic(np.ones((1, len(y_true)), dtype=int))
    bounds = bootstrap_by_group(statistic, groups, n_resamples=n_resamples, seed=seed)
    return {
        name: {"difference": float(point[0]), "low": float(low), "high": float(high)}
        for name, point, (low, high) in zip(COMPARED, points, bounds)
    }
