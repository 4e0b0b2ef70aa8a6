"""The head and the skull in a slice.

Both are looked for in a brain window, in DICOM as in pictures, so that both are treated alike.
H, W are a slice's rows and columns. Boxes are x0, y0, x1, y1: edges of pixels, 0-based.
"""

from __future__ import annotations

from itertools import product
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

MIRROR_SIDE = 96
"""Pixels of the longer side of the picture in which the middle of the head is looked for."""

MAX_TILT = 24
"""Degrees that the middle of the head may be off the image's vertical."""

ASYMMETRY_HU = 20.0
"""Denser than the mirror image by this is white, less dense by this is black."""

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
    hu, tissue = _soft_tissue(grey, skull)
    brain = hu[(tissue > 0) & (hu > BRAIN_HU[0]) & (hu < BRAIN_HU[1])]
    if not len(brain):
        return np.zeros_like(grey)
    mean, _ = _mean_of_tissue(hu * tissue, tissue, SMOOTH)
    low, high = DENSITY_HU
    density = (mean - np.median(brain) - low) * (255 / (high - low))
    return np.where(tissue > 0, density.clip(0, 255), 0).astype(np.uint8)


def asymmetry_picture(grey: np.ndarray, skull: np.ndarray | None, ratio: float = 1.0) -> np.ndarray:
    """How much denser than its mirror image the soft tissue in the head is.

    Blood breaks the symmetry of the head, and so does what it pushes aside.

    Args:
        grey: uint8 (H, W) of the window ``inspection.WINDOW``, 40/120.
        skull: of :func:`find_skull`.
        ratio: height of the pixels over their width.

    Returns:
        uint8 (H, W), 128 where both sides are alike, where there is no soft tissue on one of them,
        and everywhere without a skull.
    """
    if skull is None:
        return np.full_like(grey, 128)
    hu, tissue = _soft_tissue(grey, skull)
    # Means over more than in the picture of densities, since the sides are never quite alike: a
    # third of the pixels along each axis is enough for them.
    height, width = (max(1, round(side / 3)) for side in grey.shape)
    size = (width, height)
    means, shares = _mean_of_tissue(
        *(cv2.resize(x, size, interpolation=cv2.INTER_AREA) for x in (hu * tissue, tissue)),
        4 * SMOOTH,
    )
    small = (cv2.resize(x, size, interpolation=cv2.INTER_AREA) for x in (grey, skull))
    mirror = mirror_head(*small, ratio)
    other_shares = cv2.warpAffine(shares, mirror, size)
    others = cv2.warpAffine(means * shares, mirror, size) / np.maximum(other_shares, 1e-3)
    difference = cv2.resize(np.where(other_shares > 0.2, means - others, 0), grey.shape[::-1])
    scaled = 128 + np.where(tissue > 0, difference, 0) * (127.5 / ASYMMETRY_HU)
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def mirror_head(grey: np.ndarray, skull: np.ndarray, ratio: float = 1.0) -> np.ndarray:
    """The map that mirrors the head at its middle.

    Of lines near the vertical through the head, that one is taken at which the picture's two sides
    differ least.

    Args:
        grey: uint8 (H, W).
        skull: uint8 (H, W), 1 where the head is, and not 0 everywhere.
        ratio: height of the pixels over their width.

    Returns:
        float64 (2, 3), for ``cv2.warpAffine``: from columns and rows to those of the mirror image.
    """
    height, width = grey.shape
    scale = MIRROR_SIDE / max(height * ratio, width)
    size = (max(1, round(width * scale)), max(1, round(height * ratio * scale)))
    small = cv2.resize(grey * skull, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    small = cv2.GaussianBlur(small, (0, 0), 1.0)
    moments = cv2.moments(small)
    x, y = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]

    def differ(line: tuple[float, float]) -> float:
        mirrored = cv2.warpAffine(small, _mirror(x + line[0], y, line[1])[:2], size)
        return cv2.norm(small, mirrored, cv2.NORM_L1)

    line = min(product(range(-4, 5, 2), range(-MAX_TILT, MAX_TILT + 1, 4)), key=differ)
    near = product((line[0] + i for i in (-1, 0, 1)), (line[1] + i for i in (-2, 0, 2)))
    line = min(near, key=differ)
    # Centres of pixels, of the whole picture and of the small one.
    sx, sy = size[0] / width, size[1] / height
    shrink = np.array([[sx, 0, (sx - 1) / 2], [0, sy, (sy - 1) / 2], [0, 0, 1]])
    return (np.linalg.inv(shrink) @ _mirror(x + line[0], y, line[1]) @ shrink)[:2]


def _mirror(x: float, y: float, degrees: float) -> np.ndarray:
    """Mirrors at the line through (x, y) that is so far off the vertical; (3, 3)."""
    angle = np.deg2rad(2 * degrees)
    linear = np.array([[-np.cos(angle), np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mirror = np.eye(3)
    mirror[:2, :2], mirror[:2, 2] = linear, [x, y] - linear @ [x, y]
    return mirror


def _soft_tissue(grey: np.ndarray, skull: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """HU, float32 (H, W), and where soft tissue is in the skull, 0 or 1 in float32: neither bone,
    nor what bone's edge blurs, nor air."""
    level, width = WINDOW
    hu = (level - width / 2 + grey * np.float32(width / 255)).astype(np.float32)
    inside = np.ones_like(grey) if skull is None else skull
    bone = cv2.dilate((grey >= BONE).astype(np.uint8) & inside, np.ones((3, 3), np.uint8))
    return hu, ((inside > 0) & (bone == 0) & (grey > DARK)).astype(np.float32)


def _mean_of_tissue(
    hu: np.ndarray, tissue: np.ndarray, smooth: float
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of HU, 0 where there is no soft tissue, around each pixel over soft tissue alone, or
    bone would shine into it; and the share of soft tissue there. ``smooth`` is the sigma's share of
    the image's shorter side."""
    sigma = smooth * min(hu.shape)
    share = cv2.GaussianBlur(tissue, (0, 0), sigma)
    return cv2.GaussianBlur(hu, (0, 0), sigma) / np.maximum(share, 1e-3), share
