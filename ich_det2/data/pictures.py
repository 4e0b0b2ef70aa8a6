"""PNG and JPEG: the only code that opens one, so that all readers of the package agree.

A picture is a slice that is windowed already: 8 bit, grey. One that was turned by its EXIF
orientation is turned back, as LabelImg and Detectron2 show it; boxes are drawn on that.
H, W are its rows and columns after the turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..files import write_atomically
from .dicom import is_dicom

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
_READABLE = ("1", "L", "P", "RGB", "LA", "PA", "RGBA")
_TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


def is_picture(path: str | Path) -> bool:
    """Whether a file's name is that of a picture, and its content not DICOM."""
    return Path(path).suffix.lower() in PICTURE_SUFFIXES and not is_dicom(path)


def read_picture(path: str | Path) -> np.ndarray:
    """Reads a windowed slice.

    Args:
        path: PNG or JPEG of 8 bit or less. Colours become grey.

    Returns:
        uint8 (H, W).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, has more than 8 bit, several frames, transparent pixels, or
            colours of print; the message names the file.
    """
    with _open(path) as image:
        return np.array(_opaque(path, ImageOps.exif_transpose(image)).convert("L"))


def check_picture(path: str | Path) -> tuple[int, int]:
    """Makes sure that ``read_picture`` reads a file, by reading it.

    Returns:
        (H, W).

    Raises:
        FileNotFoundError, ValueError: as ``read_picture``.
    """
    height, width = read_picture(path).shape
    return height, width


def picture_size(path: str | Path) -> tuple[int, int]:
    """(H, W) out of a picture's header, without its pixels.

    Raises:
        FileNotFoundError, ValueError: as ``read_picture``, as far as the header tells.
    """
    with _open(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112) in _TURNED
        return (width, height) if turned else (height, width)


def read_mask_picture(path: str | Path, *, colours: bool = False) -> np.ndarray:
    """Reads the values of a segmentation mask, which may have up to 16 bit.

    Args:
        path: PNG, BMP or another lossless image.
        colours: give each pixel's colour, 0xRRGGBB, instead of its index or grey value.

    Returns:
        int32 (H, W).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, holds fractions or half-transparent pixels, or is lossy; or
            it has colours and ``colours`` is false. The message names the file.
    """
    with _open(path, mask=True) as image:
        if image.format == "JPEG":
            raise ValueError(
                f"{path} is a JPEG, whose values are blurred; save the mask as PNG or NIfTI."
            )
        image = ImageOps.exif_transpose(image)
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            rgba = np.asarray(image.convert("RGBA"))
            if not np.isin(rgba[..., 3], (0, 255)).all():
                raise ValueError(f"{path} has half-transparent pixels; save the mask without.")
            if image.mode != "P" or colours:  # what is transparent is no part of the mask
                image = Image.fromarray(rgba[..., :3] * (rgba[..., 3:] > 0))
        if not colours and image.mode not in ("RGB", "PA"):
            return np.array(image).astype(np.int32)
        red, green, blue = np.asarray(image.convert("RGB"), dtype=np.int32).transpose(2, 0, 1)
        if colours:
            return red << 16 | green << 8 | blue
        if not (np.array_equal(red, green) and np.array_equal(red, blue)):
            raise ValueError(
                f"{path} is a mask of colours, expected values; name its colours, as in"
                f" --classes {_some_colour(red, green, blue)}=NAME."
            )
        return red


def write_picture(path: str | Path, pixels: np.ndarray, **options) -> None:
    """Writes a PNG, whole or not at all.

    Args:
        path: ends in .png.
        pixels: uint8 (H, W) or (H, W, 3).
        options: of Pillow's PNG writer.
    """
    with write_atomically(path, "wb") as file:
        Image.fromarray(pixels).save(file, format="PNG", **options)


@contextmanager
def _open(path: str | Path, *, mask: bool = False) -> Iterator[Image.Image]:
    """An image whose header is in order; whatever goes wrong with it names the file."""
    try:
        with Image.open(path) as image:
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"{path} holds {frames} frames, expected one image a file.")
            readable = image.mode in _READABLE and _bits(image) <= 8
            if not (readable or mask and image.mode.startswith("I")):
                raise ValueError(
                    f"{path} has more than 8 bit or is not grey (mode {image.mode}), expected an"
                    f" 8-bit {'mask' if mask else 'image that is windowed already'}"
                    f"{'' if mask else '; give the DICOM files instead'}."
                )
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image; check the path.") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"{path} cannot be read as an image: {reason}.") from error


def _bits(image: Image.Image) -> int:
    """Bits of a value; Pillow cuts a PNG of 16 bit with colour or alpha to 8 without a word."""
    if image.format == "PNG":
        tiles = getattr(image, "tile", ())
        return 16 if any("16" in str(tile[3]) for tile in tiles) else 8
    return 16 if image.mode.startswith(("I", "F")) else 8


def _opaque(path: str | Path, image: Image.Image) -> Image.Image:
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if np.asarray(rgba.getchannel("A")).min() < 255:
            raise ValueError(
                f"{path} has transparent pixels, whose grey value is not known; save it without"
                " transparency."
            )
        return rgba.convert("RGB")
    return image


def _some_colour(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> str:
    first = np.argmax((red != green) | (red != blue))
    return "".join(f"{channel.flat[first]:02x}" for channel in (red, green, blue))
