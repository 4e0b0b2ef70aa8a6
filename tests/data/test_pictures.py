"""The one reader of PNG and JPEG: what it turns, what it takes and what it refuses."""

import cv2
import numpy as np
import pytest
from PIL import Image

from ich_det2.data.pictures import (
    check_picture,
    picture_size,
    read_mask_picture,
    read_picture,
    write_picture,
)

GREY = (np.arange(48 * 64) % 251).reshape(48, 64).astype(np.uint8)


def save(path, image, **options):
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA"])
def test_grey_is_read_from_any_mode(tmp_path, mode):
    path = save(tmp_path / "a.png", Image.fromarray(GREY).convert(mode))
    assert np.array_equal(read_picture(path), GREY)
    assert check_picture(path) == picture_size(path) == (48, 64)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_exif_says(tmp_path, orientation):
    image = Image.fromarray(GREY)
    exif = image.getexif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", image, exif=exif)
    turned = read_picture(path)
    assert turned.shape == ((64, 48) if orientation > 4 else (48, 64)) == picture_size(path)
    assert np.array_equal(read_mask_picture(path), turned)
    if orientation == 6:  # the camera was turned by 90 degrees
        assert np.array_equal(turned, np.rot90(GREY, -1))


def deep(path):
    save(path, GREY.astype(np.uint16) * 200)


def deep_colour(path):  # Pillow cuts these to 8 bit without a word
    cv2.imwrite(str(path), np.stack([GREY.astype(np.uint16) * 200] * 3, -1))


def transparent(path):
    save(path, np.stack([GREY] * 4, -1))


def transparent_palette(path):
    save(path, Image.fromarray(GREY).convert("P"), transparency=3)


def animated(path):
    Image.fromarray(GREY).save(path, save_all=True, append_images=[Image.fromarray(255 - GREY)])


def no_image(path):
    path.write_bytes(b"no image")


@pytest.mark.parametrize(
    "make", [deep, deep_colour, transparent, transparent_palette, animated, no_image]
)
def test_what_is_no_windowed_slice_is_refused_by_name(tmp_path, make):
    path = tmp_path / "a.png"
    make(path)
    for read in (read_picture, check_picture):
        with pytest.raises(ValueError, match=r"a\.png"):
            read(path)


def test_the_check_is_as_strict_as_the_reader(tmp_path):
    path = save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))
    path.write_bytes(path.read_bytes()[:-2000])
    for read in (read_picture, check_picture):
        with pytest.raises(ValueError, match=r"a\.png cannot be read"):
            read(path)
    with pytest.raises(FileNotFoundError, match="no such image"):
        read_picture(tmp_path / "b.png")


def test_masks(tmp_path):
    values = np.zeros((4, 4), np.uint8)
    values[1, 1], values[2, 2] = 7, 255
    assert np.array_equal(read_mask_picture(save(tmp_path / "a.png", values)), values)
    deep = values.astype(np.uint16) * 257
    assert np.array_equal(read_mask_picture(save(tmp_path / "b.png", deep)), deep)
    colour = np.zeros((4, 4, 3), np.uint8)
    colour[1, 1] = (0, 0, 255)
    path = save(tmp_path / "c.png", colour)
    assert read_mask_picture(path, colours=True)[1, 1] == 0x0000FF
    with pytest.raises(ValueError, match="--classes 0000ff=NAME"):
        read_mask_picture(path)
    with pytest.raises(ValueError, match="JPEG, whose values are blurred"):
        read_mask_picture(save(tmp_path / "d.jpg", values))
    with pytest.raises(ValueError, match="half-transparent"):
        read_mask_picture(save(tmp_path / "e.png", np.full((4, 4, 4), 100, np.uint8)))


def test_a_picture_is_written_whole(tmp_path):
    write_picture(tmp_path / "a.png", GREY)
    assert np.array_equal(read_picture(tmp_path / "a.png"), GREY)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
