"""Windows: HU to grey values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def apply_window(
    hu: np.ndarray, level: float, width: float, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Map the window ``level - width / 2 ... level + width / 2`` to 0 ... 1 and clip.

    This is the paper's plain window, and DICOM's LINEAR_EXACT up to the scale of the output
    (PS3.3 C.11.2.1.3.2). DICOM's default LINEAR (C.11.2.1.2.1) has ``level - 0.5`` and
    ``width - 1`` in their places and so differs by up to ``1 / width``; see docs/dicom.md.

    Args:
        hu: array of any shape, in HU; it is not modified unless it is ``out``.
        level: centre of the window, in HU.
        width: full width of the window, in HU, positive.
        out: float32 array for the result, shaped as ``hu``; ``hu`` itself for a window in place.

    Returns:
        float32 array in [0, 1], shaped as ``hu``.

    Raises:
        ValueError: ``width`` is not positive, or either is not finite.
    """
    if not (math.isfinite(level) and math.isfinite(width) and width > 0):
        raise ValueError(
            f"The window is level {level} HU, width {width} HU; expected finite numbers and a "
            "positive width."
        )
    out = np.subtract(hu, np.float32(level - width / 2), out=out, dtype=np.float32)
    out /= np.float32(width)
    return np.clip(out, 0, 1, out=out)


def window_image(hu: np.ndarray, windows: Sequence[tuple[float, float]]) -> np.ndarray:
    """Windows as the channels of an 8-bit image.

    256 grey levels are finer than a CT's noise, and let image libraries resize with antialiasing.

    Args:
        hu: (H, W), HU.
        windows: C pairs (level HU, width HU).

    Returns:
        uint8 (H, W, C): ``apply_window`` times 255, rounded.
    """
    image = np.empty((*hu.shape, len(windows)), np.uint8)
    for channel, (level, width) in enumerate(windows):
        grey = apply_window(hu, level, width)
        grey *= 255
        np.rint(grey, out=grey)
        np.copyto(image[..., channel], grey, casting="unsafe")
    return image
