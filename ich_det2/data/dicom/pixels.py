"""Stored values of a CT slice, and Hounsfield units (HU) out of them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import cv2
import numpy as np
from pydicom.pixels import get_decoder

from .elements import Refusal, Source, inflate
from .header import Header, naming, read_headers
from .window import window_image

AIR_HU = -1000.0
"""HU given to padding: the value of air, which a scanner that does not pad would show around the
head. It lies below every diagnostic window of the head, so padding is black in each."""

_scratch = threading.local()


class Cache(Protocol):
    """What ``read_hu`` asks of a cache, see ``ich_det2.data.cache``."""

    def get(self, key: tuple[Hashable, ...], make: Callable[[], np.ndarray]) -> np.ndarray: ...


def read_hu(
    path: str | os.PathLike, frame: int | None = None, *, cache: Cache | None = None
) -> np.ndarray:
    """Read one CT slice as Hounsfield units.

    ``HU = Rescale Slope * stored value + Rescale Intercept`` (C.11.1.1.2). Pixels that hold Pixel
    Padding Value, or lie between it and Pixel Padding Range Limit (C.7.5.1.1.2), become ``AIR_HU``.
    MONOCHROME1 is accepted and changes nothing: it says that a display shows low values white,
    after any window (C.7.6.3.1.2), not that HU are inverted. Values that wrapped round when a
    scanner wrote them are unwrapped, see docs/dicom.md.

    Args:
        path: a DICOM file with one CT image, or an Enhanced CT image of several frames.
        frame: 0-based frame; only a file of several frames needs it.
        cache: keeps the HU of compressed slices, which take long to decode.

    Returns:
        float32 array sized (H, W), in HU, rows and columns as stored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a DICOM file, not CT, no pixel data, truncated, colour, no such frame, no
            rescale values, or a compression nobody can decode. The message names the file.
    """
    with naming(path), open(path, "rb") as file:
        return _read_hu(file, _header(file, frame), cache)


def read_windowed(
    path: str | os.PathLike,
    windows: Sequence[tuple[float, float]],
    frame: int | None = None,
    *,
    cache: Cache | None = None,
) -> tuple[np.ndarray, tuple[float, float]]:
    """Read one CT slice as 8-bit grey values: ``window_image`` of ``read_hu``, faster.

    HU and grey value depend on a pixel's 16-bit word alone, so a table of all words is made once
    for a series, by the same functions, and looked up.

    Args:
        path, frame, cache: as ``read_hu``.
        windows: C pairs (level HU, width HU).

    Returns:
        uint8 (H, W, C), and the distance of rows and of columns in mm, NaN where the file does not
        say.

    Raises:
        FileNotFoundError, ValueError: as ``read_hu``.
    """
    windows = tuple((float(level), float(width)) for level, width in windows)
    with naming(path), open(path, "rb") as file:
        header = _header(file, frame)
        words = None if header.compressed else _read_words(file, header)
        if words is None or not _is_pointwise(words, header):
            hu = _read_hu(file, header, cache)
            return window_image(hu, windows), header.spacing_mm
        planes = [cv2.LUT(words, table) for table in _grey_tables(header, windows)]
        image = planes[0] if len(planes) == 1 else cv2.merge(planes)
        return image.reshape(*words.shape, len(planes)), header.spacing_mm


def _read_hu(file: Source, header: Header, cache: Cache | None) -> np.ndarray:
    if not header.compressed:
        return _to_hu(_read_words(file, header), header)
    if cache is None:
        return _to_hu(_decode(file, header), header)
    stat, uid = os.fstat(file.fileno()), header.values.text("SOPInstanceUID")
    key = (os.path.abspath(file.name), header.frame, stat.st_size, stat.st_mtime_ns, uid)
    return cache.get(key, lambda: _to_hu(_decode(file, header), header))


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


def read_size(path: str | os.PathLike) -> tuple[int, int]:
    """Rows and Columns of a slice that passes ``check_dicom``; errors of ``read_hu``."""
    with naming(path), open(path, "rb") as file:
        header = _header(file, None)
        return header.rows, header.columns


def _header(file: Source, frame: int | None) -> Header:
    headers = read_headers(file)
    if frame is None and len(headers) > 1:
        raise Refusal(
            f"holds {len(headers)} frames, expected one; name a frame, or export one slice a file."
        )
    if not 0 <= (frame or 0) < len(headers):
        raise Refusal(f"holds {len(headers)} frame(s), so there is no frame {frame}.")
    return headers[frame or 0]


def _read_words(file: Source, header: Header) -> np.ndarray:
    """The words of an uncompressed slice as they are in the file, uint16 (H, W).

    They lie in memory that this thread uses again for its next slice.
    """
    count = header.rows * header.columns
    words = getattr(_scratch, "words", None)
    if words is None or len(words) < count:
        words = _scratch.words = np.empty(count, np.uint16)
    words = words[:count]
    file = inflate(file)
    file.seek(header.offset + header.frame * words.nbytes)
    if (filled := file.readinto(words.data)) < words.nbytes:
        raise Refusal(f"is truncated: its pixel data ends after {filled} bytes of a slice.")
    if header.big_endian != (sys.byteorder == "big"):
        words.byteswap(inplace=True)
    return words.reshape(header.rows, header.columns)


def _decode(file: Source, header: Header) -> np.ndarray:
    """Stored values of a compressed slice, sized (H, W); int16 or uint16 of Bits Stored."""
    options: dict[str, Any] = {
        "number_of_frames": header.frames,
        "rows": header.rows,
        "columns": header.columns,
        "samples_per_pixel": 1,
        "photometric_interpretation": header.values.text("PhotometricInterpretation"),
        "bits_allocated": 16,
        "bits_stored": header.bits_stored,
        "pixel_representation": int(header.signed),
        "pixel_keyword": "PixelData",
    }
    file.seek(header.offset)
    stored, _ = get_decoder(header.syntax).as_array(file, index=header.frame, **options)
    if stored.shape != (header.rows, header.columns):
        raise Refusal(
            f"decodes to {stored.shape}, its header says ({header.rows}, {header.columns})."
        )
    return stored


def _to_hu(words: np.ndarray, header: Header) -> np.ndarray:
    """HU, float32 (H, W).

    Args:
        words: (H, W); uint16 as in the file, or what a decoder made of it.
    """
    stored = _stored_values(words, header)
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


def _stored_values(words: np.ndarray, header: Header) -> np.ndarray:
    if header.compressed:  # pydicom's decoders take care of sign and unused bits
        return words
    unused = 16 - header.bits_stored
    if not header.signed:
        # Bits above Bits Stored may hold anything, overlays for one.
        return words & np.uint16(0xFFFF >> unused) if unused else words
    stored = words.view(np.int16)
    return (stored << unused) >> unused if unused else stored


def _wraps(header: Header) -> bool:
    """Unsigned 12-bit values with an intercept at which air cannot be written unless it wraps."""
    return (
        not header.signed
        and header.bits_stored == 12
        and header.slope == 1
        and header.intercept > -100
    )


def _find_padding(stored: np.ndarray, words: np.ndarray, header: Header) -> np.ndarray | None:
    """Where there is padding, bool (H, W); None for nowhere."""
    bits = header.bits_stored
    mask = 0xFFFF >> (16 - bits)
    if header.padding is None:
        if not _has_bits_above(words, header):
            return None
        # All bits above Bits Stored set, or none, in every pixel: no overlay, but negative padding
        # that was written with its sign.
        above = words & np.uint16(0xFFFF ^ mask)
        negative = above == 0xFFFF ^ mask
        return negative if (negative | (above == 0)).all() else None

    if header.signed:
        low, high = sorted((w ^ 0x8000) - 0x8000 for w in header.padding)
        return _between(stored, max(low, -0x8000), high)
    low, high = sorted(header.padding)
    if high <= mask:
        return _between(stored, low, high)
    # Unsigned padding that needs more bits than are stored: a negative value with its sign bits.
    found = _between(words, low, high)
    if found.any():
        return found
    # A writer that cut it to Bits Stored made it look like tissue or bone. Only what reaches the
    # border of the image is padding then.
    low, high = sorted((low & mask, high & mask))
    return _touching_border(_between(stored, low, high))


def _has_bits_above(words: np.ndarray, header: Header) -> bool:
    """Whether unsigned words hold more than Bits Stored."""
    if header.compressed or header.signed or header.bits_stored == 16:
        return False
    return int(words.max()) >> header.bits_stored > 0


def _is_pointwise(words: np.ndarray, header: Header) -> bool:
    """Whether HU depend on a pixel's own word alone, and not on those of others."""
    if header.padding is None:
        return not _has_bits_above(words, header)
    return header.signed or max(header.padding) >> header.bits_stored == 0


def _between(values: np.ndarray, low: int, high: int) -> np.ndarray:
    return values == low if low == high else (values >= low) & (values <= high)


def _touching_border(mask: np.ndarray) -> np.ndarray:
    """The connected parts of a mask, bool (H, W), that reach the image's border."""
    from scipy import ndimage  # half of this room's time to import, for a rare file

    regions, _ = ndimage.label(mask)
    border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
    return mask & np.isin(regions, border)


@lru_cache(maxsize=32)
def _grey_tables(
    header: Header, windows: tuple[tuple[float, float], ...]
) -> tuple[np.ndarray, ...]:
    """For each window the grey value of each 16-bit word, uint8 (65536,)."""
    words = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    grey = window_image(_to_hu(words, header), windows)
    return tuple(np.ascontiguousarray(grey[..., i].ravel()) for i in range(len(windows)))
