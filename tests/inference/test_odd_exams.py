"""Exams as people have them: no slice is lost in silence, what is odd is said of its patient."""

import json
import os
import shutil

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import JPEG2000Lossless

from ich_det2 import diagnose
from ich_det2.data.dicom import elements

CORONAL, SAGITTAL = [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom on files bad on purpose


@pytest.fixture
def look(tmp_path, finder):
    """Function that diagnoses the exam; positive means that the bleed was found."""
    return lambda *paths, **options: diagnose(
        paths or tmp_path / "exam", finder, threshold=0.5, **options
    )


def edit(path, **attributes):
    ds = pydicom.dcmread(path)
    for keyword, value in attributes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    ds.save_as(path)


# ---- one image, or several -----------------------------------------------------------------------


@pytest.mark.parametrize("uid", ["1.2.826.0.1.1", ""])
def test_one_sop_instance_uid_for_all_slices(write_series, look, uid):
    write_series(SOPInstanceUID=uid, bleed_at=2)
    (patient,) = look().patients
    assert (patient.n_slices, patient.verdict, patient.complete) == (4, "positive", True)
    expected = ("series-01: 4 files share one SOP Instance UID",) if uid else ()
    assert patient.notes == expected


def test_one_uid_in_two_series_and_two_patients(write_series, look):
    same = {"SOPInstanceUID": "1.2.826.0.1.1", "z": (0,)}
    write_series("exam/a", **same)
    write_series("exam/b", **same, SeriesInstanceUID="1.2.1.2", bleed_at=0)
    write_series("exam/c", **same, PatientID="P2")  # the very image of the first, of another person
    first, second = look().patients
    assert (first.n_slices, first.verdict) == (2, "positive")
    assert (second.n_slices, second.verdict) == (1, "negative")
    assert "series-01: 3 files share one SOP Instance UID" in second.notes


def test_one_series_uid_for_two_patients(write_series, look):
    for patient in ("P1", "P2"):
        write_series(f"exam/{patient}", PatientID=patient, StudyInstanceUID=patient[1])
    assert [p.n_slices for p in look().patients] == [4, 4]
    assert all(p.complete and not p.notes for p in look().patients)


def recompress(path, target):
    ds = pydicom.dcmread(path)
    ds.compress(JPEG2000Lossless, generate_instance_uid=False)
    ds.save_as(target)


@pytest.mark.parametrize("repeat", [shutil.copy, recompress])
def test_a_true_repeat_is_left_out_and_said(write_series, look, tmp_path, repeat):
    paths = write_series(bleed_at=1)
    repeat(paths[1], tmp_path / "exam/again.dcm")
    found = look()
    (patient,), (skipped,) = found.patients, found.skipped
    assert (patient.n_slices, patient.complete) == (4, True)
    assert patient.notes == ("1 file(s) that repeat others are left out",)
    assert {skipped.file, *skipped.reason.split()} >= {"again.dcm", "repeats", "IM2.dcm."}
    assert not skipped.lost


@pytest.mark.parametrize("change", ["pixels", "position"])
def test_a_uid_twice_is_no_repeat_if_anything_differs(write_series, look, tmp_path, change):
    paths = write_series()
    path = shutil.copy(paths[1], tmp_path / "exam/again.dcm")
    ds = pydicom.dcmread(path)
    if change == "pixels":
        ds.PixelData = np.full((32, 32), 70 + 1024, "<u2").tobytes()
    else:
        ds.ImagePositionPatient = [0, 0, 20]
    ds.save_as(path)
    (patient,) = look().patients
    assert patient.n_slices == 5
    assert "series-01: 2 files share one SOP Instance UID" in patient.notes
    assert (patient.verdict == "positive") == (change == "pixels")
    together = "series-01: IM2.dcm and again.dcm lie at one position"
    assert (together in patient.notes) == (change == "pixels")


def test_a_broken_slice_is_lost_though_others_share_its_uid(write_series, look):
    paths = write_series(SOPInstanceUID="1.2.826.0.1.1", bleed_at=2)
    paths[2].write_bytes(paths[2].read_bytes()[:-100])
    (patient,) = look().patients
    assert (patient.n_slices_failed, patient.wording) == (1, "negative, incomplete")


def test_a_broken_copy_of_a_whole_slice_is_not_lost(write_series, look, tmp_path):
    paths = write_series()
    (tmp_path / "exam/part.dcm").write_bytes(paths[2].read_bytes()[:-100])
    found = look()
    assert found.patients[0].complete and len(found.skipped) == 1


# ---- where slices lie ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "z, missing",
    [
        ((18.1, 23.1, 28.1, 38.1), 1),
        ((0, 5, 10, 20, 30, 35, 40), 2),  # two gaps side by side
        ((0, 5, 10, 20, 30, 40), 3),  # to the end
        ((0, 10, 20, 30), 3),  # every second
        ((0, 5, 5, 20, 25), 2),  # beside a slice that is there twice
        ((40, 10, 5, 0), 5),  # names against the order
        ((0, 2.5, 5, 7.5, 12.5, 17.5, 22.5), 0),  # thicker slices towards the vertex
        ((0, 4.8, 9.9, 15), 0),
    ],
)
def test_gaps_are_said_where_the_verdict_is(write_series, look, tmp_path, z, missing):
    write_series(z=z)
    found = look()
    (patient,) = found.patients
    assert patient.n_slices_missing == missing and patient.complete == (missing == 0)
    assert patient.wording == ("negative, incomplete" if missing else "negative")
    said = [n for n in patient.notes if "missing between" in n or "not seen" in n]
    assert bool(said) == bool(missing)
    found.write(tmp_path / "out")
    (row,) = found.to_dict()["patients"]
    assert row["notes"] == list(patient.notes) and row["complete"] == patient.complete
    header, line = (tmp_path / "out/patients.csv").read_text().splitlines()
    assert header.endswith(",n_slices_missing,complete,notes")
    assert f",{missing},{'no' if missing else 'yes'}," in line
    assert all(note in line for note in said)


