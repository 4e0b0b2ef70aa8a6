"""Masks of lesions: as pixels, and as the run lengths in which dataset dicts and results keep them.

H, W are a slice's rows and columns, M the objects of its annotation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

VOID = 255
"""VOC's value of a mask's pixels of which nothing is said."""


def encode_mask(mask: np.ndarray) -> dict:
    """A mask as COCO's compressed run lengths, in text that JSON can hold.

    Args:
        mask: bool (H, W).

    Returns:
        "size", [H, W], and "counts", as Detectron2's bitmask format has them.
    """
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: dict) -> np.ndarray:
    """The mask, bool (H, W), of what :func:`encode_mask` gives."""
    return coco_mask.decode(rle).astype(bool)


def masks_of_labels(labels: np.ndarray, number: int) -> list[np.ndarray | None]:
    """The masks of objects that a picture numbers.

    Args:
        labels: whole numbers (H, W): i + 1 in object i, 0 or ``VOID`` in none.
        number: M.

    Returns:
        M masks, bool (H, W); None for an object of no pixel, whose mask is not known.
    """
    masks = [labels == i + 1 for i in range(number)]
    return [mask if mask.any() else None for mask in masks]


def labels_of_masks(masks: Sequence[np.ndarray | None], size: tuple[int, int]) -> np.ndarray:
    """Objects numbered in one picture; of several that hold a pixel the smallest has it.

    Args:
        masks: M masks, bool (H, W), or None.
        size: (H, W).

    Returns:
        int32 (H, W), i + 1 in object i, 0 in none.
    """
    labels = np.zeros(size, dtype=np.int32)
    known = [(int(mask.sum()), i, mask) for i, mask in enumerate(masks) if mask is not None]
    for _, i, mask in sorted(known, key=lambda entry: (-entry[0], -entry[1])):
        labels[mask] = i + 1
    return labels


def share_among_boxes(
    mask: np.ndarray, boxes: Sequence[Sequence[float]]
) -> list[np.ndarray | None]:
    """Shares a mask of all lesions of a slice among their boxes.

    A pixel in several boxes is of the smallest of them, so that none counts twice; one in no box
    is nobody's. The boxes stay as they were drawn.

    Args:
        mask: bool (H, W).
        boxes: M boxes (x0, y0, x1, y1), pixel edges from 0; a pixel is in one if its middle is.

    Returns:
        As :func:`masks_of_labels`.
    """
    filled = []
    for x0, y0, x1, y1 in boxes:
        rows, columns = (slice(max(round(a), 0), max(round(b), 0)) for a, b in ((y0, y1), (x0, x1)))
        filled.append(np.zeros_like(mask))
        filled[-1][rows, columns] = True
    labels = np.where(mask, labels_of_masks(filled, mask.shape), 0)
    return masks_of_labels(labels, len(boxes))
