"""The head and the skull in a slice.

Both are looked for in a brain window, in DICOM as in pictures, so that both are treated alike.
H, W are a slice's rows and columns. Boxes are x0, y0, x1, y1: edges of pixels, 0-based.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from .inspection import DARK, WINDOW

THIN = 0.03
"""Of the image's shorter side: what is thinner is no head but a couch, a headrest or a tube."""

BONE = 245
"""Grey value from which on it is bone: about 95 HU; clotted blood has 90 at most."""

SMOOTH = 0.003
"""Of the image's shorter side: the sigma that densities are smoothed by."""

BRAIN_HU = (15.0, 60.0)
"""Of brain, which is between water and blood; its median is that of grey and white matter."""

DENSITY_HU = (-10.0, 40.0)
"""Beyond the median of the brain: what is black and what is white in the picture of densities."""

MIN_SHARE = 0.02
"""Of the image: what is smaller is no head."""


class Head(NamedTuple):
    """The head in a slice.

    Attributes:
        box: around it, pixels.
        area: pixels.
        size: (H, W) of the slice.
        ratio: height of the slice's pixels over their width.
    """

    box: tuple[int, int, int, int]
    area: int
    size: tuple[int, int]
    ratio: float = 1.0


def find_head(grey: np.ndarray, ratio: float = 1.0) -> Head | None:
    """Finds the head in a slice: the largest connected part that is neither air nor thin.

    Args:
        grey: uint8 (H, W) of a brain window.
        ratio: height of the pixels over their width.

    Returns:
        None if there is no such part.
    """
    _, stats = _largest_part(grey)
    if not len(stats):
        return None
    x, y, width, height, area = map(int, stats[0])
    return Head((x, y, x + width, y + height), area, grey.shape, ratio)


def find_skull(grey: np.ndarray) -> np.ndarray | None:
    """Finds the skull and what is in it: the convex hull of the head's bone.

    The hull also closes the gaps of an infant's sutures, of a fracture and of an opened skull. The
    scalp, the couch, tubes and hands beside the head lie outside of it.

    Args:
        grey: uint8 (H, W) of a brain window, in which bone is white.

    Returns:
        uint8 (H, W), 1 in the hull and 0 elsewhere. None if there is no head, or the hull holds
        less than half of it, as below the skull.
    """
    head, stats = _largest_part(grey)
    if not len(stats):
        return None
    bone = (grey >= BONE).astype(np.uint8) & cv2.dilate(head, np.ones((5, 5), np.uint8))
    # Without noise and small calcifications of the skin.
    bone = cv2.morphologyEx(bone, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    points = cv2.findNonZero(bone)
    if points is None:
        return None
    skull = cv2.fillConvexPoly(np.zeros_like(head), cv2.convexHull(points), 1)
    return skull if 2 * np.count_nonzero(skull & head) >= np.count_nonzero(head) else None


def _largest_part(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The head, 1 in uint8 (H, W), and OpenCV's stats of it, (1, 5); (0, 5) if there is none."""
    side = 2 * max(1, round(THIN * min(grey.shape) / 2)) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    # The median closes the holes that noise leaves in dark brain, which would grow by the opening.
    tissue = (cv2.medianBlur(np.ascontiguousarray(grey), 5) > DARK).astype(np.uint8)
    # Beyond the border is air, so that what lies along it is as thin as it looks.
    tissue = cv2.morphologyEx(
        tissue, cv2.MORPH_OPEN, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0
    )
    _, labels, stats, _ = cv2.connectedComponentsWithStats(tissue, connectivity=4)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if not len(areas) or areas.max() < MIN_SHARE * grey.size:
        return np.zeros_like(tissue), stats[:0]
    largest = 1 + areas.argmax()
    return (labels == largest).astype(np.uint8), stats[largest : largest + 1]


def density_picture(grey: np.ndarray, skull: np.ndarray | None) -> np.ndarray:
    """How much denser than the slice's own brain its soft tissue is, without bone and noise.

    Blood stands out in it beside the skull too, where it is as white as bone in a window, and
    whatever the scanner's calibration.

    Args:
        grey: uint8 (H, W) of the window ``inspection.WINDOW``, 40/120.
        skull: of :func:`find_skull`.

    Returns:
        uint8 (H, W), 0 to 255 for ``DENSITY_HU`` beyond the median of the brain; 0 for bone, for
        what bone's edge blurs, for air and for what is outside of the skull.
    """
    level, width = WINDOW
    hu = (level - width / 2 + grey * np.float32(width / 255)).astype(np.float32)
    inside = np.ones_like(grey) if skull is None else skull
    bone = cv2.dilate((grey >= BONE).astype(np.uint8) & inside, np.ones((3, 3), np.uint8))
    tissue = ((inside > 0) & (bone == 0) & (grey > DARK)).astype(np.float32)
    brain = hu[(tissue > 0) & (hu > BRAIN_HU[0]) & (hu < BRAIN_HU[1])]
    if not len(brain):
        return np.zeros_like(grey)
    # The mean over soft tissue alone, or bone would shine into it.
    sigma = SMOOTH * min(grey.shape)
    weight = cv2.GaussianBlur(tissue, (0, 0), sigma)
    mean = cv2.GaussianBlur(hu * tissue, (0, 0), sigma) / np.maximum(weight, 1e-3)
    low, high = DENSITY_HU
    density = (mean - np.median(brain) - low) * (255 / (high - low))
    return np.where(tissue > 0, density.clip(0, 255), 0).astype(np.uint8)