def turned(degrees):
    angle = np.deg2rad(degrees)
    return [1, 0, 0, 0, float(np.cos(angle)), float(np.sin(angle))]


@pytest.mark.parametrize(
    "attributes",
    [
        {"ImageOrientationPatient": CORONAL, "normal": 1},
        {"ImageOrientationPatient": SAGITTAL, "normal": 0},
        {"ImageOrientationPatient": turned(60)},
        {"ImageOrientationPatient": None, "ImageType": ["DERIVED", "SECONDARY", "MPR", "CORONAL"]},
    ],
    ids=["coronal", "sagittal", "oblique", "by Image Type"],
)
def test_what_is_not_axial_decides_nothing(write_series, look, tmp_path, attributes):
    write_series("exam/ax")
    write_series("exam/other", SeriesInstanceUID="1.2.1.2", bleed_at=0, **attributes)
    found = look()
    (patient,) = found.patients
    assert (patient.n_slices, patient.verdict, patient.complete) == (4, "negative", True)
    assert "4 slice(s) that are not axial are left out" in patient.notes
    assert {s.reason for s in found.skipped} == {"is not axial, expected axial slices."}
    # Where there is nothing else in the study, a bleed may hide in it.
    shutil.rmtree(tmp_path / "exam/ax")
    write_series("exam/second", StudyInstanceUID="1.2.2", SeriesInstanceUID="1.2.2.1")
    write_series("exam/third", PatientID="P3", StudyInstanceUID="1.2.3")
    first, third = look().patients
    assert (first.n_slices, first.n_slices_failed) == (4, 4)
    assert first.wording == "negative, incomplete" and third.wording == "negative"
    shutil.rmtree(tmp_path / "exam/second")
    assert [p.verdict for p in look().patients] == ["undetermined", "negative"]
    shutil.rmtree(tmp_path / "exam/third")
    with pytest.raises(ValueError, match="none of 4 files .* is not axial"):
        look()


@pytest.mark.parametrize(
    "attributes",
    [
        {"ImageOrientationPatient": turned(30)},
        {"ImageOrientationPatient": turned(-25)},
        {"ImageOrientationPatient": [-1, 0, 0, 0, -1, 0]},
        {"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"]},
        {"ImageType": ["DERIVED", "SECONDARY", "MPR", "CT_SOM5 MPR"]},
    ],
)
def test_tilted_turned_and_reformatted_axial_slices_are_read(write_series, look, attributes):
    write_series(bleed_at=3, **attributes)
    assert look().patients[0].verdict == "positive"


@pytest.mark.parametrize("kind", ["LOCALIZER", "SCREEN SAVE", "DOSE_INFO", "CT_SOM5 PROT"])
def test_what_is_no_slice_is_not_lost(write_series, look, kind):
    write_series("exam/ax")
    write_series("exam/other", z=(0,), ImageType=["DERIVED", "SECONDARY", kind])
    found = look()
    assert found.patients[0].complete and not found.skipped[0].lost
    assert "not a slice" in found.skipped[0].reason


