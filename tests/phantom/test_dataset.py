"""A data set of synthetic patients: complete, divided by patient, and DICOM that reads back."""

import csv
import itertools
import json
import os
import xml.etree.ElementTree as ET

import numpy as np
import pydicom
import pytest

from ich_det2.data.tree import VocTree
from ich_det2.phantom import dataset
from ich_det2.phantom.bleeds import TYPES
from ich_det2.phantom.dataset import SPLITS, plan_patients, split_patients, write_dataset
from ich_det2.phantom.patient import NUM_SLICES, SLICE_SPACING_MM

SIZE = 64


def read_boxes(xml):
    """Names and boxes of an annotation file, 0-based and half-open."""
    root = ET.parse(xml).getroot()
    size = [int(root.findtext(f"size/{key}")) for key in ("width", "height")]
    boxes = []
    for item in root.iter("object"):
        box = [float(item.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")]
        boxes.append((item.findtext("name"), (box[0] - 1, box[1] - 1, box[2], box[3])))
    return size, boxes


def test_tree_is_complete(phantom_tree):
    with open(phantom_tree / "patients.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "patient", "study"]
    stems = [row["image"] for row in rows]
    assert len(stems) == len(set(stems)) == 6 * NUM_SLICES
    assert stems[0] == "P0001_001"
    assert sorted(p.stem for p in (phantom_tree / "DICOM").iterdir()) == stems
    assert sorted(p.stem for p in (phantom_tree / "Annotations").iterdir()) == stems
    assert sorted(p.name for p in phantom_tree.iterdir()) == [
        "Annotations",
        "DICOM",
        "ImageSets",
        "SegmentationObject",
        "patients.csv",
        "phantom.json",
    ]
    counts = json.loads((phantom_tree / "phantom.json").read_text())["counts"]
    boxes = [read_boxes(p)[1] for p in (phantom_tree / "Annotations").iterdir()]
    assert counts["slices"] == len(boxes)
    assert counts["bleeding_slices"] == sum(bool(b) for b in boxes)
    assert sum(counts["boxes"].values()) == sum(map(len, boxes))


def test_masks_are_tight_in_their_boxes(phantom_tree):
    tree, masks = VocTree(phantom_tree), 0
    for image in tree.images:
        _, boxes = read_boxes(phantom_tree / "Annotations" / f"{image}.xml")
        assert (phantom_tree / "SegmentationObject" / f"{image}.png").is_file() == bool(boxes)
        for (_, box), mask in zip(boxes, tree.masks(image), strict=True):
            ys, xs = np.nonzero(mask)
            assert box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            masks += 1
    assert masks > 6


def test_patients_do_not_cross_splits(phantom_tree):
    seen = {}
    for split in ("train", "val", "test"):
        stems = (phantom_tree / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
        bleeding = {}
        for stem in stems:
            patient = stem.split("_")[0]
            assert seen.setdefault(patient, split) == split
            _, boxes = read_boxes(phantom_tree / "Annotations" / f"{stem}.xml")
            bleeding.setdefault(patient, []).append(bool(boxes))
        # a bleeding patient has slices of both kinds, and each split has both kinds of patients
        assert {any(slices) for slices in bleeding.values()} == {True, False}
        assert not any(all(slices) for slices in bleeding.values())
    assert len(seen) == 6


@pytest.mark.parametrize(("patients", "seed"), [(6, 0), (7, 3), (60, 0), (60, 1), (101, 2)])
def test_split_shares(patients, seed):
    plan = plan_patients(patients, seed)
    splits = split_patients(plan)
    assert sorted(itertools.chain(*splits.values())) == list(range(1, patients + 1))
    assert sum(map(bool, plan)) == (patients + 1) // 2
    for name, share in SPLITS.items():
        assert abs(len(splits[name]) - share * patients) < 2
        kinds = {bool(plan[number - 1]) for number in splits[name]}
        assert kinds == {True, False}
        if patients >= 60:
            types = {t for number in splits[name] for t in plan[number - 1]}
            assert types == set(TYPES)


def test_dicom_reads_back(phantom_tree):
    uids = set()
    for number in range(1, 7):
        files = sorted((phantom_tree / "DICOM").glob(f"P{number:04d}_*.dcm"))
        slices = [pydicom.dcmread(file) for file in files]
        first = slices[0]
        row, column = np.reshape(np.array(first.ImageOrientationPatient, float), (2, 3))
        along = [float(np.cross(row, column) @ np.array(ds.ImagePositionPatient)) for ds in slices]
        steps = np.diff(along)
        assert np.allclose(steps, SLICE_SPACING_MM) and (steps > 0).all()
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
            size, boxes = read_boxes(phantom_tree / "Annotations" / f"{files[index].stem}.xml")
            assert size == [SIZE, SIZE]
            for _, (x0, y0, x1, y1) in boxes:
                assert 0 <= x0 < x1 <= SIZE and 0 <= y0 < y1 <= SIZE
                inside = hu[int(y0) : int(y1), int(x0) : int(x1)]
                assert ((inside > 45) & (inside < 95)).any()


@pytest.mark.parametrize("content", [None, "{}", "[1]", "not json", '{"parameters": {}}'])
def test_only_a_marker_of_the_phantom_has_parameters(tmp_path, phantom_tree, content):
    if content is not None:
        (tmp_path / dataset.MARKER).write_text(content)
    assert dataset.read_parameters(tmp_path) is None
    assert dataset.read_parameters(phantom_tree) == dataset.parameters(6, 0, SIZE)


def end_this_process(*args):
    os._exit(9)


def test_a_worker_that_the_system_ends_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "_write_patient", end_this_process)
    with pytest.raises(ValueError, match="fewer --workers"):
        write_dataset(tmp_path, patients=6, size=SIZE, workers=2)
