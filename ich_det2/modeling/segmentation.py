"""The brain in a slice, what is dense in it, and measures of that (pure functions).

Shape glossary: H and W, rows and columns of a slice; M lesions. HU are those of a window, which
ends above bone's least HU.
"""

import cv2
import numpy as np
from scipy import ndimage

BONE_HU = 94.0
"""From which on it is bone; clotted blood has 90 at most."""

GAP = 0.04
"""Of the slice's shorter side: narrower gaps of the skull are closed, such as sutures."""

NECK = 0.02
"""Of the slice's shorter side: what hangs together by less is apart, such as orbit and brain."""

BRAIN_SHARE = 0.2
"""Of the head: what bone encloses and is smaller is no brain, and near the vertex too little."""

SMOOTH = 0.003
"""Of the slice's shorter side: the sigma that densities are smoothed by."""

MEASURES = 3
"""Numbers that :func:`measure_lesions` gives of a lesion."""


def find_brain(hu: np.ndarray) -> np.ndarray:
    """Strips the skull: what bone encloses, and what is in no other hole of it.

    Muscle in the hollow of the temple, which a hull of the bone holds, is open to the outside. So
    is the brain where the skull was opened, which is then not found.

    Args:
        hu: (H, W).

    Returns:
        bool (H, W); nothing where bone encloses less than ``BRAIN_SHARE`` of the head.
    """
    side = min(hu.shape)
    bone = (hu >= BONE_HU).astype(np.uint8)
    closed = cv2.morphologyEx(bone, cv2.MORPH_CLOSE, _disk(GAP * side))
    closed |= cv2.dilate(bone, np.ones((3, 3), np.uint8))  # bone's edge is blurred
    # A frame of air, from which all that is open to the outside is reached.
    parts, _ = ndimage.label(np.pad(closed == 0, 1, constant_values=True))
    enclosed = (parts != parts[0, 0]) & (parts > 0)
    core = cv2.morphologyEx(
        enclosed[1:-1, 1:-1].astype(np.uint8), cv2.MORPH_OPEN, _disk(NECK * side)
    )
    parts, _ = ndimage.label(core)
    large = np.bincount(parts.ravel()) >= BRAIN_SHARE * head_area(hu)
    large[0] = False
    return large[parts]


def head_area(hu: np.ndarray) -> int:
    """Pixels that are not as dark as the darkest of the window, 1 or more."""
    return max(1, np.count_nonzero(hu > hu.min()))


def density_above_brain(hu: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """HU beyond the brain's median, as means over what is in the brain around each pixel.

    Args:
        hu: (H, W).
        brain: bool (H, W), of :func:`find_brain`.

    Returns:
        float32 (H, W), 0 outside of the brain.
    """
    if not brain.any():
        return np.zeros(hu.shape, np.float32)
    inside = brain.astype(np.float32)
    sigma = SMOOTH * min(hu.shape)
    above = (hu.astype(np.float32) - np.float32(np.median(hu[brain]))) * inside
    # Bone would shine into a mean over all pixels.
    share = np.maximum(cv2.GaussianBlur(inside, (0, 0), sigma), 1e-3)
    return cv2.GaussianBlur(above, (0, 0), sigma) / share * inside


def split_lesions(mask: np.ndarray, least_area: float) -> np.ndarray:
    """The connected parts of a mask, after what is a pixel or two wide has been opened away.

    Args:
        mask: bool (H, W).
        least_area: pixels; smaller parts are dropped.

    Returns:
        bool (M, H, W), from top to bottom.
    """
    parts, count = ndimage.label(ndimage.binary_opening(mask))
    areas = np.bincount(parts.ravel(), minlength=count + 1)
    kept = [i for i in range(1, count + 1) if areas[i] >= least_area]
    return parts == np.array(kept, dtype=int)[:, None, None]


def measure_lesions(lesions: np.ndarray, density: np.ndarray, head: int) -> np.ndarray:
    """What tells blood from what is as dense: calcifications, sinuses, noise.

    Args:
        lesions: bool (M, H, W), none of them empty.
        density: (H, W), of :func:`density_above_brain`.
        head: pixels.

    Returns:
        float32 (M, 3), each around 1: 3 plus the decimal logarithm of the area's share of the head;
        mean density, 10 HU; compactness, 4 pi area / perimeter^2, near 1 for a disk.
    """
    out = np.zeros((len(lesions), MEASURES), np.float32)
    for row, lesion in zip(out, lesions):
        area = np.count_nonzero(lesion)
        compactness = 4 * np.pi * area / perimeter(lesion) ** 2
        row[:] = 3 + np.log10(area / head), density[lesion].mean() / 10, compactness
    return out


def perimeter(mask: np.ndarray) -> float:
    """Length of a mask's outline in pixels: its pixels' edges times pi / 4, which of a disk is the
    circumference."""
    padded = np.pad(mask, 1)
    across = np.count_nonzero(padded[:, 1:] != padded[:, :-1])
    down = np.count_nonzero(padded[1:] != padded[:-1])
    return np.pi / 4 * (across + down)


def _disk(diameter: float) -> np.ndarray:
    """A structuring element of OpenCV, at least one pixel."""
    side = 2 * int(diameter / 2) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