# ---- whose they are ------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["ANONYMOUS", "000000", "De-Identified", "N/A", ""])
def test_a_placeholder_is_no_patient(write_series, look, word):
    write_series("exam/one", PatientID=word)
    write_series("exam/two", PatientID=word, StudyInstanceUID="1.2.2", bleed_at=1)
    patients = look().patients
    assert [p.verdict for p in patients] == ["negative", "positive"]
    for p in patients:
        assert not word or f"Patient ID '{word}' is a placeholder" in p.notes[0]


def test_two_people_of_one_id(write_series, look):
    write_series("exam/one", PatientID="4711", PatientName="DOE^JOHN")
    write_series("exam/two", PatientID="4711", PatientName="ROE^JANE", StudyInstanceUID="1.2.2")
    patients = look().patients
    assert len(patients) == 2 and all("different Patient Names" in p.notes[0] for p in patients)
    assert "4711" not in str(patients)
    assert "'4711'" in look(identify=True).patients[0].notes[0]


def test_slices_of_nobody_in_one_folder_are_one_patient(write_series, look):
    nobody = {"PatientID": None, "StudyInstanceUID": None, "SeriesInstanceUID": None}
    write_series("exam/a", **nobody, bleed_at=1)
    write_series("exam/b", **nobody)
    patients = look().patients
    assert [(p.n_slices, p.verdict) for p in patients] == [(4, "positive"), (4, "negative")]
    for p in patients:
        assert "taken for one patient" in p.notes[0]
    # Of different people the names tell.
    for path in sorted(write_series("exam/b", **nobody))[:2]:
        edit(path, PatientName="DOE^JOHN")
    assert [p.n_slices for p in look().patients] == [4, 2, 2]


@pytest.mark.parametrize(
    "attributes, name",
    [
        ({"PatientName": "Müller^Jürgen"}, "Mu\u0308ller"),
        ({"PatientName": "Müller^Jürgen"}, "Muller_Jurgen"),
        ({"PatientName": "Müller^Jürgen"}, "MUELLER"),
        ({"PatientName": "MUELLER^JUERGEN"}, "Müller"),
        ({"PatientName": "Strauß^Eva"}, "strauss"),
        ({"PatientID": "4711-XY"}, "CT_4711XY"),
        ({"PatientID": "A/77-12"}, "A_77-12"),
        ({"PatientID": "00012345"}, "ID_12345"),
        ({"PatientName": "O'Brien^Sean"}, "OBrien"),
        ({"PatientName": "Meier-Schmidt^Eva"}, "MeierSchmidt"),
        ({"PatientName": "Li^Wei"}, "WeiLi"),
        ({"PatientBirthDate": "19610213"}, "13.02.1961"),
        ({"PatientBirthDate": "19610213"}, "02-13-1961"),
        ({"PatientBirthDate": "19610213"}, "610213"),
        ({"PatientBirthDate": "19610203"}, "3.2.1961"),
        ({"OtherPatientIDs": "ZZ-9933"}, "zz9933"),
        ({"OtherPatientNames": "Zwicky^Eva"}, "zwicky"),
    ],
)
def test_no_spelling_of_an_identity_is_in_a_name(write_series, look, attributes, name):
    (path,) = write_series(f"exam/{name}", z=(0,), SpecificCharacterSet="ISO_IR 192", **attributes)
    path = path.rename(path.with_name("slice_07.dcm"))
    (path.parent / f"note {name}.txt").touch()
    found = look()
    assert found.slices[0].file == "patient-001/series-01/000.dcm"
    assert [s.file for s in found.skipped] == ["skipped-001"]
    assert name not in str(found.to_dict())
    # The name of the file itself is as anybody's.
    assert look(path).slices[0].file == "slice_07.dcm"


# ---- attributes that HU do not need --------------------------------------------------------------

ODD = [
    ("WindowCenter", "NaN"),
    ("WindowWidth", "eighty"),
    ("PixelSpacing", "0,488281\\0,488281"),
    ("PixelSpacing", "5.0mm\\5.0mm"),
    ("PixelSpacing", "0.5"),
    ("PixelSpacing", "400\\0.4"),
    ("PixelSpacing", "0\\0"),
    ("SliceThickness", "5.0mm"),
    ("SliceThickness", "5\\5"),
    ("ImagePositionPatient", "0\\0\\abc"),
    ("ImagePositionPatient", "0\\5"),
    ("ImageOrientationPatient", "1\\0\\0\\0\\1\\NaN"),
    ("PixelPaddingValue", "-"),
]


