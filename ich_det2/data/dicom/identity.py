"""Whose slice a file is: the one rule that tells patients apart.

A patient is a Patient ID. Where it is missing, a placeholder that an anonymizer left (ANONYMOUS,
000000), or one under which headers name different people, each study is taken for a patient.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .elements import Attributes
from .header import naming, printable, read_headers

_PLACEHOLDERS = frozenset(
    """ANON ANONYM ANONYME ANONYMISE ANONYMISED ANONYMISIERT ANONYMIZED ANONYMOUS ANONYMUS ANONIM
    ANONIMATO ANONIMIZADO ANONIMIZZATO ANONIMO ANONYMIZE BLANK CASE CONFIDENTIAL DEFAULT DEID
    DEIDENTIFIED DELETED DEMO DESCONOCIDO DUMMY EMPTY EXAMPLE HIDDEN ID IDENTIFIED INCONNU MASKED
    MRN NA NAME NAN NEW NIL NO NONE NOT AVAILABLE APPLICABLE GIVEN KNOWN SPECIFIED NOBODY NOID
    NONAME NULL PACIENTE PAT PATIENT PATIENTID PATIENTNAME PAZIENTE PHI PID PRIVATE PSEUDONYM
    REDACTED REMOVED SCONOSCIUTO SUBJECT TBD TEMP TEST TESTPATIENT UNBEKANNT UNDEFINED UNIDENTIFIED
    UNK UNKNOWN UNNAMED UNSPECIFIED UNDISCLOSED DE OF THE 匿名 不明""".split()
)
_FILLERS = re.compile(r"0+|X+|(\d)\1{4,}|1234567?8?9?0?|0123456789?")


@dataclass(frozen=True)
class Identity:
    """What a header says of whose image it holds; empty where it does not."""

    patient_id: str = ""
    study_uid: str = ""
    series_uid: str = ""
    sop_uid: str = ""
    name: str = ""
    birth_date: str = ""
    sex: str = ""

    @classmethod
    def of(cls, values: Attributes) -> Identity:
        """Out of the values of a header."""
        uids = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
        person = ("PatientName", "PatientBirthDate", "PatientSex")
        return cls(*map(values.text, ("PatientID", *uids, *person)))


def is_placeholder(patient_id: str) -> bool:
    """Whether a Patient ID or Name is empty, or what stands where one was taken out."""
    found = words(patient_id)
    return (
        all(word in _PLACEHOLDERS or _FILLERS.fullmatch(word) for word in found)
        or "".join(found) in _PLACEHOLDERS
        or " ".join(found) == "N A"
    )


def patient_key(identity: Identity) -> str:
    """What stands for the patient of one image: the Patient ID, or the study (or else the series)
    where it is missing or a placeholder; empty where the header says nothing."""
    own = "" if is_placeholder(identity.patient_id) else identity.patient_id
    return own or identity.study_uid or identity.series_uid


def group_patients(
    identities: Sequence[Identity], *, identify: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Tells the patients of many images apart.

    Args:
        identities: of N images.
        identify: name Patient IDs in warnings; placeholders are named in any case.

    Returns:
        The ``patient_key`` of each image, where one Patient ID has people of different name, birth
        date or sex that of the study; and a warning for each key that was made so.
    """
    keys = [patient_key(identity) for identity in identities]
    warnings: dict[str, str] = {}
    by_id: dict[str, list[int]] = defaultdict(list)
    for i, identity in enumerate(identities):
        by_id[identity.patient_id].append(i)
    for patient_id, images in sorted(by_id.items()):
        people = [identities[i] for i in images]
        if patient_id and is_placeholder(patient_id):
            reason = f"Patient ID '{printable(patient_id)}' is a placeholder"
        elif patient_id and (differing := _differences(people)):
            named = f"Patient ID '{printable(patient_id)}'" if identify else "one Patient ID"
            reason = f"{named} has different {differing}"
            for i in images:
                keys[i] = identities[i].study_uid or identities[i].series_uid or keys[i]
        else:
            continue
        # An anonymizer may have given all studies one UID, too.
        for study in {keys[i] for i in images}:
            same = [i for i in images if keys[i] == study]
            if _differences([identities[i] for i in same]):
                for i in same:
                    keys[i] = f"{study}-{_digest(identities[i])}"
        apart = sorted({keys[i] for i in images})
        if len(apart) > 1:
            warnings |= dict.fromkeys(apart, f"{reason}: taken for {len(apart)} patients, by study")
    return keys, warnings


def patient_keys(
    paths: Iterable[str | os.PathLike], *, identify: bool = False
) -> tuple[dict[Path, str], list[str]]:
    """Tells the patients of DICOM files apart, as ``group_patients``.

    Returns:
        The key of each path, and warnings that a person should read.

    Raises:
        FileNotFoundError, ValueError: as ``read_hu``.
    """
    files = [Path(path) for path in paths]
    keys, warnings = group_patients([_read(path) for path in files], identify=identify)
    return dict(zip(files, keys, strict=True)), sorted(set(warnings.values()))


def read_identity(path: str | os.PathLike) -> tuple[str, str, str]:
    """Read whose slice a file is; as identifying as the file, so store only pseudonyms of it.

    Args:
        path: a DICOM file.

    Returns:
        ``(patient_id, study_uid, sop_uid)``; empty strings where the file does not say. A
        placeholder does not say who it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as ``read_hu``.
    """
    found = _read(path)
    own = "" if is_placeholder(found.patient_id) else found.patient_id
    return own, found.study_uid, found.sop_uid


def _read(path: str | os.PathLike) -> Identity:
    with naming(path), open(path, "rb") as file:
        return Identity.of(read_headers(file)[0].values)


def words(value: str) -> list[str]:
    """The words of a free text, in capitals without accents."""
    plain = unicodedata.normalize("NFKD", value.upper())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return re.findall(r"[^\W_]+", plain)


def _differences(people: Sequence[Identity]) -> str:
    """Which attributes show that images are of several people; empty if none does."""
    names = {frozenset(words(p.name)) for p in people if not is_placeholder(p.name)}
    births = {p.birth_date for p in people if re.fullmatch(r"(?!0|19000101)\d{8}", p.birth_date)}
    sexes = {p.sex.upper() for p in people} & {"M", "F"}
    # DOE^JOHN and DOE^JOHN^^DR are one.
    differ = any(not (a <= b or b <= a) for a in names for b in names)
    found = {"Patient Names": differ, "birth dates": len(births) > 1, "sexes": len(sexes) > 1}
    return " and ".join(name for name, different in found.items() if different)


def _digest(identity: Identity) -> str:
    person = "|".join([*sorted(words(identity.name)), identity.birth_date, identity.sex])
    return hashlib.sha256(person.encode()).hexdigest()[:12]
