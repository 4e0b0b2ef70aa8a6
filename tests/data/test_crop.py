"""One crop for a series, and boxes there and back."""

import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ich_det2.data import IchDatasetMapper, load_ich_voc, register_ich_voc
from ich_det2.data.crop import crop_to, find_crops, find_tree_crops, uncrop
from ich_det2.data.head import Head
from ich_det2.data.tree import VocTree
from ich_det2.engine.anchors import boxes_wh_of

ROWS = "image,patient,series,position_mm"


# ---- the crop ------------------------------------------------------------------------------------


def head(*box, size=(100, 100), ratio=1.0):
    return Head(box, (box[2] - box[0]) * (box[3] - box[1]), size, ratio)


def test_hand_worked_crops():
    # 50 high, 40 wide: 50 * 1.08 = 54 on both axes, about (40, 55).
    assert crop_to([head(20, 30, 60, 80)]) == (13, 28, 67, 82)
    # The union of two: x 20..60, y 10..80, side 75.6 to 76, about (40, 45); 45 - 38 = 7.
    assert crop_to([head(20, 30, 60, 80), head(30, 10, 50, 60)]) == (2, 7, 78, 83)
    # At the right border it is moved in: 54 wide, up to 100.
    assert crop_to([head(58, 30, 98, 80)]) == (46, 28, 100, 82)
    # Larger than the image is cut: the image is 40 rows high.
    assert crop_to([head(20, 0, 60, 40, size=(40, 100))]) == (18, 0, 62, 40)
    # Pixels twice as high as wide: 30 rows are 60 columns, 64.8 columns and 32.4 rows in all.
    assert crop_to([head(20, 30, 60, 60, ratio=2.0)]) == (7, 28, 72, 61)
    # A small part beside the head of the largest slice is a couch.
    assert crop_to([head(20, 30, 60, 80), head(10, 85, 90, 95)]) == (13, 28, 67, 82)


@st.composite
def heads(draw):
    width, height = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    ratio = draw(st.sampled_from([1.0, 0.6, 1.7]))
    boxes = []
    for _ in range(draw(st.integers(1, 4))):
        x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        x1, y1 = draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))
        boxes.append(head(x0, y0, x1, y1, size=(height, width), ratio=ratio))
    return boxes


@given(heads())
def test_a_crop_lies_in_the_image_and_holds_the_largest_head(found):
    (height, width), ratio = found[0].size, found[0].ratio
    x0, y0, x1, y1 = crop_to(found)
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    largest = max(found, key=lambda h: h.area).box
    assert x0 <= largest[0] and y0 <= largest[1] and largest[2] <= x1 and largest[3] <= y1
    if x1 - x0 < width and y1 - y0 < height:  # square up to whole pixels
        assert abs((x1 - x0) - (y1 - y0) * ratio) <= 1 + ratio


# ---- series --------------------------------------------------------------------------------------


def save(path, grey):
    Image.fromarray(grey).save(path)
    return str(path), None


def test_one_crop_a_series_and_each_file_is_read_once(tmp_path, monkeypatch, draw_head):
    first = save(tmp_path / "a.png", draw_head((120, 110), (70, 90)))
    second = save(tmp_path / "b.png", draw_head((120, 110), (30, 30)))
    empty = save(tmp_path / "c.png", np.zeros((256, 256), np.uint8))
    other = save(tmp_path / "d.png", draw_head((60, 60), (30, 40), shape=(128, 128)))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken, missing = (str(tmp_path / "broken.png"), None), (str(tmp_path / "none.png"), None)
    crops = find_crops([[second, empty, first, other, broken, missing], [empty]])
    assert crops.keys() == {first, second, empty, other}
    assert crops[first] == crops[second] == crops[empty] != crops[other]
    x0, y0, x1, y1 = crops[first]
    assert x1 - x0 == y1 - y0 == pytest.approx(181 * 1.08, abs=3)
    assert find_crops([[second]])[second] != crops[second]  # alone, by itself
    monkeypatch.setattr("ich_det2.data.crop.find_head", None)
    assert find_crops([[first, second]])[first] == crops[first]


def test_a_picture_and_its_dicom_slice_are_cropped_alike(tmp_path, write_ct, draw_head):
    grey = draw_head((120, 110), (70, 90), couch=True)
    picture = save(tmp_path / "a.png", grey)
    dicom = str(write_ct(tmp_path / "a.dcm", grey / 255 * 120 - 20)), None  # level 40, width 120
    crops = find_crops([[picture], [dicom]])
    np.testing.assert_allclose(crops[picture], crops[dicom], atol=1)