@pytest.mark.parametrize("keyword, text", ODD)
def test_oddities_lose_no_slice_and_are_noted(write_series, write_raw, look, keyword, text):
    for path in write_series(bleed_at=2)[1:3]:
        write_raw(path, keyword, text)
    found = look()
    (patient,) = found.patients
    assert (patient.n_slices, patient.verdict, found.skipped) == (4, "positive", ())
    name = elements.label(keyword)
    assert any("2 slices: " + name in note for note in patient.notes) or "Padding" in keyword


@pytest.mark.parametrize(
    "attributes",
    [
        {"ImagePositionPatient": None},
        {"ImageOrientationPatient": None},
        {"ImageOrientationPatient": [0] * 6},
        {"PixelSpacing": [0, 0]},
        {"PixelSpacing": None, "SliceThickness": None, "SOPClassUID": None, "PatientID": None},
        {"SeriesInstanceUID": None, "StudyInstanceUID": None},
        {"Modality": None},
        {"Modality": "ANONYMOUS"},
        {"Modality": "ct", "SOPClassUID": "1.3.46.670589.5.0.1"},
        {"HighBit": None},
        {"BodyPartExamined": "HEAD\\NECK", "PatientSex": "?", "PatientBirthDate": "unknown"},
        {"RescaleType": "hu"},
    ],
)
def test_absent_and_broken_attributes_lose_no_slice(write_series, look, attributes):
    write_series(bleed_at=2)
    path = write_series("exam/more", bleed_at=None, z=(50, 55, 60))[0].parent
    for file in path.iterdir():
        edit(file, **{k: v for k, v in attributes.items() if k in pydicom.dcmread(file) or v})
    assert sum(p.n_slices for p in look().patients) == 7
    assert not look().skipped


KEYWORDS = (
    "PatientID PatientName StudyInstanceUID SeriesInstanceUID SOPInstanceUID ImagePositionPatient"
    " ImageOrientationPatient PixelSpacing SliceThickness WindowCenter ImageType BodyPartExamined"
    " Modality SOPClassUID SpecificCharacterSet PatientBirthDate PatientSex PixelPaddingValue"
)
VALUES = ("", "NaN", "0\\0\\0", "1,5", "ANONYMOUS", "\xff\xfe", "1.2.3", "x" * 40, "\\\\", "Inf")
CHANGE = st.tuples(
    st.sampled_from(KEYWORDS.split()),
    st.sampled_from([(2,), (0,), (1, 2), range(4)]),
    st.sampled_from(VALUES),
)


@given(st.lists(CHANGE, min_size=1, max_size=3))
def test_whatever_is_broken_no_bleed_is_missed_in_silence(
    tmp_path, write_series, write_raw, look, changes
):
    paths = write_series(bleed_at=2)
    for keyword, which, text in changes:
        for i in which:
            write_raw(paths[i], keyword, text)
    found = look()
    json.dumps(found.to_dict(), allow_nan=False)
    assert any(p.verdict == "positive" or not p.complete for p in found.patients)


def test_a_slice_of_unknown_position_is_diagnosed(write_series, look):
    edit(write_series(bleed_at=1)[1], ImagePositionPatient=None)
    (patient,) = look().patients
    assert (patient.n_slices, patient.verdict) == (4, "positive")
    assert any("1 slice of no known position" in note for note in patient.notes)


def test_a_rescale_that_is_none_is_a_lost_slice(write_series, write_raw, look):
    write_raw(write_series()[1], "RescaleIntercept", "-1024,0")
    found = look()
    assert found.patients[0].wording == "negative, incomplete"
    assert "Rescale Intercept (0028,1052) cannot be read as a number" in found.skipped[0].reason


def test_private_elements_of_any_kind(write_series, look):
    for i, path in enumerate(write_series(bleed_at=2)):
        ds = pydicom.dcmread(path)
        block = ds.private_block(0x0019, "MAKER", create=True)
        block.add_new(1, "UN", b"\xff\xfe\x00\x01" * (i + 1))
        block.add_new(2, "DS", "1.5")
        ds.save_as(path)
        path.write_bytes(path.read_bytes().replace(b"DS\x04\x001.5 ", b"DS\x04\x00\xff\0\\x"))
    assert look().patients[0].verdict == "positive"


@pytest.mark.parametrize("implicit", [True, False])
def test_files_without_preamble_or_suffix(write_series, look, implicit):
    for i, path in enumerate(write_series(bleed_at=2)):
        bare = pydicom.Dataset(pydicom.dcmread(path))
        bare.save_as(path, implicit_vr=implicit, little_endian=True)
        path.rename(path.with_name(f"1.2.840.{i}" if i else "slice.PNG"))
    (patient,) = look().patients
    assert (patient.n_slices, patient.verdict) == (4, "positive")


