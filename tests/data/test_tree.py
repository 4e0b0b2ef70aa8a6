"""The one reader of a VOC tree: what other tools write, and what is wrong with it."""

import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from ich_det2.data import load_ich_voc
from ich_det2.data.masks import encode_mask
from ich_det2.data.tree import VocTree

TEXT = "image,patient\na,P1\nb,P2\n"


@pytest.fixture
def tree_of(voc_tree):
    """Factory: a tree of the pictures a and b, with these files written into it."""

    def make(**files):
        root = voc_tree({"a": [("IPH", (11, 13, 30, 28))], "b": []})
        for name, text in files.items():
            path = root / {"patients": "patients.csv", "labels": "labels.csv"}.get(
                name, f"ImageSets/Main/{name}.txt"
            )
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return root

    return make


def test_patients(tree_of):
    assert VocTree(tree_of()).patients == {}
    text = "image,patient,study\na,P1,S1\nb,P1,S2\n\n"
    assert VocTree(tree_of(patients=text)).patients == {"a": ("P1", "S1"), "b": ("P1", "S2")}
    # Any order, other columns, spaces, a byte order mark, Windows lines, the same line twice.
    text = "\ufeffage, Patient ,image\r\n70,P1, a\r\n70,P1,a\r\n60,P2,b\r\n"
    assert VocTree(tree_of(patients=text)).patients == {"a": ("P1", "P1"), "b": ("P2", "P2")}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 1: the header is ''"),
        ("a,P1\nb,P2\n", "line 1: the header is 'a,p1', expected image,patient"),
        ("image;patient\na;P1\n", "line 1: the header is 'image;patient'"),
        (TEXT + "a,P3\n", "line 4: the image a has the patient 'P3', but had 'P1' before"),
        ("image,patient,study\na,P1,S1\na,P1,S2\nb,P1,S1\n", "line 3: the image a has the study"),
        ("image,patient\na\nb,P1\n", "line 2: the patient is empty"),
        ("image,patient\n,P1\n", "line 2: the image is empty"),
        (b"image,patient\na,M\xfcller\n", "is not UTF-8"),
        ("image,patient\na," + "x" * 200_000 + "\n", "is not CSV"),
        # A join that misses is no default: neither of an image nor of a row.
        ("image,patient\na,P1\nB,P2\n", "1 rows are of no image"),
        ("image,patient\n01,P1\n02,P2\n", "2 rows are of no image"),
    ],
)
def test_wrong_patients_name_file_and_line(tree_of, text, message):
    with pytest.raises(ValueError, match=r"patients\.csv") as error:
        _ = VocTree(tree_of(patients=text)).patients
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.dcm", "JPEGImages/a.png", "x\\a.jpg", " a "])
def test_a_name_with_suffix_or_folder_is_that_of_the_image(tree_of, name):
    tree = VocTree(tree_of(patients=f"image,patient\n{name},P1\nb,P2\n"))
    assert tree.patients["a"] == ("P1", "P1")
    tree = VocTree(tree_of(labels=f"image,label\n{name},0\n"))
    assert tree.labels == {"a": 0}


def test_a_slice_that_bleeds_without_boxes_is_no_healthy_one(tree_of):
    assert VocTree(tree_of()).findings == {"a": {"IPH"}, "b": set()}
    tree = VocTree(tree_of(labels="image,label\na,1\nb,1\n"))
    assert tree.findings == {"a": {"IPH"}, "b": {"hemorrhage"}}
    assert tree.types == {"a": {"IPH"}, "b": set()}
    # A training and an evaluation would take the box for hemorrhage and the slice for healthy.
    tree = VocTree(tree_of(labels="image,label\na,0\nb,0\n"))
    assert tree.findings == {"a": set(), "b": set()} and tree.types["a"] == {"IPH"}
    with pytest.raises(ValueError, match="labels.csv of .* says 0, no hemorrhage, of 'a'"):
        load_ich_voc(tree.root, "train")


def test_images_without_a_row_are_counted(tree_of, caplog):
    assert set(VocTree(tree_of(patients="image,patient\na,P1\n")).patients) == {"a"}
    assert "lacks 1 of 2 images, 'b' for one" in caplog.text


def test_rows_of_images_that_are_not_there_are_said_once(tree_of, caplog):
    root = tree_of(patients=TEXT + "c,P3\n")
    for _ in range(2):
        assert set(VocTree(root).patients) == {"a", "b"}
    assert caplog.text.count("1 rows are of no image") == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("image,label\na,1\nB,0\n", "1 rows are of no image"),
        ("image,label\na,1\na,0\n", "line 3: the image a has the label '0', but had '1'"),
        ("image,label\na,yes\n", "line 2: the label is 'yes', expected 0 or 1"),
        ("image;label\na;1\n", "the header is"),
    ],
)
def test_wrong_labels(tree_of, text, message):
    with pytest.raises(ValueError, match=r"labels\.csv") as error:
        _ = VocTree(tree_of(labels=text)).labels
    assert message in str(error.value)


