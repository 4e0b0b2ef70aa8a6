"""What a usable CT slice is: the one place that decides it.

Reading, checking and sorting all go through :func:`read_headers`, so that a file which passes the
check before a training run does not fail in it. Sections "C.x" are of DICOM PS3.3, "A.x" of PS3.5.
H, W are Rows and Columns, F is the number of frames.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder
from pydicom.uid import UID, ExplicitVRBigEndian

from .elements import (
    SEQUENCES,
    UNDEFINED_LENGTH,
    Attributes,
    Elements,
    Refusal,
    Source,
    label,
    read_elements,
    size_of,
)

MAX_SIDE = 4096
"""Largest Rows or Columns accepted; CT has 512 to 2048. A damaged header may claim gigabytes, and
a compressed file can hold them: with this, a slice takes at most 64 MiB as float32."""

MAX_FRAMES = 10_000
"""Largest Number of Frames accepted; a head CT has some hundreds."""

CT_STORAGE = {
    "1.2.840.10008.5.1.4.1.1.2": "CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT Image Storage",
}

_ITEM = b"\xfe\xff\x00\xe0"
_SEQUENCE_DELIMITER = b"\xfe\xff\xdd\xe0"
# Functional groups (C.7.6.16) and what of each stands directly in the header of a single slice.
_GROUPS = {
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelValueTransformationSequence": ("RescaleIntercept", "RescaleSlope", "RescaleType"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth"),
}
_FRAME_TYPE = "CTImageFrameTypeSequence"


_NOT_SLICES = ("LOCALIZER", "SCREEN SAVE", "DOSE", "PROT", "REPORT")
"""Words of Image Type (0008,0008) of pictures that scanners store beside their slices."""

_KEPT_FRAMES = 1 << 14
"""Headers kept in memory, about 3 KiB each."""


@dataclass(frozen=True)
class Header:
    """What is needed to turn a slice's pixel data into HU and to place it.

    Headers are equal if the same words are the same HU in both.

    Attributes:
        values: of the file's header; in an Enhanced image with those of this frame.
        frame: 0-based.
        frames: F.
        offset: of the pixel data's value in the source, bytes.
        padding: stored values, both ends included, as 16-bit words.
    """

    values: Attributes = field(compare=False)
    syntax: UID
    frame: int = field(compare=False)
    frames: int = field(compare=False)
    offset: int = field(compare=False)
    rows: int = field(compare=False)
    columns: int = field(compare=False)
    bits_stored: int
    signed: bool
    slope: float
    intercept: float
    padding: tuple[int, int] | None

    @property
    def compressed(self) -> bool:
        return self.syntax.is_encapsulated

    @property
    def big_endian(self) -> bool:
        return self.syntax == ExplicitVRBigEndian

    @property
    def spacing_mm(self) -> tuple[float, float]:
        """Distance of rows and of columns; NaN where the file does not say."""
        rows, columns = self.values.numbers("PixelSpacing") or (math.nan, math.nan)
        return rows, columns

    @property
    def is_slice(self) -> bool:
        """Whether Image Type names no localizer, dose report or screen save."""
        image_type = self.values.text("ImageType").upper().replace("_", " ")
        return not any(re.search(rf"\b{word}", image_type) for word in _NOT_SLICES)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Turn whatever goes wrong with a file into one sentence that names it."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such DICOM file; check the path.") from None
    except InvalidDicomError as error:
        raise ValueError(f"{path}: is not a DICOM file (no 'DICM' at byte 128).") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except Refusal as error:
        raise ValueError(f"{path}: {printable(error)}") from error
    except Exception as error:
        # pydicom and the decoders answer damage with whatever breaks first: struct.error, EOFError,
        # KeyError, RuntimeError, NotImplementedError, MemoryError, ...
        raise _damage(path, error) from error
    except BaseException as error:
        # pylibjpeg-rle is written in Rust, whose panics are no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise _damage(path, error) from error


def _damage(path: str | os.PathLike, error: BaseException) -> ValueError:
    detail = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"{path}: is damaged ({printable(detail)}); export the file again.")


def printable(message: object, limit: int = 300) -> str:
    """A message without what a damaged header could do to a terminal or a line of a report."""
    return "".join(c if c.isprintable() else "?" for c in str(message)[:limit])


class _Recent:
    """The headers of the files that were read last, so that a file of 300 frames, or one that is
    sorted first and read later, is parsed once."""

    def __init__(self, frames: int):
        self._frames, self._count, self._lock = frames, 0, threading.Lock()
        self._files: dict[tuple, tuple[Header, ...]] = {}

    def get(self, key: tuple) -> tuple[Header, ...] | None:
        return self._files.get(key)

    def put(self, key: tuple, headers: tuple[Header, ...]) -> None:
        with self._lock:
            self._count += len(headers) - len(self._files.pop(key, ()))
            self._files[key] = headers
            while self._count > self._frames and len(self._files) > 1:
                self._count -= len(self._files.pop(next(iter(self._files))))


_recent = _Recent(_KEPT_FRAMES)


def read_headers(file: Source, seen: list[Attributes] | None = None) -> tuple[Header, ...]:
    """Parse and validate a CT file up to and including the extent of its pixel data.

    Args:
        file: open for reading at its start.
        seen: takes the file's attributes, of one that is refused, too.

    Returns:
        The headers of its F frames.

    Raises:
        Refusal: the file is readable but no grey CT image that is whole.
        Exception: whatever pydicom raises on damage.
    """
    stat = os.fstat(file.fileno())
    key = os.path.abspath(file.name), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    headers = _recent.get(key)
    if headers is None:
        elements = read_elements(file)
        if seen is not None:
            seen.append(elements.values)
        headers = _check(elements)
        _recent.put(key, headers)
    elif seen is not None:
        seen.append(headers[0].values)
    return headers


def _check(elements: Elements) -> tuple[Header, ...]:
    values = elements.values
    if other := find_other_kind(values):
        raise Refusal(other)
    if elements.length is None:
        raise Refusal("ends without Pixel Data (7FE0,0010): it is truncated or holds no image.")
    modality, storage = values.text("Modality").upper(), values.text("SOPClassUID")
    if modality != "CT" and storage not in CT_STORAGE:
        raise Refusal(f"has no {label('Modality')}, expected CT.")
    for keyword, value in (("Modality", modality), ("SOPClassUID", storage)):
        if value not in ("", "CT", *CT_STORAGE):
            values.faults[keyword] = f"is {printable(value)}, expected CT"

    frames = int(_integer(values, "NumberOfFrames", 1, MAX_FRAMES)) if _has_frames(values) else 1
    samples = _integer(values, "SamplesPerPixel")
    photometric = values.text("PhotometricInterpretation")
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise Refusal(
            f"is a colour picture or screen capture ({samples} samples a pixel, "
            f"{photometric or 'no photometric interpretation'}), expected a grey CT image."
        )
    rows, columns = (_integer(values, k, 1, MAX_SIDE) for k in ("Rows", "Columns"))
    _integer(values, "BitsAllocated", 16, 16)  # the CT Image IOD, C.8.2.1
    bits_stored = _integer(values, "BitsStored", 1, 16)
    if "HighBit" in values:
        _integer(values, "HighBit", bits_stored - 1, bits_stored - 1)
    signed = _integer(values, "PixelRepresentation", 0, 1) == 1
    of_frames = _frame_values(values, elements.groups, frames)
    for v in of_frames:
        _check_spacing(v)
    rescale = [_rescale(v) for v in of_frames]

    if elements.syntax.is_encapsulated:
        _check_decoder(elements.syntax)
        _check_fragments(elements, (rows, columns), frames)
    else:
        _check_length(elements, elements.length, 2 * rows * columns * frames)
    return tuple(
        Header(
            values=of_frames[i],
            syntax=elements.syntax,
            frame=i,
            frames=frames,
            offset=elements.offset,
            rows=rows,
            columns=columns,
            bits_stored=bits_stored,
            signed=signed,
            slope=rescale[i][0],
            intercept=rescale[i][1],
            padding=_padding(values),
        )
        for i in range(frames)
    )


def find_other_kind(values: Attributes) -> str:
    """Says that a file is of another kind than CT; empty if it is, or if what it says means
    nothing."""
    modality, storage = values.text("Modality"), UID(values.text("SOPClassUID"))
    if modality.upper() != "CT" and re.fullmatch("[A-Z]{2,3}|RT[A-Z]+", modality):
        return f"{label('Modality')} is {modality}, expected CT."
    if storage not in CT_STORAGE and storage.name != storage:  # one that the standard knows
        return f"{label('SOPClassUID')} is {storage.name}, expected CT Image Storage."
    return ""


def _required(values: Attributes, keyword: str) -> float:
    if keyword in values.faults:
        raise Refusal(f"{label(keyword)} {values.faults[keyword]}.")
    value = values.number(keyword)
    if value is None:
        raise Refusal(f"has no {label(keyword)}, which a CT image must have.")
    return value


def _integer(values: Attributes, keyword: str, low: int = 0, high: int = 2**31) -> int:
    value = _required(values, keyword)
    if value != int(value) or not low <= value <= high:
        expected = f"{low}" if low == high else f"{low} to {high}"
        raise Refusal(f"{label(keyword)} is {value:g}, expected {expected}.")
    return int(value)


def _has_frames(values: Attributes) -> bool:
    # Some writers put 0 where there is one image.
    return "NumberOfFrames" in values.faults or values.number("NumberOfFrames") not in (None, 0)


def _check_spacing(values: Attributes) -> None:
    """Drops a Pixel Spacing too odd to be true, by which slices would be resized."""
    rows, columns = values.numbers("PixelSpacing") or (1, 1)
    if not (rows > 0 and columns > 0 and 0.2 < rows / columns < 5):
        del values["PixelSpacing"]
        values.faults["PixelSpacing"] = (
            f"is {rows:g}\\{columns:g} mm, expected pixels not five times as long as wide"
        )


def _rescale(values: Attributes) -> tuple[float, float]:
    # Both Type 1 in the CT Image IOD (C.8.2.1): without them stored values have no unit.
    slope = _required(values, "RescaleSlope")
    intercept = _required(values, "RescaleIntercept")
    if slope == 0:
        raise Refusal(f"{label('RescaleSlope')} is 0, expected a slope to Hounsfield units.")
    unit = values.text("RescaleType").upper()
    # US, "unspecified", is what older scanners write for HU.
    if unit not in ("", "HU", "US", "HOUNSFIELD", "HOUNSFIELD UNITS", "UNSPECIFIED"):
        raise Refusal(f"{label('RescaleType')} is {unit}, expected HU.")
    return slope, intercept


def _padding(values: Attributes) -> tuple[int, int] | None:
    value = values.number("PixelPaddingValue")
    if value is None:
        return None
    limit = values.number("PixelPaddingRangeLimit")
    # Files mix up the VR (US or SS) of these values, so they are kept as the pixels' 16-bit word.
    return int(value) & 0xFFFF, int(value if limit is None else limit) & 0xFFFF


def _frame_values(values: Attributes, groups: Dataset | None, frames: int) -> list[Attributes]:
    """The values of each frame: those of the header, the shared and its own functional groups."""
    if groups is None:
        if frames == 1:
            return [values]
        # The one position in the header is not that of each frame.
        alike = Attributes(values, dict(values.faults))
        alike.pop("ImagePositionPatient", None)
        return [alike] * frames
    per_frame = groups[SEQUENCES[1]].value
    if len(per_frame) != frames:
        raise Refusal(
            f"Per-Frame Functional Groups Sequence (5200,9230) has {len(per_frame)} items, "
            f"expected {frames}, the Number of Frames."
        )
    shared = groups.get(SEQUENCES[0])
    common = values.updated(_group_values(shared[0])) if shared else values
    return [common.updated(_group_values(item)) for item in per_frame]


def _group_values(item: Dataset) -> Attributes:
    found = Attributes()
    for sequence, keywords in _GROUPS.items():
        if item.get(sequence):
            found.read(item[sequence][0], keywords)
    if item.get(_FRAME_TYPE) and (frame_type := item[_FRAME_TYPE][0].get("FrameType")):
        found["ImageType"] = "\\".join([frame_type] if isinstance(frame_type, str) else frame_type)
    return found


def _check_length(elements: Elements, length: int, expected: int) -> None:
    available = max(min(length, size_of(elements.source) - elements.offset), 0)
    if available < expected:
        raise Refusal(
            f"is truncated: its pixel data has {available} bytes, its header says {expected}."
        )


def _check_decoder(syntax: UID) -> None:
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise Refusal(
            f"is compressed as {syntax.name}, for which no decoder is installed; install pylibjpeg "
            "with its plugins or convert the file."
        )


def _check_fragments(elements: Elements, size: tuple[int, int], frames: int) -> None:
    """Walk the offset table and the fragments of compressed pixel data to the end marker (A.4).

    A JPEG or JPEG 2000 stream says its own size, for which a decoder allocates memory: it is
    compared with the header's before anything is decoded.
    """
    if elements.length != UNDEFINED_LENGTH:
        raise Refusal(
            f"is compressed, but its pixel data has a fixed length of {elements.length} bytes."
        )
    file, end = elements.source, size_of(elements.source)
    file.seek(elements.offset)
    count = total = 0
    while (head := file.read(8))[:4] == _ITEM and len(head) == 8:
        length = int.from_bytes(head[4:], "little")
        start = file.tell()
        if start + length > end:
            raise Refusal("is truncated: its compressed pixel data ends within a fragment.")
        if count:  # the first item is the offset table
            total += length
            found = stream_size(file.read(min(length, 1 << 16)))
            if found is not None and found != size:
                raise Refusal(
                    f"holds a compressed image of {found[0]} x {found[1]} pixels, its header says "
                    f"{size[0]} x {size[1]} (Rows x Columns)."
                )
        count += 1
        file.seek(start + length)
    if head[:4] != _SEQUENCE_DELIMITER:
        raise Refusal("is truncated: its compressed pixel data has no end marker (FFFE,E0DD).")
    if not total:
        raise Refusal("has empty compressed pixel data, expected one frame.")
    if count - 1 < frames:
        raise Refusal(f"holds {count - 1} compressed frames, its header says {frames}.")


def stream_size(data: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG, JPEG-LS or JPEG 2000 stream announces; None for others.

    Args:
        data: the stream's beginning.
    """
    if (start := data.find(b"\xff\x4f\xff\x51", 0, 256)) >= 0 and len(data) >= start + 24:
        x, y, x0, y0 = (
            int.from_bytes(data[i : i + 4], "big") for i in range(start + 8, start + 24, 4)
        )
        return y - y0, x - x0
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == 0xF7 or 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(
                data[at + 7 : at + 9], "big"
            )
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
