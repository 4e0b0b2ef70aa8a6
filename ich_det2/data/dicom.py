"""Head-CT DICOM: pixels in Hounsfield units (HU), windows, and slices in anatomical order.

Sections "C.x" in this module are of DICOM PS3.3, "A.x" of PS3.5. Sizes: H, W are Rows and Columns.

One function, ``_read_header``, decides what a usable CT slice is; reading, checking and sorting all
go through it, so that a file which passes the check before a training run does not fail in it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom.datadict import dictionary_description, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian

AIR_HU = -1000.0
"""HU given to padding: the value of air, which a scanner that does not pad would show around the
head. It lies below every diagnostic window of the head, so padding is black in each."""

MAX_SIDE = 8192
"""Largest Rows or Columns accepted; CT has 512 or 1024. A damaged header may claim gigabytes."""

_KEYWORDS = (
    "ImageType",
    "SOPInstanceUID",
    "Modality",
    "PatientID",
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
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
)
_TAGS = [tag_for_keyword(keyword) for keyword in _KEYWORDS]
_ITEM = b"\xfe\xff\x00\xe0"
_SEQUENCE_DELIMITER = b"\xfe\xff\xdd\xe0"
_UNDEFINED_LENGTH = 0xFFFFFFFF


@dataclass(frozen=True)
class CTSeries:
    """The slices of one CT series in anatomical order.

    Attributes:
        files: the slices, ascending along the slice normal (row x column direction): from the feet
            to the head for an ordinary axial series.
        series_uid, study_uid, patient_id: as in the files; empty where a file does not say.
        spacing_mm: distance of neighbouring slices along the normal (the median, or the slice
            thickness of a single slice), of rows, and of columns; NaN where the files do not say.
    """

    files: tuple[Path, ...]
    series_uid: str
    study_uid: str
    patient_id: str
    spacing_mm: tuple[float, float, float]


def read_hu(path: str | os.PathLike) -> np.ndarray:
    """Read one CT slice as Hounsfield units.

    ``HU = Rescale Slope * stored value + Rescale Intercept`` (C.11.1.1.2). Pixels that hold Pixel
    Padding Value, or lie between it and Pixel Padding Range Limit (C.7.5.1.1.2), become ``AIR_HU``.
    MONOCHROME1 is accepted and changes nothing: it says that a display shows low values white,
    after any window (C.7.6.3.1.2), not that HU are inverted.

    Args:
        path: a DICOM file with one CT image, compressed or not.

    Returns:
        float32 array sized (H, W), in HU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a DICOM file, not CT, no pixel data, truncated, colour, several frames, no
            rescale values, or a compression nobody can decode. The message names the file.
    """
    with _naming(path), open(path, "rb") as file:
        header = _read_header(file)
        stored = _decode(file, header) if header.compressed else _read_words(file, header)
        hu = stored.astype(np.float32)
        if header.slope != 1:
            hu *= np.float32(header.slope)
        if header.intercept != 0:
            hu += np.float32(header.intercept)
        if header.padding is not None:
            low, high = header.padding
            hu[(stored >= low) & (stored <= high)] = AIR_HU
        return hu


def check_dicom(path: str | os.PathLike) -> None:
    """Find out before a long run whether ``read_hu`` would refuse a file.

    The header is read and the extent of the pixel data is compared with it; a compressed image's
    fragments are walked to their end marker (A.4). Nothing is decoded, so damage inside a
    compressed fragment stays unseen.

    Args:
        path: a DICOM file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as ``read_hu``.
    """
    with _naming(path), open(path, "rb") as file:
        _read_header(file)


def read_identity(path: str | os.PathLike) -> tuple[str, str]:
    """Read whose slice a file is; as identifying as the file, so store only pseudonyms of it.

    Args:
        path: a DICOM file.

    Returns:
        ``(patient_id, study_uid)``; empty strings where the file does not say.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as ``read_hu``.
    """
    with _naming(path), open(path, "rb") as file:
        dataset = _read_header(file).dataset
        return _text(dataset, "PatientID"), _text(dataset, "StudyInstanceUID")


def apply_window(hu: np.ndarray, level: float, width: float) -> np.ndarray:
    """Map the window ``level - width / 2 ... level + width / 2`` to 0 ... 1 and clip.

    This is the paper's plain window, and DICOM's LINEAR_EXACT up to the scale of the output
    (C.11.2.1.3.2). DICOM's default LINEAR (C.11.2.1.2.1) has ``level - 0.5`` and ``width - 1`` in
    their places and so differs by up to ``1 / width``.

    Args:
        hu: array of any shape, in HU; it is not modified.
        level: centre of the window, in HU.
        width: full width of the window, in HU, positive.

    Returns:
        float32 array in [0, 1], shaped as ``hu``.

    Raises:
        ValueError: ``width`` is not positive, or either is not finite.
    """
    if not (math.isfinite(level) and math.isfinite(width) and width > 0):
        raise ValueError(
            f"The window is level {level} HU, width {width} HU; expected finite numbers and a "
            "positive width."
        )
    out = np.subtract(hu, np.float32(level - width / 2), dtype=np.float32)
    out /= np.float32(width)
    return np.clip(out, 0, 1, out=out)


def read_series(
    folder: str | os.PathLike,
) -> tuple[list[CTSeries], list[tuple[Path, str]]]:
    """Find the CT series in a folder and its subfolders, reading headers only.

    Slices are grouped by Series Instance UID and sorted by Image Position projected on the slice
    normal (C.7.6.2.1.1), never by file name or Instance Number. A series that holds several
    orientations gives one ``CTSeries`` each. Links that lead out of the folder are not followed.

    Args:
        folder: the folder to search.

    Returns:
        ``(series, skipped)``: the series ordered by patient, study and series UID; and pairs of
        path and reason for every other file, ordered by path: not DICOM, not CT, localizers,
        reports, duplicates, slices without a position in a series of several files, unreadable.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: ``folder`` is a file.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; expected a folder of DICOM files.")
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder of DICOM files.")

    skipped: list[tuple[Path, str]] = []
    by_uid: dict[str, list[_Slice]] = {}
    seen: dict[str, Path] = {}
    for path in _walk(folder, skipped):
        try:
            entry = _read_slice(path)
            first = seen.setdefault(entry.sop_uid, path) if entry.sop_uid else path
            if first != path:
                raise _Refusal(f"repeats the image {first.relative_to(folder)} (SOP Instance UID).")
        except (ValueError, FileNotFoundError) as error:
            skipped.append((path, str(error).removeprefix(f"{path}: ")))
        else:
            by_uid.setdefault(entry.series_uid, []).append(entry)

    series = []
    for slices in by_uid.values():
        if len(slices) > 1:
            reason = f"has no position or orientation to place it among {len(slices)} slices."
            skipped += [(s.path, reason) for s in slices if s.position is None]
            slices = [s for s in slices if s.position is not None]
        series += [_sort_series(group) for group in _split_orientations(slices)]
    series.sort(key=lambda s: (s.patient_id, s.study_uid, s.series_uid))
    return series, sorted(skipped)


