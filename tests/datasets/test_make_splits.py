"""The command datasets/make_splits.py: files, table, refusals."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

from ich_det2.data.tree import VocTree
from ich_det2.data.voc import read_voc, write_voc
from ich_det2.files import write_atomically

REPO = Path(__file__).parents[2]
REAL = REPO / "../shared/data/ct_ich"
NAMES = ("train", "val", "test")

spec = importlib.util.spec_from_file_location("make_splits", REPO / "datasets/make_splits.py")
make_splits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_splits)


@pytest.fixture
def tree(tmp_path):
    """10 patients of 3 images, the even patients with hemorrhage in one image."""
    for folder in ("Annotations", "JPEGImages"):
        (tmp_path / folder).mkdir()
    lines = ["image,patient,study"]
    for patient in range(10):
        for k in range(3):
            image = f"{patient}_{k}"
            (tmp_path / f"JPEGImages/{image}.jpg").touch()
            boxes = [("SDH", (1, 2, 30, 40))] if patient % 2 == 0 and k == 1 else []
            annotate(tmp_path, image, boxes)
            lines.append(f"{image},person{patient},visit{patient}")
    (tmp_path / "patients.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def dicom_tree(tmp_path):
    """3 patients of 2 DICOM images each, without patients.csv."""
    for folder in ("Annotations", "DICOM"):
        (tmp_path / folder).mkdir()
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    for index, name in enumerate(["Zoe", "Zoe", "Adam", "Adam", "Mia", "Mia"]):
        ds.PatientID, ds.StudyInstanceUID = f"{name}^1950", f"1.2.{index // 2}"
        ds.save_as(tmp_path / f"DICOM/s{index}.dcm")
        annotate(tmp_path, f"s{index}", [])
    return tmp_path


def annotate(root, image, boxes):
    path = root / f"Annotations/{image}.xml"
    write_voc(path, filename=f"{image}.jpg", width=64, height=64, objects=boxes)


def lists(root, names=NAMES):
    return {name: (root / f"ImageSets/Main/{name}.txt").read_text().split() for name in names}


def snapshot(root):
    return {str(path): path.is_file() and path.read_bytes() for path in root.rglob("*")}


def run(root, *args):
    return make_splits.main([str(root), *args])


def refused(capsys, root, *args):
    """The command ends with 2 and one sentence, and changes nothing; returns the sentence."""
    before = snapshot(root)
    assert run(root, *args) == 2
    assert snapshot(root) == before
    message = capsys.readouterr().err
    assert message.startswith("make_splits.py: error: ")
    assert message.count("\n") == 1
    return message


def test_by_patient(tree, capsys):
    assert run(tree) == 0
    splits = lists(tree)
    patients = VocTree(tree).patients
    assert sorted(image for ids in splits.values() for image in ids) == sorted(patients)
    people = {name: {patients[image][0] for image in ids} for name, ids in splits.items()}
    assert [len(people[name]) for name in NAMES] == [5, 2, 3]
    assert sum(len(p) for p in people.values()) == 10
    out = capsys.readouterr().out
    # 5 positive patients: 2.5, 1, 1.5 -> 3, 1, 1, one positive image each; the 5 others make up for
    # the rounding: 2, 1, 2.
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if "│" in line}
    cells = {name: [c.strip() for c in rows[name].split("│")[2:-1]] for name in NAMES}
    assert cells["train"] == ["5", "15", "50.0%", "3", "20.0%"]
    assert cells["val"] == ["2", "6", "20.0%", "1", "16.7%"]
    assert cells["test"] == ["3", "9", "30.0%", "1", "11.1%"]


def test_seed_and_force(tree, capsys):
    assert run(tree, "--seed", "1") == 0
    first = lists(tree)
    assert run(tree, "--seed", "1") == 0  # the same split is no change
    assert lists(tree) == first
    assert "holds another split; replace it with --force" in refused(capsys, tree, "--seed", "2")
    assert run(tree, "--seed", "2", "--force") == 0
    assert lists(tree) != first


def test_names_and_ratios(tree):
    assert run(tree, "--names", "a", "b", "--ratios", "0.5", "0.5") == 0
    assert sorted(p.name for p in (tree / "ImageSets/Main").iterdir()) == ["a.txt", "b.txt"]
    assert [len(ids) for ids in lists(tree, ("a", "b")).values()] == [15, 15]


def test_by_image_warns_of_leakage(tree, capsys):
    assert run(tree, "--by", "image") == 0
    splits = lists(tree)
    assert [len(ids) for ids in splits.values()] == [15, 6, 9]
    patients = VocTree(tree).patients
    seen = [{patients[image][0] for image in ids} for ids in splits.values()]
    torn = sum(sum(person in s for s in seen) > 1 for person in set.union(*seen))
    assert torn > 0
    assert f"WARNING: DATA LEAKAGE: {torn} of 10 patients" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["patient", "image"])
def test_bleeding_patients_alone_with_so_many_negatives(tree, by):
    # Five bleeding patients with one positive and two negative images each.
    args = "--by", by, "--names", "a", "b", "--ratios", "0.6", "0.4"
    assert run(tree, *args, "--bleeding-patients", "5") == 0
    everything = [image for ids in lists(tree, ("a", "b")).values() for image in ids]
    assert sorted(everything) == [f"{p}_{k}" for p in (0, 2, 4, 6, 8) for k in range(3)]
    assert run(tree, *args, "--bleeding-patients", "--force") == 0
    parts = lists(tree, ("a", "b"))
    drawn = [image for ids in parts.values() for image in ids]
    assert sum(image.endswith("_1") for image in drawn) == 5  # of 735 : 865, round(5.88) negatives
    assert len(drawn) == 11 and set(drawn) <= set(everything)
    if by == "patient":
        assert not {i[0] for i in parts["a"]} & {i[0] for i in parts["b"]}


def test_labels_without_boxes_count_as_bleeding(tree, capsys):
    # The odd patients bleed too, in their first image, without a box.
    labels = {i: int(i[0] in "13579" and i[2] == "0" or i[0] in "02468" and i[2] == "1")
              for i in VocTree(tree).images}  # fmt: skip
    text = "".join(f"{image},{label}\n" for image, label in labels.items())
    (tree / "labels.csv").write_text("image,label\n" + text)
    assert run(tree, "--bleeding-patients", "0") == 0
    drawn = {image for ids in lists(tree).values() for image in ids}
    assert drawn == {image for image, label in labels.items() if label} and len(drawn) == 10
    assert "100.0%" in capsys.readouterr().out
    assert run(tree, "--folds", "5") == 0
    for k, ids in enumerate(lists(tree, [f"fold{i}_val" for i in range(5)]).values()):
        assert sum(labels[i] for i in ids) == 2, k


def test_bleeding_patients_need_patients(tree, capsys):
    (tree / "patients.csv").unlink()
    message = refused(capsys, tree, "--by", "image", "--bleeding-patients")
    assert "does not say whose image it is" in message or "DICOM" in message


def test_by_image_without_patients(tree, capsys):
    (tree / "patients.csv").unlink()
    assert run(tree, "--by", "image") == 0
    captured = capsys.readouterr()
    assert "LEAKAGE: an unknown number of patients" in captured.err
    assert "unknown" in captured.out


def test_patients_of_dicom_headers_are_pseudonyms(dicom_tree):
    assert run(dicom_tree) == 0
    text = (dicom_tree / "patients.csv").read_text()
    assert text == (
        "image,patient,study\ns0,P0001,S0001\ns1,P0001,S0001\ns2,P0002,S0002\n"
        "s3,P0002,S0002\ns4,P0003,S0003\ns5,P0003,S0003\n"
    )
    assert sorted(len(ids) for ids in lists(dicom_tree).values()) == [2, 2, 2]
    first = lists(dicom_tree)
    assert run(dicom_tree) == 0  # and again, now from patients.csv
    assert lists(dicom_tree) == first


def test_dicom_without_patient(dicom_tree, capsys):
    path = dicom_tree / "DICOM/s3.dcm"
    ds = pydicom.dcmread(path)
    ds.PatientID = ""
    ds.save_as(path)
    message = refused(capsys, dicom_tree)
    assert "s3.dcm: does not say whose image it is; write" in message


def test_broken_dicom(dicom_tree, capsys):
    path = dicom_tree / "DICOM/s3.dcm"
    path.write_bytes(path.read_bytes()[:5000])
    assert "s3.dcm: ends without Pixel Data" in refused(capsys, dicom_tree)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: (root / "patients.csv").unlink(), "does not say whose image it is"),
        (lambda root: (root / "Annotations/4_1.xml").unlink(), "4_1.xml: the image 4_1 has no"),
        (lambda root: (root / "Annotations/4_1.xml").write_text("<x/>"), "4_1.xml: the root"),
        (
            lambda root: (root / "JPEGImages/new.jpg").touch() or annotate(root, "new", []),
            "lacks 1",
        ),
        (lambda root: (root / "patients.csv").write_text("a,b\n"), "patients.csv, line 1"),
        (lambda root: (root / "patients.csv").write_text("image,patient\n"), "lacks 30 of 30"),
        (lambda root: shutil.rmtree(root / "JPEGImages"), "no images"),
    ],
)
def test_faults_of_the_tree(tree, capsys, spoil, message):
    spoil(tree)
    assert message in refused(capsys, tree)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--ratios", "0.5", "0.6", "0.1"], "expected shares from 0 to 1 of sum 1"),
        (["--ratios", "0.5", "0.5"], "--ratios has 2 values and --names 3"),
        (["--names", "a", "b", "../c"], "--names has '../c'"),
        (["--names", "a", "b", "a"], "--names has 'a'"),
        (["--bleeding-patients", "-1"], "--bleeding-patients is -1.0, expected at least 0"),
        (["--bleeding-patients", "nan"], "--bleeding-patients is nan, expected at least 0"),
        (["--ratios", *["0.09"] * 11, "0.01", "--names", *"abcdefghijkl"], "10 patient(s) for 12"),
    ],
)
def test_faults_of_the_arguments(tree, capsys, args, message):
    assert message in refused(capsys, tree, *args)


def test_missing_root(tmp_path, capsys):
    assert "no such folder" in refused(capsys, tmp_path / "none")


def test_all_files_or_none(tree, monkeypatch, capsys):
    real = write_atomically

    def full_disk(path):
        if path.name == "test.txt":
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr("ich_det2.data.tree.write_atomically", full_disk)
    assert run(tree) == 2
    assert "No space left" in capsys.readouterr().err
    assert [path for path in (tree / "ImageSets").rglob("*") if path.is_file()] == []


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        make_splits.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for option in ("ROOT", "--by", "--ratios", "--names", "--seed", "--force", "patients.csv"):
        assert option in out


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
def test_real_tree(tmp_path):
    shutil.copytree(REAL / "Annotations", tmp_path / "Annotations")
    shutil.copy(REAL / "patients.csv", tmp_path)
    (tmp_path / "JPEGImages").mkdir()
    for path in (REAL / "JPEGImages").iterdir():
        (tmp_path / "JPEGImages" / path.name).touch()
    assert run(tmp_path, "--stratify", "positive") == 0
    patients = VocTree(tmp_path).patients
    people = [{patients[image][0] for image in ids} for ids in lists(tmp_path).values()]
    # 17 bleeding patients: 8.5, 3.4, 5.1 -> 9, 3, 5. 28 others: 14, 5.6, 8.4 -> 14, 6, 8.
    assert [len(p) for p in people] == [23, 9, 13]
    assert not set.intersection(*people)
    assert np.sum([len(ids) for ids in lists(tmp_path).values()]) == 335

    # With types in mind, images and positive images come near their shares too.
    assert run(tmp_path, "--force") == 0
    sizes = [len(ids) for ids in lists(tmp_path).values()]
    positive = [
        sum(bool(read_voc(tmp_path / f"Annotations/{i}.xml").objects) for i in ids)
        for ids in lists(tmp_path).values()
    ]
    np.testing.assert_allclose(np.divide(sizes, 335), [0.5, 0.2, 0.3], atol=0.1)
    np.testing.assert_allclose(np.divide(positive, 155), [0.5, 0.2, 0.3], atol=0.1)


def test_folds(tree):
    root = tree
    assert run(root, "--folds", "3") == 0
    lists = {p.stem: p.read_text().split() for p in (root / "ImageSets/Main").iterdir()}
    assert sorted(lists) == sorted(f"fold{i}_{s}" for i in range(3) for s in ("train", "val"))
    everyone = sorted(image for i in range(3) for image in lists[f"fold{i}_val"])
    assert len(everyone) == len(set(everyone))
    for i in range(3):
        held, rest = lists[f"fold{i}_val"], lists[f"fold{i}_train"]
        assert sorted(held + rest) == everyone and held


def test_one_fold_is_an_error(tree, capsys):
    assert run(tree, "--folds", "1") == 2
    assert "--folds is 1, expected at least 2" in capsys.readouterr().err
