"""Planted leaks of each kind are found, a clean split passes."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
REAL = ROOT / "../shared/data/ct_ich"


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "datasets" / "audit_splits.py"
    spec = importlib.util.spec_from_file_location("audit_splits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(seed):
    """Smooth noise, as unlike from seed to seed as two heads are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 96), Image.BICUBIC)


@pytest.fixture
def tree(voc_tree, write_ct):
    """Factory of a clean tree of DICOM or PNG: a, b in train, c in val, d in test."""

    def make(kind="dicom", **headers):
        for split, ids in (("train", "ab"), ("val", "c"), ("test", "d")):
            root = voc_tree({i: [] for i in ids}, split=split, kind=kind, size=(96, 96))
        for seed, i in enumerate("abcd"):
            grey = picture(seed)
            if kind == "dicom":
                header = {
                    "PatientID": f"p{i}",
                    "StudyInstanceUID": f"1.{seed + 2}",
                    "SOPInstanceUID": f"1.9.{seed}",
                    **headers.get(i, {}),
                }
                write_ct(root / "DICOM" / f"{i}.dcm", np.asarray(grey) * 100 / 255, **header)
            else:
                grey.save(root / "JPEGImages" / f"{i}.png")
        return root

    return make


def test_clean_split(tool, tree, capsys):
    assert tool.main([str(tree())]) == 0
    assert "No leak among 4 images in 3 splits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keyword", "value", "kind"),
    [
        ("PatientID", "pa", "patient"),
        ("StudyInstanceUID", "1.2", "study"),
        ("SOPInstanceUID", "1.9.0", "SOP Instance UID"),
    ],
)
def test_planted_in_a_header(tool, tree, capsys, keyword, value, kind):
    root = tree(d={keyword: value})  # of image a, in train
    assert tool.main([str(root)]) == 1
    captured = capsys.readouterr()
    assert "1 LEAKS" in captured.out and kind in captured.out
    assert "test / train" in captured.out and "d / a" in captured.out
    assert "1 leaks: scores on these splits are too good" in captured.err
    assert "pa" not in captured.out.replace("patient", "")  # whose it is stays unsaid


def test_studies_that_each_patient_numbers_are_told_what_to_do(tool, tree, capsys):
    root = tree("png")
    rows = [f"{image},p{image},1" for image in "abcd"]
    (root / "patients.csv").write_text("\n".join(["image,patient,study", *rows, ""]))
    assert tool.main([str(root)]) == 1
    assert "put the patient before the number; then divide anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        (["a,x,s1", "b,y,s2", "c,x,s3", "d,z,s4"], "patient"),
        (["a,x,s1", "b,y,s2", "c,w,s1", "d,z,s4"], "study"),
    ],
)
def test_planted_in_patients_csv(tool, tree, capsys, lines, kind):
    root = tree("png")
    (root / "patients.csv").write_text("\n".join(["image,patient,study", *lines]) + "\n")
    assert tool.main([str(root)]) == 1
    out = capsys.readouterr().out
    assert "1 LEAKS" in out and kind in out and "a / c" in out


@pytest.mark.parametrize("change", ["copy", "jpeg", "brighter"])
def test_planted_pixels(tool, tree, capsys, change):
    root = tree("png")
    image = picture(0)
    if change == "brighter":
        image = image.point(lambda v: min(255, int(v * 1.1)))
    (root / "JPEGImages" / "d.png").unlink()
    if change == "jpeg":
        image.save(root / "JPEGImages" / "d.jpg", quality=60)
    else:
        image.save(root / "JPEGImages" / "d.png")
    assert tool.main([str(root)]) == 1
    assert "pixels" in capsys.readouterr().out
    assert tool.main([str(root), "--no-pixels"]) == 0


def test_one_image_in_two_lists(tool, tree, capsys):
    root = tree("png")
    (root / "ImageSets/Main/test.txt").write_text("d\na\n")
    assert tool.main([str(root), "--no-pixels"]) == 1
    assert "image id" in capsys.readouterr().out


def test_errors_of_the_user(tool, tree, capsys):
    root = tree("png")
    assert tool.main([str(root), "--names", "nothing"]) == 2
    assert "no such list" in capsys.readouterr().err
    (root / "ImageSets/Main/val.txt").write_text("x\n")
    assert tool.main([str(root)]) == 2
    assert "there is no such image" in capsys.readouterr().err


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
def test_real_split_by_patient_is_clean(tool):
    assert tool.main([str(REAL)]) == 0
