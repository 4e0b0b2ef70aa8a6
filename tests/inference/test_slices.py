"""Slices of series and of multi-frame files on their way into a model, with their neighbours."""

import threading

import numpy as np
import pydicom
import pytest
import torch
from detectron2.structures import Boxes, Instances
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from PIL import Image
from pydicom.uid import generate_uid

from ich_det2.data import IchDatasetMapper
from ich_det2.inference.diagnoser import Diagnoser
from ich_det2.inference.slices import find_slices

HEIGHTS = {"one": 10, "two": 0, "three": 5, "four": 30}
"""Sorted: two, three, one, and beyond a gap four."""


@pytest.fixture
def exam(tmp_path, write_ct):
    """A folder with a series whose grey values are 100, 110, 120, 130 from the feet up."""
    folder = tmp_path / "exam"
    folder.mkdir()
    order = sorted(HEIGHTS, key=HEIGHTS.get)
    for name, height in HEIGHTS.items():
        hu = np.full((32, 32), (100 + 10 * order.index(name)) / 255 * 200)
        write_ct(
            folder / f"{name}.dcm", hu, PatientID="secret", StudyInstanceUID="1.2",
            SeriesInstanceUID="1.2.3", ImagePositionPatient=[0, 0, height],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[0.5, 0.5],
            InstanceNumber=100 - height, SliceLocation=height, PatientName="A^B",
            PatientBirthDate="", PatientSex="O",
            StudyDate="20200101", StudyTime="000000", StudyID="1", SeriesNumber=1,
            AccessionNumber="", ReferringPhysicianName="", Manufacturer="x",
            FrameOfReferenceUID="1.2.9", PositionReferenceIndicator="", SliceThickness=5,
            ImageType=["ORIGINAL", "PRIMARY", "AXIAL"], KVP=120, AcquisitionNumber=1,
            BodyPartExamined="HEAD", Laterality=None, PatientPosition="HFS",
        )  # fmt: skip
    return folder


class Means(torch.nn.Module):
    """A detector whose one box says the mean of each channel: x0, y0, x1."""

    def forward(self, inputs):
        outputs = []
        for x in inputs:
            instances = Instances((x["height"], x["width"]))
            means = x["image"].mean((1, 2))
            instances.pred_boxes = Boxes(torch.cat([means, torch.zeros(1)])[None])
            instances.scores, instances.pred_classes = torch.ones(1), torch.zeros(1).long()
            outputs.append({"instances": instances})
        return outputs


def channel_means(slices, context):
    mapper = IchDatasetMapper(False, augmentations=[], windows=[[100, 200]], context_slices=context)
    found = Diagnoser(Means(), mapper, batch_size=2)(slices)
    return [np.rint(d.boxes[0, :3]).astype(int).tolist() for d in found]


def test_context_of_a_folder_and_of_single_files(exam):
    slices, skipped, _ = find_slices([exam])
    assert skipped == []
    assert [s.file for s in slices] == ["two.dcm", "three.dcm", "one.dcm", "four.dcm"]
    expected = [[100, 100, 110], [100, 110, 120], [110, 120, 120], [130, 130, 130]]
    assert np.abs(np.subtract(channel_means(slices, 1), expected)).max() <= 1
    given, *_ = find_slices([exam / f"{name}.dcm" for name in HEIGHTS])
    assert channel_means(given, 1) == channel_means(slices, 1)
    plain = [[100] * 3, [110] * 3, [120] * 3, [130] * 3]
    assert np.abs(np.subtract(channel_means(slices, 0), plain)).max() <= 1


@pytest.mark.parametrize("as_file", [True, False])
def test_frames_are_slices(exam, tmp_path, as_file):
    series, *_ = find_slices([exam])
    datasets = [pydicom.dcmread(exam / f"{name}.dcm") for name in HEIGHTS]
    image = LegacyConvertedEnhancedCTImage(datasets, generate_uid(), 1, generate_uid(), 1)
    (tmp_path / "enhanced").mkdir()
    path = tmp_path / "enhanced" / "all.dcm"
    image.save_as(path)
    slices, skipped, _ = find_slices([path if as_file else path.parent])
    assert skipped == []
    assert len({s.file for s in slices}) == 4 and all(s.file.startswith("all.dcm#") for s in slices)
    assert [s.index for s in slices] == [0, 1, 2, 3]
    assert channel_means(slices, 1) == channel_means(series, 1)


