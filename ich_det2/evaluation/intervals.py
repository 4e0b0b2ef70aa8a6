"""How far a metric may wander by the choice of patients (pure numpy).

Shape glossary: M images, G groups (patients), B draws, S numbers of a statistic.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from .diagnosis import group_index

_CHUNK = 4_000_000
"""Weights of so many images are held at a time."""


def bootstrap_by_group(
    statistic: Callable[[np.ndarray], Sequence],
    groups: Sequence,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> np.ndarray:
    """Percentile intervals over whole groups (patients) drawn with replacement.

    Images of one patient are near copies, so drawing images would make intervals too narrow. For a
    paired comparison the statistic computes both models with the same weights. With one group, or
    where every draw gives the same, the interval is a point and says nothing.

    Args:
        statistic: takes weights, int (B', M): how often each image was drawn, for some of the
            draws at once; returns S arrays (B',), NaN where a number is undefined.
        groups: group of each of the M images.
        n_resamples: B.
        confidence: share of the draws within the interval.
        seed: of the draws.

    Returns:
        (S, 2): low and high ends; draws whose number is NaN are left out of that number's. NaN
        where no draw gave a number.

    Raises:
        ValueError: if there are no images.
    """
    names, index = group_index(groups)
    if len(names) == 0:
        raise ValueError("expected at least one image, got none.")
    rng = np.random.default_rng(seed)
    draws = []
    step = max(1, _CHUNK // max(len(index), len(names)))
    for start in range(0, n_resamples, step):
        size = min(step, n_resamples - start)
        drawn = rng.integers(len(names), size=(size, len(names)))
        drawn += np.arange(size)[:, None] * len(names)
        counts = np.bincount(drawn.ravel(), minlength=size * len(names))
        counts = counts.reshape(size, len(names)).astype(np.int32)
        draws.append(np.array(statistic(counts[:, index]), dtype=float).reshape(-1, size))
    draws = np.concatenate(draws, axis=1)
    tail = 100 * (1 - confidence) / 2
    bounds = np.full((len(draws), 2), np.nan)
    defined = ~np.isnan(draws).all(axis=1)
    if defined.any():
        bounds[defined] = np.nanpercentile(draws[defined], (tail, 100 - tail), axis=1).T
    return bounds


def wilson_interval(successes, n, confidence: float = 0.95) -> np.ndarray:
    """Wilson's score interval of a proportion of independent cases.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927) 209.

    Args:
        successes, n: counts, any common shape.
        confidence: nominal coverage.

    Returns:
        (..., 2): low and high ends; NaN where n is 0.
    """
    successes, n = np.broadcast_arrays(np.asarray(successes, float), np.asarray(n, float))
    z = normal_quantile(confidence)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = successes / n
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        low = np.where(successes == 0, 0.0, middle - half)  # exactly, not by rounding
        high = np.where(successes == n, 1.0, middle + half)
    return np.where(n[..., None] > 0, np.stack([low, high], axis=-1), np.nan)


def delong_covariance(y_true, y_scores, groups: Sequence | None = None):
    """AUCs of models on the same cases, and their covariance.

    Source: DeLong, DeLong, Clarke-Pearson, Biometrics 44 (1988) 837; with groups, for several
    images of a patient, Obuchowski, Biometrics 53 (1997) 567, which is DeLong's for groups of one.

    Args:
        y_true: 1 hemorrhage, 0 none, sized (M,).
        y_scores: of K models, sized (K, M).
        groups: group of each case; None takes cases as independent.

    Returns:
        AUCs (K,) and covariance (K, K); NaN without both classes, the covariance also without two
        cases (groups) of each class.
    """
    y_true = np.asarray(y_true).astype(bool)
    y_scores = np.atleast_2d(np.asarray(y_scores, dtype=np.float64))
    n_groups, index = len(y_true), np.arange(len(y_true))
    if groups is not None:
        names, index = group_index(groups)
        n_groups = len(names)
    k, n_pos, n_neg = len(y_scores), int(y_true.sum()), int((~y_true).sum())
    if n_pos == 0 or n_neg == 0:
        return np.full(k, np.nan), np.full((k, k), np.nan)
    of_pos, of_neg = index[y_true], index[~y_true]
    areas = np.empty(k)
    # Sums over each group of how its positives (negatives) do against all of the other class,
    # less what the AUC lets expect.
    pos, neg = np.empty((k, n_groups)), np.empty((k, n_groups))
    for i, score in enumerate(y_scores):
        a, b = score[y_true], score[~y_true]
        below = _share_below(np.sort(b), a)
        above = 1 - _share_below(np.sort(a), b)
        areas[i] = below.mean()
        pos[i] = np.bincount(of_pos, below - areas[i], n_groups)
        neg[i] = np.bincount(of_neg, above - areas[i], n_groups)
    g_pos, g_neg = len(np.unique(of_pos)), len(np.unique(of_neg))
    if g_pos < 2 or g_neg < 2:
        return areas, np.full((k, k), np.nan)
    covariance = g_pos / (g_pos - 1) * (pos @ pos.T) / n_pos**2
    covariance += g_neg / (g_neg - 1) * (neg @ neg.T) / n_neg**2
    cross = n_groups / (n_groups - 1) * (pos @ neg.T) / (n_pos * n_neg)
    return areas, covariance + cross + cross.T


def _share_below(others: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Share of the sorted others below each score; ties count half."""
    both = np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right")
    return both / (2 * len(others))


def delong_interval(
    y_true, y_score, groups: Sequence | None = None, *, confidence: float = 0.95
) -> np.ndarray:
    """Interval of the AUC by :func:`delong_covariance`, within [0, 1].

    Returns:
        (2,): low and high end; NaN where the variance is undefined, or 0 as of an AUC of 1: it
        would claim certainty.
    """
    (area,), ((variance,),) = delong_covariance(y_true, [y_score], groups)
    if not variance > 0:
        return np.full(2, np.nan)
    half = normal_quantile(confidence) * np.sqrt(variance)
    return np.clip([area - half, area + half], 0, 1)


def normal_quantile(confidence: float) -> float:
    """z of a two-sided interval: 1.96 at 0.95."""
    return NormalDist().inv_cdf((1 + confidence) / 2)
