"""Data elements of a DICOM header up to its pixel data, as plain text and numbers.

Most files are Explicit or Implicit VR Little Endian with elements of stated length. A scan over
their bytes takes a fifth of the time that pydicom needs for the header, which is most of what
reading an uncompressed slice costs (``tools/benchmark.py read-slices``). The scan is strict: at the
first thing that it does not know for sure it gives up, and pydicom reads the header.

Sections "A.x" are of DICOM PS3.5.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

import pydicom
from pydicom.datadict import dictionary_description, dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.filewriter import write_file_meta_info
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

KEYWORDS = (
    "ImageType",
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "BodyPartExamined",
    "SliceThickness",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "PixelSpacing",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "WindowCenter",
    "WindowWidth",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
)
SEQUENCES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")

MAX_INFLATED = 1 << 28
"""Most bytes that a deflated file (A.5) may unfold to: 256 MiB."""

UNDEFINED_LENGTH = 0xFFFFFFFF

_HEAD_BYTES = 1 << 16
_PIXEL_DATA = 0x7FE00010
_WANTED = {
    int(tag): (keyword, dictionary_VR(tag), dictionary_VR(tag).encode().split(b" or "))
    for keyword in KEYWORDS
    for tag in [tag_for_keyword(keyword)]
}
_TAGS = [tag_for_keyword(keyword) for keyword in (*KEYWORDS, *SEQUENCES)]
# VRs by the size of their length field (A.2 Explicit VR, table 7.1-1 and 7.1-2).
_SHORT = frozenset(
    vr.encode() for vr in "AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split()
)
_LONG = frozenset(vr.encode() for vr in "OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_EXPLICIT = struct.Struct("<HH2sH").unpack_from
_IMPLICIT = struct.Struct("<HHI").unpack_from
_LENGTH = struct.Struct("<I").unpack_from
_TEXT = {"CS", "DA", "LO", "PN", "UI"}
_DECIMAL = {"DS", "IS"}


class Refusal(ValueError):
    """Why a file is refused, still without the file's name."""


@dataclass(frozen=True)
class Elements:
    """What a file says of its image.

    Attributes:
        values: text, or a tuple of numbers, by keyword; only ``KEYWORDS`` that the file holds.
        syntax: Transfer Syntax UID.
        source: the file, or its inflated content.
        offset: where the pixel data's value begins in ``source``, bytes.
        length: of the pixel data, bytes or ``UNDEFINED_LENGTH``; None if there are none.
        groups: the functional groups of an Enhanced image, shared and per frame; else None.
    """

    values: dict[str, str | tuple[float, ...]]
    syntax: UID
    source: BinaryIO
    offset: int
    length: int | None
    groups: Dataset | None = None

    @property
    def big_endian(self) -> bool:
        return self.syntax == ExplicitVRBigEndian


def read_elements(file: BinaryIO) -> Elements:
    """Read a header.

    Args:
        file: open for reading at its start.

    Raises:
        Refusal: a deflated file that unfolds to more than ``MAX_INFLATED``.
        Exception: whatever pydicom raises on damage.
    """
    return _scan(file, file.read(_HEAD_BYTES)) or _parse(file)


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether a file looks like DICOM by its content, whatever its name; never raises.

    Files without the preamble of PS3.10 count if they begin with an element of group 2 or 8.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(132)
    except OSError:
        return False
    if head[128:] == b"DICM":
        return True
    little, big = head[:2] in (b"\x02\0", b"\x08\0"), head[:2] == b"\0\x08"
    explicit = head[4:6] in _SHORT | _LONG
    # An implicit element has its length there, of which the first are some bytes.
    return len(head) == 132 and (explicit and (little or big) or little and head[6:8] == b"\0\0")


def size_of(file: BinaryIO) -> int:
    """Length of an open file, bytes; its position stays."""
    position = file.tell()
    try:
        return file.seek(0, os.SEEK_END)
    finally:
        file.seek(position)


def label(keyword: str) -> str:
    """An attribute as the standard prints it: ``Rescale Slope (0028,1053)``."""
    tag = tag_for_keyword(keyword)
    return f"{dictionary_description(tag)} {Tag(tag)}"


def convert(keyword: str, value) -> str | tuple[float, ...]:
    """A value of pydicom's as this module keeps it.

    Raises:
        Refusal: a number that is none.
    """
    if dictionary_VR(tag_for_keyword(keyword)) in _TEXT:
        multiple = isinstance(value, (list, tuple, MultiValue))
        return _parts("\\".join(map(str, value)) if multiple else str(value))
    try:
        values = value if hasattr(value, "__iter__") and not isinstance(value, str) else [value]
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError) as error:
        raise Refusal(f"{label(keyword)} cannot be read as a number.") from error
    return _finite(keyword, numbers)


def _parts(text: str) -> str:
    """The values of a text, each without its padding."""
    if "\\" not in text:
        return text.strip(" \0")
    return "\\".join(part.strip(" \0") for part in text.split("\\"))


def _finite(keyword: str, numbers: tuple[float, ...]) -> tuple[float, ...]:
    for number in numbers:
        if not math.isfinite(number):
            raise Refusal(f"{label(keyword)} is {number}, expected finite numbers.")
    return numbers


# ---- the scan --------------------------------------------------------------------------------


