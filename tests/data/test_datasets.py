"""VOC trees as dataset dicts, and one clear sentence for each thing that can be wrong."""

import json
import logging

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from ich_det2.data import load_ich_voc, register_ich_datasets, register_ich_voc
from ich_det2.data.datasets import check_images, fingerprint, fingerprints

SICK = [("EDH", (11, 21, 30, 40))]
KINDS = pytest.mark.parametrize("kind", ["png", "dicom"])


@pytest.fixture
def names():
    """Names of datasets that are forgotten after the test."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


# ---- fingerprints ------------------------------------------------------------------------------


def mark(**settings):
    return lambda root: fingerprint(load_ich_voc(root, "train", **settings))


def rewrite(name, before, after):
    def change(root):
        text = (root / name).read_text()
        assert before in text
        (root / name).write_text(text.replace(before, after))

    return change


CHANGES = {
    "a label": rewrite("labels.csv", "b,0", "b,1"),
    "a box": rewrite("Annotations/a.xml", "<xmax>30<", "<xmax>31<"),
    "a type": rewrite("Annotations/a.xml", "EDH", "SDH"),
    "a patient": rewrite("patients.csv", "b,p2", "b,p1"),
    "a place": rewrite("patients.csv", "5.0", "7.5"),
    "an order": rewrite("ImageSets/Main/train.txt", "a\nb", "b\na"),
    "a list": rewrite("ImageSets/Main/train.txt", "a\nb", "a"),
    "an image": lambda root: Image.new("L", (64, 48), 9).save(root / "JPEGImages/b.png"),
}


@pytest.fixture
def marked_tree(voc_tree):
    patients = ["image,patient,study,series,position_mm", "a,p1,s1,r,0.0", "b,p2,s2,q,5.0"]
    root = voc_tree({"a": SICK, "b": []}, patients=patients)
    (root / "labels.csv").write_text("image,label\na,1\nb,0\n")
    return root


def test_a_label_that_denies_a_box_is_an_error(marked_tree):
    (marked_tree / "labels.csv").write_text("image,label\na,0\nb,0\n")
    with pytest.raises(ValueError, match=r"a\.xml has 1 boxes of hemorrhage, but labels.csv"):
        load_ich_voc(marked_tree, "train")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_fingerprint_tells_each_change(marked_tree, change):
    before = mark()(marked_tree)
    assert (before["images"], before["boxes"]) == (2, 1)
    assert mark()(marked_tree) == before
    change(marked_tree)
    assert mark()(marked_tree)["sha256"] != before["sha256"]


def test_a_fingerprint_is_of_the_data_and_not_of_place_and_settings(marked_tree, tmp_path):
    before = mark()(marked_tree)
    moved = marked_tree.rename(tmp_path / "moved")
    for read in (mark(), mark(context=1), mark(scan=2), mark(classes=("SDH", "EDH"))):
        assert read(moved) == before
    (moved / "SegmentationObject").mkdir()
    mask = np.zeros((48, 64), np.uint8)
    mask[25:30, 15:20] = 1
    Image.fromarray(mask).save(moved / "SegmentationObject/a.png")
    assert mark()(moved) == before
    masked = mark(masks=True)(moved)
    assert masked.items() > before.items()
    mask[25, 15] = 0
    Image.fromarray(mask).save(moved / "SegmentationObject/a.png")
    assert mark(masks=True)(moved)["masks"] != masked["masks"]


def test_fingerprints_are_of_any_registered_dataset(names, tmp_path):
    """A COCO-like one of a user's own, of NumPy's numbers; one that is not known is left out."""
    image = tmp_path / "x.png"
    Image.new("L", (8, 8)).save(image)
    box = {"bbox": np.array([1.0, 2.0, 3.0, 4.0]), "category_id": np.int64(1)}
    rows = [{"file_name": str(image), "image_id": 1, "annotations": [box]}]
    DatasetCatalog.register("own", lambda: rows)
    MetadataCatalog.get("own")  # as training makes it
    found = fingerprints(["own", "none", "own"])
    assert found == {"own": fingerprint(rows)} and found["own"]["boxes"] == 1
    box["category_id"] = np.int64(0)
    assert fingerprints(["own"]) != found


# ---- dataset dicts -----------------------------------------------------------------------------


@KINDS
def test_dict_has_every_field(voc_tree, kind):
    root = voc_tree({"a": SICK, "b": []}, kind=kind, patients=["image,patient,study", "a,p1,s1"])
    first, second = load_ich_voc(root, "train")
    path = root / ("DICOM/a.dcm" if kind == "dicom" else "JPEGImages/a.png")
    assert first == {
        "file_name": str(path),
        "image_id": "a",
        "patient_id": "p1",
        "study_id": "s1",
        "height": 48,
        "width": 64,
        # Pixels 11..30 and 21..40, counted from 1, have the edges 10..30 and 20..40.
        "annotations": [
            {
                "bbox": [10.0, 20.0, 30.0, 40.0],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "type": "EDH",
                "iscrowd": 0,
            }
        ],
        "image_label": 1,
    }
    assert (second["image_id"], second["annotations"], second["image_label"]) == ("b", [], 0)


def test_healthy_slices_are_kept_in_the_lists_order(voc_tree):
    root = voc_tree({"d": [], "b": SICK, "c": [], "a": SICK})
    dicts = load_ich_voc(root, "train")
    assert [(d["image_id"], d["image_label"]) for d in dicts] == [
        ("d", 0),
        ("b", 1),
        ("c", 0),
        ("a", 1),
    ]


def test_box_at_the_border_is_one_pixel_wide(voc_tree):
    root = voc_tree({"a": [("x", (1, 1, 1, 48)), ("x", (64, 48, 64, 48))]})
    boxes = [a["bbox"] for a in load_ich_voc(root, "train")[0]["annotations"]]
    assert boxes == [[0.0, 0.0, 1.0, 48.0], [63.0, 47.0, 64.0, 48.0]]


@KINDS
def test_size_comes_from_the_image_if_the_xml_has_none(voc_tree, kind):
    root = voc_tree({"a": SICK}, kind=kind)
    xml = root / "Annotations" / "a.xml"
    text = xml.read_text()
    xml.write_text(text[: text.index("<size>")] + text[text.index("</size>") + 7 :])
    (d,) = load_ich_voc(root, "train")
    assert (d["width"], d["height"]) == (64, 48)


def test_dicom_is_preferred_to_a_picture_of_it(voc_tree):
    root = voc_tree({"a": SICK}, kind="dicom")
    Image.new("L", (64, 48)).save(root / "JPEGImages" / "a.jpg")
    assert load_ich_voc(root, "train")[0]["file_name"].endswith("DICOM/a.dcm")


def test_lines_of_a_voc_list_may_carry_a_label(voc_tree):
    root = voc_tree({"a": SICK, "b": []})
    (root / "ImageSets/Main/train.txt").write_text("a  1\n\nb -1\n")
    assert [d["image_id"] for d in load_ich_voc(root, "train")] == ["a", "b"]


# ---- classes -----------------------------------------------------------------------------------

TYPES = {"a": [("SDH", (1, 1, 9, 9)), ("EDH", (11, 11, 19, 19))]}


def test_one_class_takes_every_object(voc_tree):
    (d,) = load_ich_voc(voc_tree(TYPES), "train", ["hemorrhage"])
    assert [(a["category_id"], a["type"]) for a in d["annotations"]] == [(0, "SDH"), (0, "EDH")]


def test_several_classes_keep_the_types(voc_tree):
    (d,) = load_ich_voc(voc_tree(TYPES), "train", ["EDH", "SDH"])
    assert [a["category_id"] for a in d["annotations"]] == [1, 0]


def test_type_that_is_no_class_is_an_error(voc_tree):
    root = voc_tree(TYPES)
    with pytest.raises(ValueError) as error:
        load_ich_voc(root, "train", ["EDH", "IPH"])
    assert str(error.value) == (
        f"{root / 'Annotations' / 'a.xml'} has an object 'SDH', expected one of"
        " DATASETS.ICH_CLASSES ['EDH', 'IPH']."
    )


# ---- patients ----------------------------------------------------------------------------------


def test_patients_file_goes_before_the_header(voc_tree):
    header = {"a": {"PatientID": "MRN-4711"}, "b": {"PatientID": "MRN-4712"}}
    root = voc_tree(
        {"a": [], "b": []}, kind="dicom", header=header, patients=["image,patient", "a,p7"]
    )
    a, b = load_ich_voc(root, "train")
    assert (a["patient_id"], a["study_id"]) == ("p7", "p7")
    assert b["patient_id"].startswith("patient-")


def test_header_gives_pseudonyms_and_no_identity(voc_tree):
    header = {
        "a": {"PatientID": "MRN-4711", "StudyInstanceUID": "1.2.3"},
        "b": {"PatientID": "MRN-4711", "StudyInstanceUID": "1.2.4"},
        "c": {"PatientID": "MRN-4712", "StudyInstanceUID": "1.2.5"},
    }
    root = voc_tree(dict.fromkeys(header, []), kind="dicom", header=header)
    dicts = load_ich_voc(root, "train")
    a, b, c = (d["patient_id"] for d in dicts)
    assert a == b != c and a.startswith("patient-")
    assert len({d["study_id"] for d in dicts}) == 3
    text = json.dumps(dicts)
    assert "MRN" not in text and "4711" not in text and "1.2.3" not in text
    assert load_ich_voc(root, "train") == dicts  # the same each time


def test_images_without_patient_are_their_own_with_a_warning(voc_tree, caplog):
    root = voc_tree({"a": [], "b": SICK})
    with caplog.at_level(logging.WARNING, logger="ich_det2"):
        dicts = load_ich_voc(root, "train")
    assert [(d["patient_id"], d["study_id"]) for d in dicts] == [("a", "a"), ("b", "b")]
    assert f"{root} has no patients.csv" in caplog.text


def test_images_with_patients_give_no_warning(voc_tree, caplog):
    root = voc_tree({"a": []}, patients=["image,patient", "a,p1"])
    with caplog.at_level(logging.WARNING, logger="ich_det2"):
        assert load_ich_voc(root, "train")[0]["patient_id"] == "p1"
    assert caplog.text == ""


# ---- registration ------------------------------------------------------------------------------


def test_registration_reads_nothing_until_asked(voc_tree, names):
    root = voc_tree({"a": SICK})
    register_ich_voc("some_ich", root / "later", "train", ["EDH", "SDH"])
    meta = MetadataCatalog.get("some_ich")
    assert (meta.thing_classes, meta.split) == (["EDH", "SDH"], "train")
    with pytest.raises(FileNotFoundError, match="later"):
        DatasetCatalog.get("some_ich")
    register_ich_voc("some_ich", root, "train")  # replaces
    assert DatasetCatalog.get("some_ich") == load_ich_voc(root, "train")
    assert MetadataCatalog.get("some_ich").thing_classes == ["hemorrhage"]


def test_the_three_splits_are_registered(voc_tree, names):
    for split in ("val", "test", "train"):
        root = voc_tree({f"{split}1": SICK}, split=split)
    register_ich_datasets(root)
    found = {n: DatasetCatalog.get(f"ich_{n}")[0]["image_id"] for n in ("train", "val", "test")}
    assert found == {"train": "train1", "val": "val1", "test": "test1"}


# ---- errors ------------------------------------------------------------------------------------


def test_missing_root_is_an_error_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_ich_voc(tmp_path / "nowhere", "train")
    assert str(tmp_path / "nowhere") in str(error.value)
    assert "datasets/prepare_phantom.py" in str(error.value)


def spoil_list(text):
    return lambda root: (root / "ImageSets/Main/train.txt").write_text(text)


def spoil_xml(old, new):
    def spoil(root):
        path = root / "Annotations" / "a.xml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "kind", "messages"),
    [
        (
            lambda root: (root / "ImageSets/Main/train.txt").unlink(),
            FileNotFoundError,
            ["train.txt is missing", "datasets/make_splits.py"],
        ),
        (spoil_list(" \n\n"), ValueError, ["train.txt is empty", "--force"]),
        (spoil_list("a\nb\na\n"), ValueError, ["train.txt names 'a' more than once"]),
        (spoil_list("../a\n"), ValueError, ["train.txt names '../a'"]),
        (spoil_list("/etc/passwd\n"), ValueError, ["train.txt names '/etc/passwd'"]),
        (spoil_list("x\\a\n"), ValueError, ["train.txt names 'x\\a'"]),
        (spoil_list("..\n"), FileNotFoundError, ["train.txt", "'..'"]),
        (spoil_list("a\nz\n"), FileNotFoundError, ["'z' of ImageSets/Main/train.txt", "z.xml"]),
        (
            lambda root: (root / "Annotations" / "a.xml").unlink(),
            FileNotFoundError,
            ["'a' of ImageSets/Main/train.txt has no Annotations/a.xml", "healthy slice"],
        ),
        (
            lambda root: (root / "JPEGImages" / "a.png").unlink(),
            FileNotFoundError,
            ["a.xml has no image", "DICOM/a.dcm", "JPEGImages/a.jpg"],
        ),
        (
            spoil_xml("a.png", "b.png"),
            ValueError,
            ["a.xml names the image 'b.png', expected 'a'"],
        ),
        (spoil_xml("</annotation>", ""), ValueError, ["a.xml"]),
        (spoil_xml("<xmin>11<", "<xmin>eleven<"), ValueError, ["a.xml", "object 0", "'eleven'"]),
        (
            lambda root: (root / "patients.csv").write_text("who,what\na,p\n"),
            ValueError,
            ["patients.csv, line 1", "image,patient"],
        ),
    ],
)
def test_error_names_the_file(voc_tree, spoil, kind, messages):
    root = voc_tree({"a": SICK, "b": []})
    spoil(root)
    with pytest.raises(kind) as error:
        load_ich_voc(root, "train")
    assert all(message in str(error.value) for message in messages), error.value
    assert str(root) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_image_name_in_the_xml_is_never_followed(voc_tree):
    root = voc_tree({"a": SICK})
    spoil_xml("a.png", "../../etc/a.png")(root)
    assert load_ich_voc(root, "train")[0]["file_name"] == str(root / "JPEGImages" / "a.png")


# ---- check_images ------------------------------------------------------------------------------


@KINDS
def test_good_images_pass(voc_tree, kind):
    dicts = load_ich_voc(voc_tree({"a": SICK, "b": []}, kind=kind), "train")
    assert check_images(dicts) is None and len(dicts) == 2


@KINDS
def test_image_of_another_size_is_named(voc_tree, kind):
    root = voc_tree({"a": SICK, "b": []}, kind=kind)
    spoil = {"<width>64<": "<width>128<", "<height>48<": "<height>96<"}
    for old, new in spoil.items():
        spoil_xml(old, new)(root)
    dicts = load_ich_voc(root, "train")
    with pytest.raises(ValueError) as error:
        check_images(dicts)
    assert dicts[0]["file_name"] in str(error.value)
    assert "is 64 x 48 pixels, but its annotation says 128 x 96" in str(error.value)


def test_truncated_dicom_is_named(voc_tree):
    root = voc_tree({"a": [], "b": SICK}, kind="dicom")
    dicts = load_ich_voc(root, "train")
    path = root / "DICOM" / "b.dcm"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"b\.dcm: is truncated"):
        check_images(dicts)


def test_file_that_is_no_image_is_named(voc_tree):
    root = voc_tree({"a": []})
    dicts = load_ich_voc(root, "train")
    (root / "JPEGImages" / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        check_images(dicts)


def test_image_that_vanished_is_named(voc_tree):
    root = voc_tree({"a": []})
    dicts = load_ich_voc(root, "train")
    (root / "JPEGImages" / "a.png").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"a\.png"):
        check_images(dicts)


def test_boxes_lie_on_what_was_drawn(voc_tree):
    # The tree's rectangles are bright: the box covers exactly the bright pixels.
    root = voc_tree({"a": SICK})
    (d,) = load_ich_voc(root, "train")
    x0, y0, x1, y1 = map(int, d["annotations"][0]["bbox"])
    bright = np.asarray(Image.open(d["file_name"])) > 150
    assert bright[y0:y1, x0:x1].all() and bright.sum() == (y1 - y0) * (x1 - x0)
