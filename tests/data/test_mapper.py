"""IchDatasetMapper: DICOM and pictures give the same tensor, boxes follow what they show."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image

from ich_det2.data import IchDatasetMapper, load_ich_voc
from ich_det2.data.augmentation import RandomShiftScale, shift_scale_transform
from ich_det2.data.masks import encode_mask

BRAIN = [[50.0, 100.0]]
THREE = [[50.0, 100.0], [80.0, 200.0], [40.0, 40.0]]
# A bright rectangle of 40 x 24 in 128 x 96, away from the centre.
BOX = (61, 21, 100, 44)  # VOC corners: edges 60, 20, 100, 44


def make_mapper(augmentations=(), is_train=True, windows=BRAIN):
    return IchDatasetMapper(is_train, augmentations=augmentations, windows=windows)


@pytest.fixture
def slice_of(voc_tree):
    """Factory of the dataset dict of one slice with the bright rectangle."""

    def make(kind="png", boxes=(BOX,)):
        objects = [("EDH", box) for box in boxes]
        return load_ich_voc(voc_tree({"a": objects}, kind=kind, size=(128, 96)), "train")[0]

    return make


# ---- pixels ------------------------------------------------------------------------------------


def test_picture_and_dicom_give_the_same_tensor(write_ct, tmp_path):
    hu = np.random.default_rng(0).integers(-200, 300, size=(48, 64))
    write_ct(tmp_path / "a.dcm", hu)
    # Window 50/100: 0 HU is black, 100 HU is white.
    grey = np.rint(np.clip(hu / 100, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    tensors = []
    for name in ("a.dcm", "a.png"):
        d = {"file_name": str(tmp_path / name), "height": 48, "width": 64}
        tensors.append(make_mapper([T.ResizeShortestEdge(96)])(d)["image"])
    assert tensors[0].shape == (3, 96, 128) and tensors[0].dtype == torch.float32
    assert (tensors[0] - tensors[1]).abs().max() <= 1
    assert tensors[0].std() > 10


def test_hand_worked_grey_values(write_ct, tmp_path):
    write_ct(tmp_path / "a.dcm", np.array([[-1000, 0, 40, 100, 3000]]))
    d = {"file_name": str(tmp_path / "a.dcm"), "height": 1, "width": 5}
    image = make_mapper(windows=[[50, 100], [80, 200], [40, 40]])(d)["image"]
    # 50/100 is 0..100: 40 HU is 0.4 * 255 = 102. 80/200 is -20..180: 0 HU 20/200 * 255 = 25.5, to
    # even 26; 40 HU 60/200 = 76.5 to 76; 100 HU 120/200 = 153. 40/40 is 20..60: 40 HU 127.5 to 128.
    assert image[:, 0].tolist() == [
        [0, 0, 102, 255, 255],
        pytest.approx([0, 26, 76, 153, 255], abs=1),
        [0, 0, 128, 255, 255],
    ]


def test_three_windows_are_three_channels_and_one_fills_three(slice_of):
    d = slice_of("dicom")
    three = make_mapper(windows=THREE)(d)["image"]
    one = make_mapper()(d)["image"]
    assert three.shape == one.shape == (3, 96, 128)
    assert torch.equal(one[0], one[1]) and torch.equal(one[0], one[2])
    assert torch.equal(three[0], one[0])
    assert not torch.equal(three[0], three[1]) and not torch.equal(three[1], three[2])
    # 30 and 80 HU under 40/40: (30 - 20) / 40 * 255 = 63.75, and white.
    assert set(three[2].unique().tolist()) == {64.0, 255.0}


def test_channels_of_the_tensor_share_no_memory(slice_of):
    image = make_mapper()(slice_of())["image"]
    image[0] += 1
    assert (image[0] == image[1] + 1).all()


# ---- boxes -------------------------------------------------------------------------------------


def bright_box(image):
    """Edges of what is bright: halfway between brain (30 HU: 77) and the rectangle (80: 204)."""
    ys, xs = np.nonzero(image[0].numpy() > 140)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def box_of(output):
    (box,) = output["instances"].gt_boxes.tensor.tolist()
    return box


def flip(**kwargs):
    return T.RandomFlip(prob=1.0, **kwargs)


def test_without_augmentation_the_box_is_that_of_the_xml(slice_of):
    output = make_mapper()(slice_of())
    assert box_of(output) == [60, 20, 100, 44] == bright_box(output["image"])
    assert output["instances"].gt_classes.tolist() == [0]
    assert output["instances"].image_size == (96, 128)


@pytest.mark.parametrize(
    ("augmentation", "expected"),
    [
        # 128 x 96, the box at 60, 20, 100, 44.
        (T.ResizeShortestEdge(192), [120, 40, 200, 88]),
        (T.ResizeShortestEdge(48), [30, 10, 50, 22]),
        (flip(), [28, 20, 68, 44]),  # 128 - 100, 128 - 60
        (flip(horizontal=False, vertical=True), [60, 52, 100, 76]),  # 96 - 44, 96 - 20
        # A quarter of 96 down, an eighth of 128 to the left.
        (lambda: shift_scale_transform((96, 128), -0.125, 0.25, 1), [44, 44, 84, 68]),
        # Halved about the centre (64, 48): 64 - 4 / 2, 48 - 28 / 2, 64 + 36 / 2, 48 - 4 / 2.
        (lambda: shift_scale_transform((96, 128), 0, 0, 0.5), [62, 34, 82, 46]),
        # Enlarged by 1.5: 64 - 4 * 1.5, 48 - 28 * 1.5, 64 + 36 * 1.5, 48 - 4 * 1.5.
        (lambda: shift_scale_transform((96, 128), 0, 0, 1.5), [58, 6, 118, 42]),
        # Both: enlarged, then moved by 0.125 * 96 = 12 down, whatever the scale is.
        (lambda: shift_scale_transform((96, 128), 0, 0.125, 1.5), [58, 18, 118, 54]),
    ],
)
@pytest.mark.parametrize("kind", ["png", "dicom"])
def test_box_follows_the_picture_to_a_place_worked_by_hand(slice_of, augmentation, expected, kind):
    if not isinstance(augmentation, T.Augmentation):
        augmentation = augmentation()
    output = make_mapper([augmentation])(slice_of(kind))
    assert box_of(output) == pytest.approx(expected, abs=1e-3)
    assert bright_box(output["image"]) == pytest.approx(expected, abs=1.5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none"])
def test_box_follows_the_picture_under_all_augmentations(slice_of, tiny_cfg, flip, seed):
    cfg = tiny_cfg(
        "INPUT.AUG.SHIFT", 0.1,
        "INPUT.AUG.SCALE", 0.2,
        "INPUT.RANDOM_FLIP", flip,
        "INPUT.MIN_SIZE_TRAIN", (80, 144),
    )  # fmt: skip
    d = slice_of("dicom") | {"shift_scale": (0.05, -0.05, 1.1)}
    np.random.seed(seed)
    output = IchDatasetMapper(cfg, is_train=True)(d)
    assert min(output["image"].shape[1:]) in (80, 144)
    assert bright_box(output["image"]) == pytest.approx(box_of(output), abs=1.5)
    assert "shift_scale" not in output


@pytest.mark.parametrize("seed", range(4))
def test_box_encloses_the_turned_picture(slice_of, tiny_cfg, seed):
    cfg = tiny_cfg("INPUT.AUG.ROTATE", 10.0, "INPUT.AUG.JITTER", 0.1, "INPUT.MIN_SIZE_TRAIN", (96,))
    np.random.seed(seed)
    output = IchDatasetMapper(cfg, is_train=True)(slice_of("dicom"))
    # The tips of a turned rectangle are blurred, so what is bright may end some pixels before.
    x0, y0, x1, y1 = np.subtract(bright_box(output["image"]), box_of(output))
    assert -1 <= x0 < 6 and -1 <= y0 < 6 and -6 < x1 <= 1 and -6 < y1 <= 1


def test_augmentations_are_drawn_anew_each_time(slice_of):
    mapper, d = make_mapper([RandomShiftScale(0.1, 0.2)]), slice_of()
    np.random.seed(0)
    boxes = [box_of(mapper(d)) for _ in range(3)]
    assert len({tuple(box) for box in boxes}) == 3


def test_box_moved_out_of_the_picture_is_dropped(slice_of):
    # A box at the left border, moved a quarter to the left; the other one stays.
    d = slice_of(boxes=[(1, 41, 20, 60), BOX]) | {"shift_scale": (-0.25, 0.0, 1.0)}
    assert box_of(make_mapper()(d)) == [28, 20, 68, 44]


def test_box_is_clipped_at_the_border(slice_of):
    # Moved by half of 128 to the right: 124 .. 164, of which 124 .. 128 is left.
    d = slice_of() | {"shift_scale": (0.5, 0.0, 1.0)}
    assert box_of(make_mapper()(d)) == [124, 20, 128, 44]


# ---- masks -------------------------------------------------------------------------------------


def rectangle():
    mask = np.zeros((96, 128), bool)
    mask[20:44, 60:100] = True
    return encode_mask(mask)


def with_masks(d, *masks):
    """A dataset dict whose boxes have these masks, None for one that is not known."""
    known = [{} if mask is None else {"segmentation": mask} for mask in masks]
    return d | {"annotations": [a | m for a, m in zip(d["annotations"], known, strict=True)]}


def mapper_with_masks(cfg):
    cfg.INPUT.MASK_FORMAT = "bitmask"
    return IchDatasetMapper(cfg, is_train=True)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("crop", [None, (20, 10, 120, 90)])
def test_a_mask_shows_what_the_slice_shows(voc_tree, tiny_cfg, seed, crop):
    """Whatever moves the slice: crop, square pixels, expansion, augmentations, resize."""
    header = {"a": {"PixelSpacing": [0.6, 0.4]}}
    root = voc_tree({"a": [("EDH", BOX)]}, kind="dicom", size=(128, 96), header=header)
    cfg = tiny_cfg(
        "INPUT.AUG.SHIFT", 0.1,
        "INPUT.AUG.SCALE", 0.2,
        "INPUT.AUG.ROTATE", 15.0,
        "INPUT.RANDOM_FLIP", "horizontal",
        "INPUT.MIN_SIZE_TRAIN", (144,),
    )  # fmt: skip
    d = load_ich_voc(root, "train")[0] | {"shift_scale": (0.05, -0.05, 1.1)}
    d = with_masks(d, rectangle()) | ({} if crop is None else {"crop": crop})
    np.random.seed(seed)
    output = mapper_with_masks(cfg)(d)
    bright = output["image"][0] > 140  # between brain (30 HU: 77) and the rectangle (80: 204)
    (mask,) = output["instances"].gt_masks.tensor
    assert mask.shape == bright.shape and output["instances"].gt_has_mask.tolist() == [True]
    # They differ by half a pixel along the outline, of about 400 of 5000 pixels, at most.
    both, either = (mask & bright).sum(), (mask | bright).sum()
    assert both / either > 0.94
    ys, xs = mask.nonzero(as_tuple=True)
    x0, y0, x1, y1 = box_of(output)
    assert x0 - 1 <= xs.min() and xs.max() <= x1 and y0 - 1 <= ys.min() and ys.max() <= y1


def test_a_box_whose_mask_is_not_known_has_an_empty_one(slice_of, tiny_cfg):
    d = with_masks(slice_of(boxes=(BOX, (11, 51, 30, 70))), rectangle(), None)
    instances = mapper_with_masks(tiny_cfg())(d)["instances"]
    assert instances.gt_has_mask.tolist() == [True, False]
    assert instances.gt_masks.tensor.flatten(1).any(1).tolist() == [True, False]
    # Without masks asked for there are none, whatever the dicts hold.
    instances = IchDatasetMapper(tiny_cfg(), is_train=True)(d)["instances"]
    assert set(instances.get_fields()) == {"gt_boxes", "gt_classes"} and len(instances) == 2


def test_a_lesion_that_left_the_slice_leaves_its_loose_box_too(slice_of, tiny_cfg):
    corner = np.zeros((96, 128), bool)
    corner[20:24, 96:100] = True  # of a box from 60 to 100
    # Moved by a half of 128 to the right: what is at 96 and more would be at 160.
    d = slice_of() | {"shift_scale": (0.5, 0.0, 1.0)}
    assert len(mapper_with_masks(tiny_cfg())(with_masks(d, encode_mask(corner)))["instances"]) == 0
    assert len(mapper_with_masks(tiny_cfg())(with_masks(d, None))["instances"]) == 1


def test_a_healthy_slice_has_no_masks(slice_of, tiny_cfg):
    instances = mapper_with_masks(tiny_cfg())(slice_of(boxes=()))["instances"]
    assert len(instances) == 0 and not instances.has("gt_masks")


# ---- what comes out ----------------------------------------------------------------------------


def test_healthy_slice_has_instances_without_boxes(slice_of):
    output = make_mapper()(slice_of(boxes=()))
    assert len(output["instances"]) == 0 and output["image_label"] == 0
    assert output["instances"].gt_boxes.tensor.shape == (0, 4)


def test_in_the_test_annotations_are_dropped_and_labels_kept(slice_of, tiny_cfg):
    d = slice_of()
    output = IchDatasetMapper(tiny_cfg(), is_train=False)(d)
    assert "annotations" not in output and "instances" not in output
    kept = ("file_name", "image_id", "patient_id", "study_id", "height", "width", "image_label")
    assert {k: output[k] for k in kept} == {k: d[k] for k in kept}
    assert set(output) == {*kept, "image"}
    # The shorter side of 96 becomes 64; the dict still has the size on disk.
    assert output["image"].shape[1:] == (64, 85) and output["height"] == 96


@pytest.mark.parametrize("is_train", [True, False])
def test_input_dict_is_not_modified(slice_of, is_train):
    d = slice_of() | {"shift_scale": (0.1, 0.0, 1.2)}
    before = copy.deepcopy(d)
    first = make_mapper([T.ResizeShortestEdge(64)], is_train)(d)
    assert d == before
    assert torch.equal(
        make_mapper([T.ResizeShortestEdge(64)], is_train)(d)["image"], first["image"]
    )


def test_test_pictures_are_resized_alone(slice_of, tiny_cfg):
    cfg = tiny_cfg("INPUT.AUG.SHIFT", 0.3, "INPUT.AUG.SCALE", 0.5)
    mapper, d = IchDatasetMapper(cfg, is_train=False), slice_of()
    outputs = [mapper(d)["image"] for _ in range(3)]
    assert all(torch.equal(image, outputs[0]) for image in outputs)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], r"INPUT.WINDOWS is \[\], expected 1 or 3 pairs"),
        ([[50, 100]] * 2, "expected 1 or 3 pairs"),
        ([[50, 100, 3]], "expected 1 or 3 pairs"),
        ([[50]], "expected 1 or 3 pairs"),
        ([[50, 0]], r"INPUT.WINDOWS is \[\[50, 0\]\], expected widths above 0 HU"),
        ([[50, 100], [50, -1], [50, 100]], "expected widths above 0 HU"),
        ([50, 100, 40], "expected 1 or 3 pairs"),  # a pair's brackets forgotten
    ],
)
def test_bad_windows_are_errors(windows, message):
    with pytest.raises(ValueError, match=message):
        make_mapper(windows=windows)


@pytest.mark.parametrize("kind", ["png", "dicom"])
@pytest.mark.parametrize("damage", ["half", "empty", "missing"])
def test_file_that_cannot_be_read_is_named(slice_of, kind, damage):
    d = slice_of(kind)
    path = Path(d["file_name"])
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        make_mapper()(d)
    assert d["file_name"] in str(error.value)


def test_size_that_is_not_the_annotations_is_an_error(slice_of):
    with pytest.raises(ValueError, match=r"a\.png.*\(128, 96\).*\(64, 96\)"):
        make_mapper()(slice_of() | {"width": 64})


# ---- pixels that are not square ----------------------------------------------------------------


def test_pixels_become_square_and_boxes_follow(voc_tree):
    header = {"a": {"PixelSpacing": [0.8, 0.4]}}  # rows twice as far apart as columns
    root = voc_tree({"a": [("EDH", BOX)]}, kind="dicom", size=(128, 96), header=header)
    output = make_mapper()(load_ich_voc(root, "train")[0])
    assert output["image"].shape == (3, 192, 128)
    assert (output["height"], output["width"]) == (96, 128)  # a detector scales its boxes back
    assert box_of(output) == [60, 40, 100, 88]
    assert bright_box(output["image"]) == pytest.approx(box_of(output), abs=1.5)


def test_impossible_pixel_spacing_is_none(voc_tree):
    root = voc_tree({"a": []}, kind="dicom", header={"a": {"PixelSpacing": [400, 0.4]}})
    assert make_mapper()(load_ich_voc(root, "train")[0])["image"].shape == (3, 48, 64)
