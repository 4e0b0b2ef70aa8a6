"""Writes a VOC tree image by image: what all preparers in ``datasets/`` share.

An image, its annotation and its row of ``patients.csv`` appear whole or not at all, and what is
there already is not written again, so a preparer that was stopped, or killed, is simply started
again. An image whose boxes have changed since is written anew.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from ..files import remove_leftovers, write_atomically
from .splits import read_labels
from .voc import Box, read_voc, write_voc

FIELDS = ("image", "patient", "study", "series", "position_mm")
"""Columns of ``patients.csv``."""

SOURCES = "sources.json"
"""Where each image came from: its source's path under SOURCE, and what a way back needs."""

JOURNAL = ".added.jsonl"
"""The rows of images that are written, until the tables are: a line each."""

FOLDERS = ("Annotations", "DICOM", "JPEGImages")


class VocWriter:
    """A VOC tree under construction.

    with VocWriter(root, database=...) as tree:
        if tree.wants(name, objects):
            tree.add(name, image, objects, patient=...)

    Attributes:
        dropped: number of boxes left out, since less than a pixel of them is in the image.
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
        self.dropped = 0
        self._labels = {name: str(label) for name, label in read_labels(self.root).items()}
        for folder in FOLDERS:
            (self.root / folder).mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.root / folder)
        remove_leftovers(self.root)
        if (self.root / "patients.csv").is_file():
            with open(self.root / "patients.csv", encoding="utf-8", newline="") as file:
                self._rows = {row["image"]: row for row in csv.DictReader(file)}
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
        for folder in ("DICOM", "JPEGImages"):
            if not any((self.root / folder).iterdir()):
                (self.root / folder).rmdir()

    def __contains__(self, name: str) -> bool:
        return name in self._rows and (self.root / "Annotations" / f"{name}.xml").is_file()

    def __len__(self) -> int:
        return len(self._rows)

    def wants(
        self, name: str, objects: Iterable[tuple[str, Box]], *, label: int | None = None
    ) -> bool:
        """Whether an image is still to be added, or was added with other boxes or another label.

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
        voc = read_voc(self.root / "Annotations" / f"{name}.xml")
        boxes = [(obj.name, obj.box) for obj in voc.objects]
        return boxes != list(clip(objects, voc.width, voc.height))

    def add(
        self,
        name: str,
        image: Path | np.ndarray | bytes,
        objects: Iterable[tuple[str, Box]],
        *,
        size: tuple[int, int],
        patient: str,
        study: str = "",
        series: str = "",
        position_mm: float | None = None,
        label: int | None = None,
        source: dict | None = None,
    ) -> None:
        """Write an image and its annotation.

        Args:
            name: the image's id, fit for a file name.
            image: a DICOM, PNG or JPEG file, copied as it is; the content of a DICOM file; or uint8
                (H, W), written as PNG.
            objects: see ``write_voc``; boxes are clipped to the image, and those of less than one
                pixel are dropped.
            size: (H, W).
            patient, study, series: pseudonyms.
            position_mm: along the slice normal.
            label: of the image, where boxes do not tell it; kept in ``labels.csv``.
            source: kept in ``sources.json``; no identities.

        Raises:
            ValueError: the name is not fit for a file, or a box or name for an annotation.
        """
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise ValueError(f"The image id is {name!r}, expected letters, digits, '_', '-', '.'.")
        height, width = size
        if isinstance(image, np.ndarray):
            path = self.root / "JPEGImages" / f"{name}.png"
            with write_atomically(path, "wb") as file:
                Image.fromarray(image).save(file, format="PNG")
        elif isinstance(image, bytes):
            path = self.root / "DICOM" / f"{name}.dcm"
            with write_atomically(path, "wb") as file:
                file.write(image)
        else:
            picture = image.suffix.lower() in (".png", ".jpg", ".jpeg")
            path = self.root / ("JPEGImages" if picture else "DICOM")
            path /= f"{name}{image.suffix.lower() if picture else '.dcm'}"
            with write_atomically(path, "wb") as file:
                file.write(image.read_bytes())
        objects = list(objects)
        kept = list(clip(objects, width, height))
        self.dropped += len(objects) - len(kept)
        write_voc(
            self.root / "Annotations" / f"{name}.xml",
            filename=path.name,
            width=width,
            height=height,
            objects=kept,
            database=self.database,
        )
        position = "" if position_mm is None or np.isnan(position_mm) else f"{position_mm:.3f}"
        values = (name, patient, study or patient, series or study or patient, position)
        row = dict(zip(FIELDS, values, strict=True))
        entry = (row, None if label is None else str(int(label)), source)
        self._take(*entry)
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()

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
        table = io.StringIO()
        writer = csv.DictWriter(table, FIELDS, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(self._rows[name] for name in sorted(self._rows))
        with write_atomically(self.root / "patients.csv") as file:
            file.write(table.getvalue())
        if self._labels:
            lines = [f"{name},{label}\n" for name, label in sorted(self._labels.items())]
            with write_atomically(self.root / "labels.csv") as file:
                file.write("".join(["image,label\n", *lines]))
        if self._sources:
            with write_atomically(self.root / SOURCES) as file:
                json.dump(dict(sorted(self._sources.items())), file, indent=1, ensure_ascii=False)


def clip(
    objects: Iterable[tuple[str, Sequence[float]]], width: int, height: int
) -> Iterable[tuple[str, Box]]:
    """Boxes clipped to the image; those of less than a pixel in it are dropped."""
    for name, (x0, y0, x1, y1) in objects:
        x0, x1 = max(float(x0), 0.0), min(float(x1), float(width))
        y0, y1 = max(float(y0), 0.0), min(float(y1), float(height))
        if x1 - x0 >= 1 and y1 - y0 >= 1:
            yield name, (x0, y0, x1, y1)


def pseudonym(kind: str, value: str) -> str:
    """A name in the place of an identity: not to be read back, but not safe against guessing."""
    return f"{kind}-{hashlib.sha256(value.encode()).hexdigest()[:10]}"


def boxes_of_mask(
    mask: np.ndarray, name_of: Callable[[int], str | None], *, min_pixels: int = 1
) -> list[tuple[str, Box]]:
    """The boxes around the connected parts of each class of a mask.

    Args:
        mask: whole numbers (H, W); 0 is background.
        name_of: the name of a value; None leaves the value out.
        min_pixels: smaller parts are left out.

    Returns:
        Names and boxes, 0-based pixel edges; parts that touch at a corner are one.
    """
    objects = []
    for value in np.unique(mask[mask != 0]):
        name = name_of(int(value))
        if name is None:
            continue
        parts, _ = ndimage.label(mask == value, structure=np.ones((3, 3)))
        sizes = np.bincount(parts.ravel())
        for label, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
            if sizes[label] >= min_pixels:
                box = (columns.start, rows.start, columns.stop, rows.stop)
                objects.append((name, tuple(map(float, box))))
    return objects
