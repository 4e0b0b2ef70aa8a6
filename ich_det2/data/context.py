"""Which slices lie before and after each slice of a VOC tree."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np

from .dicom import neighbours
from .pictures import is_picture
from .tree import VocTree, warn_once


def find_context(tree: VocTree, reach: int, *, by_name: bool = False) -> dict[str, list[str]]:
    """The neighbours of each image within its series, for channels of context and sequences.

    DICOM files say which series they are of and where they lie. For PNG and JPEG ``patients.csv``
    has to say it in the columns ``series`` (or else ``study`` or ``patient``) and ``position_mm``,
    along the slice normal.

    Args:
        tree: all of its images are looked at, whatever their list.
        reach: neighbours on either side.
        by_name: order PNG and JPEG of a series whose positions are not known by the last number
            in their names.

    Returns:
        2 ``reach`` + 1 image ids by image id, ascending along the slice normal; the image itself
        is in the middle, and where there is no neighbour the nearest stands in.

    Raises:
        ValueError: naming an image whose place is not known.
    """
    places = find_places(tree, tree.images, by_name=by_name)
    for image, path in tree.images.items():
        if image not in places:
            raise ValueError(
                f"{path}: its place in a series is not known, which INPUT.CONTEXT_SLICES and"
                " INPUT.SEQUENCE_SLICES need;"
                " DICOM has Image Position (Patient) (0020,0032), for PNG and JPEG add the columns"
                f" series and position_mm to patients.csv of {tree.root}."
            )
    series: dict[str, list[tuple[str, float]]] = {}
    for image, (uid, position) in places.items():
        series.setdefault(uid, []).append((image, position))
    context: dict[str, list[str]] = {}
    for members in series.values():
        names = np.array([image for image, _ in members], dtype=object)
        table = neighbours([position for _, position in members], reach)
        context.update(zip(names, (names[row].tolist() for row in table), strict=True))
    return context


def find_places(
    tree: VocTree, images: Iterable[str], *, by_name: bool = False
) -> dict[str, tuple[str, float]]:
    """Series and position along the slice normal in mm of images, as :func:`find_context` takes
    them; those whose place is not known are left out.

    Args:
        tree: to which the images belong.
        images: ids.
        by_name: the last number in the name of a picture is its position if that is not known.
    """
    places: dict[str, tuple[str, float]] = {}
    named = 0
    for image in images:
        series, position = tree.place(image)
        if by_name and series and math.isnan(position) and is_picture(tree.images[image]):
            position, named = last_number(image), named + 1
        if series and not math.isnan(position):
            places[image] = series, position
    if named:
        warn_once(
            f"{tree.root}: patients.csv has no position_mm for {named} images: each series' slices"
            " are taken in the order of the last number in their names."
        )
    return places


def last_number(name: str) -> float:
    """The last whole number in a name; NaN without any."""
    numbers = re.findall(r"\d+", name)
    return float(numbers[-1]) if numbers else math.nan
