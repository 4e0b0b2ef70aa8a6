"""The function ich_det2.diagnose and what it returns: values, files, the key, and no identity."""

import csv
import json
import os
import stat
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import RLELossless

import ich_det2
from ich_det2 import Diagnosis, diagnose
from ich_det2.inference.results import KEY_FIELDS

FORMER_SLICE_FIELDS = "patient,series,slice,file,score,verdict,n_boxes"
FORMER_PATIENT_FIELDS = (
    "patient,n_slices,n_slices_failed,n_positive_slices,score,verdict,worst_slice_file"
)
SECRETS = ("ZWICKY", "JANUSZ", "PID4711", "19500102", "1.2.826.0.1.3680043", "A77")


@pytest.fixture
def exam(tmp_path, write_series):
    """Two patients whose files and folders are named as hospitals do."""
    for n, (name, bleed) in enumerate((("ZWICKY^JANUSZ", 1), ("LI^WEI", None))):
        paths = write_series(
            f"exam/{name.replace('^', '_')}", bleed_at=bleed, PatientName=name,
            PatientID=f"PID471{n + 1}", PatientBirthDate="19500102", AccessionNumber="A77",
            SeriesInstanceUID=f"1.2.826.0.1.3680043.{n}",
        )  # fmt: skip
        for path in paths:
            uid = pydicom.dcmread(path).SOPInstanceUID
            path.rename(path.with_name(f"CT.{uid}.dcm"))
    (tmp_path / "exam" / "report A77 1950-01-02.txt").write_text("x")
    return tmp_path / "exam"


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_what_a_diagnosis_holds(exam, finder):
    found = diagnose(str(exam), finder, threshold=0.5)
    assert isinstance(found, Diagnosis) and "diagnose" in ich_det2.__all__
    assert [(p.verdict, p.n_slices, p.complete) for p in found.patients] == [
        ("positive", 4, True),
        ("negative", 4, True),
    ]
    bleeding = [s for s in found.slices if s.verdict == "positive"]
    assert [(s.patient, s.series, s.index) for s in bleeding] == [("patient-001", "series-01", 1)]
    assert bleeding[0].boxes.shape == (1, 4) and bleeding[0].scores == [bleeding[0].score]
    assert bleeding[0].classes == ("hemorrhage",)
    assert [s.lost for s in found.skipped] == [False]
    json.dumps(found.to_dict(), allow_nan=False)


def test_names_tell_nobody_and_the_key_tells_all(exam, finder, tmp_path):
    found = diagnose(exam, finder, threshold=0.5)
    found.write(tmp_path / "out", overlays="all", key=tmp_path / "key.csv")
    text = json.dumps(found.to_dict()) + repr(found)
    for path in sorted((tmp_path / "out").rglob("*")):
        text += path.name + (path.read_bytes().decode("latin-1") if path.is_file() else "")
    for secret in (*SECRETS, "LI_WEI", str(tmp_path)):
        assert secret.lower() not in text.lower(), secret
    names = [s.file for s in found.slices] + [s.file for s in found.skipped]
    assert names[:2] == ["patient-001/series-01/000.dcm", "patient-001/series-01/001.dcm"]
    assert len(set(names)) == 9 and "[removed]" not in " ".join(names)

    key = rows(tmp_path / "key.csv")
    assert found.key == [row | {"slice": int(row["slice"])} if row["slice"] else row for row in key]
    assert stat.S_IMODE(os.stat(tmp_path / "key.csv").st_mode) == 0o600
    by_file = {row["file"]: row for row in key}
    for s in found.slices:
        ds, row = pydicom.dcmread(by_file[s.file]["path"]), by_file[s.file]
        assert (ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID) == (
            row["patient_id"], row["study_uid"], row["series_uid"], row["sop_uid"],
        )  # fmt: skip
        assert ds.ImagePositionPatient[2] == 5 * s.index
    assert by_file[found.skipped[0].file]["path"].endswith("report A77 1950-01-02.txt")


def test_names_of_several_inputs_are_unique(write_series, finder):
    folders = [write_series(name, PatientID=name)[0].parent for name in ("one", "two")]
    names = [s.file for s in diagnose(folders, finder).slices]
    assert len(set(names)) == 8 and names[0] == "patient-001/series-01/000.dcm"
    assert [s.file for s in diagnose(folders[0], finder).slices][0] == "IM1.dcm"


