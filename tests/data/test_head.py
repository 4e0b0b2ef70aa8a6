"""The head and the skull in a slice."""

import cv2
import numpy as np
import pytest
from PIL import Image

from ich_det2.data import IchDatasetMapper
from ich_det2.data.head import (
    asymmetry_picture,
    density_picture,
    find_head,
    find_skull,
    mirror_head,
)


@pytest.mark.parametrize("centre, axes", [((120, 110), (70, 90)), ((90, 128), (60, 60))])
@pytest.mark.parametrize("couch", [False, True])
def test_the_head_is_found_and_not_the_couch(centre, axes, couch, draw_head):
    head = find_head(draw_head(centre, axes, couch=couch))
    edges = np.subtract(centre, axes), np.add(centre, axes) + 1
    # Where the couch touches the head, its thickness and what rounds the corner remain.
    np.testing.assert_allclose(head.box, np.ravel(edges), atol=6 if couch else 2)


def test_without_a_head_nothing_is_found(draw_head):
    rng = np.random.default_rng(0)
    air = rng.integers(0, 24, (256, 256)).astype(np.uint8)
    couch = draw_head((120, 110), (70, 90), couch=True) * (draw_head((120, 110), (70, 90)) == 0)
    for grey in (air, air * 0, couch, air[:2, :3]):
        assert find_head(grey) is None
    # What is noise all over is not cropped either.
    noise = rng.integers(0, 256, (256, 256)).astype(np.uint8)
    assert find_head(noise).box == (0, 0, 256, 256)


# ---- the skull -----------------------------------------------------------------------------------


@pytest.fixture
def draw_skull(draw_head):
    """A head in a scalp, and where the skull and what is in it are."""

    def draw(**kwargs):
        grey = draw_head((120, 110), (70, 80), **kwargs)
        inside = cv2.ellipse(np.zeros_like(grey), (120, 110), (70, 80), 0, 0, 360, 1, -1)
        scalp = cv2.ellipse(np.zeros_like(grey), (120, 110), (78, 90), 0, 0, 360, 90, -1)
        return np.where(inside, grey, np.maximum(grey, scalp)), inside

    return draw


def differ(skull, inside):
    """Pixels on the edge between two masks do not count."""
    edge = cv2.morphologyEx(inside, cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8))
    return np.count_nonzero((skull != inside) & (edge == 0))


@pytest.mark.parametrize("couch", [False, True])
def test_the_skull_is_found_without_scalp_and_couch(couch, draw_skull):
    grey, inside = draw_skull(couch=couch)
    cv2.ellipse(grey, (180, 60), (30, 30), 0, 0, 360, 150, -1)  # a swelling of the scalp
    grey[inside > 0] = draw_skull()[0][inside > 0]
    assert differ(find_skull(grey), inside) == 0


def test_gaps_in_the_skull_are_closed(draw_skull):
    # An infant's sutures: no two bones touch, and none is most of the skull.
    grey, inside = draw_skull()
    for angle in range(0, 360, 45):
        cv2.ellipse(grey, (120, 110), (66, 76), 0, angle, angle + 8, 110, 10)
    assert differ(find_skull(grey), inside) == 0


def test_hands_beside_the_head_are_outside(draw_skull):
    grey, inside = draw_skull()
    for y in (60, 100, 140):
        cv2.circle(grey, (225, y), 12, 100, -1)
        cv2.circle(grey, (225, y), 6, 255, -1)
    assert differ(find_skull(grey), inside) == 0


def test_no_skull_is_found_where_there_is_none(draw_skull):
    grey, inside = draw_skull()
    neck = np.minimum(grey, 120)
    cv2.circle(neck, (120, 170), 12, 255, -1)  # a vertebra
    for image in (np.zeros_like(grey), np.minimum(grey, 120), neck, grey[:2, :3]):
        assert find_skull(image) is None


