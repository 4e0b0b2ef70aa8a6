"""Writes a VOC tree image by image: what all preparers in ``datasets/`` share.

An image, its annotation and its row of ``patients.csv`` appear whole or not at all, and what is
there already is not written again, so a preparer that was stopped, or killed, is simply started
again. An image whose boxes have changed since is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from ..files import remove_leftovers, write_atomically, write_csv
from .masks import VOID
from .pictures import is_picture, read_mask_picture, write_picture
from .tree import (
    ANNOTATIONS,
    IMAGE_FOLDERS,
    LABELS,
    OBJECT_MASKS,
    PATIENT_FIELDS,
    PATIENTS,
    read_table,
)
from .voc import DECIMALS, Box, read_voc, write_voc

SOURCES = "sources.json"
"""Where each image came from: its source's path under SOURCE, and what a way back needs."""

_COUNTED = ("images", "images with boxes", "boxes")

JOURNAL = ".added.jsonl"
"""The rows of images that are written, until the tables are: a line each."""


class VocWriter:
    """A VOC tree under construction.

    with VocWriter(root, database=...) as tree:
        if tree.wants(name, objects):
            tree.add(name, image, objects, patient=...)

    Attributes:
        counts: of this run: "images", "images with boxes" and "boxes", whether written now or
            found written.
        dropped: boxes of this run that were left out, by reason.
        ignored: what else of the source was left out, by reason; for preparers to count.
    """

    def __init__(self, root: str | os.PathLike, *, database: str):
        """
        Args:
            root: folder of the tree; made if need be. What an earlier run left is kept.
            database: where the images come from, written into each annotation.
        """
        self.root, self.database = Path(root), database
        self._rows: dict[str, dict] = {}
        self._sources: dict[str, dict] = {}
        self._seen: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self._labels: dict[str, str] = {}
        for folder in (ANNOTATIONS, *IMAGE_FOLDERS):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        for folder in (ANNOTATIONS, *IMAGE_FOLDERS, OBJECT_MASKS):
            remove_leftovers(self.root / folder)
        remove_leftovers(self.root)
        if (self.root / PATIENTS).is_file():
            rows = read_table(self.root / PATIENTS, ("image", "patient"))
            self._rows = {row["image"]: row for _, row in rows}
        if (self.root / LABELS).is_file():
            rows = read_table(self.root / LABELS, ("image", "label"))
            self._labels = {row["image"]: row["label"] for _, row in rows}
        if (self.root / SOURCES).is_file():
            self._sources = json.loads((self.root / SOURCES).read_text(encoding="utf-8"))

    def __enter__(self) -> VocWriter:
        self._replay()
        self._journal = open(self.root / JOURNAL, "w", encoding="utf-8")
        return self

    def __exit__(self, *error) -> None:
        # An interrupted run keeps what it has, so that the next one goes on from there.
        self._journal.close()
        self._write_tables()
        (self.root / JOURNAL).unlink()
        for folder in IMAGE_FOLDERS:
            if not any((self.root / folder).iterdir()):
                (self.root / folder).rmdir()

    def __contains__(self, name: str) -> bool:
        return name in self._rows and self._xml(name).is_file()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def has_labels(self) -> bool:
        """Whether the tree has labels of images that do not come from boxes."""
        return bool(self._labels)

    def summary(self) -> str:
        """What this run has seen, in one line."""
        parts = [", ".join(f"{self.counts[key]} {key}" for key in _COUNTED)]
        for what, counter in (("boxes dropped", self.dropped), ("ignored", self.ignored)):
            reasons = ", ".join(f"{number} {reason}" for reason, number in counter.items())
            parts.append(f"{what}: {reasons or 'none'}")
        return "; ".join(parts)

    def _xml(self, name: str) -> Path:
        return self.root / ANNOTATIONS / f"{name}.xml"

    def _mask(self, name: str) -> Path:
        return self.root / OBJECT_MASKS / f"{name}.png"

    def wants(
        self,
        name: str,
        objects: Sequence[tuple[str, Box]],
        *,
        label: int | None = None,
        masks: np.ndarray | None = None,
    ) -> bool:
        """Whether an image is still to be added, or was added with other boxes or masks or another
        label.

        Args:
            name, objects, label, masks: as of :meth:`add`.

        Raises:
            ValueError: this run has asked for an image of this name already.
        """
        if name in self._seen:
            raise ValueError(
                f"two images of the source have the id '{name}', expected one; rename a file."
            )
        self._seen.add(name)
        if name not in self or (label is not None and self._labels.get(name) != str(int(label))):
            return True
        voc = read_voc(self._xml(name))
        kept, dropped = clip(objects, voc.width or 0, voc.height or 0)
        if [(obj.name, obj.box) for obj in voc.objects] != kept:
            return True
        if not self._has_masks(
            name, _kept_masks(masks, objects, (voc.height or 0, voc.width or 0))
        ):
            return True
        self._count(kept, dropped)
        return False

    def add(
        self,
        name: str,
        image: Path | np.ndarray | bytes,
        objects: Sequence[tuple[str, Box]],
        *,
        size: tuple[int, int],
        patient: str,
        study: str = "",
        series: str = "",
        position_mm: float | None = None,
        label: int | None = None,
        source: dict | None = None,
        masks: np.ndarray | None = None,
    ) -> None:
        """Write an image and its annotation.

        Args:
            name: the image's id, fit for a file name.
            image: a DICOM, PNG or JPEG file, copied as it is; the content of a DICOM file; or uint8
                (H, W), written as PNG.
            objects: see ``write_voc``; boxes are clipped to the image, and those of less than one
                pixel are dropped. An image that loses all of its boxes bleeds still: that is said
                by its label.
            size: (H, W).
            patient, study, series: pseudonyms.
            position_mm: along the slice normal.
            label: of the image, where boxes do not tell it; kept in ``labels.csv``.
            source: kept in ``sources.json``; no identities.
            masks: whole numbers (H, W), i + 1 in ``objects[i]``, 0 in none; None where masks are
                not known.

        Raises:
            ValueError: the name is not fit for a file, or a box or name for an annotation, or more
                objects have masks than a picture of 8 bit can number.
        """
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise ValueError(f"The image id is {name!r}, expected letters, digits, '_', '-', '.'.")
        height, width = size
        masks = _kept_masks(masks, objects, size)
        if isinstance(image, np.ndarray):
            path = self.root / IMAGE_FOLDERS[1] / f"{name}.png"
            write_picture(path, image)
        else:
            if isinstance(image, Path) and is_picture(image):
                path = self.root / IMAGE_FOLDERS[1] / f"{name}{image.suffix.lower()}"
            else:
                path = self.root / IMAGE_FOLDERS[0] / f"{name}.dcm"
            with write_atomically(path, "wb") as file:
                file.write(image if isinstance(image, bytes) else image.read_bytes())
        kept, dropped = clip(objects, width, height)
        self._count(kept, dropped)
        if dropped and not kept and label is None:
            label = 1
        if masks is None:
            self._mask(name).unlink(missing_ok=True)  # of other boxes
        else:
            self._mask(name).parent.mkdir(exist_ok=True)
            write_picture(self._mask(name), masks)
        write_voc(
            self._xml(name),
            filename=path.name,
            width=width,
            height=height,
            objects=kept,
            database=self.database,
            segmented=masks is not None,
        )
        position = "" if position_mm is None or np.isnan(position_mm) else f"{position_mm:.3f}"
        values = (name, patient, study or patient, series or study or patient, position)
        row = dict(zip(PATIENT_FIELDS, values, strict=True))
        entry = (row, None if label is None else str(int(label)), source)
        self._take(*entry)
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()

    def _has_masks(self, name: str, masks: np.ndarray | None) -> bool:
        if masks is None or not self._mask(name).is_file():
            return masks is None and not self._mask(name).exists()
        return np.array_equal(read_mask_picture(self._mask(name)), masks)

    def _count(self, kept: Sequence, dropped: Counter[str]) -> None:
        self.counts["images"] += 1
        self.counts["images with boxes"] += bool(kept)
        self.counts["boxes"] += len(kept)
        self.dropped += dropped

    def _take(self, row: dict, label: str | None, source: dict | None) -> None:
        self._rows[row["image"]] = row
        if label is not None:
            self._labels[row["image"]] = label
        if source is not None:
            self._sources[row["image"]] = source

    def _replay(self) -> None:
        """Takes over what a run added that was killed before it could write the tables."""
        path = self.root / JOURNAL
        if not path.is_file():
            return
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):  # the last line may be half written
                self._take(*json.loads(line))
        self._write_tables()

    def _write_tables(self) -> None:
        rows = [self._rows[name] for name in sorted(self._rows)]
        write_csv(self.root / PATIENTS, PATIENT_FIELDS, rows)
        if self._labels:
            labels = [{"image": i, "label": label} for i, label in sorted(self._labels.items())]
            write_csv(self.root / LABELS, ("image", "label"), labels)
        if self._sources:
            with write_atomically(self.root / SOURCES) as file:
                json.dump(dict(sorted(self._sources.items())), file, indent=1, ensure_ascii=False)


