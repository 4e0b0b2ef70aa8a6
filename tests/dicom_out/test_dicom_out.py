"""DICOM objects of a diagnosis: valid, of the source's study, and saying what was found."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
import torch
from detectron2.structures import Boxes, Instances
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom.uid import generate_uid

from ich_det2.data import IchDatasetMapper
from ich_det2.data.masks import decode_mask
from ich_det2.dicom_out import ALL_KINDS, KINDS, build_objects, studies, write_dicom
from ich_det2.inference.api import diagnose
from ich_det2.inference.diagnoser import Diagnoser
from ich_det2.phantom import write_exam

REAL = Path(__file__).parents[3] / "shared/data/dicom"
VALIDATORS = [tool for tool in ("dciodvfy", "dcmpschk") if shutil.which(tool) is None]
needs_validators = pytest.mark.skipif(
    bool(VALIDATORS), reason=f"{', '.join(VALIDATORS)} not installed (Debian: dicom3tools, dcmtk)"
)
BOXES = [[10.3333, 20.77, 40.125, 55.9], [1.1, 2.2, 30.3, 40.4]]
ABSENT = ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyTime")


class Marked(torch.nn.Module):
    """Two boxes on every slice, of the scores that it is given by turns; masks, if asked for, fill
    the pixels whose middles are in the boxes."""

    def __init__(self, *scores, masks=False):
        super().__init__()
        self.scores, self.masks, self.seen = scores, masks, 0

    def forward(self, inputs):
        outputs = []
        for x in inputs:
            score = self.scores[self.seen % len(self.scores)]
            self.seen += 1
            found = Instances((x["height"], x["width"]))
            found.pred_boxes = Boxes(torch.tensor(BOXES))
            found.scores = torch.tensor([score, score / 2])
            found.pred_classes = torch.zeros(2).long()
            if self.masks:
                found.pred_masks = torch.zeros(2, x["height"], x["width"], dtype=torch.bool)
                found.pred_masks[0, 21:56, 10:40] = True
                found.pred_masks[1, 2:40, 1:30] = True
            outputs.append({"instances": found})
        return outputs


def look(paths, *scores, threshold=0.4, masks=False):
    mapper = IchDatasetMapper(False, augmentations=[], windows=[[40, 120]])
    facts = {"run": "marked", "weights": "model.pth", "sha256": "ab" * 32, "patient_rule": "any"}
    model = Marked(*scores, masks=masks)
    model = Diagnoser(model, mapper, batch_size=2, threshold=threshold, facts=facts)
    return diagnose(paths, model)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exam") / "exam"
    write_exam(folder, size=128)
    return folder


def enhanced(files, path):
    path.parent.mkdir(parents=True)
    image = LegacyConvertedEnhancedCTImage(
        [pydicom.dcmread(f) for f in files], generate_uid(), 1, generate_uid(), 1
    )
    image.save_as(path)
    return path.parent


@pytest.fixture
def source(request, phantom, tmp_path):
    """A folder of files, of the kind that the test names."""
    kind, folder = request.param, tmp_path / "source"
    if kind == "phantom":
        return phantom
    if kind == "enhanced":
        return enhanced(sorted(phantom.iterdir()), folder / "all.dcm")
    if kind == "bare":
        shutil.copytree(phantom, folder)
        for path in folder.iterdir():
            ds = pydicom.dcmread(path)
            for keyword in (*ABSENT, "ReferringPhysicianName", "StudyDate"):
                if keyword in ds:
                    del ds[keyword]
            ds.PatientIdentityRemoved, ds.DeidentificationMethod = "YES", ""
            ds.save_as(path)
        return folder
    if not REAL.is_dir():
        pytest.skip("no real data")
    if kind == "tilted":
        return REAL / "ge_tilted_series"
    folder.mkdir()
    shutil.copy(REAL / "cq500_693/693_J2KR.dcm", folder)
    return folder


SOURCES = ["phantom", "enhanced", "bare", "tilted", "j2k"]


def check(path):
    """What the validators complain of."""
    told = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
    errors = [x for x in (told.stdout + told.stderr).splitlines() if x.startswith("Error")]
    told = subprocess.run(["dcmpschk", str(path)], capture_output=True, text=True)
    if "gsps" in path.name and told.returncode:
        errors.append(told.stdout + told.stderr)
    return errors


@needs_validators
@pytest.mark.parametrize("source", SOURCES, indirect=True)
@pytest.mark.parametrize("verdict", ["present", "absent", "undetermined"])
def test_the_validators_find_no_error(source, verdict, tmp_path, request):
    # The CQ500 slice does not say where it lies.
    kinds = KINDS if "j2k" in request.node.callspec.id else ALL_KINDS
    diagnosis = look([source], *((0.9, 0.1) if verdict == "present" else (0.1,)), masks=True)
    lost = int(verdict == "undetermined")
    patients = tuple(
        replace(p, n_slices_failed=lost, n_slices_missing=0) for p in diagnosis.patients
    )
    diagnosis = replace(diagnosis, patients=patients)
    for sr_class in ("3d", "comprehensive"):
        files = write_dicom(diagnosis, tmp_path / sr_class, kinds, sr_class=sr_class)
        expected = kinds if verdict == "present" else KINDS  # nothing has no segmentation
        assert {f.name.split("-")[0] for f in files} == set(expected)
        assert {str(f): errors for f in files if (errors := check(f))} == {}
    (study,) = studies(diagnosis)
    assert study.verdict == verdict


@needs_validators
def test_the_validators_find_an_error_that_is_there(phantom, tmp_path):
    sr, *_ = write_dicom(look([phantom], 0.9), tmp_path / "out", ["sr"])
    ds = pydicom.dcmread(sr)
    del ds.CompletionFlag
    ds.save_as(sr)
    assert any("CompletionFlag" in error for error in check(sr))


@pytest.mark.parametrize("source", SOURCES, indirect=True)
def test_a_report_read_back_says_what_was_found_and_where(source, tmp_path):
    diagnosis = look([source], 0.9, 0.1)
    files = write_dicom(diagnosis, tmp_path / "out")
    sr = hd.sr.srread(files[0])
    first = pydicom.dcmread(diagnosis.slices[0].source.path, stop_before_pixels=True)
    for file in files:
        ds = pydicom.dcmread(file, stop_before_pixels=True)
        assert ds.StudyInstanceUID == first.StudyInstanceUID
        assert ds.PatientID == first.PatientID and ds.PatientName == first.get("PatientName", "")
        assert "research only" in ds.SeriesDescription
    groups = sr.content.get_planar_roi_measurement_groups()
    slices = [s for s in diagnosis.slices if s.verdict == "positive"]
    wanted = [(s, s.boxes[i], s.scores[i]) for i in range(2) for s in slices]
    wanted = sorted((w for w in wanted if w[2] >= 0.4), key=lambda w: -w[2])
    assert len(groups) == len(wanted) == 2 * len(slices)
    for group, (s, box, score) in zip(groups, wanted, strict=True):
        x0, y0, x1, y1 = box
        points = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]], np.float32)
        assert group.roi.graphic_type.value == "POLYLINE"
        assert np.array_equal(group.roi.value.astype(np.float32), points)
        (image,) = group.roi.ContentSequence
        (reference,) = image.ReferencedSOPSequence
        assert reference.ReferencedSOPInstanceUID == s.source.identity.sop_uid
        frame = s.source.frame
        assert reference.get("ReferencedFrameNumber") == (None if frame is None else frame + 1)
        (certainty,) = group.get_measurements()
        assert certainty.value == pytest.approx(100 * score, abs=1e-4)


@pytest.mark.parametrize("source", [s for s in SOURCES if s != "j2k"], indirect=True)
def test_a_segmentation_read_back_has_the_masks_on_their_images(source, tmp_path):
    diagnosis = look([source], 0.9, 0.5, masks=True)
    (file,) = write_dicom(diagnosis, tmp_path / "out", ["seg"])
    seg = hd.seg.segread(file)
    first = pydicom.dcmread(diagnosis.slices[0].source.path, stop_before_pixels=True)
    assert seg.StudyInstanceUID == first.StudyInstanceUID and seg.PatientID == first.PatientID
    assert "research only" in seg.SeriesDescription
    assert seg.segmentation_type == hd.seg.SegmentationTypeValues.BINARY
    description = seg.get_segment_description(1)
    assert seg.number_of_segments == 1 and description.segment_label == "hemorrhage"
    assert description.segmented_property_type.value == "1386000"
    (identified,) = description.algorithm_identification
    assert identified.AlgorithmName == "ich_det2 marked"
    for s in diagnosis.slices:
        if s.source.frame is None:
            pixels = seg.get_pixels_by_source_instance([s.source.identity.sop_uid])
        else:
            uid, frame = s.source.identity.sop_uid, s.source.frame
            pixels = seg.get_pixels_by_source_frame(uid, [frame + 1])
        expected = np.zeros(pixels.shape[1:3], bool)
        for mask, score in zip(s.masks, s.scores):
            expected |= decode_mask(mask) & (score >= 0.4)
        # The weaker box scores 0.45 or 0.25: above the threshold on every other slice.
        assert expected.sum() in (35 * 30, 35 * 30 + 38 * 29 - 19 * 20)
        assert np.array_equal(pixels[0, ..., 0] > 0, expected)


def test_a_segmentation_is_the_same_object_for_the_same_answer(phantom):
    def built():
        (study,) = studies(look([phantom], 0.9, 0.1, masks=True))
        ((_, seg),) = build_objects(study, ["seg"])
        return seg.PixelData, [e.value for e in seg.iterall() if e.VR == "UI"]

    once = built()
    assert once == built() and len(once[1]) > 10


@pytest.mark.parametrize("source", ["j2k"], indirect=True)
def test_images_at_no_known_place_have_no_segmentation(source, tmp_path):
    with pytest.raises(ValueError, match=r"say where they lie .*Frame Of Reference UID.*IOD\.$"):
        write_dicom(look([source], 0.9, masks=True), tmp_path / "out", ["sr", "seg"])
    assert not (tmp_path / "out").exists()


def test_without_masks_a_segmentation_is_refused(phantom, tmp_path):
    with pytest.raises(ValueError, match="boxes and no masks.*leave out seg"):
        write_dicom(look([phantom], 0.9), tmp_path / "out", ["sr", "seg"])
    assert not (tmp_path / "out").exists()
    # Nothing found has none.
    assert write_dicom(look([phantom], 0.1, masks=True), tmp_path / "out", ["seg"]) == []


def verdict_of(sr):
    (container,) = [
        x for x in sr.ContentSequence if x.ConceptNameCodeSequence[0].CodeValue == "C0034375"
    ]
    code, text = container.ContentSequence
    return code.ConceptCodeSequence[0].CodeMeaning, text.TextValue


@pytest.mark.parametrize(
    ("score", "failed", "missing", "code", "words"),
    [
        (0.9, 0, 0, "Present", "suspected"),
        (0.9, 1, 0, "Present", "1 not read"),
        (0.1, 0, 0, "Absent", "not found ("),
        (0.1, 1, 0, "Undetermined", "INCOMPLETE"),
        (0.1, 0, 2, "Undetermined", "2 not read or missing"),
    ],
)
def test_slices_that_were_not_read_give_no_bare_absent(
    phantom, score, failed, missing, code, words
):
    diagnosis = look([phantom], score)
    patient = replace(diagnosis.patients[0], n_slices_failed=failed, n_slices_missing=missing)
    (study,) = studies(replace(diagnosis, patients=(patient,)))
    ((_, sr),) = build_objects(study, ["sr"])
    meaning, text = verdict_of(sr)
    assert meaning == code and words in text and "not for clinical use" in text
    assert len(hd.sr.MeasurementReport.from_sequence([sr])._find_measurement_groups()) == (
        2 * len(diagnosis.slices) if score > 0.4 else 0
    )


def smoothed(diagnosis, **verdicts):
    """As if the scores of slices were smoothed otherwise than those of boxes.

    Args:
        diagnosis: of slices that are alike.
        verdicts: by index, as "s3", what the slice is instead.
    """
    scores = {"positive": 0.45, "negative": 0.3}
    slices = [
        replace(s, verdict=v, score=scores[v])
        for s in diagnosis.slices
        for v in [verdicts.get(f"s{s.index}", "negative")]
    ]
    return replace(diagnosis, slices=tuple(slices))


def test_boxes_of_negative_slices_are_no_findings(phantom, tmp_path):
    diagnosis = smoothed(look([phantom], 0.9, masks=True))
    (study,) = studies(diagnosis)
    assert study.verdict == "absent" and study.findings == ()
    built = dict(build_objects(study, ALL_KINDS))
    assert verdict_of(built["sr"])[0] == "Absent" and "seg" not in built
    assert not hd.sr.MeasurementReport.from_sequence([built["sr"]])._find_measurement_groups()
    (drawn,) = built["gsps"].GraphicAnnotationSequence
    assert "GraphicObjectSequence" not in drawn and len(drawn.TextObjectSequence) == 1
    assert drawn.TextObjectSequence[0].UnformattedTextValue.startswith("NEGATIVE 0.300")
    below = [replace(s, scores=np.full(2, 0.399)) for s in diagnosis.slices]
    (same,) = studies(replace(diagnosis, slices=tuple(below)))
    ((_, expected),) = build_objects(same, ["sc"])
    assert built["sc"].PixelData == expected.PixelData


@needs_validators
@pytest.mark.parametrize("source", ["phantom", "enhanced"], indirect=True)
@pytest.mark.parametrize("sr_class", ["3d", "comprehensive"])
def test_a_positive_slice_without_a_box_is_referenced(source, sr_class, tmp_path):
    diagnosis = smoothed(look([source], 0.3), s3="positive", s4="positive")
    slices = [replace(s, scores=np.array([0.42])) if s.index == 4 else s for s in diagnosis.slices]
    diagnosis = replace(diagnosis, slices=tuple(slices))
    sr, *others = write_dicom(diagnosis, tmp_path / "out", sr_class=sr_class)
    assert {str(f): errors for f in (sr, *others) if (errors := check(f))} == {}
    sr = pydicom.dcmread(sr)
    meaning, text = verdict_of(sr)
    assert meaning == "Present" and "1 positive slice(s) without a box here are" in text
    assert len(hd.sr.MeasurementReport.from_sequence([sr])._find_measurement_groups()) == 1
    (image,) = sr.ContentSequence[-1].ContentSequence[0].ContentSequence
    (reference,) = image.ReferencedSOPSequence
    where = slices[3].source
    assert reference.ReferencedSOPInstanceUID == where.identity.sop_uid
    frame = None if where.frame is None else where.frame + 1
    assert reference.get("ReferencedFrameNumber") == frame


def test_a_study_with_a_positive_slice_is_not_absent(phantom):
    diagnosis = smoothed(look([phantom], 0.9), s3="positive")
    diagnosis = replace(diagnosis, model={**diagnosis.model, "patient_rule": "at_least_2"})
    (study,) = studies(diagnosis)
    assert study.verdict == "undetermined" and "but 1 slice(s) are POSITIVE" in study.sentence


def uids(diagnosis, **kwargs):
    (study,) = studies(diagnosis)
    return [ds.SOPInstanceUID for _, ds in build_objects(study, **kwargs)]


def test_the_same_answer_has_the_same_uids_and_another_has_others(phantom):
    once = uids(look([phantom], 0.9, 0.1))
    assert once == uids(look([phantom], 0.9, 0.1)) and len({*once}) == len(once)
    assert all(uid.startswith("2.25.") and len(uid) <= 64 for uid in once)
    fewer = look([phantom], 0.9, 0.1, threshold=0.41)
    assert not {*once} & {*uids(fewer)}
    assert not {*once} & {*uids(look(sorted(phantom.iterdir())[:-1], 0.9, 0.1))}
    diagnosis = look([phantom], 0.9, 0.1)
    other = replace(diagnosis, model={**diagnosis.model, "sha256": "cd" * 32})
    assert not {*once} & {*uids(other)}
    slices = (replace(diagnosis.slices[0], scores=diagnosis.slices[0].scores - 0.01),)
    moved = replace(diagnosis, slices=slices + diagnosis.slices[1:])
    assert not {*once} & {*uids(moved)}
    lost = replace(diagnosis.patients[0], n_slices_failed=1)
    assert not {*once} & {*uids(replace(diagnosis, patients=(lost,)))}
    assert once[0] not in uids(diagnosis, sr_class="comprehensive")


def test_a_corrected_patient_has_objects_of_his_own(phantom, tmp_path):
    folder = tmp_path / "corrected"
    shutil.copytree(phantom, folder)
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        ds.PatientID = "CORRECTED"
        ds.save_as(path)
    assert not {*uids(look([phantom], 0.9))} & {*uids(look([folder], 0.9))}


def test_a_new_report_names_the_one_that_it_takes_the_place_of(phantom):
    half = look(sorted(phantom.iterdir())[:5], 0.1)
    ((_, first),) = build_objects(next(studies(half)), ["sr"])
    ((_, second),) = build_objects(next(studies(look([phantom], 0.1))), ["sr"], previous=[first])
    (study,) = second.PredecessorDocumentsSequence
    (series,) = study.ReferencedSeriesSequence
    (reference,) = series.ReferencedSOPSequence
    assert reference.ReferencedSOPInstanceUID == first.SOPInstanceUID


def test_pictures_show_the_boxes_and_say_what_they_are_for(phantom, tmp_path):
    diagnosis = look([phantom], 0.1, 0.9)
    files = write_dicom(diagnosis, tmp_path / "out", ["sc"])
    positive = [s for s in diagnosis.slices if s.verdict == "positive"]
    assert len(files) == len(positive)
    ds = pydicom.dcmread(files[0])
    picture = diagnosis.draw(positive[0], f"series {1}   image {positive[0].index + 1}")
    assert ds.pixel_array.shape == picture.shape
    rows = len(picture) * 3 // 4  # above the strip
    assert np.array_equal(ds.pixel_array[:rows], picture[:rows])
    (source,) = ds.SourceImageSequence
    assert source.ReferencedSOPInstanceUID == positive[0].source.identity.sop_uid
    assert list(ds.PatientOrientation) == ["L", "P"]


def test_boxes_beyond_what_viewers_bear_are_told_of(phantom):
    many = look([phantom], 0.9)
    boxes = np.tile(np.float32([[1, 2, 30, 40]]), (150, 1))
    slices = [
        replace(s, boxes=boxes, scores=np.full(150, 0.8), classes=("hemorrhage",) * 150)
        for s in many.slices
    ]
    (study,) = studies(replace(many, slices=tuple(slices)))
    ((_, sr),) = build_objects(study, ["sr"])
    assert f"The 100 highest scored of {150 * len(slices)} boxes" in verdict_of(sr)[1]


def test_a_folder_of_objects_is_told_by_its_index_and_not_lost(phantom, tmp_path):
    diagnosis, out = look([phantom], 0.9, 0.1), tmp_path / "out"
    files = write_dicom(diagnosis, out, ["sr", "kos"])
    index = json.loads((out / "objects.json").read_text())
    assert [out / row["file"] for row in index["objects"]] == files
    assert [row["verdict"] for row in index["objects"]] == ["present"] * 2
    assert "P0001" not in (out / "objects.json").read_text()
    with pytest.raises(ValueError, match="holds something already"):
        write_dicom(diagnosis, out)
    assert len(write_dicom(diagnosis, out, ["sr"], force=True)) == 1
    assert [p.name for p in out.rglob("*.dcm")] == ["sr-001.dcm"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(ValueError, match="holds something already"):
        write_dicom(diagnosis, tmp_path / "mine", force=True)
    with pytest.raises(ValueError, match="lie in one another"):
        write_dicom(diagnosis, phantom / "out")
    with pytest.raises(ValueError, match="expected sr, gsps, sc, kos, seg"):
        write_dicom(diagnosis, tmp_path / "new", ["rtstruct"])
    with pytest.raises(ValueError, match="expected one of 3d, comprehensive"):
        write_dicom(diagnosis, tmp_path / "new", sr_class="2d")
    assert not (tmp_path / "new").exists()


def test_pictures_have_no_study_to_be_filed_under(tmp_path):
    from PIL import Image

    (tmp_path / "exam").mkdir()
    Image.fromarray(np.full((64, 64), 90, np.uint8)).save(tmp_path / "exam/a.png")
    with pytest.raises(ValueError, match="a.png: has no Study, Series or SOP Instance UID"):
        write_dicom(look([tmp_path / "exam"], 0.9), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_studies_of_a_patient_have_their_own_objects(phantom, tmp_path):
    folder = tmp_path / "two"
    for i in (1, 2):
        shutil.copytree(phantom, folder / str(i))
        for n, path in enumerate(sorted((folder / str(i)).iterdir())):
            ds = pydicom.dcmread(path)
            ds.StudyInstanceUID, ds.SeriesInstanceUID = f"1.2.{i}", f"1.2.{i}.1"
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.{i}.1.{n + 1}"
            ds.save_as(path)
    files = write_dicom(look([folder], 0.9, 0.1), tmp_path / "out", ["sr"])
    assert [pydicom.dcmread(f).StudyInstanceUID for f in files] == ["1.2.1", "1.2.2"]
    assert [f.parent.name for f in files] == ["study-01", "study-02"]


def test_no_name_is_told_in_a_warning(phantom, tmp_path, recwarn, caplog):
    folder = tmp_path / "named"
    shutil.copytree(phantom, folder)
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        ds.PatientName = "ZWICKY"
        ds.save_as(path)
    write_dicom(look([folder], 0.9), tmp_path / "out")
    assert "ZWICKY" not in "".join(str(w.message) for w in recwarn) + caplog.text


@pytest.fixture
def odd(phantom, tmp_path, monkeypatch):
    """Function that copies three slices with attributes that may break rules of DICOM."""

    def copy(change):
        folder = tmp_path / "odd"
        folder.mkdir()
        monkeypatch.setattr(pydicom.config.settings, "writing_validation_mode", 0)
        for i, path in enumerate(sorted(phantom.iterdir())[4:7]):
            ds = pydicom.dcmread(path)
            for keyword, value in (change(i) if callable(change) else change).items():
                if value is None:
                    del ds[keyword]
                else:
                    setattr(ds, keyword, value)
            ds.save_as(folder / path.name)
        monkeypatch.undo()
        return folder

    return copy


LONG = "0.4882812500000000123"


@needs_validators
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "change, keyword, expected",
    [
        ({"StudyDate": "2004.01.19", "StudyTime": "10:20:30"}, "StudyDate", "20040119"),
        ({"PatientBirthDate": "19-01-1950"}, "PatientBirthDate", ""),
        ({"AccessionNumber": "ACC-2024-0000000123456789"}, "AccessionNumber", ""),
        ({"AccessionNumber": ["A1", "B2"]}, "AccessionNumber", "A1"),
        ({"StudyID": "S" * 30, "PatientID": "X" * 80}, "PatientID", ""),
        ({"StudyDescription": "D" * 100}, "StudyID", None),
        ({"PatientAge": "45"}, "PatientAge", None),
        ({"PatientAge": "45Y"}, "PatientAge", "045Y"),
        ({"PatientWeight": LONG, "PixelSpacing": [LONG] * 2}, "PatientID", None),
        ({"PatientName": ["A^B", "C^D"]}, "PatientName", "A^B"),
        ({"PatientName": "A" * 70}, "PatientName", "A" * 64),
        ({"ReferringPhysicianName": ["A^B", "C^D"]}, "ReferringPhysicianName", "A^B"),
        ({"SOPClassUID": None}, "PatientID", None),
        (lambda i: {"RescaleIntercept": -1024 + i}, "PatientID", None),
    ],
)
def test_odd_attributes_give_valid_objects(odd, tmp_path, change, keyword, expected):
    files = write_dicom(look([odd(change)], 0.9), tmp_path / "out")
    assert {f.name.split("-")[0] for f in files} == {*KINDS}
    assert {str(f): errors for f in files if (errors := check(f))} == {}
    for file in files:
        ds = pydicom.dcmread(file)
        assert expected is None or keyword not in ds or str(ds[keyword].value) == expected


def test_each_rescale_has_a_state_of_its_own(odd):
    (study,) = studies(look([odd(lambda i: {"RescaleIntercept": -1024 + (i == 1)})], 0.9))
    built = [ds for _, ds in build_objects(study, ["gsps"])]
    assert sorted(float(ds.RescaleIntercept) for ds in built) == [-1024, -1023]


def test_images_that_nothing_can_refer_to_are_refused_by_name(odd, tmp_path):
    folder = odd({"SeriesInstanceUID": None})
    with pytest.raises(ValueError, match=r"^\S+: has no Study, Series or SOP Instance UID"):
        write_dicom(look([folder], 0.9), tmp_path / "out")


def test_a_kind_that_cannot_be_made_leaves_the_others(phantom, tmp_path, monkeypatch, caplog):
    def fail(study):
        raise TypeError("ZWICKY")

    monkeypatch.setattr("ich_det2.dicom_out.presentation.build_presentations", fail)
    diagnosis, out = look([phantom], 0.1), tmp_path / "out"
    assert {f.name[:2] for f in write_dicom(diagnosis, out)} == {"sr", "sc", "ko"}
    index = json.loads((out / "objects.json").read_text())
    assert index["not_made"] == [{"kind": "gsps", "folder": "patient-001/study-01"}]
    assert "GSPS cannot be made (TypeError)" in caplog.text and "ZWICKY" not in caplog.text
    with pytest.raises(ValueError, match="GSPS cannot be made"):
        write_dicom(diagnosis, tmp_path / "alone", ["gsps"])
