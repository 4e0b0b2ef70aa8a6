"""How far a metric may wander by the choice of patients (pure numpy)."""

from collections.abc import Callable, Sequence

import numpy as np


def bootstrap_by_group(
    statistic: Callable[[np.ndarray], Sequence[float]],
    groups: Sequence,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> np.ndarray:
    """Percentile intervals over whole groups (patients) drawn with replacement.

    Images of one patient are near copies, so drawing images would make intervals too narrow. For a
    paired comparison the statistic computes both models on the same drawn images.

    Args:
        statistic: takes indices of images, sized (M',), some of them several times, and returns S
            numbers; NaN where a number is undefined.
        groups: group of each of the M images.
        n_resamples: draws.
        confidence: share of the draws within the interval.
        seed: of the draws.

    Returns:
        (S, 2): low and high ends; draws whose number is NaN are left out of that number's.

    Raises:
        ValueError: if there are no images.
    """
    names, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if len(names) == 0:
        raise ValueError("expected at least one image, got none.")
    members = [np.flatnonzero(index == i) for i in range(len(names))]
    rng = np.random.default_rng(seed)
    draws = np.array(
        [
            statistic(
                np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))])
            )
            for _ in range(n_resamples)
        ],
        dtype=float,
    )
    tail = 100 * (1 - confidence) / 2
    return np.nanpercentile(draws, (tail, 100 - tail), axis=0).T