@pytest.mark.parametrize("position", ["5mm", "12,5", "inf"])
def test_a_position_that_is_no_number_is_an_error(tree_of, position):
    text = f'image,patient,position_mm\na,P1,"{position}"\nb,P1,3\n'
    with pytest.raises(ValueError, match="line 2: position_mm is"):
        _ = VocTree(tree_of(patients=text)).places


@pytest.mark.parametrize(
    "text",
    [
        "a\nb\n",
        "a  1\nb -1\n",  # VOC's flags
        "a\r\nb\r\n\r\n",
        "\ufeffa\nb",
        "a.png\nb.PNG\n",
        "a\nb\n".encode("utf-16"),
        "a\nb\n".encode("utf-16-be").join([b"\xfe\xff", b""]),
    ],
)
def test_lists_as_other_tools_write_them(tree_of, text):
    root = tree_of(val=text)
    assert VocTree(root).read_list("val") == ["a", "b"]
    assert VocTree(root).lists == ["train", "val"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a\nzz\n", "'zz' of ImageSets/Main/val.txt, line 2"),
        ("a b c\n", "line 1: is 'a b c', expected an image id"),
        ("a b\n", "line 1: is 'a b', expected an image id"),
        ("a\na.png\n", "names 'a' more than once"),
        ("\n\n", "is empty"),
        ("../a\n", "expected a file's stem without folder"),
        (b"a\xff\n", "is not UTF-8"),
    ],
)
def test_a_wrong_list_is_one_sentence(tree_of, text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=r"val\.txt") as error:
        VocTree(tree_of(val=text)).read_list("val")
    assert message in str(error.value)


