"""Neighbouring slices as channels, in a VOC tree of DICOM or of pictures."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image

from ich_det2.data import IchDatasetMapper, load_ich_voc
from ich_det2.data.augmentation import RandomShiftScale
from ich_det2.data.context import find_context, find_places, find_scans
from ich_det2.data.tree import VocTree
from ich_det2.inference.slices import find_slices

NAMES = ["c", "a", "d", "b"]  # from the feet to the head
GREY = {"c": 10, "a": 20, "d": 30, "b": 40}


@pytest.fixture
def tree(voc_tree, write_ct):
    """Factory of a tree of one series; a slice's grey value says which it is."""

    def make(kind, heights=(0, 5, 10, 15), columns="image,patient,series,position_mm"):
        root = voc_tree({name: [] for name in NAMES[:2]}, kind=kind)
        voc_tree({name: [] for name in NAMES[2:]}, split="val", kind=kind)
        rows = [f"{n},p,s,{z}" for n, z in zip(NAMES, heights, strict=True)]
        (root / "patients.csv").write_text("\n".join([columns, *rows]) + "\n")
        for name, height in zip(NAMES, heights, strict=True):
            hu = np.full((48, 64), GREY[name] / 255 * 100)
            if kind == "dicom":
                write_ct(
                    root / "DICOM" / f"{name}.dcm", hu, SeriesInstanceUID="1.2",
                    ImagePositionPatient=[0, 0, height],
                    ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                )  # fmt: skip
            else:
                grey = np.full((48, 64), GREY[name], np.uint8)
                Image.fromarray(grey).save(root / "JPEGImages" / f"{name}.png")
        return root

    return make


def channels(root, split="train"):
    """The mean of each channel, by image."""
    mapper = IchDatasetMapper(False, augmentations=[], windows=[[50, 100]], context_slices=1)
    dicts = load_ich_voc(root, split, context=1)
    return {d["image_id"]: mapper(d)["image"].mean((1, 2)).tolist() for d in dicts}


@pytest.mark.parametrize("kind", ["png", "dicom"])
def test_before_the_slice_itself_and_after(tree, kind):
    # Neighbours are found across the splits: they are of the same patient.
    root, tolerance = tree(kind), 0 if kind == "png" else 1.5  # HU of the file are whole numbers
    assert channels(root) == {
        "c": pytest.approx([10, 10, 20], abs=tolerance),
        "a": pytest.approx([10, 20, 30], abs=tolerance),
    }
    assert channels(root, "val") == {
        "d": pytest.approx([20, 30, 40], abs=tolerance),
        "b": pytest.approx([30, 40, 40], abs=tolerance),
    }


def test_beyond_a_gap_there_is_no_neighbour(tree):
    assert channels(tree("png", heights=(0, 5, 20, 25)))["a"] == [10, 20, 20]


def test_pictures_without_positions_are_an_error(tree):
    root = tree("png", columns="image,patient,series,other")
    with pytest.raises(
        ValueError, match=r"a\.png: its place in a series is not known.*position_mm"
    ):
        channels(root)


@pytest.mark.parametrize("kind", ["png", "dicom"])
def test_places_come_with_the_data_and_through_the_mapper(tree, kind):
    root = tree(kind)
    mapper = IchDatasetMapper(False, augmentations=[], windows=[[50, 100]])
    found = [mapper(d) for d in load_ich_voc(root, "train")]
    assert [(x["image_id"], x["position_mm"]) for x in found] == [("c", 0.0), ("a", 5.0)]
    assert found[0]["series"] == found[1]["series"] != ""


SAME_NAMES = {
    "of two patients": ("c,p,,1,0", "a,p,,1,5", "d,q,,1,0", "b,q,,1,5"),
    "of two studies": ("c,p,x,1,0", "a,p,x,1,5", "d,p,y,1,0", "b,p,y,1,5"),
    "without series": ("c,p,x,,0", "a,p,x,,5", "d,p,y,,0", "b,p,y,,5"),
    "without study and series": ("c,p,,,0", "a,p,,,5", "d,q,,,0", "b,q,,,5"),
}


@pytest.mark.parametrize("rows", SAME_NAMES.values(), ids=SAME_NAMES)
def test_series_of_one_name_are_apart(tree, rows):
    root = tree("png")
    text = "\n".join(["image,patient,study,series,position_mm", *rows, ""])
    (root / "patients.csv").write_text(text)
    known = VocTree(root)
    assert find_context(known, 1) == {
        **{"c": ["c", "c", "a"], "a": ["c", "a", "a"]},
        **{"d": ["d", "d", "b"], "b": ["d", "b", "b"]},
    }
    assert find_scans(known, NAMES, 2)["d"] == ["d", "b"]
    assert sorted(members for members, _ in known.series()) == [["a", "c"], ["b", "d"]]
    dicts = load_ich_voc(root, "train") + load_ich_voc(root, "val")
    assert len({(d["patient_id"], d["series"]) for d in dicts}) == 2
    diagnosed = find_slices([root / "JPEGImages"]).slices
    assert len({(s.patient, s.series) for s in diagnosed}) == 2


