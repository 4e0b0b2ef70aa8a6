"""The page finds what is planted and says the counts right."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ich_det2.data.inspection import inspect_image, note_turned, read_grey
from ich_det2.data.voc import write_voc

ROOT = Path(__file__).parents[2]
REAL = ROOT / "../shared/data/ct_ich"


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "inspect_data.py"
    spec = importlib.util.spec_from_file_location("inspect_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def head():
    """A skull with brain on a couch."""
    image = Image.new("L", (200, 200))
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 30, 160, 170), fill=90, outline=255, width=6)
    draw.arc((20, 60, 180, 190), 20, 160, fill=255, width=3)
    return image


PLANTED = {
    "air": ([("EDH", (1, 1, 30, 30))], "EDH: the box lies over air (100% of it)"),
    "tiny": ([("SAH", (90, 90, 92, 92))], "SAH: tiny box, 2 x 2 pixels"),
    "large": ([("SDH", (45, 40, 155, 160))], "SDH: the box takes 33% of the image"),
    "normal": (
        [("IPH", (80, 80, 110, 110))],
        "1 box(es), but the slice's label says no hemorrhage",
    ),
    "missed": ([], "no box, but the slice's label says hemorrhage"),
    "empty": ([], "no head: nearly all is air"),
    "turned": ([], "upside down: the couch or headrest seems to be above the head"),
}


@pytest.fixture
def tree(tmp_path):
    """A healthy slice, one with a box, and one for each thing that is odd."""
    root = tmp_path / "t"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    objects = {"good": [], "bleed": [("IPH", (80, 80, 110, 120))]}
    objects |= {name: boxes for name, (boxes, _) in PLANTED.items()}
    for name, boxes in objects.items():
        image = Image.new("L", (200, 200)) if name == "empty" else head()
        if name == "turned":
            image = image.transpose(Image.FLIP_TOP_BOTTOM)
        image.save(root / "JPEGImages" / f"{name}.png")
        xml = root / "Annotations" / f"{name}.xml"
        write_voc(xml, filename=f"{name}.png", width=200, height=200, objects=boxes)
    (root / "ImageSets/Main/train.txt").write_text("\n".join(list(objects)[:5]) + "\n")
    (root / "ImageSets/Main/test.txt").write_text("\n".join(list(objects)[5:]) + "\n")
    rows = [f"{name},p{i // 3}" for i, name in enumerate(objects)]
    (root / "patients.csv").write_text("\n".join(["image,patient", *rows]) + "\n")
    (root / "labels.csv").write_text("image,label\nnormal,0\nmissed,1\nbleed,1\ngood,0\n")
    return root


def test_all_that_is_planted_is_found_and_nothing_else(tool, tree, tmp_path):
    assert tool.main([str(tree), "--output", str(tmp_path / "o")]) == 0
    report = json.loads((tmp_path / "o/inspection.json").read_text())
    found = {entry["image"]: entry["findings"] for entry in report["suspicious"]}
    assert found == {name: [sentence] for name, (_, sentence) in PLANTED.items()}
    rows = {row["split"]: row for row in report["counts"]}
    assert rows["all"] == {
        "split": "all", "patients": 3, "images": 9, "negative": 4, "share negative": 0.444,
        "boxes": 5, "EDH": 1, "IPH": 2, "SAH": 1, "SDH": 1,
    }  # fmt: skip
    assert rows["train"]["images"] == 5 and rows["test"]["images"] == 4
    assert {kind["what"]: kind["findings"] for kind in report["kinds"]}["tiny box"] == 1
    assert 0 <= report["anchors"]["recall 0.5"] <= 1
    page = (tmp_path / "o/index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 9 + 7  # the sheets, and what is odd
    for name, (_, sentence) in PLANTED.items():
        assert name in page and sentence.replace("'", "&#39;") in page


@pytest.mark.parametrize("listed", ["patient", "header"])
def test_a_series_upside_down_is_named_once(tool, tmp_path, write_ct, listed):
    root = tmp_path / "t"
    image = Image.new("L", (100, 100))
    ImageDraw.Draw(image).ellipse((20, 10, 80, 90), fill=90)
    ImageDraw.Draw(image).rectangle((20, 10, 80, 30), fill=0)  # the narrow end is cut off
    head = np.asarray(image)
    for folder in ("DICOM", "JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True)
    for patient in ("upright", "turned"):
        for i in range(4):
            name = f"{patient}{i}"
            grey = (head[::-1] if patient == "upright" else head).copy()
            grey[2:4, 10:90] = 90 if name == "upright2" else 0  # a bar above one head is no couch
            write_voc(
                root / f"Annotations/{name}.xml", filename=f"{name}.x", width=100, height=100,
                objects=[],
            )  # fmt: skip
            if listed == "patient":
                Image.fromarray(grey).save(root / f"JPEGImages/{name}.png")
            else:
                write_ct(
                    root / f"DICOM/{name}.dcm", grey - 30.0, SeriesInstanceUID=f"1.{len(patient)}",
                    ImagePositionPatient=[0, 0, i], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                )  # fmt: skip
    if listed == "patient":
        rows = [f"{patient}{i},{patient}\n" for patient in ("upright", "turned") for i in range(4)]
        (root / "patients.csv").write_text("".join(["image,patient\n", *rows]))
    assert tool.main([str(root), "--output", str(tmp_path / "o")]) == 0
    (entry,) = json.loads((tmp_path / "o/inspection.json").read_text())["suspicious"]
    assert entry["image"] == "turned0"
    assert entry["findings"][0].startswith("upside down, its whole series of 4: the head is wider")


def test_names_in_a_tree_cannot_write_html(tool, tree, tmp_path):
    xml = tree / "Annotations/bleed.xml"
    box = [("<script>alert(1)</script>", (80, 80, 110, 120))]
    write_voc(xml, filename="bleed.png", width=200, height=200, objects=box)
    assert tool.main([str(tree), "--output", str(tmp_path / "o")]) == 0
    assert "<script>" not in (tmp_path / "o/index.html").read_text()


def test_series_of_dicom_slices_are_looked_at(tool, voc_tree, tmp_path):
    places = {"a": 0, "b": 5, "c": 10, "d": 25, "e": 30}
    header = {
        name: {
            "SeriesInstanceUID": "1.2", "ImagePositionPatient": [0, 0, z],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [0.5, 0.5],
        }
        for name, z in places.items()
    }  # fmt: skip
    root = voc_tree({name: [] for name in places}, kind="dicom", header=header)
    assert tool.main([str(root), "--output", str(tmp_path / "o")]) == 0
    report = json.loads((tmp_path / "o/inspection.json").read_text())
    (entry,) = report["suspicious"]
    assert entry["image"] == "a" and "2 slice(s) seem to be missing" in entry["findings"][0]


def test_errors_of_the_user(tool, tree, tmp_path, capsys):
    assert tool.main([str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (tree / "JPEGImages/good.png").write_bytes(b"x")
    assert tool.main([str(tree), "--output", str(tmp_path / "o")]) == 2
    assert "good.png cannot be read as an image" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
def test_real_series_are_upright():
    series = {}
    for path in sorted((REAL / "JPEGImages").iterdir()):
        series.setdefault(path.stem[:3], []).append(read_grey(path))
    rates = []
    for step in (1, -1):
        named = 0
        for greys in series.values():
            images = [inspect_image("", grey[::step], [], None) for grey in greys]
            note_turned(images)
            named += any("its whole series" in text for i in images for text in i.findings)
        rates.append(named / len(series))
    assert len(series) == 45 and rates[0] == 0 and rates[1] > 0.6


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
def test_real_slices_are_upright_heads():
    paths = sorted((REAL / "JPEGImages").iterdir())[::10]
    found = [inspect_image(p.stem, read_grey(p), [], None) for p in paths]
    assert not any(f.findings for f in found)
    turned = [inspect_image(p.stem, read_grey(p)[::-1], [], None) for p in paths]
    # Only where a couch is in the picture: a slice or some of each series, 15 % of all here.
    assert np.mean([bool(f.findings) for f in turned]) > 0.08