def test_images(tmp_path):
    for name in ("DICOM/b.dcm", "JPEGImages/b.png", "JPEGImages/a.JPG", "JPEGImages/._c.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "DICOM/readme.txt").touch()
    images = VocTree(tmp_path).images
    assert list(images.items()) == [
        ("a", tmp_path / "JPEGImages/a.JPG"),
        ("b", tmp_path / "DICOM/b.dcm"),
    ]
    (tmp_path / "DICOM/x y.dcm").touch()
    with pytest.raises(ValueError, match=r"x y\.dcm: has a space"):
        _ = VocTree(tmp_path).images


def test_dicom_is_known_by_its_content(tmp_path, write_ct):
    (tmp_path / "DICOM").mkdir()
    for name in ("a.DCM", "b", "1.2.3.4"):
        write_ct(tmp_path / "DICOM" / name, np.zeros((8, 8)))
    assert list(VocTree(tmp_path).images) == ["1.2.3.4", "a", "b"]


def test_two_files_of_one_id_are_an_error(tree_of):
    root = tree_of()
    shutil.copy(root / "JPEGImages/a.png", root / "JPEGImages/a.jpg")
    with pytest.raises(ValueError, match="has the id 'a' of a.jpg beside it"):
        _ = VocTree(root).images


def test_names_in_another_form_of_unicode_are_the_same(tree_of):
    decomposed, composed = (unicodedata.normalize(form, "h\u00e4") for form in ("NFD", "NFC"))
    root = tree_of(train=f"{composed}\nb\n", patients=f"image,patient\n{composed},P\nb,P\n")
    (root / "JPEGImages/a.png").rename(root / "JPEGImages" / f"{decomposed}.png")
    xml = root / "Annotations/a.xml"
    xml.write_text(xml.read_text().replace("a.png", f"{decomposed}.png"))
    xml.rename(root / "Annotations" / f"{decomposed}.xml")
    tree = VocTree(root)
    assert tree.read_list("train") == [composed, "b"]
    assert len(tree.annotation(composed).objects) == 1 and tree.patients[composed] == ("P", "P")


def test_no_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        VocTree(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no images"):
        _ = VocTree(tmp_path).images


# ---- masks ---------------------------------------------------------------------------------------

TWO = [
    ("IPH", (11, 13, 30, 28)),
    ("SDH", (41, 5, 50, 20)),
]  # edges 10, 12, 30, 28 and 40, 4, 50, 20


@pytest.fixture
def masked(voc_tree):
    """Factory: a tree of a, which bleeds twice, and b, and a mask (H, W) of a in a folder."""

    def make(mask, folder="SegmentationObject", name="a.png"):
        root = voc_tree({"a": TWO, "b": []})
        (root / folder).mkdir(exist_ok=True)
        Image.fromarray(np.asarray(mask, np.uint8)).save(root / folder / name)
        return root

    return make


def two_lesions(*values):
    mask = np.zeros((48, 64), np.uint8)
    mask[14:20, 12:22], mask[6:18, 42:48] = values
    return mask


def test_masks_of_objects(masked):
    mask = two_lesions(1, 2)
    mask[0, 0] = 255  # void
    first, second = VocTree(masked(mask)).masks("a")
    assert np.array_equal(first, mask == 1) and np.array_equal(second, mask == 2)
    tree = VocTree(masked(two_lesions(0, 2)))
    assert tree.masks("a")[0] is None and tree.masks("b") == []
    # As VOC's own pictures are: indices of a palette.
    path = tree.root / "SegmentationObject/a.png"
    picture = Image.fromarray(mask, "P")
    picture.putpalette([v for i in range(256) for v in (i, 0, 255 - i)])
    picture.save(path)
    assert np.array_equal(VocTree(tree.root).masks("a")[1], mask == 2)


def test_masks_of_a_class_are_shared_among_the_boxes(masked, caplog):
    mask = two_lesions(1, 1)
    mask[40:44, 2:5] = 1
    root = masked(mask, "SegmentationClass")
    first, second = VocTree(root).masks("a")
    assert np.array_equal(first + second, two_lesions(1, 1) > 0) and second[6:18, 42:48].all()
    assert "12 of its 144 pixels lie in no box" in caplog.text
    # Masks of objects have the first word.
    masked(two_lesions(2, 1))
    assert VocTree(root).masks("a")[0][6:18, 42:48].all()


@pytest.mark.parametrize(
    ("mask", "folder", "message"),
    [
        (two_lesions(1, 3), "SegmentationObject", "has the value 3, but a.xml has 2 objects"),
        (np.ones((64, 48)), "SegmentationObject", "is 48 x 64 pixels, its image 64 x 48"),
        (np.ones((9, 9)), "SegmentationClass", "is 9 x 9 pixels, its image 64 x 48"),
        (two_lesions(255, 255), "SegmentationClass", "has no value but 255, which is VOC's for"),
        (np.ones((48, 64, 3)) * [1, 2, 3], "SegmentationObject", "is a mask of colours"),
    ],
)
def test_a_wrong_mask_is_one_sentence(masked, mask, folder, message):
    with pytest.raises(ValueError, match=rf"{folder}/a\.png.*{message}"):
        VocTree(masked(mask, folder)).masks("a")


def test_a_mask_that_cannot_be_read_is_named(masked):
    root = masked(two_lesions(1, 2))
    (root / "SegmentationObject/a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"SegmentationObject/a\.png cannot be read"):
        VocTree(root).masks("a")


def test_masks_of_no_image(masked, caplog):
    root = masked(two_lesions(1, 2), name="c.png")
    with pytest.raises(ValueError, match="no mask has the name of an image, 'c.png' for one"):
        VocTree(root).masks("a")
    masked(two_lesions(1, 2))
    assert VocTree(root).masks("a")[0] is not None
    assert "1 masks are of no image, 'c.png' for one" in caplog.text


def test_masks_are_read_only_if_asked_for(masked):
    root = masked(two_lesions(1, 0))
    assert all("segmentation" not in a for a in load_ich_voc(root, "train")[0]["annotations"])
    first, second = load_ich_voc(root, "train", masks=True)[0]["annotations"]
    assert first["segmentation"] == encode_mask(two_lesions(1, 0) > 0)
    assert "segmentation" not in second
    assert first["bbox"] == [10, 12, 30, 28]  # as drawn
    (root / "SegmentationObject/a.png").write_bytes(b"no picture")
    load_ich_voc(root, "train")
    linked = VocTree(root).link(root.parent / "linked").root
    assert (linked / "SegmentationObject").is_symlink()


def test_a_tree_of_links_is_of_this_tree_or_an_error(voc_tree, tmp_path):
    root = voc_tree({"a": [], "b": []}, patients=["image,patient", "a,p1", "b,p2"])
    tree, place = VocTree(root), tmp_path / "linked"
    assert VocTree(root).patients == tree.link(place).patients
    tree.link(place)  # again
    (root / "labels.csv").write_text("image,label\na,1\n")
    assert tree.link(place).labels == {"a": 1}  # what came later
    (root / "labels.csv").unlink()
    assert tree.link(place).labels == {}  # and has gone
    other = shutil.copytree(root, tmp_path / "other")
    with pytest.raises(ValueError, match=rf"Annotations: leads to {root}/Annotations, expected a"):
        VocTree(other).link(place)
    (place / "patients.csv").unlink()
    shutil.copy(root / "patients.csv", place)
    with pytest.raises(ValueError, match=r"patients.csv: is no link, expected a link to"):
        tree.link(place)