class _Refusal(ValueError):
    """Why a file is refused, still without the file's name."""


@contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
    """Turn whatever goes wrong with a file into one sentence that names it."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such DICOM file; check the path.") from None
    except InvalidDicomError as error:
        raise ValueError(f"{path}: is not a DICOM file (no 'DICM' at byte 128).") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except _Refusal as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        # pydicom and the decoders answer damage with whatever breaks first: struct.error, EOFError,
        # KeyError, RuntimeError, NotImplementedError, ...
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: is damaged ({detail}); export the file again.") from error


@dataclass(frozen=True)
class _Header:
    """What is needed to turn the pixel data of a file into HU."""

    dataset: Dataset  # only _TAGS
    offset: int  # of the pixel data's value in the file, in bytes
    rows: int
    columns: int
    bits_stored: int
    signed: bool
    big_endian: bool
    compressed: bool
    slope: float
    intercept: float
    padding: tuple[int, int] | None  # stored values, both ends included


def _read_header(file: BinaryIO) -> _Header:
    """Parse and validate a CT slice up to and including the extent of its pixel data.

    Raises:
        _Refusal: the file is readable but not a single-frame grey CT image that is whole.
        Exception: whatever pydicom raises on damage.
    """
    dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax == DeflatedExplicitVRLittleEndian:
        raise _Refusal("is deflated, which is not supported; convert it to Explicit VR.")
    compressed = syntax is not None and syntax.is_encapsulated
    big_endian = not dataset.original_encoding[1]

    modality = _text(dataset, "Modality")
    if modality not in ("", "CT"):
        raise _Refusal(f"{_label('Modality')} is {modality}, expected CT.")
    length = _enter_pixel_data(file, big_endian)
    if length is None:
        raise _Refusal("ends without Pixel Data (7FE0,0010): it is truncated or holds no image.")
    if not modality:
        raise _Refusal(f"has no {_label('Modality')}, expected CT.")
    offset = file.tell()

    if (_number(dataset, "NumberOfFrames") or 1) != 1:
        frames = _integer(dataset, "NumberOfFrames")
        raise _Refusal(f"holds {frames} frames, which is not supported; export one slice a file.")
    samples = _integer(dataset, "SamplesPerPixel")
    photometric = _text(dataset, "PhotometricInterpretation")
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise _Refusal(
            f"is a colour picture or screen capture ({samples} samples a pixel, "
            f"{photometric or 'no photometric interpretation'}), expected a grey CT image."
        )
    rows, columns = (_integer(dataset, k, 1, MAX_SIDE) for k in ("Rows", "Columns"))
    _integer(dataset, "BitsAllocated", 16, 16)  # the CT Image IOD, C.8.2.1
    bits_stored = _integer(dataset, "BitsStored", 1, 16)
    _integer(dataset, "HighBit", bits_stored - 1, bits_stored - 1)
    signed = _integer(dataset, "PixelRepresentation", 0, 1) == 1
    # Both Type 1 in the CT Image IOD (C.8.2.1): without them stored values have no unit.
    slope = _required(dataset, "RescaleSlope")
    intercept = _required(dataset, "RescaleIntercept")
    if slope == 0:
        raise _Refusal(f"{_label('RescaleSlope')} is 0, expected a slope to Hounsfield units.")
    unit = _text(dataset, "RescaleType")
    if unit not in ("", "HU", "US"):  # US, "unspecified", is what older scanners write for HU
        raise _Refusal(f"{_label('RescaleType')} is {unit}, expected HU.")

    if compressed:
        _check_decoder(syntax)
        _check_fragments(file, length)
    else:
        _check_length(file, length, 2 * rows * columns)
    return _Header(
        dataset=dataset,
        offset=offset,
        rows=rows,
        columns=columns,
        bits_stored=bits_stored,
        signed=signed,
        big_endian=big_endian,
        compressed=compressed,
        slope=slope,
        intercept=intercept,
        padding=_padding(dataset, signed),
    )


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


def _check_length(file: BinaryIO, length: int, expected: int) -> None:
    available = os.fstat(file.fileno()).st_size - file.tell()
    if min(length, available) < expected:
        raise _Refusal(
            f"is truncated: its pixel data has {min(length, available)} bytes, its header says "
            f"{expected}."
        )


def _check_decoder(syntax: pydicom.uid.UID) -> None:
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise _Refusal(
            f"is compressed as {syntax.name}, for which no decoder is installed; install pylibjpeg "
            "with its plugins or convert the file."
        )


def _check_fragments(file: BinaryIO, length: int) -> None:
    """Walk the offset table and the fragments of compressed pixel data to the end marker (A.4)."""
    if length != _UNDEFINED_LENGTH:
        raise _Refusal(f"is compressed, but its pixel data has a fixed length of {length} bytes.")
    end = os.fstat(file.fileno()).st_size
    sizes = []
    while (head := file.read(8))[:4] == _ITEM and len(head) == 8:
        sizes.append(int.from_bytes(head[4:], "little"))
        if file.tell() + sizes[-1] > end:
            raise _Refusal("is truncated: its compressed pixel data ends within a fragment.")
        file.seek(sizes[-1], os.SEEK_CUR)
    if head[:4] != _SEQUENCE_DELIMITER:
        raise _Refusal("is truncated: its compressed pixel data has no end marker (FFFE,E0DD).")
    if not sum(sizes[1:]):  # the first item is the offset table
        raise _Refusal("has empty compressed pixel data, expected one frame.")


def _read_words(file: BinaryIO, header: _Header) -> np.ndarray:
    """Stored values of an uncompressed image, int16 or uint16 sized (H, W)."""
    file.seek(header.offset)
    data = file.read(2 * header.rows * header.columns)
    words = np.frombuffer(data, ">u2" if header.big_endian else "<u2")
    words = words.astype(np.uint16, copy=False).reshape(header.rows, header.columns)
    unused = 16 - header.bits_stored
    if not header.signed:
        # Bits above Bits Stored may hold anything, overlays for one.
        return words & np.uint16(0xFFFF >> unused) if unused else words
    words = words.view(np.int16)
    return (words << unused) >> unused if unused else words


def _decode(file: BinaryIO, header: _Header) -> np.ndarray:
    """Stored values of a compressed image, sized (H, W)."""
    file.seek(0)
    stored = pydicom.dcmread(file).pixel_array
    if stored.shape != (header.rows, header.columns):
        raise _Refusal(
            f"decodes to {stored.shape}, its header says ({header.rows}, {header.columns})."
        )
    return stored


def _padding(dataset: Dataset, signed: bool) -> tuple[int, int] | None:
    value = _number(dataset, "PixelPaddingValue")
    if value is None:
        return None
    limit = _number(dataset, "PixelPaddingRangeLimit")
    # Files mix up the VR (US or SS) of these values, so read them as the pixels' 16-bit word.
    low, high = sorted(
        word - 0x10000 if signed and word > 0x7FFF else word
        for word in (int(v) & 0xFFFF for v in (value, value if limit is None else limit))
    )
    return low, high


def _label(keyword: str) -> str:
    """An attribute as the standard prints it: ``Rescale Slope (0028,1053)``."""
    tag = tag_for_keyword(keyword)
    return f"{dictionary_description(tag)} {Tag(tag)}"


def _text(dataset: Dataset, keyword: str) -> str:
    value = dataset.get(keyword)
    return "" if value is None else str(value).strip()


def _numbers(dataset: Dataset, keyword: str) -> list[float]:
    """The values of a numeric attribute, empty where it is missing or empty."""
    try:
        value = dataset.get(keyword)
        values = [] if value in (None, "") else np.atleast_1d(np.asarray(value, dtype=float))
    except Exception as error:  # pydicom converts raw bytes on access, with many kinds of failure
        raise _Refusal(f"{_label(keyword)} cannot be read as a number.") from error
    if not np.isfinite(values).all():
        raise _Refusal(f"{_label(keyword)} is {value}, expected finite numbers.")
    return [float(v) for v in values]


def _number(dataset: Dataset, keyword: str) -> float | None:
    values = _numbers(dataset, keyword)
    if len(values) > 1:
        raise _Refusal(f"{_label(keyword)} has {len(values)} values, expected one.")
    return values[0] if values else None


def _required(dataset: Dataset, keyword: str) -> float:
    value = _number(dataset, keyword)
    if value is None:
        raise _Refusal(f"has no {_label(keyword)}, which a CT image must have.")
    return value


def _integer(dataset: Dataset, keyword: str, low: int = 0, high: int = 2**31) -> int:
    value = _required(dataset, keyword)
    if value != int(value) or not low <= value <= high:
        expected = f"{low}" if low == high else f"{low} to {high}"
        raise _Refusal(f"{_label(keyword)} is {value:g}, expected {expected}.")
    return int(value)


@dataclass(frozen=True)
class _Slice:
    path: Path
    sop_uid: str
    series_uid: str
    study_uid: str
    patient_id: str
    position: np.ndarray | None  # (3,), mm
    directions: np.ndarray | None  # (2, 3): of a row, of a column; unit vectors
    pixel_spacing: list[float]  # rows, columns; mm
    thickness: float | None  # mm


def _walk(folder: Path, skipped: list[tuple[Path, str]]) -> Iterator[Path]:
    """Regular files under a folder in the order of their paths, links out of it reported."""
    root = folder.resolve()

    def report(error: OSError) -> None:
        skipped.append((Path(error.filename), f"cannot be read ({error.strerror})."))

    paths = []
    for parent, folders, files in os.walk(folder, onerror=report):
        paths += [Path(parent, name) for name in files]
        links = [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
        skipped += [(link, "is a link to a folder, which is not followed.") for link in links]
    for path in sorted(paths):
        if not path.is_file():
            skipped.append((path, "is not a regular file."))
        elif not path.resolve().is_relative_to(root):
            skipped.append((path, "is a link out of the folder, which is not followed."))
        else:
            yield path


def _read_slice(path: Path) -> _Slice:
    with _naming(path), open(path, "rb") as file:
        dataset = _read_header(file).dataset
        if "LOCALIZER" in _text(dataset, "ImageType").upper():
            raise _Refusal("is a localizer (scout), not a slice.")
        series_uid = _text(dataset, "SeriesInstanceUID")
        if not series_uid:
            raise _Refusal(f"has no {_label('SeriesInstanceUID')}.")
        position, directions = _read_geometry(dataset)
        return _Slice(
            path=path,
            sop_uid=_text(dataset, "SOPInstanceUID"),
            series_uid=series_uid,
            study_uid=_text(dataset, "StudyInstanceUID"),
            patient_id=_text(dataset, "PatientID"),
            position=position,
            directions=directions,
            pixel_spacing=_numbers(dataset, "PixelSpacing"),
            thickness=_number(dataset, "SliceThickness"),
        )


def _read_geometry(dataset: Dataset) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    position = np.array(_numbers(dataset, "ImagePositionPatient"))
    directions = np.array(_numbers(dataset, "ImageOrientationPatient"))
    if position.size != 3 or directions.size != 6:
        return None, None
    directions = directions.reshape(2, 3)
    lengths = np.linalg.norm(directions, axis=1)
    if not np.allclose(lengths, 1, atol=0.01) or abs(directions[0] @ directions[1]) > 0.01:
        return None, None
    return position, directions / lengths[:, None]


def _split_orientations(slices: list[_Slice]) -> list[list[_Slice]]:
    groups: list[list[_Slice]] = []
    for entry in slices:
        for group in groups:
            if np.allclose(entry.directions, group[0].directions, atol=1e-3):
                group.append(entry)
                break
        else:
            groups.append([entry])
    return groups


def _sort_series(slices: list[_Slice]) -> CTSeries:
    first = slices[0]
    gap = math.nan if first.thickness is None else first.thickness
    if len(slices) > 1:
        normal = np.cross(*first.directions)
        heights = np.array([s.position @ normal for s in slices])
        order = np.argsort(heights, kind="stable")  # equal heights stay in the order of their paths
        slices = [slices[i] for i in order]
        gaps = np.diff(heights[order])
        gaps = gaps[gaps > 1e-3]
        gap = float(np.median(gaps)) if gaps.size else gap
    rows, columns = first.pixel_spacing if len(first.pixel_spacing) == 2 else (math.nan, math.nan)
    return CTSeries(
        files=tuple(s.path for s in slices),
        series_uid=first.series_uid,
        study_uid=first.study_uid,
        patient_id=first.patient_id,
        spacing_mm=(gap, rows, columns),
    )
