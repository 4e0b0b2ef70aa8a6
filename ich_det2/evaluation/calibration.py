"""Are scores probabilities? Reliability, its error, and temperature scaling.

Shape glossary: M images, N bins.
"""

import numpy as np
from scipy.special import expit, logit

from .intervals import wilson_interval

_EDGE = 1e-6
"""Scores are kept so far from 0 and 1, where the logit is infinite (an image without boxes)."""


def calibrate(y_score, temperature: float) -> np.ndarray:
    """Scores as probabilities: the logit divided by the temperature; the order stays.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    return expit(logit(np.clip(y_score, _EDGE, 1 - _EDGE)) / temperature)


def fit_temperature(y_true, y_score) -> float:
    """The temperature with the least mean negative log likelihood, on validation.

    Args:
        y_true: 1 hemorrhage, 0 none, sized (M,).
        y_score: in [0, 1], sized (M,).

    Returns:
        A temperature from 0.05 to 20; NaN without both classes.

    Raises:
        ValueError: if a score is not in [0, 1].
    """
    from scipy.optimize import minimize_scalar  # not for those who only read: it takes a second

    y_true = np.asarray(y_true).astype(bool)
    y_score = _probabilities(y_score)
    if y_true.all() or not y_true.any():
        return float("nan")
    # z > 0 where a case is called right; -log expit(z / T).
    z = logit(np.clip(y_score, _EDGE, 1 - _EDGE)) * np.where(y_true, 1, -1)
    best = minimize_scalar(
        lambda log_t: np.logaddexp(0, -z / np.exp(log_t)).mean(),
        bounds=(np.log(0.05), np.log(20)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(best.x))


def reliability(y_true, y_score, n_bins: int = 10) -> dict[str, np.ndarray]:
    """How often images of a score do bleed, in bins of equal width.

    Args:
        y_true: sized (M,).
        y_score: in [0, 1], sized (M,).
        n_bins: N.

    Returns:
        "n" int (N,), "score" (N,) mean score, "observed" (N,) share of positives, "interval"
        (N, 2) Wilson's 95 % interval of it; NaN where a bin is empty.

    Raises:
        ValueError: if a score is not in [0, 1].
    """
    y_true, y_score = np.asarray(y_true).astype(bool), _probabilities(y_score)
    bins = np.minimum((y_score * n_bins).astype(int), n_bins - 1)
    n = np.bincount(bins, minlength=n_bins)
    positive = np.bincount(bins, y_true, n_bins)
    with np.errstate(invalid="ignore"):
        return {
            "n": n,
            "score": np.bincount(bins, y_score, n_bins) / n,
            "observed": positive / n,
            "interval": wilson_interval(positive, n),
        }


def expected_calibration_error(y_true, y_score, n_bins: int = 10) -> float:
    """Mean distance of score and observed share over the bins, weighted by their images (ECE)."""
    bins = reliability(y_true, y_score, n_bins)
    filled = bins["n"] > 0
    distance = np.abs(bins["score"] - bins["observed"])[filled]
    return float(np.average(distance, weights=bins["n"][filled])) if filled.any() else float("nan")


def _probabilities(y_score) -> np.ndarray:
    y_score = np.asarray(y_score, dtype=np.float64)
    if len(y_score) and not (0 <= y_score.min() and y_score.max() <= 1):
        raise ValueError(
            f"calibration needs scores from 0 to 1, got {y_score.min():g} to {y_score.max():g}."
        )
    return y_score