def test_a_broken_neighbour_is_named_without_its_folder(exam):
    slices, *_ = find_slices([exam])
    whole = (exam / "three.dcm").read_bytes()
    (exam / "three.dcm").write_bytes(whole[:-100])
    mapper = IchDatasetMapper(False, augmentations=[], windows=[[100, 200]], context_slices=1)
    results = list(Diagnoser(Means(), mapper, batch_size=2)(slices))
    errors = [str(r) for r in results if isinstance(r, ValueError)]
    assert len(errors) == 3  # itself, and the two that it is a neighbour of
    assert all("truncated" in e and str(exam) not in e for e in errors)


def test_what_is_no_head_is_skipped_and_not_lost(exam, write_ct):
    write_ct(exam / "chest.dcm", np.zeros((8, 8)), BodyPartExamined="CHEST", SeriesInstanceUID="1")
    slices, (skipped,), _ = find_slices([exam])
    assert len(slices) == 4
    assert skipped.file == "chest.dcm" and "is CHEST, expected a head" in skipped.reason
    assert not skipped.lost


class Meeting(Means):
    """A detector that answers when it is asked by two at a time."""

    def __init__(self):
        super().__init__()
        self.barrier, self.threads = threading.Barrier(2), []

    def forward(self, inputs):
        assert torch.is_inference_mode_enabled()
        self.threads.append(torch.get_num_threads())
        self.barrier.wait(timeout=60)
        return super().forward(inputs)


def test_slices_side_by_side_keep_their_order_and_the_threads(exam):
    slices, *_ = find_slices([exam])
    mapper = IchDatasetMapper(False, augmentations=[], windows=[[100, 200]])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        model = Meeting()
        found = list(Diagnoser(model, mapper, batch_size=1, workers=2)(slices))
        means = [round(float(d.boxes[0, 0])) for d in found]
        assert np.abs(np.subtract(means, [100, 110, 120, 130])).max() <= 1
        assert model.threads == [2] * 4 and torch.get_num_threads() == 4
        # One who takes no more leaves nothing behind.
        rest = Diagnoser(Means(), mapper, batch_size=1, workers=2)(slices)
        next(rest)
        rest.close()
        assert torch.get_num_threads() == 4
        assert not [t for t in threading.enumerate() if t.name.startswith(("detect", "read"))]
    finally:
        torch.set_num_threads(before)


def test_diagnoses_that_overlap_give_the_threads_back(exam):
    slices, *_ = find_slices([exam])
    mapper = IchDatasetMapper(False, augmentations=[], windows=[[100, 200]])
    before, seen = torch.get_num_threads(), []

    def begin():
        found = Diagnoser(Means(), mapper, batch_size=1, workers=2)(slices)
        next(found)
        return found

    def in_a_thread_of_its_own():
        second = begin()
        first.close()
        list(second)
        seen.append(torch.get_num_threads())

    try:
        torch.set_num_threads(4)
        first = begin()
        for target in (in_a_thread_of_its_own, lambda: seen.append(torch.get_num_threads())):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        assert seen == [4, 4] and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_a_slice_that_cannot_be_read_keeps_its_place_beside_others(exam):
    slices, *_ = find_slices([exam])
    (exam / "three.dcm").write_bytes((exam / "three.dcm").read_bytes()[:-100])
    mapper = IchDatasetMapper(False, augmentations=[], windows=[[100, 200]])
    results = list(Diagnoser(Means(), mapper, batch_size=1, workers=3)(slices))
    assert [isinstance(r, ValueError) for r in results] == [False, True, False, False]
    broken = Diagnoser(torch.nn.Linear(1, 1), mapper, batch_size=1, workers=3)(slices)
    with pytest.raises(TypeError):
        list(broken)


def test_gaps_between_pictures_of_known_places_are_noticed(tmp_path):
    (tmp_path / "JPEGImages").mkdir()
    rows = ["image,patient,position_mm"]
    for name, position in zip("edcba", (0, 5, 10, 30, 35)):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"JPEGImages/{name}.png")
        rows.append(f"{name},p,{position}")
    (tmp_path / "patients.csv").write_text("\n".join([*rows, ""]))
    found = find_slices([tmp_path / "JPEGImages"])
    assert [s.path.stem for s in found.slices] == list("edcba")
    (noticed,) = found.noticed.values()
    assert noticed.n_missing == 3
    assert "3 slice(s) seem to be missing between c.png and b.png: 20.0 mm" in noticed.notes[0]