def test_several_frames_without_positions(write_series, look):
    path = write_series(z=(0,))[0]
    ds = pydicom.dcmread(path)
    frames = np.full((3, 32, 32), 30 + 1024)
    frames[1] += 40
    ds.NumberOfFrames, ds.PixelData = 3, frames.astype("<u2").tobytes()
    ds.save_as(path)
    (patient,) = look().patients
    assert (patient.n_slices, patient.n_positive_slices) == (3, 1)
    assert patient.worst_slice_file == "IM1.dcm#2"


# ---- what is no head, and what is hidden ---------------------------------------------------------

HEADS = "KOPF CABEZA CRÂNE UNKNOWN TRAUMA STROKE Schädel TÊTE 頭部 HEADNECK HEAD+SPINE BEHANDLUNG"
OTHERS = "CHEST Thorax LSPINE C-SPINE HÜFTE KNIE GENOU PIE ABD/PELVIS L_HAND Wirbelsäule Füße"


@pytest.mark.parametrize("word", HEADS.split())
def test_body_parts_that_may_be_a_head(write_series, write_raw, look, word):
    for path in write_series(bleed_at=1, BodyPartExamined="x"):
        write_raw(path, "BodyPartExamined", word)
    assert look().patients[0].verdict == "positive"


@pytest.mark.parametrize("word", OTHERS.split())
def test_other_body_parts_are_read_if_wanted(write_series, write_raw, look, word):
    write_series("exam/head", z=(0,))
    for path in write_series("exam/x", BodyPartExamined="x", bleed_at=1):
        write_raw(path, "BodyPartExamined", word)
    found = look()
    assert found.patients[0].verdict == "negative" and found.patients[0].complete
    assert len(found.skipped) == 4 and f"is {word}, expected a head" in found.skipped[0].reason
    assert look(any_body_part=True).patients[0].verdict == "positive"


def test_hidden_files_are_nowhere(write_series, look, tmp_path):
    for path in write_series():
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0" + bytes(200))
    for name in (".DS_Store", "Thumbs.db", "__MACOSX/._IM1.dcm", "__MACOSX/IM9.dcm"):
        (tmp_path / "exam" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "exam" / name).write_bytes(b"x")
    found = look()
    assert found.skipped == () and found.patients[0].complete
    # A list of files, as of find, may name them.
    found = look(*sorted((tmp_path / "exam").glob("*1.dcm")))
    assert [(s.file, s.lost) for s in found.skipped] == [("._IM1.dcm", False)]
    assert found.patients[0].n_slices == 1 and found.patients[0].complete


def test_what_is_not_followed_is_lost(write_series, look, tmp_path):
    write_series()
    write_series("elsewhere", z=(20,))
    (tmp_path / "exam/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "exam/again").symlink_to(tmp_path / "exam")
    found = look()
    assert found.patients[0].wording == "negative, incomplete"
    assert {s.file: s.lost for s in found.skipped} == {"again": False, "more": True}


def test_a_link_to_itself_is_skipped(write_series, look, tmp_path):
    write_series()
    (tmp_path / "exam/loop.dcm").symlink_to(tmp_path / "exam/loop.dcm")
    found = look()
    assert [(s.file, s.reason) for s in found.skipped] == [("loop.dcm", "is not a regular file.")]
    assert found.patients[0].n_slices == 4


def test_lost_files_of_nobody_known_are_those_of_the_one_beside(write_series, look, tmp_path):
    write_series("exam/a/1")
    (tmp_path / "exam/a/2").mkdir()
    (tmp_path / "exam/a/2/IM1.dcm").touch()
    assert look().patients[0].n_slices_failed == 1
    # Of whom of several, is not said.
    write_series("exam/b/1", PatientID="P2")
    (tmp_path / "exam/c").mkdir()
    shutil.move(tmp_path / "exam/a/2/IM1.dcm", tmp_path / "exam/c")
    found = look()
    assert [p.n_slices_failed for p in found.patients] == [0, 0]
    assert [(s.lost, s.patients) for s in found.skipped] == [(True, ())]


# ---- the header is read once ---------------------------------------------------------------------


def test_each_header_is_read_once(write_series, look, monkeypatch):
    paths, calls = write_series(), []
    read = elements.read_elements

    def count(file):
        calls.append(os.path.basename(file.name))
        return read(file)

    monkeypatch.setattr("ich_det2.data.dicom.header.read_elements", count)
    look()
    assert sorted(calls) == [path.name for path in paths]