def _scan(file: BinaryIO, head: bytes) -> Elements | None:
    """The header out of the file's first bytes; None for pydicom to read it."""
    if head[128:132] != b"DICM":
        return None
    try:
        meta = _Scan(head, 132, explicit=True, first=0x00020000, stop=0x00030000)
        syntax = UID(meta.raw.get(0x00020010, b"").rstrip(b"\0 ").decode("ascii"))
        if syntax == ImplicitVRLittleEndian:
            explicit = False
        elif syntax == ExplicitVRLittleEndian or (
            syntax.is_transfer_syntax and syntax.is_encapsulated
        ):
            explicit = True
        else:
            return None
        data = _Scan(head, meta.end, explicit=explicit, first=0x00080000, stop=_PIXEL_DATA)
        tag, length, offset = data.last
        if tag != _PIXEL_DATA or data.has_frames:
            return None
        values = {}
        for tag, raw in data.raw.items():
            keyword, vr, _ = _WANTED[tag]
            if value := _interpret(raw, vr):
                values[keyword] = value
    except (_Unsure, struct.error, ValueError):
        return None
    return Elements(values, syntax, file, offset, length)


class _Unsure(Exception):
    """The scan met something that it leaves to pydicom."""


class _Scan:
    """Walks over elements in ascending order of their tags up to a tag.

    Attributes:
        raw: values of the wanted elements (and of group 2), by tag.
        last: tag, length and offset of the value of the element at which the walk to the pixel
            data ended.
        end: offset of the element at which another walk ended.
        has_frames: whether there are functional groups of an Enhanced image.
    """

    def __init__(self, data: bytes, at: int, *, explicit: bool, first: int, stop: int):
        self.raw: dict[int, bytes] = {}
        self.has_frames = False
        wanted, short, long, raw = _WANTED, _SHORT, _LONG, self.raw
        start_of, long_length = _EXPLICIT if explicit else _IMPLICIT, _LENGTH
        size, before = len(data), first - 1
        vr = b""
        while True:
            if at + 12 > size:
                raise _Unsure
            if explicit:
                group, element, vr, length = start_of(data, at)
            else:
                group, element, length = start_of(data, at)
            tag = group << 16 | element
            if tag <= before:
                raise _Unsure
            if tag >= stop and stop != _PIXEL_DATA:
                self.end = at
                return
            start = at + 8
            if explicit and vr not in short:
                if vr not in long:
                    raise _Unsure
                (length,) = long_length(data, start)
                start += 4
            if tag >= stop:
                if tag == _PIXEL_DATA and vr not in (b"", b"OB", b"OW"):
                    raise _Unsure
                self.last = (tag, length, start)
                return
            at = start + length
            # Sequences of undefined length, and what is beyond the head, are left to pydicom.
            if at > size:
                raise _Unsure
            if tag in wanted or tag < 0x00030000:
                if explicit and tag in wanted and vr not in wanted[tag][2]:
                    raise _Unsure
                raw[tag] = data[start:at]
            elif tag in (0x52009229, 0x52009230):
                self.has_frames = True
            before = tag


def _interpret(raw: bytes, vr: str) -> str | tuple[float, ...]:
    if not raw:
        return ()
    if vr in _TEXT:
        # Other than ASCII depends on Specific Character Set.
        return _parts(raw.decode("ascii"))
    if vr in _DECIMAL:
        text = raw.decode("ascii").rstrip("\0").strip()
        numbers = tuple(float(part) for part in text.split("\\")) if text else ()
        if not all(map(math.isfinite, numbers)) or "_" in text:
            raise _Unsure
        return numbers
    if len(raw) != 2:
        raise _Unsure
    return (float(int.from_bytes(raw, "little")),)


# ---- pydicom ---------------------------------------------------------------------------------


def _parse(file: BinaryIO) -> Elements:
    file.seek(0)
    file = _inflate(file)
    dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
    syntax = UID(str(dataset.file_meta.get("TransferSyntaxUID", "")))
    if not syntax:
        implicit, little = dataset.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        syntax = syntax if little else ExplicitVRBigEndian
    length = _enter_pixel_data(file, big_endian=syntax == ExplicitVRBigEndian)
    values = {}
    for keyword in KEYWORDS:
        try:
            value = dataset.get(keyword)
        except Exception as error:  # pydicom converts on access, with many kinds of failure
            raise Refusal(f"{label(keyword)} cannot be read.") from error
        if value not in (None, ""):
            values[keyword] = convert(keyword, value)
    groups = dataset if SEQUENCES[1] in dataset else None
    return Elements(values, syntax, file, file.tell(), length, groups)


def _inflate(file: BinaryIO) -> BinaryIO:
    """The file itself, or a deflated file's content (A.5) as an Explicit VR file in memory."""
    read_preamble(file, False)
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
    write_file_meta_info(plain, meta, enforce_standard=False)
    plain.write(content)
    plain.seek(0)
    return plain


def _enter_pixel_data(file: BinaryIO, big_endian: bool) -> int | None:
    """Step from a tag to its value; return the value's length, None if it is not Pixel Data."""
    order = "big" if big_endian else "little"
    start = file.read(8)
    group, element = (int.from_bytes(start[i : i + 2], order) for i in (0, 2))
    if len(start) < 8 or (group, element) != (0x7FE0, 0x0010):
        return None
    # Explicit VR puts the length after the VR and two reserved bytes (A.2). Implicit VR has it in
    # the VR's place; a length is even, so it cannot be mistaken for one of these three VR.
    length = file.read(4) if start[4:6] in (b"OB", b"OW", b"UN") else start[4:]
    return int.from_bytes(length, order)
