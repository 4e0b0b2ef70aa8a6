"""Stored values of a CT slice, and Hounsfield units (HU) out of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from pydicom.pixels import pixel_array
from scipy import ndimage

from .elements import Refusal
from .header import Header, naming, numbers, read_headers, text

AIR_HU = -1000.0
"""HU given to padding: the value of air, which a scanner that does not pad would show around the
head. It lies below every diagnostic window of the head, so padding is black in each."""


class Cache(Protocol):
    """What ``read_image`` asks of a cache, see ``ich_det2.data.cache``."""

    def get(self, key: tuple[Hashable, ...], make: Callable[[], np.ndarray]) -> np.ndarray: ...


@dataclass(frozen=True)
class CTImage:
    """A slice with what its header says about its pixels.

    Attributes:
        hu: float32 (H, W), HU.
        spacing_mm: distance of rows and of columns; NaN where the file does not say.
        windows: (level HU, width HU) of the file's VOI windows, in its order (C.11.2).
        sop_uid: SOP Instance UID, empty where the file does not say.
    """

    hu: np.ndarray
    spacing_mm: tuple[float, float]
    windows: tuple[tuple[float, float], ...]
    sop_uid: str


def read_hu(path: str | os.PathLike, frame: int | None = None) -> np.ndarray:
    """Read one CT slice as Hounsfield units.

    ``HU = Rescale Slope * stored value + Rescale Intercept`` (C.11.1.1.2). Pixels that hold Pixel
    Padding Value, or lie between it and Pixel Padding Range Limit (C.7.5.1.1.2), become ``AIR_HU``.
    MONOCHROME1 is accepted and changes nothing: it says that a display shows low values white,
    after any window (C.7.6.3.1.2), not that HU are inverted. Values that wrapped round when a
    scanner wrote them are unwrapped, see docs/dicom.md.

    Args:
        path: a DICOM file with one CT image, or an Enhanced CT image of several frames.
        frame: 0-based frame; only a file of several frames needs it.

    Returns:
        float32 array sized (H, W), in HU, rows and columns as stored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a DICOM file, not CT, no pixel data, truncated, colour, no such frame, no
            rescale values, or a compression nobody can decode. The message names the file.
    """
    return read_image(path, frame).hu


def read_image(
    path: str | os.PathLike, frame: int | None = None, *, cache: Cache | None = None
) -> CTImage:
    """Read one CT slice with its pixel spacing and windows.

    Args:
        path, frame: as ``read_hu``.
        cache: keeps the HU of compressed slices, which take long to decode.

    Raises:
        FileNotFoundError, ValueError: as ``read_hu``.
    """
    with naming(path), open(path, "rb") as file:
        header, source = _header(file, frame)
        sop_uid = text(header.values, "SOPInstanceUID")
        if not header.compressed:
            hu = _to_hu(*_read_words(source, header), header)
        elif cache is None:
            hu = _to_hu(_decode(path, header), None, header)
        else:
            stat = os.fstat(file.fileno())
            key = (os.path.abspath(path), header.frame, stat.st_size, stat.st_mtime_ns, sop_uid)
            hu = cache.get(key, lambda: _to_hu(_decode(path, header), None, header))
        return CTImage(hu, header.spacing_mm, _windows(header), sop_uid)


def check_dicom(path: str | os.PathLike, frame: int | None = None) -> None:
    """Find out before a long run whether ``read_hu`` would refuse a file.

    The header is read and the extent of the pixel data is compared with it; a compressed image's
    fragments are walked to their end marker (A.4). Nothing is decoded, so damage inside a
    compressed fragment stays unseen.

    Args:
        path, frame: as ``read_hu``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as ``read_hu``.
    """
    with naming(path), open(path, "rb") as file:
        _header(file, frame)


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
    with naming(path), open(path, "rb") as file:
        values = read_headers(file)[0][0].values
        return text(values, "PatientID"), text(values, "StudyInstanceUID")


def read_size(path: str | os.PathLike) -> tuple[int, int]:
    """Rows and Columns of a slice that passes ``check_dicom``; errors of ``read_hu``."""
    with naming(path), open(path, "rb") as file:
        header, _ = _header(file, None)
        return header.rows, header.columns


def _header(file: BinaryIO, frame: int | None) -> tuple[Header, BinaryIO]:
    headers, source = read_headers(file)
    if frame is None and len(headers) > 1:
        raise Refusal(
            f"holds {len(headers)} frames, expected one; name a frame, or export one slice a file."
        )
    if not 0 <= (frame or 0) < len(headers):
        raise Refusal(f"holds {len(headers)} frame(s), so there is no frame {frame}.")
    return headers[frame or 0], source


def _read_words(file: BinaryIO, header: Header) -> tuple[np.ndarray, np.ndarray]:
    """Stored values of an uncompressed slice and the words that hold them, both (H, W)."""
    words = np.empty((header.rows, header.columns), ">u2" if header.big_endian else "<u2")
    file.seek(header.offset + header.frame * words.nbytes)
    view, filled = memoryview(words.reshape(-1).view(np.uint8)), 0
    while filled < words.nbytes:
        count = file.readinto(view[filled:])
        if not count:
            raise Refusal(f"is truncated: its pixel data ends after {filled} bytes of a slice.")
        filled += count
    words = words.astype(np.uint16, copy=False)
    unused = 16 - header.bits_stored
    if not header.signed:
        # Bits above Bits Stored may hold anything, overlays for one.
        return (words & np.uint16(0xFFFF >> unused) if unused else words), words
    stored = words.view(np.int16)
    return ((stored << unused) >> unused if unused else stored), words


def _decode(path: str | os.PathLike, header: Header) -> np.ndarray:
    """Stored values of a compressed slice, sized (H, W)."""
    stored = pixel_array(Path(path), index=header.frame)
    if stored.shape != (header.rows, header.columns):
        raise Refusal(
            f"decodes to {stored.shape}, its header says ({header.rows}, {header.columns})."
        )
    return stored


def _to_hu(stored: np.ndarray, words: np.ndarray | None, header: Header) -> np.ndarray:
    """HU, float32 (H, W).

    Args:
        stored: (H, W), of ``bits_stored`` bits.
        words: (H, W) uint16, as in the file; None where a decoder left ``bits_stored`` bits alone.
    """
    hu = stored.astype(np.float32)
    if _wraps(header):
        # Negative HU, written as the 12-bit two's complement that the header does not announce.
        hu[stored >= 3072] -= 4096
    if header.slope != 1:
        hu *= np.float32(header.slope)
    if header.intercept != 0:
        hu += np.float32(header.intercept)
    padding = _find_padding(stored, words, header)
    if padding is not None:
        np.copyto(hu, np.float32(AIR_HU), where=padding)
    return hu


def _wraps(header: Header) -> bool:
    """Unsigned 12-bit values with an intercept at which air cannot be written unless it wraps."""
    return (
        not header.signed
        and header.bits_stored == 12
        and header.slope == 1
        and header.intercept > -100
    )


def _find_padding(
    stored: np.ndarray, words: np.ndarray | None, header: Header
) -> np.ndarray | None:
    """Where there is padding, bool (H, W); None for nowhere."""
    bits = header.bits_stored
    mask = 0xFFFF >> (16 - bits)
    if header.padding is None:
        if words is None or header.signed or bits == 16 or int(words.max()) <= mask:
            return None
        # All bits above Bits Stored set, or none, in every pixel: no overlay, but negative padding
        # that was written with its sign.
        above = words & np.uint16(0xFFFF ^ mask)
        negative = above == 0xFFFF ^ mask
        return negative if (negative | (above == 0)).all() else None

    if header.signed:
        low, high = sorted((w ^ 0x8000) - 0x8000 for w in header.padding)
        if low == high:
            return stored == low if -(1 << bits - 1) <= low else None
        return (stored >= low) & (stored <= high)
    low, high = sorted(header.padding)
    if high <= mask:
        return stored == low if low == high else (stored >= low) & (stored <= high)
    # Unsigned padding that needs more bits than are stored: a negative value with its sign bits.
    found = None if words is None else (words >= low) & (words <= high)
    if found is not None and found.any():
        return found
    # A writer that cut it to Bits Stored made it look like tissue or bone. Only what reaches the
    # border of the image is padding then.
    low, high = sorted((low & mask, high & mask))
    return _touching_border((stored >= low) & (stored <= high))


def _touching_border(mask: np.ndarray) -> np.ndarray:
    """The connected parts of a mask, bool (H, W), that reach the image's border."""
    regions, _ = ndimage.label(mask)
    border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
    return mask & np.isin(regions, border)


def _windows(header: Header) -> tuple[tuple[float, float], ...]:
    levels, widths = (numbers(header.values, k) for k in ("WindowCenter", "WindowWidth"))
    return tuple((c, w) for c, w in zip(levels, widths) if w > 0)
