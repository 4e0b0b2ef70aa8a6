"""Attributes of a DICOM header up to its pixel data, as plain text and numbers.

pydicom parses the file; values are taken out of its raw elements, because what pydicom makes of
them on access fails on one bad value, and costs more than the parsing. A value that is not as it
should be is a fault of its attribute, not of the file: whether it matters is decided by who needs
it. Sections "A.x" are of DICOM PS3.5.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import pydicom
from pydicom.datadict import dictionary_description, dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filebase import DicomIO
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.filewriter import write_file_meta_info
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

TEXTS = (
    "ImageType",
    "SOPClassUID",
    "SOPInstanceUID",
    "AccessionNumber",
    "Modality",
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "BodyPartExamined",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "PhotometricInterpretation",
    "RescaleType",
)
NUMBERS = {
    "SliceThickness": 1,
    "ImagePositionPatient": 3,
    "ImageOrientationPatient": 6,
    "SamplesPerPixel": 1,
    "NumberOfFrames": 1,
    "Rows": 1,
    "Columns": 1,
    "PixelSpacing": 2,
    "BitsAllocated": 1,
    "BitsStored": 1,
    "HighBit": 1,
    "PixelRepresentation": 1,
    "PixelPaddingValue": 1,
    "PixelPaddingRangeLimit": 1,
    "WindowCenter": None,
    "WindowWidth": None,
    "RescaleIntercept": 1,
    "RescaleSlope": 1,
}
"""Numeric attributes, and how many values each has."""

SEQUENCES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")

MAX_INFLATED = 1 << 28
"""Most bytes that a deflated file (A.5) may unfold to: 256 MiB."""

UNDEFINED_LENGTH = 0xFFFFFFFF

Source = io.BufferedReader | io.BytesIO
"""An open file, or the content of a deflated one."""

_TAGS = {keyword: Tag(keyword) for keyword in (*TEXTS, *NUMBERS, *SEQUENCES)}
_BINARY = {"US": "H", "SS": "h", "UL": "L", "SL": "l", "FL": "f", "FD": "d", "UV": "Q", "SV": "q"}
_VALUE_REPRESENTATIONS = frozenset(vr.value.encode() for vr in pydicom.valuerep.VR)


class Refusal(ValueError):
    """Why a file is refused, still without the file's name."""


class Attributes(dict):
    """Texts, and tuples of numbers, by keyword; only what the file holds.

    Attributes:
        faults: in words, by the keyword of a value that is not as it should be.
    """

    def __init__(self, values: Iterable = (), faults: dict[str, str] | None = None):
        super().__init__(values)
        self.faults = faults or {}

    def updated(self, other: Attributes) -> Attributes:
        """A copy, with what others say in the place of these."""
        return Attributes({**self, **other}, self.faults | other.faults)

    def text(self, keyword: str) -> str:
        """Empty where it is missing."""
        return self.get(keyword, "")

    def numbers(self, keyword: str) -> tuple[float, ...]:
        """Empty where they are missing, or not as many as there should be."""
        return self.get(keyword, ())

    def number(self, keyword: str) -> float | None:
        """None where it is missing."""
        return next(iter(self.numbers(keyword)), None)

    def read(self, dataset: Dataset, keywords: Iterable[str]) -> None:
        """Takes attributes of a data set."""
        for keyword in keywords:
            tag = _TAGS[keyword]
            if tag not in dataset:
                continue
            try:
                value = _value(dataset, tag)
                if keyword in NUMBERS:
                    value = self._check(keyword, tuple(map(_number, value)))
                else:
                    value = "\\".join(str(part).strip(" \0\t\r\n") for part in value)
            except Exception as error:  # pydicom converts on access, with many kinds of failure
                self.faults[keyword] = (
                    str(error)
                    if isinstance(error, Refusal)
                    else f"cannot be read{' as a number' * (keyword in NUMBERS)}"
                )
            else:
                if value:
                    self[keyword] = value

    def _check(self, keyword: str, numbers: tuple[float, ...]) -> tuple[float, ...]:
        """Of several values where one is expected the first; none, where several are."""
        for number in numbers:
            if not math.isfinite(number):
                raise Refusal(f"is {number}, expected finite numbers")
        count = NUMBERS[keyword]
        if not numbers or count in (None, len(numbers)):
            return numbers
        many = f"{len(numbers)} value{'s' * (len(numbers) > 1)}"
        self.faults[keyword] = f"has {many}, expected {'one' if count == 1 else count}"
        return numbers[:1] if count == 1 else ()


@dataclass(frozen=True)
class Elements:
    """What a file says of its image.

    Attributes:
        values: of the header.
        syntax: Transfer Syntax UID.
        source: the file, or its inflated content.
        offset: where the pixel data's value begins in ``source``, bytes.
        length: of the pixel data, bytes or ``UNDEFINED_LENGTH``; None if there are none.
        groups: the functional groups of an Enhanced image, shared and per frame; else None.
    """

    values: Attributes
    syntax: UID
    source: Source
    offset: int
    length: int | None
    groups: Dataset | None = None


