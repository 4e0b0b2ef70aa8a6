"""How far a metric may wander by the choice of patients.

Shape glossary: M images, G groups (patients), B draws, S numbers of a statistic.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from scipy.special import ndtr, stdtrit

from .diagnosis import group_index

_CHUNK = 4_000_000
"""Weights of so many images are held at a time."""
_FEW = 500
"""With more groups than this an interval needs no expansion: at 500 it is 0.3 % wider."""


def bootstrap_by_group(
    statistic: Callable[[np.ndarray], Sequence],
    groups: Sequence,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> np.ndarray:
    """Expanded percentile intervals over whole groups (patients) drawn with replacement.

    Images of one patient are near copies, so drawing images would make intervals too narrow. For a
    paired comparison the statistic computes both models with the same weights. Percentiles of the
    draws are too narrow for few groups: by the factor sqrt((n - 1) / n), and for taking z where
    Student's t belongs. So those further out are taken that make up for both, with n the groups
    that a number depends on (a recall: those with a bleed). Where every draw gives the same, as of
    a recall of 1 or with one group, the interval is a point and says nothing; of a proportion,
    :func:`wilson_by_group` does.

    Source: Hesterberg, "What Teachers Should Know About the Bootstrap", Am. Stat. 69 (2015) 371.

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
    draws = _draws(statistic, groups, n_resamples, seed)
    return _expanded(draws, statistic, groups, confidence)


def paired_by_group(
    difference: Callable[[np.ndarray], Sequence],
    groups: Sequence,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> np.ndarray:
    """Intervals of differences as :func:`bootstrap_by_group`, and their two-sided p-values.

    The p-value is twice the smaller share of the draws on either side of 0, those at 0 counted on
    both, with one more draw on each: never less than 2 / (B + 1).

    Args:
        difference: as ``statistic`` there.
        groups, n_resamples, confidence, seed: as there.

    Returns:
        (S, 3): low and high ends and p-value; NaN where no draw gave a number.
    """
    draws = _draws(difference, groups, n_resamples, seed)
    n = (~np.isnan(draws)).sum(axis=1)
    fewer = np.minimum((draws <= 0).sum(axis=1), (draws >= 0).sum(axis=1))
    p_value = np.where(n > 0, np.minimum(1.0, 2 * (fewer + 1) / (n + 1)), np.nan)
    return np.c_[_expanded(draws, difference, groups, confidence), p_value]


def _draws(statistic, groups: Sequence, n_resamples: int, seed: int) -> np.ndarray:
    """The statistic of each draw, (S, B)."""
    names, index = group_index(groups)
    if len(names) == 0:
        raise ValueError("expected at least one image, got none.")
    rng = np.random.default_rng(seed)
    parts = []
    step = max(1, _CHUNK // max(len(index), len(names)))
    for start in range(0, n_resamples, step):
        size = min(step, n_resamples - start)
        drawn = rng.integers(len(names), size=(size, len(names)))
        drawn += np.arange(size)[:, None] * len(names)
        counts = np.bincount(drawn.ravel(), minlength=size * len(names))
        parts.append(_values(statistic, counts.reshape(size, len(names)), index))
    return np.concatenate(parts, axis=1)


def _expanded(draws: np.ndarray, statistic, groups: Sequence, confidence: float) -> np.ndarray:
    """Expanded percentiles (S, 2) of draws (S, B)."""
    names, index = group_index(groups)
    n = np.full(len(draws), len(names))
    if 2 < len(names) <= _FEW:
        n = np.maximum(_groups_that_matter(statistic, len(names), index), 2)
    tail = np.full(len(draws), (1 - confidence) / 2)
    if len(names) > 1:
        tail = ndtr(np.sqrt(n / (n - 1)) * stdtrit(n - 1, tail))
    bounds = np.full((len(draws), 2), np.nan)
    for i in np.flatnonzero(~np.isnan(draws).all(axis=1)):
        bounds[i] = np.nanpercentile(draws[i], (100 * tail[i], 100 - 100 * tail[i]))
    return bounds


def _values(statistic, counts: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The statistic (S, B') where each group is there so often, (B', G)."""
    return np.array(statistic(counts.astype(np.int32)[:, index]), dtype=float).reshape(
        -1, len(counts)
    )


def _groups_that_matter(statistic, n_groups: int, index: np.ndarray) -> np.ndarray:
    """How many groups change each number when they are left out, (S,)."""
    every = np.ones((1, n_groups), dtype=int)
    left_out = every - np.eye(n_groups, dtype=int)
    step = max(1, _CHUNK // len(index))
    values = [
        _values(statistic, left_out[start : start + step], index)
        for start in range(0, n_groups, step)
    ]
    same = np.isclose(np.concatenate(values, axis=1), _values(statistic, every, index), rtol=1e-9)
    return (~same).sum(axis=1)


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


def wilson_by_group(hits, cases, groups: Sequence, confidence: float = 0.95) -> np.ndarray:
    """Wilson's interval of a proportion of images, where those of a group (patient) are alike.

    The number of cases is the one that independent cases would need for the variance between the
    groups (cases over the design effect), with Student's t of the groups in place of z; without
    any variance it is the number of groups.

    Source: Korn and Graubard, Survey Methodology 24 (1998) 193; compared with others by Dean and
    Pagano, J. Surv. Stat. Methodol. 3 (2015) 484.

    Args:
        hits, cases: of which images the proportion is, bool (M,); a hit is a case.
        groups: group of each of the M images.
        confidence: nominal coverage.

    Returns:
        (2,): low and high end; NaN with cases of fewer than two groups.
    """
    hits, cases = np.asarray(hits, dtype=bool), np.asarray(cases, dtype=bool)
    _, index = group_index(np.asarray(groups)[cases])
    n = np.bincount(index).astype(float)
    if len(n) < 2:
        return np.full(2, np.nan)
    residual = np.bincount(index, hits[cases]) - hits[cases].mean() * n
    p, n_groups, n_cases = hits[cases].mean(), len(n), n.sum()
    variance = n_groups / (n_groups - 1) * (residual @ residual) / n_cases**2
    effective = n_groups if variance == 0 else min(p * (1 - p) / variance, n_cases)
    effective *= (normal_quantile(confidence) / stdtrit(n_groups - 1, (1 + confidence) / 2)) ** 2
    return wilson_interval(p * effective, effective, confidence)


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