@pytest.fixture
def tree(voc_tree, draw_head):
    """Two series over two lists and a picture of none; heads grow from slice to slice."""
    box = [("IPH", (101, 91, 140, 120))]
    for split, ids in (("train", "abx"), ("val", "cd")):
        root = voc_tree({i: box for i in ids}, split=split, size=(256, 256))
    rows = ["a,p,1,0", "b,p,2,0", "c,p,1,5", "d,p,2,5"]
    (root / "patients.csv").write_text("\n".join([ROWS, *rows]) + "\n")
    for axis, image in zip((40, 50, 80, 70, 60), "abcdx"):
        save(root / f"JPEGImages/{image}.png", draw_head((120, 110), (axis - 10, axis)))
    return root


def test_crops_of_a_tree_are_of_its_series_across_lists(tree, caplog):
    caplog.set_level(logging.INFO, logger="ich_det2")
    crops = {
        d["image_id"]: d["crop"]
        for split in ("train", "val")
        for d in load_ich_voc(tree, split, head_crop=True)
    }
    assert crops["a"] == crops["c"] and crops["b"] == crops["d"]
    sides = [crops[i][2] - crops[i][0] for i in "abx"]
    assert sides == pytest.approx([161 * 1.08, 141 * 1.08, 121 * 1.08], abs=3)
    assert "5 slices of 3 series" in caplog.text and "3 of 3 images" in caplog.text
    assert find_tree_crops(VocTree(tree), ["d"]) == {"d": crops["d"]}
    assert all("crop" not in d for d in load_ich_voc(tree, "train"))


def test_a_box_that_the_crop_takes_away_is_said(tree, caplog, draw_head):
    save(tree / "JPEGImages/x.png", draw_head((200, 200), (30, 40)))
    load_ich_voc(tree, "train", head_crop=True)
    assert "the middle of 1 boxes lies outside" in caplog.text and "x.png" in caplog.text


# ---- there and back ------------------------------------------------------------------------------


def mapped(d, is_train, short_edge=64, **settings):
    augmentations = [T.ResizeShortestEdge(short_edge)]
    return IchDatasetMapper(is_train, augmentations=augmentations, windows=[[50, 100]], **settings)(
        d
    )


def test_the_mapper_crops_before_all_else_and_the_neighbours_too(tree):
    d = load_ich_voc(tree, "train", head_crop=True)[0]
    x0, y0, x1, y1 = d["crop"]
    image, before = (np.array(Image.open(tree / f"JPEGImages/{i}.png")) for i in "ac")
    d["context_files"] = [(str(tree / f"JPEGImages/{i}.png"), None) for i in "caa"]
    output = mapped(d, True, y1 - y0, context_slices=1)
    np.testing.assert_array_equal(output["image"][1], image[y0:y1, x0:x1])
    np.testing.assert_array_equal(output["image"][0], before[y0:y1, x0:x1])
    # The box is 100, 90, 140, 120.
    expected = [100.0 - x0, 90.0 - y0, 140.0 - x0, 120.0 - y0]
    assert output["instances"].gt_boxes.tensor.tolist() == [expected]
    assert (output["height"], output["width"]) == (256, 256)
    d["context_files"] = [(str(tree / f"JPEGImages/{i}.png"), None) for i in "caa"]
    sequence = mapped(d, False, y1 - y0, sequence_slices=1)["sequence"]
    np.testing.assert_array_equal(sequence[0, 0], before[y0:y1, x0:x1])
    np.testing.assert_array_equal(sequence[1, 0], image[y0:y1, x0:x1])


