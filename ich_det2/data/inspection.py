"""What a person should look at in a VOC tree before training on it.

Grey values are those of a brain window, 0 to 255. N is the number of images, T a thumbnail's side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from scipy import ndimage

from .dicom import read_windowed
from .voc import VocObject

WINDOW = (40.0, 120.0)
DARK = 12
"""Grey value up to which a pixel is air."""

TINY_SHARE = 2e-4
"""A box of a smaller share of the image is named: 7 x 7 of 512 x 512 pixels."""

LOOSE_SHARE = 0.25
T = 32


@dataclass
class Inspected:
    """An image and what is odd about it.

    Attributes:
        objects: of its annotation.
        size: (H, W).
        findings: sentences; empty for nothing odd.
        shape: thumbnail, float32 (T, T) of mean 0 and length 1.
    """

    image: str
    objects: Sequence[VocObject]
    size: tuple[int, int]
    shape: np.ndarray
    findings: list[str] = field(default_factory=list)


def read_grey(path: Path) -> np.ndarray:
    """A slice as uint8 (H, W); errors name the file."""
    if path.suffix.lower() == ".dcm":
        return read_windowed(path, [WINDOW])[0][..., 0]
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}.") from error


def inspect_image(
    image: str, grey: np.ndarray, objects: Sequence[VocObject], label: int | None
) -> Inspected:
    """Look at one image.

    Args:
        image: its id.
        grey: uint8 (H, W).
        objects: of its annotation.
        label: 1 hemorrhage, 0 none, None unknown.
    """
    small = cv2.resize(grey, (T, T), interpolation=cv2.INTER_AREA).astype(np.float32)
    small -= small.mean()
    found = Inspected(image, objects, grey.shape, small / max(np.linalg.norm(small), 1e-6))
    say, (height, width) = found.findings.append, grey.shape
    if _head_share(grey) < 0.04:
        say("no head: nearly all is air")
    for obj in objects:
        x0, y0, x1, y1 = (int(round(v)) for v in obj.box)
        inside = grey[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        share = (obj.box[2] - obj.box[0]) * (obj.box[3] - obj.box[1]) / (height * width)
        if inside.size and (inside <= DARK).mean() > 0.5:
            say(f"{obj.name}: the box lies over air ({(inside <= DARK).mean():.0%} of it)")
        if share < TINY_SHARE:
            w, h = obj.box[2] - obj.box[0], obj.box[3] - obj.box[1]
            say(f"{obj.name}: tiny box, {w:.0f} x {h:.0f} pixels")
        if share > LOOSE_SHARE:
            say(f"{obj.name}: the box takes {share:.0%} of the image")
    if label == 0 and objects:
        say(f"{len(objects)} box(es), but the slice's label says no hemorrhage")
    if label == 1 and not objects:
        say("no box, but the slice's label says hemorrhage")
    return found


def find_upside_down(images: Sequence[Inspected], margin: float = 0.15) -> None:
    """Add a finding to slices that look more like the others when turned over.

    The mean of all slices is the pattern; slices are compared with it as they are, and mirrored
    from front to back. Nothing is said of sets of fewer than 20 images.
    """
    if len(images) < 20:
        return
    shapes = np.array([i.shape for i in images])
    pattern = shapes.mean(axis=0)
    pattern /= max(np.linalg.norm(pattern), 1e-6)
    upright = (shapes * pattern).sum(axis=(1, 2))
    turned = (shapes[:, ::-1] * pattern).sum(axis=(1, 2))
    for found, gain in zip(images, turned - upright, strict=True):
        if gain > margin:
            found.findings.append(
                f"upside down: turned over it is more like the other slices (by {gain:.2f})"
            )


def counts(
    images: Sequence[Inspected],
    splits: Mapping[str, Sequence[str]],
    patients: Mapping[str, tuple[str, str]],
) -> list[dict]:
    """Per split: patients, images, negatives, boxes, and images of each type."""
    by_id = {i.image: i for i in images}
    names = sorted({obj.name for i in images for obj in i.objects})
    rows = []
    for split, ids in {**splits, "all": list(by_id)}.items():
        members = [by_id[i] for i in ids if i in by_id]
        negative = sum(not i.objects for i in members)
        rows.append(
            {
                "split": split,
                "patients": len({patients[i][0] for i in ids if i in patients}),
                "images": len(members),
                "negative": negative,
                "share negative": round(negative / max(len(members), 1), 3),
                "boxes": sum(len(i.objects) for i in members),
                **{n: sum(any(o.name == n for o in i.objects) for i in members) for n in names},
            }
        )
    return rows


def box_sizes(images: Sequence[Inspected], short_edge: int) -> np.ndarray:
    """Widths and heights of all boxes, (M, 2), after a resize of the shorter side, pixels."""
    sizes = [
        ((o.box[2] - o.box[0]) * scale, (o.box[3] - o.box[1]) * scale)
        for i in images
        for scale in [short_edge / min(i.size)]
        for o in i.objects
    ]
    return np.array(sizes, dtype=float).reshape(-1, 2)


def _head_share(grey: np.ndarray) -> float:
    """Share of the image that its largest connected part that is no air takes."""
    parts, count = ndimage.label(grey > DARK)
    return float(np.bincount(parts.ravel())[1:].max() / grey.size) if count else 0.0
