"""Lesions as the connected parts of a segmented slice.

Shape glossary: H, W a slice's rows and columns, K types of bleeds, M parts.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage


class Components(NamedTuple):
    """The parts of a slice, by falling score.

    Attributes:
        boxes: float32 (M, 4): x0, y0, x1, y1, pixel edges from 0.
        scores: float32 (M,).
        classes: int64 (M,), 0 to K - 1.
        masks: bool (M, H, W).
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: np.ndarray


def find_components(
    labels: np.ndarray, probabilities: np.ndarray, *, min_pixels: int = 1, most: int | None = None
) -> Components:
    """The connected parts of each type; pixels that touch at a corner are connected.

    Args:
        labels: whole numbers (H, W): 0 background, c + 1 for type c.
        probabilities: (K, H, W), of each type.
        min_pixels: smaller parts are left out.
        most: so many are kept, of the highest scores; None keeps all.

    Returns:
        The parts; a part's score is the mean probability of its type over its pixels.
    """
    found: list[tuple[float, int, np.ndarray, tuple[slice, slice]]] = []
    for c, probability in enumerate(probabilities):
        parts, number = ndimage.label(labels == c + 1, structure=np.ones((3, 3)))
        if not number:
            continue
        pixels = np.bincount(parts.ravel())
        sums = np.bincount(parts.ravel(), weights=probability.ravel())
        for i, place in enumerate(ndimage.find_objects(parts), start=1):
            if pixels[i] >= min_pixels:
                found.append((sums[i] / pixels[i], c, parts[place] == i, place))
    found.sort(key=lambda part: -part[0])
    found = found[:most]
    masks = np.zeros((len(found), *labels.shape), dtype=bool)
    for mask, (_, _, part, place) in zip(masks, found):
        mask[place] = part
    corners = [(x.start, y.start, x.stop, y.stop) for *_, (y, x) in found]
    return Components(
        np.array(corners, dtype=np.float32).reshape(-1, 4),
        np.array([part[0] for part in found], dtype=np.float32),
        np.array([part[1] for part in found], dtype=np.int64),
        masks,
    )


def slice_score(foreground: np.ndarray, min_pixels: int = 1) -> float:
    """That a slice bleeds: the mean of its highest probabilities, of as many pixels as the least
    lesion has, so that a speck does not make a bleed.

    Args:
        foreground: (H, W), the probability of a bleed of any type.
        min_pixels: of the least lesion.
    """
    values = foreground.ravel()
    number = min(max(min_pixels, 1), len(values))
    return float(np.partition(values, -number)[-number:].mean(dtype=np.float64))