def clip(
    objects: Iterable[tuple[str, Sequence[float]]], width: int, height: int
) -> tuple[list[tuple[str, Box]], Counter[str]]:
    """Boxes clipped to the image.

    Args:
        objects: names and boxes (x0, y0, x1, y1), 0-based pixel edges.
        width, height: of the image, pixels.

    Returns:
        The boxes of which a pixel or more is in the image, and the numbers of the others by reason.
    """
    kept: list[tuple[str, Box]] = []
    dropped: Counter[str] = Counter()
    for name, (x0, y0, x1, y1) in objects:
        if not (x1 > x0 and y1 > y0):  # NaN compares as false
            dropped["of no size"] += 1
            continue
        if x1 - x0 < 1 or y1 - y0 < 1:
            dropped["smaller than a pixel"] += 1
            continue
        x0, x1 = max(float(x0), 0.0), min(float(x1), float(width))
        y0, y1 = max(float(y0), 0.0), min(float(y1), float(height))
        if x1 - x0 >= 1 and y1 - y0 >= 1:
            x0, y0, x1, y1 = (round(value, DECIMALS) for value in (x0, y0, x1, y1))
            kept.append((name, (x0, y0, x1, y1)))
        else:
            dropped["outside the image"] += 1
    return kept, dropped


def _kept_masks(
    masks: np.ndarray | None, objects: Sequence[tuple[str, Box]], size: tuple[int, int]
) -> np.ndarray | None:
    """Masks as :meth:`VocWriter.add` takes them, uint8 (H, W), numbered as the objects that
    :func:`clip` keeps; None where none is known."""
    if masks is None:
        return None
    number = 0
    table = np.zeros(len(objects) + 1, dtype=np.uint8)
    for i, obj in enumerate(objects):
        if clip([obj], size[1], size[0])[0]:
            number += 1
            if number >= VOID:
                raise ValueError(
                    f"an image has more than {VOID - 1} objects with masks, which a picture of 8"
                    " bit cannot number; leave out the smallest."
                )
            table[i + 1] = number
    kept = table[masks]
    return kept if kept.any() else None


