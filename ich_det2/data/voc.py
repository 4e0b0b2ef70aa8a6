"""Pascal VOC annotation files (one XML per image), read leniently and written strictly.

VOC corners are 1-based and inclusive: ``xmin = xmax = 1`` is the one-pixel box at the left border.
Everywhere else in this package a box is XYXY in 0-based pixel edges,
``(xmin - 1, ymin - 1, xmax, ymax)``, so that its width is ``x1 - x0``. The change of convention
happens here and nowhere else.
"""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import defusedxml.ElementTree as SafeET
from defusedxml import DefusedXmlException

from ..files import write_atomically

Box = tuple[float, float, float, float]

MAX_BYTES = 8 << 20
"""Largest annotation file accepted; a thousand objects take half a MiB."""

DECIMALS = 6
"""Places behind the point that coordinates keep; what a mouse draws has none, a resize a few."""


@dataclass(frozen=True)
class VocObject:
    """One annotated object.

    Attributes:
        name: the class as written in the file.
        box: ``(x0, y0, x1, y1)``, 0-based pixel edges inside the image, of positive area.
        difficult: VOC's mark of an object that is hard to recognise.
    """

    name: str
    box: Box
    difficult: bool = False


@dataclass(frozen=True)
class VocAnnotation:
    """The content of one annotation file.

    Attributes:
        path: the file that was read.
        filename: the image's name without any folder, None where the file does not say.
        width, height: the image's size in pixels, None where the file does not say.
        objects: the annotated objects, in the file's order; empty for a healthy slice.
    """

    path: Path
    filename: str | None
    width: int | None
    height: int | None
    objects: tuple[VocObject, ...]


def read_voc(path: str | os.PathLike) -> VocAnnotation:
    """Read a VOC annotation as LabelImg, CVAT and their kin write it.

    ``pose``, ``truncated``, ``difficult``, ``filename`` and ``size`` may be missing, coordinates
    may be floats, unknown elements are ignored, and a box that reaches over the image's border is
    clipped (without ``size`` only the upper and left borders are known).

    Args:
        path: the XML file.

    Returns:
        The annotation, its boxes in 0-based pixel edges.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not XML, no ``annotation`` root, XML entities, a size or coordinate that is no
            finite number, an object without name or box, or a box that is empty or outside the
            image. The message names the file and the object's index.
    """
    path = Path(path)
    root = _parse(path)
    size = root.find("{*}size")
    width = _dimension(size, "width", path)
    height = _dimension(size, "height", path)
    objects = tuple(
        _read_object(element, width, height, f"{path}: object {index}")
        for index, element in enumerate(root.findall("{*}object"))
    )
    filename = _basename(_text(root, "filename"))
    return VocAnnotation(path, filename, width, height, objects)


