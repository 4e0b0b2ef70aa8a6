"""Tests of ``datasets/prepare_phantom.py``, on small slices to stay quick."""

import csv
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pydicom
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "datasets" / "prepare_phantom.py"
SIZE = 64


def load_script():
    spec = importlib.util.spec_from_file_location("prepare_phantom", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


phantom = load_script()


def run(output, *extra):
    return phantom.main(
        ["--output", str(output), "--patients", "6", "--size", str(SIZE), "--workers", "1", *extra]
    )


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "phantom"
    assert run(output) == 0
    return output


@pytest.fixture(scope="module")
def patients():
    """One patient of each type, and a healthy one under None."""
    made = {
        name: phantom.make_patient(np.random.default_rng(11), types=[name], size=128)
        for name in phantom.TYPES
    }
    made[None] = phantom.make_patient(np.random.default_rng(11), size=128)
    return made


def read_boxes(xml):
    """Names and boxes of an annotation file, 0-based and half-open."""
    root = ET.parse(xml).getroot()
    size = [int(root.findtext(f"size/{key}")) for key in ("width", "height")]
    boxes = []
    for item in root.iter("object"):
        box = [float(item.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")]
        boxes.append((item.findtext("name"), (box[0] - 1, box[1] - 1, box[2], box[3])))
    return size, boxes


def test_tree_is_complete(dataset):
    with open(dataset / "patients.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "patient", "study"]
    stems = [row["image"] for row in rows]
    assert len(stems) == len(set(stems)) == 6 * phantom.NUM_SLICES
    assert stems[0] == "P0001_001"
    assert sorted(p.stem for p in (dataset / "DICOM").iterdir()) == stems
    assert sorted(p.stem for p in (dataset / "Annotations").iterdir()) == stems
    assert sorted(p.name for p in dataset.iterdir()) == [
        "Annotations",
        "DICOM",
        "ImageSets",
        "patients.csv",
        "phantom.json",
    ]
    counts = json.loads((dataset / "phantom.json").read_text())["counts"]
    boxes = [read_boxes(p)[1] for p in (dataset / "Annotations").iterdir()]
    assert counts["slices"] == len(boxes)
    assert counts["bleeding_slices"] == sum(bool(b) for b in boxes)
    assert sum(counts["boxes"].values()) == sum(map(len, boxes))


def test_patients_do_not_cross_splits(dataset):
    seen = {}
    for split in ("train", "val", "test"):
        stems = (dataset / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
        bleeding = {}
        for stem in stems:
            patient = stem.split("_")[0]
            assert seen.setdefault(patient, split) == split
            _, boxes = read_boxes(dataset / "Annotations" / f"{stem}.xml")
            bleeding.setdefault(patient, []).append(bool(boxes))
        # a bleeding patient has slices of both kinds, and each split has both kinds of patients
        assert {any(slices) for slices in bleeding.values()} == {True, False}
        assert not any(all(slices) for slices in bleeding.values())
    assert len(seen) == 6


@pytest.mark.parametrize(("patients", "seed"), [(6, 0), (7, 3), (60, 0), (60, 1), (101, 2)])
def test_split_shares(patients, seed):
    plan = phantom.plan_patients(patients, seed)
    splits = phantom.split_patients(plan)
    assert sorted(itertools.chain(*splits.values())) == list(range(1, patients + 1))
    assert sum(map(bool, plan)) == (patients + 1) // 2
    for name, share in phantom.SPLITS.items():
        assert abs(len(splits[name]) - share * patients) < 2
        kinds = {bool(plan[number - 1]) for number in splits[name]}
        assert kinds == {True, False}
        if patients >= 60:
            types = {t for number in splits[name] for t in plan[number - 1]}
            assert types == set(phantom.TYPES)


def test_dicom_reads_back(dataset):
    uids = set()
    for number in range(1, 7):
        files = sorted((dataset / "DICOM").glob(f"P{number:04d}_*.dcm"))
        slices = [pydicom.dcmread(file) for file in files]
        first = slices[0]
        row, column = np.reshape(np.array(first.ImageOrientationPatient, float), (2, 3))
        along = [float(np.cross(row, column) @ np.array(ds.ImagePositionPatient)) for ds in slices]
        steps = np.diff(along)
        assert np.allclose(steps, phantom.SLICE_SPACING_MM) and (steps > 0).all()
        for index, ds in enumerate(slices):
            assert ds.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
            assert ds.SOPClassUID == ds.file_meta.MediaStorageSOPClassUID
            assert ds.SOPClassUID == pydicom.uid.CTImageStorage
            assert ds.SOPInstanceUID.is_valid and ds.SOPInstanceUID not in uids
            uids.add(ds.SOPInstanceUID)
            assert (ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID) == (
                first.StudyInstanceUID,
                first.SeriesInstanceUID,
                first.FrameOfReferenceUID,
            )
            assert ds.PatientID == f"P{number:04d}" and ds.InstanceNumber == index + 1
            assert (ds.BitsAllocated, ds.BitsStored, ds.HighBit) == (16, 12, 11)
            assert ds.PixelRepresentation == 0 and ds.pixel_array.shape == (SIZE, SIZE)
            assert ds.pixel_array.max() <= 4095
            hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
            assert abs(np.median(hu[:8]) + 1000) < 30  # air above the nose
            assert (hu > 600).sum() > 100  # skull
            size, boxes = read_boxes(dataset / "Annotations" / f"{files[index].stem}.xml")
            assert size == [SIZE, SIZE]
            for _, (x0, y0, x1, y1) in boxes:
                assert 0 <= x0 < x1 <= SIZE and 0 <= y0 < y1 <= SIZE
                inside = hu[int(y0) : int(y1), int(x0) : int(x1)]
                assert ((inside > 45) & (inside < 95)).any()


@pytest.mark.parametrize("name", phantom.TYPES)
def test_type_is_visible_and_boxes_are_tight(patients, name):
    patient = patients[name]
    assert {lesion.name for lesions in patient.lesions for lesion in lesions} == {name}
    assert any(not lesions for lesions in patient.lesions)
    for hu, labels, lesions in zip(patient.hu, patient.labels, patient.lesions):
        assert labels.max() == len(lesions)
        for index, lesion in enumerate(lesions):
            rows, columns = np.nonzero(labels == index + 1)
            assert lesion.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            area = rows.size * patient.pixel_mm**2
            assert lesion.area_mm2 == pytest.approx(area, rel=1e-4)
            assert area >= phantom.MIN_LESION_MM2
            # the mean of the noise over a few pixels stays below 4 HU
            assert 42 < np.mean(hu[labels == index + 1]) < 100


def test_types_have_their_own_shape(patients):
    def largest(name):
        patient = patients[name]
        return max(itertools.chain(*patient.lesions), key=lambda lesion: lesion.area_mm2)

    def fill(lesion, pixel_mm):
        x0, y0, x1, y1 = lesion.box
        return lesion.area_mm2 / ((x1 - x0) * (y1 - y0) * pixel_mm**2)

    shares = {n: fill(largest(n), patients[n].pixel_mm) for n in ("IPH", "SDH", "SAH")}
    assert shares["IPH"] > 0.5  # a filled blob
    assert shares["SDH"] < 0.4 and shares["SAH"] < 0.6  # a thin shell, a net of sulci


def test_plausible_hu(patients):
    patient = patients[None]
    middle = patient.hu[phantom.NUM_SLICES // 2]
    size = middle.shape[0]
    brain = middle[size // 2 - 30 : size // 2 + 30, size // 2 - 30 : size // 2 + 30]
    assert 20 < np.median(brain) < 42
    corner = middle[: size // 10, : size // 10]
    assert abs(np.median(corner) + 1000) < 15
    assert 900 < np.percentile(middle[middle > 300], 90) < 1600
    fat = (middle > -110) & (middle < -40)
    assert fat.sum() > 50
    assert 2 < corner.std() < 8


def test_healthy_patient_has_no_lesion_but_bright_distractors(patients):
    patient = patients[None]
    assert not any(patient.lesions) and not patient.labels.any()
    assert ((patient.hu > 55) & (patient.hu < 90)).mean() > 0.001


def test_neighbouring_slices_agree(patients):
    bone = patients[None].hu > 300
    head = bone[4:10]  # above the skull base
    overlap = (head[1:] & head[:-1]).sum((1, 2)) / head[1:].sum((1, 2))
    assert overlap.min() > 0.3


def test_unknown_type():
    with pytest.raises(ValueError, match=r"got \['ABC'\], expected"):
        phantom.make_patient(np.random.default_rng(0), types=["ABC"], size=64)


def test_same_files_for_any_number_of_workers(dataset, tmp_path):
    """A second run in a fresh interpreter with two workers, as a person would start it."""
    output = tmp_path / "out" / "again"
    # The real voc.py without the package around it: its import of torch in every worker takes
    # longer than the work.
    data = tmp_path / "shim" / "ich_det2" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").touch()
    (data / "__init__.py").write_text(f"__path__.append({str(ROOT / 'ich_det2' / 'data')!r})\n")
    environment = {**os.environ, "PYTHONPATH": str(data.parents[1])}
    command = [sys.executable, str(SCRIPT), "--output", str(output), "--patients", "6"]
    done = subprocess.run(
        [*command, "--size", str(SIZE), "--workers", "2"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "6 patients" in done.stdout
    assert tree(output) == tree(dataset)
    assert [p.name for p in output.parent.iterdir()] == ["again"]


def test_seed_and_patient_matter():
    def make(seed, patient):
        rng = np.random.default_rng(np.random.SeedSequence([seed, patient]))
        return phantom.make_patient(rng, size=64, num_slices=2).hu

    assert np.array_equal(make(0, 1), make(0, 1))
    assert not np.array_equal(make(0, 1), make(1, 1))
    assert not np.array_equal(make(0, 1), make(0, 2))


def test_complete_phantom_is_left_alone(dataset, capsys):
    before = (dataset / "phantom.json").stat().st_mtime_ns
    assert run(dataset) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (dataset / "phantom.json").stat().st_mtime_ns == before


def test_other_parameters_are_refused(dataset, capsys):
    before = tree(dataset)
    assert run(dataset, "--seed", "5") == 2
    message = capsys.readouterr().err
    assert "seed 0 (asked for 5)" in message and "--force" in message
    assert message.count("\n") == 1
    assert tree(dataset) == before


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("marker", [None, "{}", "[1]", "not json", '{"parameters": {}}'])
def test_foreign_folder_is_refused(tmp_path, capsys, force, marker):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    if marker is not None:
        (tmp_path / "mine" / "phantom.json").write_text(marker)
    before = tree(tmp_path)
    assert run(tmp_path / "mine", *force) == 2
    assert "is not a phantom" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_file_as_output_is_refused(tmp_path):
    (tmp_path / "file").write_text("text")
    assert run(tmp_path / "file", "--force") == 2
    assert (tmp_path / "file").read_text() == "text"


def test_file_as_parent_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    assert run(tmp_path / "file" / "phantom") == 2
    assert "give another --output" in capsys.readouterr().err


def test_small_bleed_leaves_image_and_annotation():
    """Two blots of one bleed, 20 HU above brain; the one of 3 x 3 mm must go entirely."""
    bleed = phantom._Bleed("IPH", 60.0, distance=lambda fields: None)
    added = np.zeros((1, 64, 64), np.float32)
    added[0, 10:20, 10:20] = 20
    added[0, 40:43, 40:43] = 20
    added[0, 43, 40:43] = 4  # its faint edge
    kept, lesions, labels = phantom._find_lesions(
        [bleed], np.full((64, 64), 35.0, np.float32), added, 1.0
    )
    assert [lesion.box for lesion in lesions] == [(10, 10, 20, 20)]
    assert lesions[0].area_mm2 == 100
    assert kept[0, 10:20, 10:20].min() == 20 and kept.sum() == 100 * 20
    assert labels.sum() == 100


def small_patient(rng, *, types=(), size=64):
    """A quick stand-in for ``make_patient``: noise, without any lesion."""
    return phantom.Phantom(
        hu=rng.normal(0, 5, (2, size, size)).astype(np.float32),
        labels=np.zeros((2, size, size), np.uint8),
        lesions=[[], []],
        position_mm=np.array([[0, 0, 0], [0, 0, 7.5]]),
        pixel_mm=0.5,
        kernel="H31s",
    )


def test_force_replaces_a_phantom_and_empty_folder_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(phantom, "make_patient", small_patient)
    output = tmp_path / "phantom"
    output.mkdir()
    assert run(output) == 0
    (output / "stale.txt").write_text("old")
    assert run(output, "--seed", "5", "--force") == 0
    assert not (output / "stale.txt").exists()
    assert json.loads((output / "phantom.json").read_text())["parameters"]["seed"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["phantom"]


def test_failure_leaves_no_trace(tmp_path, monkeypatch):
    calls = []

    def fail(rng, **options):
        calls.append(options)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return small_patient(rng, **options)

    monkeypatch.setattr(phantom, "make_patient", fail)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "phantom")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"), [("--patients", "5"), ("--size", "8"), ("--workers", "0"), ("--seed", "x")]
)
def test_bad_numbers(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "phantom", option, value)
    assert error.value.code == 2
    assert f"{option}: got '{value}', expected a whole number" in capsys.readouterr().err