def test_series_of_one_uid_are_apart_by_patient(tree, write_ct):
    root = tree("dicom")
    (root / "patients.csv").unlink()
    for name, patient in zip(NAMES, "ppqq"):
        write_ct(
            root / "DICOM" / f"{name}.dcm", np.zeros((48, 64)), SeriesInstanceUID="1.2",
            PatientID=patient, ImagePositionPatient=[0, 0, 5 * NAMES.index(name)],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        )  # fmt: skip
    assert find_context(VocTree(root), 1)["a"] == ["c", "a", "a"]


def test_where_a_place_is_not_known_there_is_none(tree):
    root = tree("png", columns="image,patient,series,other")
    assert not any("position_mm" in d or "series" in d for d in load_ich_voc(root, "train"))
    # A classifier of sequences takes the numbers in names.
    assert find_places(VocTree(root), ["c"], by_name=True) == {}


def test_a_dataset_without_context_is_an_error(tree):
    mapper = IchDatasetMapper(False, augmentations=[], windows=[[50, 100]], context_slices=1)
    d = load_ich_voc(tree("png"), "train")[0]
    with pytest.raises(ValueError, match=r"register_ich_voc\(\.\.\., context=1\)"):
        mapper(d)


def test_several_neighbours_are_channels_in_order(tree):
    mapper = IchDatasetMapper(False, augmentations=[], windows=[[50, 100]], context_slices=2)
    dicts = load_ich_voc(tree("png"), "train", context=2)
    images = {d["image_id"]: mapper(d)["image"] for d in dicts}
    # As those of a sequence, of which each slice is one channel.
    mapper = IchDatasetMapper(False, augmentations=[], windows=[[50, 100]], sequence_slices=2)
    for d in dicts:
        assert torch.equal(images[d["image_id"]], mapper(d)["sequence"][:, 0])


def test_three_windows_leave_no_channel_for_context():
    with pytest.raises(ValueError, match="INPUT.CONTEXT_SLICES is 1 with 3 windows"):
        IchDatasetMapper(False, augmentations=[], windows=[[50, 100]] * 3, context_slices=1)


def test_sequences_hold_the_neighbours_in_order(tree):
    mapper = IchDatasetMapper(False, augmentations=[], windows=[[50, 100]], sequence_slices=2)
    dicts = load_ich_voc(tree("png"), "train", context=2)
    sequences = {d["image_id"]: mapper(d)["sequence"] for d in dicts}
    assert sequences["a"].shape == (5, 3, 48, 64)
    # At the ends the last slice stands in.
    assert sequences["c"].mean((1, 2, 3)).tolist() == [10, 10, 10, 20, 30]
    assert sequences["a"].mean((1, 2, 3)).tolist() == [10, 10, 20, 30, 40]


def test_all_slices_of_a_sequence_are_moved_alike(tree):
    root = tree("png")
    grey = np.random.default_rng(0).integers(0, 255, (48, 64), np.uint8)
    for name in NAMES:  # one picture in all files
        Image.fromarray(grey).save(root / "JPEGImages" / f"{name}.png")
    augmentations = [
        *(RandomShiftScale(0.2, 0.3), T.RandomRotation([-30, 30], expand=False)),
        *(T.RandomContrast(0.5, 1.5), T.RandomBrightness(0.5, 1.5), T.ResizeShortestEdge(32)),
    ]
    mapper = IchDatasetMapper(
        True, augmentations=augmentations, windows=[[50, 100]], sequence_slices=1
    )
    for d in load_ich_voc(root, "train", context=1):
        mapped = mapper(d)
        assert all(torch.equal(x, mapped["image"]) for x in mapped["sequence"])
        assert mapped["image"].std() > 0


def test_names_order_pictures_without_positions(tmp_path, caplog):
    root = tmp_path / "named"
    images = [f"p_{i}" for i in (10, 9, 11)]
    (root / "JPEGImages").mkdir(parents=True)
    for name in images:
        Image.new("L", (8, 8)).save(root / f"JPEGImages/{name}.png")
    rows = [f"{name},p" for name in images]
    (root / "patients.csv").write_text("\n".join(["image,patient", *rows]) + "\n")
    context = find_context(VocTree(root), 1, by_name=True)
    assert context == {
        "p_9": ["p_9", "p_9", "p_10"],
        "p_10": ["p_9", "p_10", "p_11"],
        "p_11": ["p_10", "p_11", "p_11"],
    }
    assert "no position_mm for 3 images" in caplog.text
    (root / "JPEGImages/p_9.png").rename(root / "JPEGImages/scout.png")
    (root / "patients.csv").write_text("image,patient\np_10,p\np_11,p\nscout,p\n")
    with pytest.raises(ValueError, match=r"scout\.png: its place in a series is not known"):
        find_context(VocTree(root), 1, by_name=True)


def test_channels_and_sequences_exclude_each_other():
    with pytest.raises(ValueError, match="INPUT.SEQUENCE_SLICES is 2 with INPUT.CONTEXT_SLICES 1"):
        IchDatasetMapper(
            False, augmentations=[], windows=[[50, 100]], context_slices=1, sequence_slices=2
        )