@pytest.mark.parametrize("kind", ["picture", "dicom"])
@pytest.mark.parametrize("windows", [[(40, 120)], [(50, 100), (80, 200), (600, 2800)]])
def test_the_mapper_blanks_what_is_outside(tmp_path, write_ct, kind, windows, draw_skull):
    grey, inside = draw_skull()
    if kind == "picture":
        file = str(tmp_path / "a.png")
        Image.fromarray(grey).save(file)
    else:
        file = str(write_ct(tmp_path / "a.dcm", grey / 255 * 120 - 20))  # level 40, width 120
    options = {"augmentations": [], "windows": windows}
    found, whole = (
        IchDatasetMapper(False, skull_mask=mask, **options)({"file_name": file})["image"].numpy()
        for mask in (True, False)
    )
    skull = find_skull(grey)
    edge = cv2.morphologyEx(skull, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    assert whole[:, skull == 0].max() > 0
    assert (found == whole * skull)[:, ~edge].all()
    # A person sees the whole slice.
    mapper = IchDatasetMapper(False, skull_mask=True, **options)
    seen = mapper.read_image(file)
    assert seen.shape[2] == (1 if kind == "picture" else len(windows))
    assert (seen.transpose(2, 0, 1) == whole[: seen.shape[2]]).all()


def test_neighbours_are_blanked_by_their_own_skull(tmp_path, draw_skull):
    slices = [np.roll(draw_skull()[0], shift, axis=1) for shift in (-20, 0, 20)]
    files = [(str(tmp_path / f"{i}.png"), None) for i in range(3)]
    for (file, _), grey in zip(files, slices):
        Image.fromarray(grey).save(file)
    mapper = IchDatasetMapper(
        False, augmentations=[], windows=[(40, 120)], context_slices=1, skull_mask=True
    )
    image = mapper({"file_name": files[1][0], "context_files": files})["image"].numpy()
    for channel, grey in zip(image, slices):
        np.testing.assert_array_equal(channel, grey * find_skull(grey))


# ---- densities -----------------------------------------------------------------------------------


def grey_of(hu):
    """In the window 40/120."""
    return np.rint((np.asarray(hu, dtype=float) + 20) / 120 * 255).clip(0, 255).astype(np.uint8)


def draw_densities(brain=32, blood=62):
    """A skull with a bleed within the brain and one along the bone, and a swelling outside."""
    hu = np.full((256, 256), -1000.0)
    cv2.ellipse(hu, (120, 110), (80, 92), 0, 0, 360, 50, -1)
    cv2.ellipse(hu, (120, 110), (70, 80), 0, 0, 360, 1000, -1)
    cv2.ellipse(hu, (120, 110), (60, 70), 0, 0, 360, brain, -1)
    cv2.circle(hu, (110, 90), 12, blood, -1)
    cv2.rectangle(hu, (60, 100), (66, 120), blood, -1)
    hu[
        (hu == blood)
        & (cv2.ellipse(np.zeros_like(hu), (120, 110), (60, 70), 0, 0, 360, 1, -1) == 0)
    ] = 1000
    return hu


def test_hand_worked_densities():
    hu = draw_densities()
    grey = grey_of(hu)
    found = density_picture(grey, find_skull(grey)).astype(int)
    # Brain is its own median: 10 of 50 HU above the lowest; blood is 30 HU denser.
    assert abs(found[150, 120] - 51) <= 2 and abs(found[90, 110] - 204) <= 3
    assert abs(found[110, 64] - 204) <= 6  # beside the bone
    assert found[110, 55] == found[20, 120] == found[5, 5] == found[110, 195] == 0
    # Bone does not shine into the brain: whatever is soft within the skull is brain or blood.
    inside = cv2.ellipse(np.zeros_like(grey), (120, 110), (57, 67), 0, 0, 360, 1, -1) > 0
    assert set(np.unique(found[inside & (hu == 32)]).tolist()) <= {*range(49, 205)}
    far = cv2.erode(((hu == 32) & inside).astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    assert np.abs(found[far] - 51).max() <= 2


def test_densities_do_not_depend_on_the_calibration_of_the_scanner():
    pictures = []
    for shift in (-6, 0, 6):
        grey = grey_of(draw_densities(32 + shift, 62 + shift))
        pictures.append(density_picture(grey, find_skull(grey)).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 5
    assert np.abs(pictures[2] - pictures[1]).max() <= 5


def test_without_brain_there_is_no_density():
    grey = grey_of(draw_densities())
    for image in (grey * 0, np.full_like(grey, 255)):
        assert not density_picture(image, None).any()
    whole = density_picture(grey, None)  # where no skull was found
    assert whole[150, 120] > 0 and whole[110, 195] > 0 and whole[5, 5] == 0


@pytest.mark.parametrize("windows", [[(40, 120)], [(50, 100)]])
def test_the_second_channel_shows_densities(tmp_path, write_ct, windows):
    hu = draw_densities()
    file = str(write_ct(tmp_path / "a.dcm", hu))
    picture = str(tmp_path / "a.png")
    Image.fromarray(grey_of(hu)).save(picture)
    mapper = IchDatasetMapper(
        False, augmentations=[], windows=windows, skull_mask=True, density=True
    )
    dicom, png = (mapper({"file_name": f})["image"].numpy() for f in (file, picture))
    skull = find_skull(grey_of(hu))
    np.testing.assert_array_equal(png[1], density_picture(grey_of(hu), skull))
    np.testing.assert_allclose(dicom[1], png[1], atol=1)
    for image in (dicom, png):
        assert (image[0] == image[2]).all() and not image[:, skull == 0].any()
    assert mapper.read_image(file).shape == mapper.read_image(picture).shape == (256, 256, 1)


@pytest.mark.parametrize("key", ["density", "asymmetry"])
@pytest.mark.parametrize("options", [{"windows": [(40, 80)] * 3}, {"context_slices": 1}])
def test_densities_and_asymmetries_take_a_channel_that_is_free(key, options):
    match = f"INPUT.{key.upper()} is True with .*there are three channels"
    with pytest.raises(ValueError, match=match):
        IchDatasetMapper(False, augmentations=[], **{key: True, "windows": [(40, 80)], **options})


# ---- the sides of the head -----------------------------------------------------------------------


def tilt(hu, degrees, shift=(0, 0), ratio=1.0):
    """Turned about (120, 110), shifted, and of pixels that are so high."""
    turn = cv2.getRotationMatrix2D((120, 110), degrees, 1.0)
    turn[:, 2] += shift
    turned = cv2.warpAffine(hu, turn, (256, 256), flags=cv2.INTER_NEAREST, borderValue=-1000)
    size = (256, round(256 / ratio))
    return cv2.resize(turned, size, interpolation=cv2.INTER_NEAREST), turn


def draw_sides(left=32, right=32):
    """A head that is no circle, with a patch of brain on either side."""
    hu = draw_densities(32, 32)
    for x, value in ((120 - 35, left), (120 + 35, right)):
        cv2.circle(hu, (x, 110), 14, value, -1)
    return hu


@pytest.mark.parametrize("degrees", [-20, -7, 0, 13])
@pytest.mark.parametrize("shift, ratio", [((0, 0), 1.0), ((17, -9), 1.0), ((0, 4), 1.25)])
def test_the_head_is_mirrored_at_its_middle(degrees, shift, ratio):
    hu, turn = tilt(draw_sides(), degrees, shift, ratio)
    mirror = mirror_head(grey_of(hu), find_skull(grey_of(hu)), ratio)
    # From a point on the image's left of the head to the one across.
    for dx, dy in ((50, 0), (30, 40), (0, -60)):
        here, across = (turn @ (120 + s * dx, 110 + dy, 1) / (1, ratio) for s in (-1, 1))
        np.testing.assert_allclose(mirror @ (*here, 1), across, atol=6)
        np.testing.assert_allclose(mirror @ (*across, 1), here, atol=6)


@pytest.mark.parametrize("degrees, ratio", [(0, 1.0), (-15, 1.0), (15, 1.0), (10, 1.25)])
def test_hand_worked_asymmetry(degrees, ratio):
    hu, turn = tilt(draw_sides(left=32, right=42), degrees, (3, 5), ratio)
    grey = grey_of(hu)
    found = asymmetry_picture(grey, find_skull(grey), ratio).astype(int)

    def at(x, y):
        column, row = np.rint(turn @ (x, y, 1) / (1, ratio)).astype(int)
        return found[row, column]

    # 10 of 20 HU more, or less, than the other side.
    assert abs(at(155, 110) - 192) <= 6 and abs(at(85, 110) - 64) <= 6
    assert abs(at(120, 110) - 128) <= 4 and abs(at(120, 60) - 128) <= 4
    assert at(120, 28) == 128 and found[2, 2] == 128  # bone, air
    alike, _ = tilt(draw_sides(), degrees, (3, 5), ratio)
    grey = grey_of(alike)
    assert np.abs(asymmetry_picture(grey, find_skull(grey), ratio).astype(int) - 128).max() <= 10


def test_without_a_skull_both_sides_are_alike():
    grey = grey_of(draw_sides(right=62))
    assert (asymmetry_picture(grey, None) == 128).all()
    thin = grey[100:101]
    assert asymmetry_picture(thin, np.ones_like(thin)).shape == (1, 256)


@pytest.mark.parametrize("density", [False, True])
def test_the_third_channel_shows_asymmetries(tmp_path, write_ct, density):
    hu = draw_sides(right=52)
    file = str(write_ct(tmp_path / "a.dcm", hu))
    picture = str(tmp_path / "a.png")
    Image.fromarray(grey_of(hu)).save(picture)
    mapper = IchDatasetMapper(
        False, augmentations=[], windows=[(40, 120)], density=density, asymmetry=True
    )
    dicom, png = (mapper({"file_name": f})["image"].numpy() for f in (file, picture))
    skull = find_skull(grey_of(hu))
    np.testing.assert_array_equal(png[2], asymmetry_picture(grey_of(hu), skull))
    np.testing.assert_allclose(dicom[2], png[2], atol=2)
    second = density_picture(grey_of(hu), skull) if density else grey_of(hu)
    np.testing.assert_array_equal(png[1], second)
    np.testing.assert_array_equal(png[0], grey_of(hu))