def test_outputs_keep_their_columns_and_add_some(exam, finder, tmp_path):
    found = diagnose(exam, finder, threshold=0.5)
    found.write(tmp_path / "plain")
    replace(found, identify=True).write(tmp_path / "named")
    headers = {p: p.read_text().split("\n")[0] for p in tmp_path.glob("*/*.csv")}
    added = ",n_slices_missing,complete,notes"
    assert headers == {
        tmp_path / "plain/slices.csv": FORMER_SLICE_FIELDS,
        tmp_path / "plain/patients.csv": FORMER_PATIENT_FIELDS + added,
        tmp_path / "named/slices.csv": FORMER_SLICE_FIELDS + ",patient_id,series_uid,sop_uid",
        tmp_path / "named/patients.csv": FORMER_PATIENT_FIELDS + ",patient_id" + added,
    }
    for row, s in zip(rows(tmp_path / "plain/slices.csv"), found.slices, strict=True):
        assert row["score"] == f"{s.score:.6f}"
    content = json.loads((tmp_path / "plain/diagnosis.json").read_text())
    drawn = [s.pop("overlay") for p in content["patients"] for s in p["slices"]]
    assert sum(map(bool, drawn)) == 2  # the positive one, and the highest of the other patient
    assert content == json.loads(json.dumps(found.to_dict()))


@pytest.mark.parametrize("overlays, count", [("none", 0), ("positive", 2), ("all", 8)])
def test_overlays(exam, finder, tmp_path, overlays, count):
    found = diagnose(exam, finder, threshold=0.5)
    found.write(tmp_path / "out", overlays=overlays)
    assert len(list(tmp_path.glob("out/overlays/*/*.png"))) == count
    with pytest.raises(ValueError, match="expected one of positive, all, none"):
        found.write(tmp_path / "other", overlays="some")
    assert not (tmp_path / "other").exists()


def test_keys_are_written_where_they_are_safe(exam, finder, tmp_path):
    found, out = diagnose(exam, finder), tmp_path / "out"

    def refused(key, message, **options):
        with pytest.raises(ValueError, match=message):
            found.write(out, key=key, **options)
        assert not out.exists()

    refused(out / "key.csv", "lies in the folder of the results")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    refused(tmp_path / "link", "is a link, which is not followed", force=True)
    refused(tmp_path / "none" / "key.csv", "there is no such folder")
    refused(exam, "exists; give a new file", force=True)
    (tmp_path / "other.csv").write_text("patient,notes\n")
    refused(tmp_path / "other.csv", "exists; give a new file.", force=True)
    (tmp_path / "key.csv").write_text(",".join(KEY_FIELDS) + "\n")
    os.chmod(tmp_path / "key.csv", 0o644)
    refused(tmp_path / "key.csv", "or --force to replace an earlier key")
    found.write(out, key=tmp_path / "key.csv", force=True)
    assert len(rows(tmp_path / "key.csv")) == 9
    assert stat.S_IMODE(os.stat(tmp_path / "key.csv").st_mode) == 0o600
    assert not (tmp_path / "target").exists()


def test_options_are_used_or_refused(exam, finder):
    with pytest.raises(ValueError, match="threshold is 2"):
        diagnose(exam, finder, threshold=2)
    for option in ({"device": "cpu"}, {"batch_size": 1}):
        with pytest.raises(ValueError, match="those of the Diagnoser"):
            diagnose(exam, finder, **option)
    seen = []

    def progress(items, what, total):
        seen.append((what, total))
        return items

    diagnose(exam, finder, progress=progress)
    assert seen == [("detecting", 8)]


def test_slices_and_patients_are_diagnosed_by_smoothed_scores(exam, finder, tmp_path):
    plain = diagnose(exam, finder, threshold=0.5)
    finder.smoothing = (0.25, 0.5, 0.25)
    found = diagnose(exam, finder, threshold=0.5)
    raw = [s.score for s in plain.slices]
    assert [s.raw_score for s in found.slices] == raw
    assert {s.raw_score for s in plain.slices} == {None}
    # The bleed is on the second of four slices; the other patient has none.
    a, b, c, d = raw[:4]
    expected = [(2 * a + b) / 3, (a + 2 * b + c) / 4, (b + 2 * c + d) / 4, (c + 2 * d) / 3]
    assert [s.score for s in found.slices[:4]] == pytest.approx(expected)
    assert [s.verdict for s in found.slices[:2]] == ["negative", "positive"]
    assert found.slices[1].scores == [b]  # boxes keep their scores
    patient = found.patients[0]
    assert (patient.score, patient.worst_slice_file) == (expected[1], found.slices[1].file)

    replace(found, identify=True).write(tmp_path / "out")
    table = rows(tmp_path / "out/slices.csv")
    header = FORMER_SLICE_FIELDS + ",patient_id,series_uid,sop_uid,raw_score"
    assert ",".join(table[0]) == header
    assert [row["raw_score"] for row in table] == [f"{score:.6f}" for score in raw]
    content = found.to_dict()["patients"][0]["slices"]
    assert [(s["score"], s["raw_score"]) for s in content] == [
        (s.score, s.raw_score) for s in found.slices[:4]
    ]
    # What is positive by its raw score alone is not.
    assert diagnose(exam, finder, threshold=0.9).patients[0].verdict == "negative"


