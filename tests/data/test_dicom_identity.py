"""Patients told apart: placeholders, IDs that hold several people, and DICOM by its content."""

import numpy as np
import pydicom
import pytest
from pydicom.uid import ImplicitVRLittleEndian

from ich_det2.data.dicom import (
    Identity,
    group_patients,
    is_dicom,
    is_placeholder,
    patient_key,
    patient_keys,
    read_identity,
)


@pytest.mark.parametrize(
    "word",
    "|ANONYMOUS|Anonymous^Patient|anon|0|000000|DE-IDENTIFIED|N/A|XXXX|xxx-xxx|NONE|TEST|---|Anónimo"
    "|not available|no id|99999|123456|PATIENT|匿名|?".split("|"),
)
def test_placeholders(word):
    assert is_placeholder(word)
    assert patient_key(Identity(word, "1.2")) == "1.2"


@pytest.mark.parametrize("word", "ANON01|P1|1|12|PID47|NOTT|X1|Patient 3|1111|TEST12".split("|"))
def test_pseudonyms_are_no_placeholders(word):
    assert patient_key(Identity(word, "1.2")) == word


def people(*names, patient="A1", **attributes):
    return [
        Identity(patient, f"1.{i}", name=name, **{k: v[i] for k, v in attributes.items()})
        for i, name in enumerate(names)
    ]


def test_spellings_of_one_person():
    keys, warnings = group_patients(people("DOE^JOHN", "Doe^John^^Dr", "", "ANONYMOUS"))
    assert keys == ["A1"] * 4 and warnings == {}


@pytest.mark.parametrize(
    "people, what",
    [
        (people("DOE^JOHN", "ROE^JANE"), "Patient Names"),
        (people("", "", birth_date=("19500101", "19600101")), "birth dates"),
        (people("DOE^A", "DOE^A", sex=("F", "M")), "sexes"),
    ],
)
def test_people_of_one_id_are_told_apart(people, what):
    keys, warnings = group_patients(people)
    assert keys == list(warnings) == ["1.0", "1.1"]
    (warning,) = set(warnings.values())
    assert warning == f"one Patient ID has different {what}: taken for 2 patients, by study"
    _, warnings = group_patients(people, identify=True)
    assert warnings["1.0"].startswith("Patient ID 'A1' has")


def test_people_of_one_study_uid():
    same = [Identity("ANONYMOUS", "1", name=name) for name in ("DOE^J", "ROE^J", "DOE^J")]
    (a, b, c), warnings = group_patients(same)
    assert a == c != b and "DOE" not in a + b
    assert "Patient ID 'ANONYMOUS' is a placeholder" in warnings[a]


def test_of_files(tmp_path, write_ct):
    for name, patient, study in (("a", "ANON", "1.1"), ("b", "ANON", "1.2"), ("c", "P7", "1.3")):
        write_ct(tmp_path / name, np.zeros((4, 4)), PatientID=patient, StudyInstanceUID=study)
    keys, (warning,) = patient_keys([tmp_path / name for name in "abc"])
    assert {path.name: key for path, key in keys.items()} == {"a": "1.1", "b": "1.2", "c": "P7"}
    assert warning == "Patient ID 'ANON' is a placeholder: taken for 2 patients, by study"
    assert read_identity(tmp_path / "a")[:2] == ("", "1.1")


def test_dicom_is_known_by_its_content(tmp_path, write_ct):
    path = write_ct(tmp_path / "IM1.png", np.zeros((4, 4)))
    assert is_dicom(path)
    whole, ds = path.read_bytes(), pydicom.dcmread(path)
    path.write_bytes(whole[132:])  # begins with the file meta information
    assert is_dicom(path)
    for implicit in (False, True):
        bare = pydicom.Dataset(ds)
        bare.save_as(path, implicit_vr=implicit, little_endian=True)
        assert path.read_bytes()[128:132] != b"DICM" and is_dicom(path)
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    for content in (b"", b"DICM", b"text " * 50, bytes(300), b"\0\5\x16\7\0\2\0\0" + bytes(300)):
        path.write_bytes(content)
        assert not is_dicom(path)
    assert not is_dicom(tmp_path) and not is_dicom(tmp_path / "none")