def there_and_back(path, box, crop, size, short_edge):
    """A box as the training sees it, given out as a prediction in the test."""
    d = {"file_name": str(path), "height": size[0], "width": size[1], "crop": crop}
    seen = mapped({**d, "annotations": [{"bbox": box, "bbox_mode": 0, "category_id": 0}]}, True,
                  short_edge)  # fmt: skip
    inputs = mapped(d, False, short_edge)
    assert torch.equal(inputs["image"], seen["image"])
    found = Instances(tuple(inputs["image"].shape[1:]))
    found.pred_boxes = Boxes(seen["instances"].gt_boxes.tensor.clone())
    output = {"instances": detector_postprocess(found, inputs["height"], inputs["width"])}
    (output,) = uncrop([inputs], [output])
    assert output["instances"].image_size == size
    return output["instances"].pred_boxes.tensor.tolist()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Slices of 60 x 90 pixels by the height of a pixel over its width, None of a picture."""
    from pydicom.uid import generate_uid

    from ich_det2.data.dicom.writing import make_ct

    folder = tmp_path_factory.mktemp("slices")
    hu = np.random.default_rng(0).integers(0, 100, (60, 90))
    found = {None: folder / "a.png"}
    save(found[None], hu.astype(np.uint8))
    for ratio in (0.6, 1.7):
        found[ratio] = folder / f"{ratio}.dcm"
        ds = make_ct((hu + 1024).astype("<u2"), generate_uid(), intercept=-1024,
                     PixelSpacing=[0.5 * ratio, 0.5])  # fmt: skip
        ds.save_as(found[ratio], enforce_file_format=True)
    return found


@given(st.data())
def test_boxes_there_and_back(files, data):
    path = files[data.draw(st.sampled_from(list(files)))]
    x0, x1 = data.draw(
        st.lists(st.integers(0, 90), min_size=2, max_size=2, unique=True).map(sorted)
    )
    y0, y1 = data.draw(
        st.lists(st.integers(0, 60), min_size=2, max_size=2, unique=True).map(sorted)
    )
    a, b = sorted(data.draw(st.tuples(*[st.floats(0, 1)] * 2)))
    c, d = sorted(data.draw(st.tuples(*[st.floats(0, 1)] * 2)))
    w, h = x1 - x0, y1 - y0
    box = [x0 + a * w * 0.9, y0 + c * h * 0.9, x0 + (b * 0.9 + 0.1) * w, y0 + (d * 0.9 + 0.1) * h]
    short_edge = data.draw(st.integers(8, 64))
    (back,) = there_and_back(path, box, (x0, y0, x1, y1), (60, 90), short_edge)
    assert back == pytest.approx(box, abs=1e-3)


def test_what_is_not_cropped_is_not_touched():
    boxes = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    found = Instances((60, 90))
    found.pred_boxes = Boxes(boxes)
    for crop in ({}, {"crop": None}):
        outputs = [{"instances": found}, {"image_score": 0.5}]
        uncrop([{"height": 60, "width": 90, **crop}] * 2, outputs)
        assert found.pred_boxes.tensor is boxes
    # A crop that is the whole slice changes nothing either.
    uncrop([{"height": 60, "width": 90, "crop": (0, 0, 90, 60)}], outputs[:1])
    assert torch.equal(found.pred_boxes.tensor, boxes)


def test_masks_are_mapped_back_to_the_whole_slice():
    # A crop of 40 x 30 of 60 x 90 pixels, that the model sees stretched over the slice.
    found = Instances((60, 90), pred_boxes=Boxes(torch.tensor([[45.0, 0.0, 90.0, 30.0]])))
    found.pred_masks = torch.zeros(1, 60, 90, dtype=torch.bool)
    found.pred_masks[0, :30, 45:] = True
    uncrop([{"height": 60, "width": 90, "crop": (20, 10, 60, 40)}], [{"instances": found}])
    # Its right upper quarter: columns 40 to 60, rows 10 to 25.
    assert found.pred_boxes.tensor.tolist() == [[40, 10, 60, 25]]
    expected = torch.zeros(60, 90, dtype=torch.bool)
    expected[10:25, 40:60] = True
    assert torch.equal(found.pred_masks[0], expected)


def test_anchors_are_clustered_from_boxes_as_large_as_the_crop_makes_them(tree, tiny_cfg):
    register_ich_voc("cropped", tree, "train", head_crop=True)
    try:
        cfg = tiny_cfg()
        expected = []
        for d in DatasetCatalog.get("cropped"):
            expected += mapped(d, True)["instances"].gt_boxes.tensor.tolist()
        got = boxes_wh_of(cfg, ["cropped"])
        np.testing.assert_allclose(got, [(x1 - x0, y1 - y0) for x0, y0, x1, y1 in expected], 1e-5)
        # 40 x 30 pixels of 256, and of a crop of about 174 for the first.
        assert got[0] == pytest.approx([40 * 64 / 174, 30 * 64 / 174], rel=0.03)
    finally:
        DatasetCatalog.remove("cropped")
