"""How much blood: areas in slices, volumes by Cavalieri's principle, and how masks agree.

Cavalieri's principle: a volume is the sum of its areas in parallel slices, each times the distance
that the slice stands for. Chosen here: that is half of the way to the slice before and half of that
to the slice after. At an end of the series, and at a gap, it is on that side what it is on the
other. A gap, a distance of more than one and a half times those on both sides of it, is not filled,
since what is in it was not seen; a run of larger distances is no gap but another spacing.

Shape glossary: N slices of a series, K kinds of lesions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

_SAME_DECIMALS = 2
"""Slices whose positions in mm agree to so many places lie at one place, and share it."""

_GAP = 1.5


def slice_widths(positions_mm: ArrayLike) -> tuple[np.ndarray, int]:
    """The distance along the normal that each slice stands for.

    Args:
        positions_mm: (N,), along the slice normal, in any order.

    Returns:
        float64 (N,) in mm, and the number of gaps. All are NaN if a position is, or if there is but
        one place: the distance of slices is then not known.
    """
    positions = np.round(np.asarray(positions_mm, dtype=float), _SAME_DECIMALS)
    places, index, counts = np.unique(positions, return_inverse=True, return_counts=True)
    if len(places) < 2 or np.isnan(places).any():
        return np.full(len(positions), np.nan), 0
    steps = np.diff(places)
    beside = np.maximum(np.r_[0, steps[:-1]], np.r_[steps[1:], 0])
    gap = (beside > 0) & (steps > _GAP * beside)
    halves = np.where(gap, np.nan, steps / 2)
    before, after = np.r_[np.nan, halves], np.r_[halves, np.nan]
    usual = np.nanmedian(halves)  # of a slice with a gap on either side
    sides = np.where(np.isnan(before), after, before) + np.where(np.isnan(after), before, after)
    widths = np.where(np.isnan(sides), 2 * usual, sides) / counts
    return widths[index], int(gap.sum())


def volumes_ml(areas_mm2: ArrayLike, positions_mm: ArrayLike) -> tuple[np.ndarray, int]:
    """Volumes of a series by Cavalieri's principle.

    Args:
        areas_mm2: (N, K), NaN where it is not known.
        positions_mm: (N,), as of :func:`slice_widths`.

    Returns:
        float64 (K,) in millilitres, NaN where it is not known, and the number of gaps.
    """
    areas = np.asarray(areas_mm2, dtype=float)
    widths, gaps = slice_widths(positions_mm)
    return (areas * widths[:, None]).sum(axis=0) / 1000, gaps


def dice(true: ArrayLike, predicted: ArrayLike, both: ArrayLike) -> np.ndarray:
    """Dice's coefficient of two masks.

    Args:
        true, predicted, both: pixels of the one, of the other, and in both.

    Returns:
        float64 in [0, 1]; NaN where both are empty.
    """
    total = np.asarray(true, dtype=float) + np.asarray(predicted, dtype=float)
    with np.errstate(invalid="ignore"):
        return 2 * np.asarray(both, dtype=float) / np.where(total > 0, total, np.nan)


def relative_error(true: ArrayLike, predicted: ArrayLike) -> np.ndarray:
    """(predicted - true) / true; NaN where nothing is true."""
    true, predicted = np.asarray(true, dtype=float), np.asarray(predicted, dtype=float)
    with np.errstate(invalid="ignore"):
        return (predicted - true) / np.where(true > 0, true, np.nan)