def read_elements(file: Source) -> Elements:
    """Read a header.

    Args:
        file: open for reading at its start.

    Raises:
        Refusal: a deflated file that unfolds to more than ``MAX_INFLATED``.
        Exception: whatever pydicom raises on damage.
    """
    if not _begins_as_dicom(file.read(132)):
        raise InvalidDicomError
    source = inflate(file)
    dataset = pydicom.dcmread(
        source, force=True, stop_before_pixels=True, specific_tags=list(_TAGS.values())
    )
    meta = dataset.file_meta
    syntax = UID(str(meta.get("TransferSyntaxUID", "")))
    if not syntax:
        implicit, little = dataset.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        syntax = syntax if little else ExplicitVRBigEndian
    length = _enter_pixel_data(source, big_endian=syntax == ExplicitVRBigEndian)
    values = Attributes()
    values.read(dataset, (*TEXTS, *NUMBERS))
    values.setdefault("SOPClassUID", str(meta.get("MediaStorageSOPClassUID", "")))
    groups = dataset if SEQUENCES[1] in dataset else None
    return Elements(values, syntax, source, source.tell(), length, groups)


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether a file looks like DICOM by its content, whatever its name; never raises.

    Files without the preamble of PS3.10 count if they begin with an element of group 2 or 8.
    """
    try:
        with open(path, "rb") as file:
            return _begins_as_dicom(file.read(132))
    except OSError:
        return False


def _begins_as_dicom(head: bytes) -> bool:
    if head[128:] == b"DICM":
        return True
    little, big = head[:2] in (b"\2\0", b"\x08\0"), head[:2] == b"\0\x08"
    explicit = head[4:6] in _VALUE_REPRESENTATIONS
    # An implicit element has its length there, of which the first are some bytes.
    return len(head) == 132 and (explicit and (little or big) or little and head[6:8] == b"\0\0")


def size_of(file: Source) -> int:
    """Length of an open file, bytes; its position stays."""
    position = file.tell()
    try:
        return file.seek(0, os.SEEK_END)
    finally:
        file.seek(position)


def label(keyword: str) -> str:
    """An attribute as the standard prints it: ``Rescale Slope (0028,1053)``."""
    return f"{dictionary_description(_TAGS[keyword])} {_TAGS[keyword]}"


def _value(dataset: Dataset, tag: int) -> Iterable:
    """The values of an element, whatever VR the file gives it."""
    element = dataset.get_item(tag)
    value = element.value
    if isinstance(element, RawDataElement) and isinstance(value, bytes):
        vr = dictionary_VR(tag) if element.VR in (None, "UN", "OB", "OW") else element.VR
        code = _BINARY.get(vr[:2])  # "US or SS"
        if code:
            order = "<" if element.is_little_endian else ">"
            return [number for (number,) in struct.iter_unpack(order + code, value)]
        if value.isascii() and b"\x1b" not in value:
            text = value.decode("ascii")
            return text.split("\\") if text.strip(" \0") else ()
        # What other characters mean depends on Specific Character Set, but this cannot be mistaken.
        with contextlib.suppress(UnicodeDecodeError):
            if b"\x1b" not in value:
                return value.decode("utf-8").split("\\")
        try:
            value = dataset[tag].value
        except Exception:
            return value.decode("latin-1").split("\\")
    if value is None or value == "":
        return ()
    return value if hasattr(value, "__iter__") and not isinstance(value, str) else [value]


def _number(value) -> float:
    if isinstance(value, str) and "_" in value:
        raise ValueError
    return float(value.strip(" \0\t\r\n") if isinstance(value, str) else value)


def inflate(file: Source) -> Source:
    """The file itself, or a deflated file's content (A.5) as an Explicit VR file in memory."""
    file.seek(0)
    deflated = DeflatedExplicitVRLittleEndian.encode() in file.read(1 << 12)
    file.seek(0)
    if not deflated:
        return file
    read_preamble(file, True)
    meta = _read_file_meta_info(file)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        file.seek(0)
        return file
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    content = inflater.decompress(file.read(), MAX_INFLATED)
    if inflater.unconsumed_tail:
        raise Refusal(f"unfolds to more than {MAX_INFLATED >> 20} MiB, expected one CT image.")
    if not inflater.eof:
        raise Refusal("is truncated: its deflated data set has no end.")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    plain = io.BytesIO(b"\0" * 128 + b"DICM")
    plain.seek(0, os.SEEK_END)
    write_file_meta_info(cast(DicomIO, plain), meta, enforce_standard=False)
    plain.write(content)
    plain.seek(0)
    return plain


def _enter_pixel_data(file: Source, big_endian: bool) -> int | None:
    """Step from a tag to its value; return the value's length, None if it is not Pixel Data."""
    order: Literal["big", "little"] = "big" if big_endian else "little"
    start = file.read(8)
    group, element = (int.from_bytes(start[i : i + 2], order) for i in (0, 2))
    if len(start) < 8 or (group, element) != (0x7FE0, 0x0010):
        return None
    # Explicit VR puts the length after the VR and two reserved bytes (A.2). Implicit VR has it in
    # the VR's place; a length is even, so it cannot be mistaken for one of these three VR.
    length = file.read(4) if start[4:6] in (b"OB", b"OW", b"UN") else start[4:]
    return int.from_bytes(length, order)