def test_boxes_are_smoothed_too_and_keep_their_raw_scores(exam, finder):
    plain = diagnose(exam, finder, threshold=0.5)
    finder.smoothing, finder.smoothing_iou = (0.25, 0.5, 0.25), 0.3
    found = diagnose(exam, finder, threshold=0.5)
    a, b, c, d = (s.score for s in plain.slices[:4])
    assert b > max(a, c, d)
    for before, after in zip(plain.slices, found.slices):
        assert after.raw_score == before.score
        assert len(after.boxes) == len(after.scores) == len(after.classes) == len(after.raw_scores)
        assert sorted(after.scores, reverse=True) == after.scores.tolist()
    # The finder's boxes lie where the bleed is: alone, it has half of its score.
    bleed = found.slices[1]
    assert bleed.raw_scores[0] == b and b / 2 <= bleed.scores[0] <= b
    content = found.to_dict()["patients"][0]["slices"][1]["boxes"]
    assert [(box["score"], box["raw_score"]) for box in content] == [
        *zip(bleed.scores.tolist(), bleed.raw_scores.tolist())
    ]
    assert "raw_score" not in plain.to_dict()["patients"][0]["slices"][1]["boxes"][0]


def test_boxes_are_smoothed_by_weights_of_their_own(exam, finder):
    finder.smoothing, finder.smoothing_iou = (0.25, 0.5, 0.25), 0.3
    same = diagnose(exam, finder, threshold=0.5)
    finder.smoothing_boxes = (0.25, 0.5, 0.25)
    assert [s.score for s in diagnose(exam, finder, threshold=0.5).slices] == [
        s.score for s in same.slices
    ]
    finder.smoothing_boxes = (1.0,)
    found = diagnose(exam, finder, threshold=0.5)
    raw = [s.raw_score for s in found.slices]
    a, b, c, d = raw[:4]
    expected = [(2 * a + b) / 3, (a + 2 * b + c) / 4, (b + 2 * c + d) / 4, (c + 2 * d) / 3]
    assert [s.score for s in found.slices[:4]] == pytest.approx(expected)
    assert found.slices[1].scores.tolist() == found.slices[1].raw_scores.tolist()


def test_pictures_of_no_series_and_slices_not_read_are_no_neighbours(
    write_series, finder, tmp_path
):
    finder.smoothing = (0.25, 0.5, 0.25)
    paths = write_series(bleed_at=1)
    ds = pydicom.dcmread(paths[2])
    ds.compress(RLELossless, generate_instance_uid=False)
    ds.PixelData = encapsulate([b"no frame"])
    ds.save_as(paths[2], enforce_file_format=True)
    for i, grey in enumerate((0, 180)):
        Image.new("L", (32, 32), grey).save(tmp_path / "exam" / f"{i}.png")
    found = diagnose(tmp_path / "exam", finder)
    scores = {s.file: (s.score, s.raw_score) for s in found.slices}
    assert scores["0.png"] == (0, 0) and scores["1.png"] == (1, 1)
    a, b, d = (scores[f"IM{i}.dcm"][1] for i in (1, 2, 4))
    assert b > a and [scores[f"IM{i}.dcm"][0] for i in (1, 2, 4)] == pytest.approx(
        [(2 * a + b) / 3, (a + 2 * b) / 3, d]
    )


def test_a_neighbour_that_breaks_is_not_named(exam, finder):
    finder.mapper.context_slices = 1
    finder.context = {"context": 1}
    path = sorted(exam.glob("ZWICKY*/*"))[0]
    ds = pydicom.dcmread(path)
    ds.compress(RLELossless, generate_instance_uid=False)
    ds.PixelData = encapsulate([b"no frame"])
    ds.save_as(path)
    found = diagnose(exam, finder)
    assert found.patients[0].n_slices_failed >= 2
    assert any("a neighbouring slice" in s.reason for s in found.skipped)
    assert not any(secret in str(found.to_dict()) for secret in SECRETS)


def test_pictures(tmp_path, finder, voc_tree):
    root = voc_tree({"a": [("EDH", (5, 5, 40, 40))], "b": []}, patients=["image,patient", "a,p"])
    found = diagnose([root / "JPEGImages"], finder, threshold=0.9)
    assert [(p.n_slices, p.verdict) for p in found.patients] == [(1, "negative")] * 2
    assert np.isfinite([s.score for s in found.slices]).all()
    assert {row["file"]: row["patient_id"] for row in found.key} == {"a.png": "p", "b.png": ""}
