"""Which slices lie before and after each slice of a VOC tree."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

from .dicom import evenly_spaced, neighbours
from .pictures import is_picture
from .tree import VocTree, warn_once


def find_context(tree: VocTree, reach: int, *, by_name: bool = False) -> dict[str, list[str]]:
    """The neighbours of each image within its series, for channels of context and sequences.

    DICOM files say which series they are of and where they lie. For PNG and JPEG ``patients.csv``
    has to say it in ``position_mm``, along the slice normal, and, where a patient has several, the
    columns ``study`` and ``series``.

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
    context: dict[str, list[str]] = {}
    for names, positions in _find_series(tree, tree.images, by_name):
        table = neighbours(positions, reach)
        context.update(zip(names, (names[row].tolist() for row in table), strict=True))
    return context


def find_scans(
    tree: VocTree, images: Iterable[str], count: int, *, by_name: bool = False
) -> dict[str, list[str]]:
    """The scan that each image is of: images at even distances over its series.

    Args:
        tree: to which the images belong.
        images: ids; of others of the series nothing is taken, so that no list shows another's.
        count: images of a scan.
        by_name: see :func:`find_context`.

    Returns:
        ``count`` image ids by image id, ascending along the slice normal, the same for all of a
        series.

    Raises:
        ValueError: naming an image whose place is not known.
    """
    scans: dict[str, list[str]] = {}
    for names, positions in _find_series(tree, images, by_name):
        scans |= dict.fromkeys(names, names[evenly_spaced(positions, count)].tolist())
    return scans


def _find_series(
    tree: VocTree, images: Iterable[str], by_name: bool
) -> Iterator[tuple[np.ndarray, list[float]]]:
    """The images and positions of each series; all have to be known."""
    images = list(images)
    places = find_places(tree, images, by_name=by_name)
    series: dict[str, list[tuple[str, float]]] = {}
    for image in images:
        if image not in places:
            raise ValueError(
                f"{tree.images[image]}: its place in a series is not known, which"
                " INPUT.CONTEXT_SLICES, INPUT.SEQUENCE_SLICES and INPUT.SCAN_SLICES need;"
                " DICOM has Image Position (Patient) (0020,0032), for PNG and JPEG add the columns"
                f" series and position_mm to patients.csv of {tree.root}."
            )
        uid, position = places[image]
        series.setdefault(uid, []).append((image, position))
    for members in series.values():
        names = np.array([image for image, _ in members], dtype=object)
        yield names, [position for _, position in members]


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