def pseudonym(kind: str, value: str) -> str:
    """A name in the place of an identity: not to be read back, but not safe against guessing."""
    return f"{kind}-{hashlib.sha256(value.encode()).hexdigest()[:10]}"


def objects_of_mask(
    mask: np.ndarray, name_of: Callable[[int], str | None], *, min_pixels: int = 1
) -> tuple[list[tuple[str, Box]], np.ndarray]:
    """The connected parts of each class of a mask.

    Args:
        mask: whole numbers (H, W); 0 is background.
        name_of: the name of a value; None leaves the value out.
        min_pixels: smaller parts are left out.

    Returns:
        Names and boxes, 0-based pixel edges; parts that touch at a corner are one, and so are
        parts of several values of one name, as soft edges have. And the parts as
        :meth:`VocWriter.add` takes masks: int32 (H, W), i + 1 in the i-th of them.
    """
    values_of: dict[str, list[int]] = {}
    for value in np.unique(mask[mask != 0]).tolist():
        if (name := name_of(value)) is not None:
            values_of.setdefault(name, []).append(value)
    objects: list[tuple[str, Box]] = []
    labels = np.zeros(mask.shape, dtype=np.int32)
    for name, values in values_of.items():
        parts, _ = ndimage.label(np.isin(mask, values), structure=np.ones((3, 3)))
        sizes = np.bincount(parts.ravel())
        for label, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
            if sizes[label] >= min_pixels:
                x0, y0, x1, y1 = columns.start, rows.start, columns.stop, rows.stop
                objects.append((name, (float(x0), float(y0), float(x1), float(y1))))
                labels[parts == label] = len(objects)
    return objects, labels
