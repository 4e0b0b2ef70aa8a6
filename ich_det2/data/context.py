"""Which slices lie before and after each slice of a VOC tree."""

from __future__ import annotations

import csv
import logging
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from .dicom import neighbours, read_place

logger = logging.getLogger(__name__)


def find_context(
    root: str | Path, images: Mapping[str, Path], reach: int, *, by_name: bool = False
) -> dict[str, list[str]]:
    """The neighbours of each image within its series, for channels of context and sequences.

    DICOM files say which series they are of and where they lie. For PNG and JPEG ``patients.csv``
    has to say it in the columns ``series`` (or else ``study`` or ``patient``) and ``position_mm``,
    along the slice normal.

    Args:
        root: folder of the VOC tree.
        images: file by image id, of ``find_images``: all of the tree, whatever their split.
        reach: neighbours on either side.
        by_name: order PNG and JPEG of a series whose positions are not known by the last number
            in their names.

    Returns:
        2 ``reach`` + 1 image ids by image id, ascending along the slice normal; the image itself
        is in the middle, and where there is no neighbour the nearest stands in.

    Raises:
        ValueError: naming an image whose place is not known.
    """
    listed = read_places(root)
    series: dict[str, list[tuple[str, float]]] = {}
    named = 0
    for image, path in images.items():
        if path.suffix.lower() == ".dcm":
            uid, position = read_place(path)
        else:
            uid, position = listed.get(image, ("", math.nan))
            if by_name and uid and math.isnan(position):
                position, named = last_number(image), named + 1
        if not uid or math.isnan(position):
            raise ValueError(
                f"{path}: its place in a series is not known, which INPUT.CONTEXT_SLICES and"
                " INPUT.SEQUENCE_SLICES need;"
                " DICOM has Image Position (Patient) (0020,0032), for PNG and JPEG add the columns"
                f" series and position_mm to {Path(root) / 'patients.csv'}."
            )
        series.setdefault(uid, []).append((image, position))
    if named:
        _warn_of_names(Path(root) / "patients.csv", named)
    context = {}
    for members in series.values():
        names = np.array([image for image, _ in members], dtype=object)
        table = neighbours([position for _, position in members], reach)
        context.update(zip(names, (names[row].tolist() for row in table), strict=True))
    return context


@cache  # a dataset is read several times
def _warn_of_names(path: Path, number: int) -> None:
    logger.warning(
        "%s has no position_mm for %d images: each series' slices are taken in the order of the"
        " last number in their names.",
        path,
        number,
    )


def last_number(name: str) -> float:
    """The last whole number in a name; NaN without any."""
    numbers = re.findall(r"\d+", name)
    return float(numbers[-1]) if numbers else math.nan


def read_places(root: str | Path) -> dict[str, tuple[str, float]]:
    """Where ``patients.csv`` of a VOC tree says that its images lie.

    Returns:
        Series and position along the slice normal in mm by image id, NaN where it is not given; a
        study or else a patient stands for the series where there is no such column. Empty without
        the file.
    """
    path, places = Path(root) / "patients.csv", {}
    if not path.is_file():
        return places
    with open(path, encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            row = {(key or "").strip().lower(): (value or "") for key, value in row.items() if key}
            try:
                position = float(row.get("position_mm", ""))
            except ValueError:
                position = math.nan
            series = row.get("series") or row.get("study") or row.get("patient") or ""
            places[row.get("image", "").strip()] = (series.strip(), position)
    return places