def write_voc(
    path: str | os.PathLike,
    *,
    filename: str,
    width: int,
    height: int,
    objects: Iterable[tuple[str, Box]],
    database: str | None = None,
    segmented: bool = False,
) -> None:
    """Write a VOC annotation that LabelImg opens and ``read_voc`` reads back, to
    ``DECIMALS`` places.

    The file appears whole or not at all: it is written beside its target and renamed.

    Args:
        path: the XML file to write; an existing one is replaced.
        filename: the image's name; a folder before it is dropped.
        width, height: the image's size in pixels.
        objects: pairs of class name and ``(x0, y0, x1, y1)`` in 0-based pixel edges inside the
            image, at least one pixel wide and high (VOC's inclusive corners cannot say less).
        database: where the annotation comes from, kept in ``source/database``.
        segmented: whether the image has masks in ``SegmentationObject``.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        ValueError: a size, name or box that VOC cannot hold.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder for {path.name}; create it first.")
    if not (_is_whole(width) and _is_whole(height) and width > 0 and height > 0):
        raise ValueError(
            f"{path}: the image size is {width} x {height}, expected two positive whole numbers."
        )
    name = _basename(filename)
    if name is None:
        raise ValueError(f"{path}: the image's filename is {filename!r}, expected a file name.")

    root = ET.Element("annotation")
    _add(root, "folder", "DICOM" if name.lower().endswith(".dcm") else "JPEGImages")
    _add(root, "filename", _printable(name, f"{path}: the image's filename"))
    _add(
        _add(root, "source"), "database", _printable(database or "Unknown", f"{path}: the database")
    )
    size = _add(root, "size")
    for tag, value in (("width", width), ("height", height), ("depth", 1)):
        _add(size, tag, str(int(value)))
    _add(root, "segmented", str(int(segmented)))
    for index, (label, box) in enumerate(objects):
        _add_object(root, label, box, width, height, f"{path}: object {index}")

    ET.indent(root, space="\t")
    with write_atomically(path) as file:
        file.write(ET.tostring(root, encoding="unicode") + "\n")


def _parse(path: Path) -> ET.Element:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise ValueError(
                    f"{path}: has {size} bytes, expected at most {MAX_BYTES >> 20} MiB of XML."
                )
            data = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotation file; check the path.") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        root = SafeET.fromstring(data)
    except DefusedXmlException as error:
        raise ValueError(
            f"{path}: defines XML entities, which an annotation does not need and which are "
            "refused as unsafe; remove the DOCTYPE."
        ) from error
    except (SafeET.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: is not XML ({error}); expected a VOC annotation.") from error
    tag = root.tag.rpartition("}")[2]
    if tag != "annotation":
        raise ValueError(
            f"{path}: the root element is <{tag}>, expected <annotation> of Pascal VOC."
        )
    return root


def _text(parent: ET.Element | None, tag: str) -> str | None:
    """The stripped text of a child in any namespace, None where it is missing or empty."""
    text = None if parent is None else parent.findtext("{*}" + tag)
    return (text or "").strip() or None


def _number(text: str | None, what: str) -> float:
    try:
        value = float(text or "nan")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        got = "missing" if text is None else f"'{_short(text)}'"
        raise ValueError(f"{what} is {got}, expected a finite number.")
    return value


def _dimension(size: ET.Element | None, tag: str, path: Path) -> int | None:
    text = _text(size, tag)
    if text is None:
        return None
    value = _number(text, f"{path}: size/{tag}")
    if value <= 0 or value != int(value):
        raise ValueError(
            f"{path}: size/{tag} is '{_short(text)}', expected a positive whole number of pixels."
        )
    return int(value)


def _read_object(
    element: ET.Element, width: int | None, height: int | None, where: str
) -> VocObject:
    name = _text(element, "name")
    if name is None:
        raise ValueError(f"{where} has no <name>, expected the class of the object.")
    bndbox = element.find("{*}bndbox")
    if bndbox is None:
        raise ValueError(f"{where} has no <bndbox>, expected xmin, ymin, xmax and ymax.")
    x0, x1 = _read_span(bndbox, "x", width, where)
    y0, y1 = _read_span(bndbox, "y", height, where)
    difficult = (_text(element, "difficult") or "").lower() in ("1", "true")
    return VocObject(name, (x0, y0, x1, y1), difficult)


def _read_span(bndbox: ET.Element, axis: str, size: int | None, where: str) -> tuple[float, float]:
    """One axis of a box: 1-based inclusive corners to 0-based edges, clipped to the image."""
    low = _number(_text(bndbox, f"{axis}min"), f"{where}: {axis}min")
    high = _number(_text(bndbox, f"{axis}max"), f"{where}: {axis}max")
    if high < low:
        raise ValueError(
            f"{where}: {axis}max {high:g} is less than {axis}min {low:g}, expected a box that is "
            "not empty."
        )
    limit = math.inf if size is None else size
    start, stop = max(round(low - 1, DECIMALS), 0.0), round(float(min(high, limit)), DECIMALS)
    if not start < stop:
        raise ValueError(
            f"{where}: {axis}min {low:g} to {axis}max {high:g} has no pixel inside the image "
            f"(1 to {limit:g}); correct the box or the size."
        )
    return start, stop


def _basename(name: str | None) -> str | None:
    """The last part of a path of either system: a path that comes from a file is never followed."""
    name = re.split(r"[\\/]", name or "")[-1].strip()
    return None if name in ("", ".", "..") else name


def _add(parent: ET.Element, tag: str, text: str | None = None) -> ET.Element:
    child = ET.SubElement(parent, tag)
    child.text = text
    return child


def _add_object(root: ET.Element, name: str, box: Box, width: int, height: int, where: str) -> None:
    x0, y0, x1, y1 = (float(value) for value in box)
    for axis, low, high, limit in (("x", x0, x1, width), ("y", y0, y1, height)):
        # As read_voc sees it: the 1-based low corner may not lie beyond the high one.
        if not (0 <= low < high <= limit and round(low + 1, DECIMALS) <= round(high, DECIMALS)):
            raise ValueError(
                f"{where}: {axis} runs from {low:g} to {high:g}, expected at least one pixel "
                f"between 0 and {limit}; clip the box to the image."
            )
    element = _add(root, "object")
    _add(element, "name", _printable(name, f"{where}: the name"))
    for tag, text in (("pose", "Unspecified"), ("truncated", "0"), ("difficult", "0")):
        _add(element, tag, text)
    bndbox = _add(element, "bndbox")
    for tag, value in (("xmin", x0 + 1), ("ymin", y0 + 1), ("xmax", x1), ("ymax", y1)):
        _add(bndbox, tag, f"{value:.{DECIMALS}f}".rstrip("0").rstrip("."))


def _printable(text: str, what: str) -> str:
    text = text.strip()
    if not text or not text.isprintable():
        raise ValueError(
            f"{what} is {text!r}, expected printable text (XML cannot hold control characters)."
        )
    return text


def _is_whole(value: float) -> bool:
    return math.isfinite(value) and value == int(value)


def _short(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
