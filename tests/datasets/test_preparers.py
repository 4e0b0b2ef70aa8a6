"""Each preparer on a small sample in its own format; what was written loads as a data set."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedCTImageStorage
from scipy import ndimage

from ich_det2.data import load_ich_voc
from ich_det2.data.dicom import read_hu, read_identity, read_series
from ich_det2.data.masks import encode_mask
from ich_det2.data.tree import VocTree
from ich_det2.data.tree_writer import VocWriter
from ich_det2.data.voc import read_voc, write_voc

ROOT = Path(__file__).parents[2]
REAL = ROOT / "../shared/data"


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "datasets" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def boxes(root):
    """Names and boxes of each image."""
    return {
        p.stem: [(o.name, o.box) for o in read_voc(p).objects]
        for p in sorted((root / "Annotations").glob("*.xml"))
    }


def loads(root):
    """The whole tree as a data set."""
    names = sorted(VocTree(root).images)
    (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Main/all.txt").write_text("\n".join(names))
    return {d["image_id"]: d for d in load_ich_voc(root, "all")}


def times(root):
    return {
        p: p.stat().st_mtime_ns for p in root.rglob("*") if p.suffix in (".xml", ".dcm", ".png")
    }


# ---- CQ500 and BHX -------------------------------------------------------------------------------


@pytest.fixture
def cq500(tmp_path, write_ct):
    """Two series of CQ500-CT-7, one with boxes, and a healthy CQ500-CT-8."""
    source = tmp_path / "cq500"
    for number, series in ((7, "1.7.1"), (7, "1.7.2"), (8, "1.8.1")):
        folder = source / f"CQ500CT{number}" / series
        folder.mkdir(parents=True)
        for i in range(3):
            write_ct(
                folder / f"CT{i}.dcm", np.full((64, 64), 30.0 + i), PatientID=f"CQ500-CT-{number}",
                StudyInstanceUID=f"1.{number}", SeriesInstanceUID=series,
                SOPInstanceUID=f"{series}.{i}", ImagePositionPatient=[0, 0, 5 * i],
                ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[0.5, 0.5],
            )  # fmt: skip
    rows = [
        ("1.7.1.1", "{'x': 10.5, 'y': 20, 'width': 30, 'height': 5.5}", "Subdural", "handDrawn"),
        ("1.7.1.1", "{'x': 50, 'y': 2, 'width': 30, 'height': 5}", "Chronic", "handDrawn"),
        ("1.7.1.2", "{'x': 1, 'y': 2, 'width': 3, 'height': 4}", "Epidural", "extrapolated"),
        ("1.9.9", "{'x': 1, 'y': 2, 'width': 3, 'height': 4}", "Epidural", "handDrawn"),
    ]
    with open(tmp_path / "boxes.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["", "SOPInstanceUID", "SeriesInstanceUID", "data", "labelName", "labelType"]
        )
        writer.writerows([i, uid, "", data, *rest] for i, (uid, data, *rest) in enumerate(rows))
    (tmp_path / "reads.csv").write_text(
        "name,R1:ICH,R2:ICH,R3:ICH\nCQ500-CT-7,1,1,1\nCQ500-CT-8,0,0,0\n"
    )
    return source


def test_bhx(tmp_path, cq500, capsys):
    args = [str(cq500), "--output", str(tmp_path / "t"), "--boxes", str(tmp_path / "boxes.csv")]
    assert tool("prepare_bhx").main(args) == 0
    assert "1 of 3 slices with boxes are not among the 1 series" in capsys.readouterr().err
    found = list(boxes(tmp_path / "t").values())
    # The box that reaches over the border is clipped; the slices are in anatomical order.
    subdural = [("SDH", (10.5, 20, 40.5, 25.5)), ("Chronic", (50, 2, 64, 7))]
    assert found == [[], subdural, [("EDH", (1, 2, 4, 6))]]
    dicts = loads(tmp_path / "t")
    assert len({d["patient_id"] for d in dicts.values()}) == 1
    text = "".join(p.read_text() for p in (tmp_path / "t").rglob("*.[cjx][so][vnm]*"))
    assert "CQ500-CT" not in text and "1.7.1" not in text
    sources = json.loads((tmp_path / "t/sources.json").read_text())
    kinds = [entry["labelType"] for entry in sources.values()]
    assert kinds == [[], ["handDrawn", "handDrawn"], ["extrapolated"]]
    # Once more: nothing is written again.
    before = times(tmp_path / "t")
    assert tool("prepare_bhx").main(args) == 0 and times(tmp_path / "t") == before


def test_bhx_hand_drawn_with_healthy_studies(tmp_path, cq500):
    args = [str(cq500), "--output", str(tmp_path / "t"), "--boxes", str(tmp_path / "boxes.csv")]
    args += ["--label-types", "handDrawn", "--reads", str(tmp_path / "reads.csv")]
    assert tool("prepare_bhx").main(args) == 0
    assert sorted(map(len, boxes(tmp_path / "t").values())) == [0, 0, 0, 0, 0, 2]
    assert len({p for p, _ in VocTree(tmp_path / "t").patients.values()}) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("__import__('os').system('x')", "line 2: data is"),
        ("{'x': 1, 'y': 1, 'width': 0, 'height': 1}", "is empty"),
    ],
)
def test_bhx_refuses_what_is_no_box(tmp_path, cq500, capsys, bad, message):
    with open(tmp_path / "boxes.csv", "w", newline="") as file:
        rows = [["SOPInstanceUID", "data", "labelName", "labelType"], ["1", bad, "Subdural", "x"]]
        csv.writer(file).writerows(rows)
    args = [str(cq500), "--output", str(tmp_path / "t"), "--boxes", str(tmp_path / "boxes.csv")]
    assert tool("prepare_bhx").main(args) == 2
    assert message in capsys.readouterr().err


def test_bhx_takes_both_orientations_of_a_series_and_no_multi_frame_file(
    tmp_path, cq500, write_ct, capsys
):
    header = dict(PatientID="CQ500-CT-7", StudyInstanceUID="1.7", SeriesInstanceUID="1.7.1")
    tilted = [1, 0, 0, 0, 0.8, 0.6]
    for i in range(2):
        write_ct(
            cq500 / f"tilted{i}.dcm", np.zeros((64, 64)), ImagePositionPatient=[0, 0, 50 + 5 * i],
            ImageOrientationPatient=tilted, SOPInstanceUID=f"1.7.1.{90 + i}", **header,
        )  # fmt: skip
    text = (tmp_path / "boxes.csv").read_text().replace("1.9.9", "1.7.1.90")
    (tmp_path / "boxes.csv").write_text(text)
    position, orientation, transformation = Dataset(), Dataset(), Dataset()
    position.ImagePositionPatient = [0, 0, 1]
    orientation.ImageOrientationPatient = tilted
    transformation.RescaleIntercept, transformation.RescaleSlope = 0, 1
    frame = Dataset()
    frame.PlanePositionSequence = [position]
    frame.PlaneOrientationSequence = [orientation]
    frame.PixelValueTransformationSequence = [transformation]
    header["SeriesInstanceUID"] = "1.7.9"
    write_ct(
        cq500 / "frames.dcm", np.zeros((64, 64)), NumberOfFrames=2, Rows=32,
        SOPClassUID=EnhancedCTImageStorage, PerFrameFunctionalGroupsSequence=[frame, frame],
        **header,
    )  # fmt: skip
    args = [str(cq500), "--output", str(tmp_path / "t"), "--boxes", str(tmp_path / "boxes.csv")]
    assert tool("prepare_bhx").main([*args, "--reads", str(tmp_path / "reads.csv")]) == 0
    assert "1 series are multi-frame files" in capsys.readouterr().err
    uids = {read_identity(path)[2] for path in (tmp_path / "t/DICOM").iterdir()}
    # Three slices with a box among them, the two tilted ones of that series, and a healthy study.
    assert len(uids) == len(boxes(tmp_path / "t")) == 3 + 2 + 3


def test_boxes_outside_the_image_are_counted(tmp_path, cq500, capsys):
    text = (tmp_path / "boxes.csv").read_text().replace("'x': 50", "'x': 500")
    (tmp_path / "boxes.csv").write_text(text)
    args = [str(cq500), "--output", str(tmp_path / "t"), "--boxes", str(tmp_path / "boxes.csv")]
    assert tool("prepare_bhx").main(args) == 0
    assert "1 boxes were dropped" in capsys.readouterr().err


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
def test_bhx_on_the_real_slice(tmp_path):
    source = REAL / "dicom/cq500_693"
    args = [str(source), "--output", str(tmp_path), "--boxes", str(source / "693_bhx_rows.csv")]
    assert tool("prepare_bhx").main(args) == 0
    ((name, objects),) = boxes(tmp_path).items()
    assert [label for label, _ in objects] == ["Chronic", "SDH"]
    hu = read_hu(tmp_path / "DICOM" / f"{name}.dcm")
    # A chronic subdural hematoma is fluid between that of a ventricle and brain. The largest part
    # of that density, with the noise smoothed away, lies in the box, on the image's right.
    smooth = ndimage.uniform_filter(hu, 7)
    parts, _ = ndimage.label((smooth > 10) & (smooth < 24))
    largest = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    for _, (x0, y0, x1, y1) in objects:
        x0, y0, x1, y1 = (round(v) for v in (x0, y0, x1, y1))
        assert largest.sum() > 9000 and largest[y0:y1, x0:x1].sum() == largest.sum()


# ---- masks ---------------------------------------------------------------------------------------


def save_nifti(path, slices, axes):
    """Slices (D, H, W), rows to the back, columns to the left, as a volume in an orientation."""
    data = slices.T[::-1, ::-1]  # RAS+
    image = nib.Nifti1Image(np.ascontiguousarray(data), np.diag([0.5, 0.5, 5, 1]))
    wanted = nib.orientations.axcodes2ornt(axes)
    now = nib.orientations.axcodes2ornt("RAS")
    image = image.as_reoriented(nib.orientations.ornt_transform(now, wanted))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS"])
def test_ct_ich(tmp_path, axes, capsys):
    source = tmp_path / "ct-ich"
    hu = np.random.default_rng(0).integers(-1000, 1000, (3, 40, 48)).astype(np.int16)
    mask = np.zeros((3, 40, 48), np.uint8)
    mask[1, 5:12, 20:30] = 255
    mask[2, 5:12, 20:30] = mask[2, 30:36, 2:9] = 255
    mask[2, 20, 20] = 255  # a speck
    save_nifti(source / "ct_scans/049.nii", hu, axes)
    save_nifti(source / "masks/049.nii", mask, axes)
    types = "Intraventricular,Intraparenchymal,Subarachnoid,Epidural,Subdural"
    (source / "hemorrhage_diagnosis_raw_ct.csv").write_text(
        f"PatientNumber,SliceNumber,{types},No_Hemorrhage,Fracture_Yes_No\n"
        "49,1,0,1,0,0,0,0,0\n49,2,0,0,0,1,0,0,0\n49,3,1,1,0,0,0,0,0\n"
    )
    assert tool("prepare_ct_ich").main([str(source), "--output", str(tmp_path / "t")]) == 0
    assert "on 1 slices mask and diagnosis disagree" in capsys.readouterr().err
    first, second = (20, 5, 30, 12), (2, 30, 9, 36)
    assert boxes(tmp_path / "t") == {
        "049_01": [],
        "049_02": [("EDH", first)],
        "049_03": [("hemorrhage", first), ("hemorrhage", second)],
    }
    for i in range(3):
        assert np.array_equal(read_hu(tmp_path / f"t/DICOM/049_0{i + 1}.dcm"), hu[i])
    mask[2, 20, 20] = 0
    for i, name in enumerate(("049_01", "049_02", "049_03")):
        parts = VocTree(tmp_path / "t").masks(name)
        assert np.array_equal(sum(parts, np.zeros((40, 48), bool)), mask[i] > 0)
    (series,), _ = read_series(tmp_path / "t/DICOM")
    assert [p.stem for p in series.files] == ["049_01", "049_02", "049_03"]
    assert series.spacing_mm == (5, 0.5, 0.5) and series.notes == ()
    assert {d["patient_id"] for d in loads(tmp_path / "t").values()} == {"049"}


def test_masks_of_volumes(tmp_path):
    mask = np.zeros((2, 32, 32), np.uint8)
    mask[0, 4:10, 4:10], mask[0, 12:20, 4:10] = 1, 2
    save_nifti(tmp_path / "s/images/case.nii.gz", np.zeros((2, 32, 32), np.int16), "LPS")
    save_nifti(tmp_path / "s/masks/case.nii.gz", mask, "LPS")
    args = [str(tmp_path / "s"), "--output", str(tmp_path / "t"), "--classes", "1=EDH", "2=SDH"]
    assert tool("prepare_masks").main(args) == 0
    expected = [("EDH", (4, 4, 10, 10)), ("SDH", (4, 12, 10, 20))]
    assert boxes(tmp_path / "t") == {"case_000": expected, "case_001": []}
    first, second = VocTree(tmp_path / "t").masks("case_000")
    assert np.array_equal(first, mask[0] == 1) and np.array_equal(second, mask[0] == 2)
    assert "<segmented>1</segmented>" in (tmp_path / "t/Annotations/case_000.xml").read_text()
    assert [p.name for p in (tmp_path / "t/SegmentationObject").iterdir()] == ["case_000.png"]
    # Masks that are lost, or of another outline in the same boxes, are written again.
    before = times(tmp_path / "t")
    assert tool("prepare_masks").main(args) == 0 and times(tmp_path / "t") == before
    (tmp_path / "t/SegmentationObject/case_000.png").unlink()
    assert tool("prepare_masks").main(args) == 0
    mask[0, 5, 5] = 0
    save_nifti(tmp_path / "s/masks/case.nii.gz", mask, "LPS")
    assert tool("prepare_masks").main(args) == 0
    assert np.array_equal(VocTree(tmp_path / "t").masks("case_000")[0], mask[0] == 1)


def test_masks_go_with_the_boxes_that_are_kept(tmp_path):
    labels = np.zeros((32, 32), np.int32)
    labels[4:8, 4:8], labels[10:12, 10:12], labels[20:24, 20:30] = 1, 2, 3
    objects = [("a", (4, 4, 8, 8)), ("b", (10, 10, 10.5, 10.5)), ("c", (20, 20, 30, 24))]
    grey = np.zeros((32, 32), np.uint8)
    for masks in (labels, None):  # then the same boxes without masks
        with VocWriter(tmp_path / "t", database="test") as tree:
            assert tree.wants("x", objects, masks=masks)
            tree.add("x", grey, objects, size=(32, 32), patient="p", masks=masks)
        found = VocTree(tmp_path / "t").masks("x")
        if masks is not None:
            first, second = found
            assert np.array_equal(first, labels == 1) and np.array_equal(second, labels == 3)
    assert found == [None, None]
    with VocWriter(tmp_path / "t", database="test") as tree, pytest.raises(ValueError, match="254"):
        many = np.arange(32 * 32).reshape(32, 32)
        tree.add("y", grey, [("a", (0, 0, 2, 2))] * 1023, size=(32, 32), patient="p", masks=many)


def test_a_mask_with_a_scale_keeps_its_values_and_nan_is_air(tmp_path):
    hu = np.zeros((2, 32, 32), np.float32)
    hu[0, 0, 0] = np.nan
    mask = np.zeros((2, 32, 32), np.uint8)
    mask[1, 4:10, 4:10] = 1
    save_nifti(tmp_path / "s/images/case.nii", hu, "RAS")
    save_nifti(tmp_path / "s/masks/case.nii", mask, "RAS")
    image = nib.load(tmp_path / "s/masks/case.nii")
    image.header.set_slope_inter(0.9999, 0)
    scaled = nib.Nifti1Image(image.get_fdata(), image.affine, image.header)
    nib.save(scaled, tmp_path / "s/masks/case.nii")
    args = [str(tmp_path / "s"), "--output", str(tmp_path / "t"), "--classes", "1=EDH"]
    assert tool("prepare_masks").main(args) == 0
    assert boxes(tmp_path / "t") == {"case_000": [], "case_001": [("EDH", (4, 4, 10, 10))]}
    assert read_hu(tmp_path / "t/DICOM/case_000.dcm")[0, 0] == -1024


def test_a_mask_turned_against_its_scan_is_refused(tmp_path, capsys):
    volume = np.zeros((2, 32, 32), np.int16)
    save_nifti(tmp_path / "s/images/case.nii", volume, "RAS")
    save_nifti(tmp_path / "s/masks/case.nii", volume, "LPS")
    assert tool("prepare_masks").main([str(tmp_path / "s"), "--output", str(tmp_path / "t")]) == 2
    assert "the scan has the axes RAS, its mask LPS" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["p_", "("])
def test_a_pattern_without_a_group_is_refused(tmp_path, capsys, pattern):
    with pytest.raises(SystemExit):
        tool("prepare_masks").main([str(tmp_path), "--output", "t", "--patient", pattern])
    assert f"'{pattern}': " in capsys.readouterr().err


@pytest.mark.parametrize("colours", [True, False])
def test_masks_of_pictures(tmp_path, colours):
    for folder in ("images", "masks"):
        (tmp_path / "s" / folder).mkdir(parents=True)
    Image.fromarray(np.full((32, 40), 99, np.uint8)).save(tmp_path / "s/images/p1_04.jpg")
    mask = np.zeros((32, 40, 3), np.uint8)
    mask[4:10, 4:10] = (255, 0, 0) if colours else 1
    mask[10:14, 10:14] = (255, 0, 0) if colours else 1  # touches at a corner: the same part
    mask[20:30, 20:30] = (0, 255, 0) if colours else 2
    mask[2:6, 30:38] = (0, 0, 255) if colours else 3  # of no class
    Image.fromarray(mask if colours else mask[..., 0]).save(tmp_path / "s/masks/p1_04.png")
    classes = ["ff0000=SDH", "00ff00=IPH"] if colours else ["1=SDH", "2=IPH"]
    args = [str(tmp_path / "s"), "--output", str(tmp_path / "t"), "--classes", *classes]
    assert tool("prepare_masks").main(args) == 0
    found = sorted(boxes(tmp_path / "t")["p1_04"])
    assert found == [("IPH", (20, 20, 30, 30)), ("SDH", (4, 4, 14, 14))]
    assert sorted(m.sum() for m in VocTree(tmp_path / "t").masks("p1_04")) == [6 * 6 + 4 * 4, 100]
    assert VocTree(tmp_path / "t").patients == {"p1_04": ("p1", "p1")}


def test_an_image_without_mask_is_named(tmp_path, capsys):
    for folder in ("images", "masks"):
        (tmp_path / "s" / folder).mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "s/images/a.png")
    assert tool("prepare_masks").main([str(tmp_path / "s"), "--output", str(tmp_path / "t")]) == 2
    assert "'a' and 0 more have an image or a mask alone" in capsys.readouterr().err


# ---- RSNA ----------------------------------------------------------------------------------------


def test_rsna(tmp_path, write_ct, capsys):
    (tmp_path / "s").mkdir()
    for name in ("ID_a", "ID_b"):
        write_ct(tmp_path / f"s/{name}.dcm", np.zeros((16, 16)), PatientID="ID_person")
    (tmp_path / "s/ID_c.dcm").write_bytes(b"damaged")
    (tmp_path / "s/ID_d.dcm").write_bytes(b"without a label")
    lines = ["ID,Label"]
    for name, label in (("ID_a", 1), ("ID_b", 0), ("ID_c", 0)):
        lines += [f"{name}_epidural,{label}", f"{name}_any,{label}"]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    args = [str(tmp_path / "s"), "--output", str(tmp_path / "t")]
    assert tool("prepare_rsna").main([*args, "--labels", str(tmp_path / "labels.csv")]) == 0
    told = capsys.readouterr().err
    assert "1 of 4 DICOM files have no label" in told and "1 of 3 images cannot be read" in told
    assert VocTree(tmp_path / "t").labels == {"ID_a": 1, "ID_b": 0}
    dicts = loads(tmp_path / "t")
    assert {i: (d["image_label"], d["annotations"]) for i, d in dicts.items()} == {
        "ID_a": (1, []),
        "ID_b": (0, []),
    }


# ---- LabelImg ------------------------------------------------------------------------------------


def test_from_dicom_to_png_to_labelimg_and_back(tmp_path, write_ct):
    exams = tmp_path / "exams"
    exams.mkdir()
    for i in range(3):
        write_ct(
            exams / f"{i}.dcm", np.full((40, 48), 10.0 * i), PatientID="secret",
            StudyInstanceUID="1.2", SeriesInstanceUID="1.2.3", ImagePositionPatient=[0, 0, -5 * i],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        )  # fmt: skip
    pictures = tmp_path / "pictures"
    assert tool("export_png").main([str(exams), "--output", str(pictures)]) == 0
    names = sorted(p.stem for p in pictures.glob("*.png"))
    # From the feet up: the last file first. Window 50/100: 20 HU is 51.
    assert [np.asarray(Image.open(pictures / f"{n}.png"))[0, 0] for n in names] == [51, 26, 0]
    assert "secret" not in (pictures / "export.json").read_text() + "".join(names)
    objects = [("SDH", (3, 4, 20, 30))]
    xml = pictures / f"{names[1]}.xml"
    write_voc(xml, filename=f"{names[1]}.png", width=48, height=40, objects=objects)

    args = [str(pictures), "--healthy", "--output"]
    assert tool("prepare_labelimg").main([*args, str(tmp_path / "t"), "--dicom", str(exams)]) == 0
    assert boxes(tmp_path / "t") == {names[0]: [], names[1]: objects, names[2]: []}
    hu = [read_hu(tmp_path / f"t/DICOM/{n}.dcm")[0, 0] for n in names]
    assert hu == [20, 10, 0]
    assert len({d["patient_id"] for d in loads(tmp_path / "t").values()}) == 1
    # Without --dicom the pictures themselves; without --healthy those with an XML alone.
    assert tool("prepare_labelimg").main([str(pictures), "--output", str(tmp_path / "u")]) == 0
    assert [p.name for p in (tmp_path / "u/JPEGImages").iterdir()] == [f"{names[1]}.png"]


def test_images_of_one_name_are_not_taken_for_one(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / "s" / folder).mkdir(parents=True)
        Image.new("L", (16, 16)).save(tmp_path / f"s/{folder}/1.png")
    args = [str(tmp_path / "s"), "--output", str(tmp_path / "t"), "--healthy"]
    assert tool("prepare_labelimg").main(args) == 2
    assert "b/1.png: has the name of" in capsys.readouterr().err
    images = [
        {"id": i, "file_name": f"{folder}/1.png", "height": 16, "width": 16}
        for i, folder in enumerate("ab")
    ]
    (tmp_path / "c.json").write_text(
        json.dumps({"images": images, "annotations": [], "categories": []})
    )
    args = [str(tmp_path / "c.json"), str(tmp_path / "s"), "--output", str(tmp_path / "u")]
    assert tool("coco").main(["import", *args]) == 2
    assert "two images of the source have the id '1'" in capsys.readouterr().err


def test_labelimg_drawn_on_another_size(tmp_path, capsys):
    Image.new("L", (48, 40)).save(tmp_path / "a.png")
    write_voc(tmp_path / "a.xml", filename="a.png", width=40, height=40, objects=[])
    args = [str(tmp_path), "--output", str(tmp_path / "t")]
    assert tool("prepare_labelimg").main(args) == 2
    assert "was drawn on 40 x 40 pixels, the image has 48 x 40" in capsys.readouterr().err


# ---- COCO ----------------------------------------------------------------------------------------


def test_coco_there_and_back(tmp_path, full_tree):
    root = full_tree("png")
    coco = tool("coco")
    assert coco.main(["export", str(root), "train", "--output", str(tmp_path / "c.json")]) == 0
    content = json.loads((tmp_path / "c.json").read_text())
    assert [a["bbox"] for a in content["annotations"]] == [[10, 12, 20, 16]] * 2
    args = ["import", str(tmp_path / "c.json"), str(root), "--output", str(tmp_path / "t")]
    assert coco.main(args) == 0
    expected = boxes(root)
    assert boxes(tmp_path / "t") == {i: expected[i] for i in "abcd"}
    assert VocTree(tmp_path / "t").patients["a"][0] == "p-a"


def test_coco_that_leads_out_of_the_folder(tmp_path, full_tree, capsys):
    root = full_tree("png")
    shutil.copy(root / "JPEGImages/a.png", tmp_path / "a.png")
    image = {"id": 1, "file_name": "../a.png", "height": 48, "width": 64}
    content = {"images": [image], "annotations": [], "categories": []}
    (tmp_path / "c.json").write_text(json.dumps(content))
    args = ["import", str(tmp_path / "c.json"), str(root), "--output", str(tmp_path / "t")]
    assert tool("coco").main(args) == 2
    assert "is not in" in capsys.readouterr().err


def test_no_such_source(tmp_path, capsys):
    args = [str(tmp_path / "none"), "--output", str(tmp_path / "t")]
    assert tool("prepare_ct_ich").main(args) == 2
    assert "no such folder" in capsys.readouterr().err and not (tmp_path / "t").exists()


# ---- situations that other people reported -------------------------------------------------------


def masks_of(tmp_path, mask, *, image=None, suffix=".png"):
    """SOURCE with one picture and its mask."""
    for folder in ("images", "masks"):
        (tmp_path / "s" / folder).mkdir(parents=True, exist_ok=True)
    grey = np.full(np.shape(mask)[:2], 99, np.uint8) if image is None else image
    Image.fromarray(grey).save(tmp_path / "s/images/p1_04.png")
    Image.fromarray(np.asarray(mask)).save(tmp_path / f"s/masks/p1_04{suffix}")
    return [str(tmp_path / "s"), "--output", str(tmp_path / "t")]


def soft_disc():
    y, x = np.mgrid[:64, :64]
    return np.clip(255 * (14 - np.hypot(x - 30, y - 30)) / 4, 0, 255).astype(np.uint8)


def test_soft_edges_of_a_mask_are_one_bleed(tmp_path):
    assert tool("prepare_masks").main(masks_of(tmp_path, soft_disc())) == 0
    assert len(boxes(tmp_path / "t")["p1_04"]) == 1


def test_two_values_of_one_class_that_touch_are_one_bleed(tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[4:10, 4:10], mask[4:10, 10:16] = 1, 2
    args = masks_of(tmp_path, mask)
    assert tool("prepare_masks").main([*args, "--classes", "1=IPH", "2=IPH"]) == 0
    assert boxes(tmp_path / "t")["p1_04"] == [("IPH", (4, 4, 16, 10))]


@pytest.mark.parametrize(
    "classes, message",
    [
        (["1=SDH"], "of the values 255 none is among --classes, 1"),
        (["ff0000=SDH"], "of the colours ffffff none is among --classes, ff0000"),
    ],
)
def test_values_of_no_class_are_an_error_that_names_them(tmp_path, capsys, classes, message):
    mask = np.zeros((32, 32), np.uint8)
    mask[4:10, 4:10] = 255
    args = masks_of(tmp_path, mask)
    assert tool("prepare_masks").main([*args, "--classes", *classes]) == 2
    assert message in capsys.readouterr().err
    assert tool("prepare_masks").main([*args, "--classes", "1=SDH", "255=-"]) == 0
    assert boxes(tmp_path / "t") == {"p1_04": []}


def test_values_of_no_class_beside_others_are_counted(tmp_path, capsys):
    mask = np.zeros((32, 32), np.uint8)
    mask[4:10, 4:10], mask[20:24, 20:24] = 1, 9
    assert tool("prepare_masks").main([*masks_of(tmp_path, mask), "--classes", "1=SDH"]) == 0
    told = capsys.readouterr()
    assert "1 images or volumes with the mask value 9 of no class" in told.out
    assert "warning: 1 times a mask has a value of no class" in told.err


def test_no_box_at_all_is_a_warning(tmp_path, capsys):
    assert tool("prepare_masks").main(masks_of(tmp_path, np.zeros((32, 32), np.uint8))) == 0
    told = capsys.readouterr()
    assert "1 images, 0 images with boxes, 0 boxes; boxes dropped: none" in told.out
    assert "no image has a box" in told.err


def test_a_lossy_mask_is_refused(tmp_path, capsys):
    assert tool("prepare_masks").main(masks_of(tmp_path, soft_disc(), suffix=".jpg")) == 2
    assert "JPEG, whose values are blurred" in capsys.readouterr().err


def test_a_picture_of_16_bit_is_refused(tmp_path, capsys):
    deep = np.full((32, 32), 3000, np.uint16)
    args = masks_of(tmp_path, np.zeros((32, 32), np.uint8), image=deep)
    assert tool("prepare_masks").main(args) == 2
    assert "more than 8 bit" in capsys.readouterr().err


def volume_of(tmp_path, hu=None, mask=None, affine=None, mask_affine=None):
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 90, (16, 16, 3)).astype(np.int16) if hu is None else hu
    mask = np.ones(hu.shape[:3], np.uint8) if mask is None else mask
    affine = np.diag([-0.5, -0.5, 5, 1.0]) if affine is None else affine
    for folder, data, own in (
        ("images", hu, affine),
        ("masks", mask, affine if mask_affine is None else mask_affine),
    ):
        (tmp_path / "s" / folder).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data, own), tmp_path / f"s/{folder}/case.nii.gz")
    return [str(tmp_path / "s"), "--output", str(tmp_path / "t")]


def rgb():
    return np.zeros((16, 16, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(
    "changes, message",
    [
        (lambda: {"hu": rgb()}, "case.nii.gz: is not a NIfTI volume of a head (holds"),
        (lambda: {"mask": rgb()}, "case.nii.gz: is not a NIfTI volume of a head (holds"),
        (lambda: {"mask": np.full((16, 16, 3), 0.4)}, "holds fractions or NaN, expected a mask"),
        (lambda: {"mask": np.full((16, 16, 3), np.nan)}, "holds fractions or NaN"),
        (
            lambda: {"hu": np.arange(768).reshape(16, 16, 3) % 256 / 255},
            "holds values from 0 to 1, expected Hounsfield units",
        ),
        (
            lambda: {"hu": (np.arange(768).reshape(16, 16, 3) * 5).astype(np.int16)},
            "expected Hounsfield units",
        ),
        (
            lambda: {"mask_affine": np.array(
                [[-0.5, 0, 0, 40], [0, -0.5, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1.0]]
            )},
            "its mask lies 40.0 mm beside the scan",
        ),
    ],
)  # fmt: skip
def test_a_volume_that_is_no_scan_or_mask_of_it_is_one_sentence(tmp_path, capsys, changes, message):
    assert tool("prepare_masks").main(volume_of(tmp_path, **changes())) == 2
    assert message in capsys.readouterr().err


def test_an_affine_that_says_nothing_is_a_warning(tmp_path, capsys):
    assert tool("prepare_masks").main(volume_of(tmp_path, affine=np.eye(4))) == 0
    assert "the orientation of 1 volumes is a guess (case.nii.gz:" in capsys.readouterr().err


def coco_of(tmp_path, **changes):
    """COCO JSON of a bleeding and a healthy picture."""
    (tmp_path / "pictures/p1").mkdir(parents=True, exist_ok=True)
    for name in "ab":
        Image.new("L", (64, 48), 99).save(tmp_path / f"pictures/p1/{name}.png")
    size = {"height": 48, "width": 64}
    content = {
        "images": [{"id": 1, "file_name": "p1/a.png", **size},
                   {"id": 2, "file_name": "p1/b.png", **size}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [4, 5, 10, 12]}],
        "categories": [{"id": 3, "name": "IPH"}, {"id": 4, "name": "SDH"}],
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(content | changes))
    return ["import", str(tmp_path / "c.json"), str(tmp_path / "pictures"),
            "--output", str(tmp_path / "t")]  # fmt: skip


def test_coco_masks_there_and_back(tmp_path):
    """A polygon, run lengths of both kinds, and a box without a mask."""
    square = [[4, 5, 14, 5, 14, 17, 4, 17]]  # 10 x 12 pixels
    runs = np.zeros((48, 64), bool)
    runs[10:20, 30:40] = True
    # By columns: 30 of 48 are empty and 10 above; ten of 10 with 38 between; the rest.
    counts = [30 * 48 + 10, *[10, 38] * 9, 10, 48 * 64 - 40 * 48 + 28]
    segmentations = [square, {"size": [48, 64], "counts": counts}, encode_mask(runs), []]
    annotations = [
        {"id": i, "image_id": 1, "category_id": 3, "bbox": [4 + 10 * i, 5, 10, 12],
         "segmentation": segmentation} for i, segmentation in enumerate(segmentations)
    ]  # fmt: skip
    coco = tool("coco")
    for some in (annotations[:2] + annotations[3:], annotations[2:]):
        assert coco.main(coco_of(tmp_path, annotations=some)) == 0
        *found, last = VocTree(tmp_path / "t").masks("a")
        assert last is None and np.array_equal(found[-1], runs)
        if len(found) == 2:
            polygon = found[0]
            assert polygon.sum() == 120 and polygon[5:17, 4:14].all()
    VocTree(tmp_path / "t").write_lists({"all": ["a", "b"]})
    export = ["export", str(tmp_path / "t"), "all", "--output", str(tmp_path / "back.json")]
    assert coco.main(export) == 0
    first, second = json.loads((tmp_path / "back.json").read_text())["annotations"]
    assert first["segmentation"] == encode_mask(runs) and first["area"] == 100
    assert "segmentation" not in second and second["area"] == 120


def annotated(box, **values):
    return [{"id": 1, "image_id": 1, "category_id": 3, "bbox": box, **values}]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": [{"id": 1, "file_name": f"p1/{n}.png", "height": 48, "width": 64}
                     for n in "ab"]}, "two entries have the image id 1"),
        ({"annotations": annotated([4, 5, 9, 9]) * 2}, "two entries have the annotation id 1"),
        ({"categories": [{"id": 3, "name": n} for n in ("IPH", "SDH")]}, "the category id 3"),
        ({"annotations": annotated([0.1, 0.2, 0.3, 0.2])}, "fractions of the image"),
        ({"annotations": annotated([4, 5, 9, 9], category_id=9)}, "category 9"),
        ({"annotations": annotated([4, 5, 9, 9], image_id=7)}, "image 7"),
        ({"annotations": annotated([4, 5, 9, 9], bbox_mode=4)}, "bbox_mode is 4"),
        ({"annotations": annotated([4, 5, 9])}, "is not COCO JSON"),
        ({"annotations": annotated([4, 5, 9, 9], segmentation=[[1, 2, 3, 4]])},
         "a segmentation of the image 1 is neither polygons nor run lengths of 64 x 48 pixels"),
        ({"annotations": annotated([4, 5, 9, 9], segmentation={"size": [9, 9], "counts": [81]})},
         "(its size is [9, 9])"),
        ({"annotations": annotated([4, 5, 9, 9], segmentation={"size": [48, 64], "counts": [81]})},
         "(its counts are of 81 pixels)"),
        ({"annotations": annotated([4, 5, 9, 9], segmentation="polygon")}, "neither polygons nor"),
        ({"images": [{"id": 1, "file_name": "p1\\c.png", "height": 48, "width": 64}]},
         "the image 'p1/c.png' is not in"),
        ({"images": [{"id": 1, "file_name": "../c.json", "height": 48, "width": 64}]}, "is not in"),
        ({"images": [{"id": 1, "file_name": "p1/a.png", "height": 64, "width": 48}]},
         "is 64 x 48 pixels, c.json says 48 x 64"),
        ({"images": [{"id": 1, "height": 64, "width": 48}]}, "lacks 'file_name'"),
    ],
)  # fmt: skip
def test_wrong_coco_is_one_sentence(tmp_path, capsys, changes, message):
    assert tool("coco").main(coco_of(tmp_path, **changes)) == 2
    told = capsys.readouterr().err
    assert message in told and "c.json" in told and "Error(" not in told


def test_coco_of_other_systems_and_modes(tmp_path):
    images = [{"id": i, "file_name": f"p1\\{n}.png", "height": 48, "width": 64}
              for i, n in enumerate("ab", start=1)]  # fmt: skip
    changes = {"images": images, "annotations": annotated([4, 5, 14, 17], bbox_mode=0)}
    assert tool("coco").main(coco_of(tmp_path, **changes)) == 0
    assert boxes(tmp_path / "t") == {"a": [("IPH", (4, 5, 14, 17))], "b": []}


@pytest.mark.parametrize("box", [[40, 30, -9, 9], [4, 5, 0, 9], [70, 5, 9, 9], [4, 5, 0.4, 0.3]])
def test_an_image_that_loses_its_boxes_bleeds_still(tmp_path, capsys, box):
    assert tool("coco").main(coco_of(tmp_path, annotations=annotated(box))) == 0
    told = capsys.readouterr()
    assert "1 boxes were dropped" in told.err and "boxes dropped: 1 " in told.out
    assert VocTree(tmp_path / "t").labels == {"a": 1}


def test_ids_of_categories_are_the_same_in_all_exported_lists(tmp_path):
    two = annotated([4, 5, 10, 12], category_id=4)
    assert tool("coco").main(coco_of(tmp_path, annotations=two)) == 0
    root = tmp_path / "t"
    VocTree(root).write_lists({"train": ["b"], "val": ["a"]})
    for name in ("train", "val"):
        assert tool("coco").main(["export", str(root), name, "--output", str(root / name)]) == 0
    train, val = (json.loads((root / name).read_text()) for name in ("train", "val"))
    assert train["categories"] == val["categories"] == [{"id": 1, "name": "SDH"}]
    assert val["annotations"][0]["category_id"] == 1


def test_dicom_is_found_by_its_content(tmp_path, write_ct, capsys):
    (tmp_path / "s/deep").mkdir(parents=True)
    for name in ("ID_a.DCM", "deep/ID_b", "ID_c.dcm"):
        write_ct(tmp_path / "s" / name, np.zeros((16, 16)), StudyInstanceUID="1.2")
    (tmp_path / "s/._ID_a.DCM").write_bytes(b"\0\5\26\7" * 99)
    lines = [f"ID_{n}_any,{label}" for n, label in (("a", 1), ("b", 0), ("c", 0), ("z", 1))]
    (tmp_path / "labels.csv").write_text("\n".join(["ID,Label", *lines]))
    args = [str(tmp_path / "s"), "--output", str(tmp_path / "t")]
    assert tool("prepare_rsna").main([*args, "--labels", str(tmp_path / "labels.csv")]) == 0
    assert VocTree(tmp_path / "t").labels == {"ID_a": 1, "ID_b": 0, "ID_c": 0}
    assert "1 of 4 labelled images are not in" in capsys.readouterr().err


def test_labelimg_takes_dicom_without_suffix(tmp_path, write_ct):
    (tmp_path / "s").mkdir()
    for name in ("IM1", "1.2.3.4", "IM2.DCM"):
        write_ct(tmp_path / "s" / name, np.zeros((40, 48)), StudyInstanceUID="1.2")
        write_voc(
            tmp_path / f"s/{name.removesuffix('.DCM')}.xml",
            filename=name, width=48, height=40, objects=[("SDH", (3, 4, 20, 30))],
        )  # fmt: skip
    args = [str(tmp_path / "s"), "--output", str(tmp_path / "t")]
    assert tool("prepare_labelimg").main(args) == 0
    assert set(boxes(tmp_path / "t")) == {"IM1", "1.2.3.4", "IM2"}
