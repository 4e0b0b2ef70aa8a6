"""What a person should look at in a VOC tree before training on it.

Grey values are those of a brain window, 0 to 255.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import ndimage

from .dicom import read_windowed
from .pictures import is_picture, read_picture
from .tree import SPLITS, VocTree
from .voc import VocObject

WINDOW = (40.0, 120.0)
DARK = 12
"""Grey value up to which a pixel is air."""

TINY_SHARE = 2e-4
"""A box of a smaller share of the image is named: 7 x 7 of 512 x 512 pixels."""

LOOSE_SHARE = 0.2
"""A box of a larger share of the image holds more than a bleed."""

AIR_SHARE = 0.35
"""A box of which more is air is named; bleeds touch the skull, so some air is in many boxes."""

TURNED_RATIO = 1.1
"""A head is wider behind than in front. A series, of MIN_SLICES or more, whose front quarter is so
much the larger one in the median is named. Of 45 CT-ICH and 20 phantom series none is (at most
1.08), and 29 and 20 of them when turned."""

MIN_SLICES = 4

COUCH = "upside down: the couch or headrest seems to be above the head"


@dataclass
class Inspected:
    """An image and what is odd about it.

    Attributes:
        objects: of its annotation.
        size: (H, W).
        front_to_back: pixels of the head's upper quarter over those of the lower; NaN for no head.
        findings: sentences; empty for nothing odd.
    """

    image: str
    objects: Sequence[VocObject]
    size: tuple[int, int]
    front_to_back: float = math.nan
    findings: list[str] = field(default_factory=list)


def read_grey(path: Path) -> np.ndarray:
    """A slice as uint8 (H, W); errors name the file."""
    return read_picture(path) if is_picture(path) else read_windowed(path, [WINDOW])[0][..., 0]


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
    found = Inspected(image, objects, grey.shape)
    say, (height, width) = found.findings.append, grey.shape
    head, above, below = _head_and_couch(grey)
    if head.mean() < 0.04:
        say("no head: nearly all is air")
    else:
        found.front_to_back = _front_to_back(head)
        if above > 2e-4 and above > 3 * below:
            say(COUCH)
    for obj in objects:
        x0, y0, x1, y1 = (int(round(v)) for v in obj.box)
        inside = grey[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        share = (obj.box[2] - obj.box[0]) * (obj.box[3] - obj.box[1]) / (height * width)
        if inside.size and (inside <= DARK).mean() > AIR_SHARE:
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


def note_turned(series: Sequence[Inspected]) -> None:
    """Say of a series on its first image if its heads are wider in front than behind; if they are
    clearly not, what seemed to be a couch above one of them was none."""
    ratios = [i.front_to_back for i in series if not math.isnan(i.front_to_back)]
    if len(ratios) < MIN_SLICES:
        return
    ratio = float(np.median(ratios))
    for image in series if ratio < 1 / TURNED_RATIO else ():
        image.findings = [text for text in image.findings if text != COUCH]
    if ratio > TURNED_RATIO:
        series[0].findings.append(
            f"upside down, its whole series of {len(series)}: the head is wider above than below "
            f"({ratio:.2f} times)"
        )


def counts(
    images: Sequence[Inspected],
    splits: Mapping[str, Sequence[str]],
    patients: Mapping[str, tuple[str, str]],
    shown: Mapping[str, Collection[str]],
) -> list[dict]:
    """Per split: patients, images, negatives, boxes, and images of each type.

    Args:
        images: all of them.
        splits: image ids of each.
        patients: patient and study by image id.
        shown: what each image shows, of ``VocTree.findings``; a negative one nothing.
    """
    by_id = {i.image: i for i in images}
    names = sorted({obj.name for i in images for obj in i.objects})
    rows = []
    for split, ids in {**splits, "all": list(by_id)}.items():
        members = [by_id[i] for i in ids if i in by_id]
        negative = sum(not shown[i.image] for i in members)
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


def split_table(root: Path) -> list[dict]:
    """The paper's table 1 of a VOC tree: slices and patients of each split, and of all of them.

    Returns:
        Rows with "split"; "slices", "positive slices", "negative slices" and, by type, positive
        slices; "patients", "positive patients" and "negative patients", zero where not known.

    Raises:
        FileNotFoundError, ValueError: one sentence that names a file.
    """
    tree = VocTree(root)
    splits = {split: tree.read_list(split) for split in SPLITS}
    patients = tree.patients
    images = [
        Inspected(image, tree.annotation(image).objects, (0, 0))
        for ids in splits.values()
        for image in ids
    ]
    table = []
    for row in counts(images, splits, patients, tree.findings):
        ids = splits.get(row["split"], [i.image for i in images])
        positive = {patients[i][0] for i in ids if tree.findings[i] and i in patients}
        table.append(
            {
                "split": row["split"],
                "slices": row["images"],
                "positive slices": row["images"] - row["negative"],
                "negative slices": row["negative"],
                "patients": row["patients"],
                "positive patients": len(positive),
                "negative patients": row["patients"] - len(positive),
                "boxes": row["boxes"],
                **{name: row[name] for name in sorted({o.name for i in images for o in i.objects})},
            }
        )
    return table


def box_sizes(images: Sequence[Inspected], short_edge: int) -> np.ndarray:
    """Widths and heights of all boxes, (M, 2), after a resize of the shorter side, pixels."""
    sizes = [
        ((o.box[2] - o.box[0]) * scale, (o.box[3] - o.box[1]) * scale)
        for i in images
        for scale in [short_edge / min(i.size)]
        for o in i.objects
    ]
    return np.array(sizes, dtype=float).reshape(-1, 2)


def _front_to_back(head: np.ndarray) -> float:
    """Pixels of the upper quarter of a head's height, over those of the lower."""
    width_of_rows = head.sum(axis=1)
    width_of_rows = np.trim_zeros(width_of_rows)
    quarter = max(len(width_of_rows) // 4, 1)
    return float(width_of_rows[:quarter].sum() / width_of_rows[-quarter:].sum())


def _head_and_couch(grey: np.ndarray) -> tuple[np.ndarray, float, float]:
    """The largest connected part that is no air, which is taken for the head, bool (H, W); and the
    shares of the image of what may be the couch above and below the head's middle: parts of their
    own that are wide, or reach the picture's border, as no part of a face does."""
    height, width = grey.shape
    parts, count = ndimage.label(grey > DARK)
    if not count:
        return parts > 0, 0.0, 0.0
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    head = int(sizes.argmax())
    rows = ndimage.find_objects(parts)[head - 1][0]
    middle = (rows.start + rows.stop) // 2
    above = below = 0
    for label, (y, x) in enumerate(ndimage.find_objects(parts), start=1):
        at_border = x.start == 0 or y.start == 0 or x.stop == width or y.stop == height
        if label != head and (at_border or x.stop - x.start > width / 4):
            above += sizes[label] if y.stop <= middle else 0
            below += sizes[label] if y.start >= middle else 0
    return parts == head, above / grey.size, below / grey.size
