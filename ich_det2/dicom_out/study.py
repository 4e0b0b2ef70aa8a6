"""What a diagnosis says of one study, and the headers of its images.

Everything that is written for a PACS is about a study; a diagnosis is about patients, who may have
several.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pydicom
from pydicom.datadict import dictionary_has_tag, dictionary_VM
from pydicom.multival import MultiValue
from pydicom.valuerep import DA, TM, format_number_as_ds

from ..evaluation.diagnosis import patient_scores
from ..version import __version__

if TYPE_CHECKING:
    from ..inference.results import Diagnosis, PatientDiagnosis, SliceDiagnosis

NOTICE = "Research only, not for clinical use"
"""Stands in the pixels, the texts and the series descriptions of all that is written."""

# Type 2 of the patient and the study: they have to be there, and may be empty.
_TYPE_2 = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"),
    *("StudyDate", "StudyTime", "ReferringPhysicianName"),
)

_IDENTIFIERS = ("PatientID", "AccessionNumber", "StudyID")


class NoSegmentation(ValueError):
    """There can be no segmentation of a study, in one sentence why."""


@dataclass(frozen=True)
class Finding:
    """A box at or above the threshold, on a positive slice.

    Attributes:
        source: the slice it is on.
        box: float32 (4,): x0, y0, x1, y1 in pixels of the image, edges, 0-based. DICOM's graphics
            have the same origin, the upper left corner of the first pixel.
        score: 0 to 1.
        name: of its class.
    """

    source: SliceDiagnosis
    box: np.ndarray = field(repr=False)
    score: float
    name: str

    @property
    def corners(self) -> np.ndarray:
        """A closed polyline, float32 (5, 2): column and row of its points."""
        x0, y0, x1, y1 = self.box
        return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)], np.float32)


@dataclass(frozen=True)
class StudyDiagnosis:
    """What was found in a study.

    Attributes:
        diagnosis: that it is a part of.
        patient: whose study it is.
        study_uid: Study Instance UID.
        slices: by series and index.
    """

    diagnosis: Diagnosis = field(repr=False)
    patient: PatientDiagnosis
    study_uid: str
    slices: tuple[SliceDiagnosis, ...] = field(repr=False)

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """The boxes at or above the threshold on positive slices, strongest first.

        Scores of slices and of boxes are smoothed apart, so a negative slice may have such a box,
        which is then no more than one below the threshold.
        """
        found = [
            Finding(s, box, float(score), name)
            for s in self.positive
            for box, score, name in zip(s.boxes, s.scores, s.classes, strict=True)
            if score >= self.diagnosis.threshold
        ]
        return tuple(sorted(found, key=lambda f: -f.score))

    @cached_property
    def positive(self) -> tuple[SliceDiagnosis, ...]:
        """The slices at or above the threshold."""
        return tuple(s for s in self.slices if s.verdict == "positive")

    @cached_property
    def worst(self) -> SliceDiagnosis:
        """The slice of the highest score."""
        return max(self.slices, key=lambda s: s.score)

    @cached_property
    def shown(self) -> tuple[SliceDiagnosis, ...]:
        """The slices that a reader should look at: the positive ones and the worst."""
        return tuple(s for s in self.slices if s.verdict == "positive" or s is self.worst)

    @cached_property
    def score(self) -> float:
        """By the model's patient rule, over the study's slices; -inf where they are too few."""
        scores = [s.score for s in self.slices]
        rule = self.diagnosis.model.get("patient_rule", "any")
        return float(patient_scores([0] * len(scores), scores, 1, rule)[0])

    @property
    def n_lost(self) -> int:
        """Slices of the patient that were not read, or seem to be missing."""
        return self.patient.n_slices_failed + self.patient.n_slices_missing

    @property
    def verdict(self) -> str:
        """ "present", "absent", or "undetermined": where the study is not positive a bleed may hide
        in a slice that was not read, or be on one that is positive alone where the patient rule
        asks for more."""
        if self.score >= self.diagnosis.threshold:
            return "present"
        return "absent" if not self._doubts else "undetermined"

    @property
    def _doubts(self) -> str:
        """Why a study that is not positive is not negative either."""
        if self.n_lost or not np.isfinite(self.score):
            return "but the study is INCOMPLETE"
        return f"but {len(self.positive)} slice(s) are POSITIVE" if self.positive else ""

    @property
    def sentence(self) -> str:
        """The verdict for a person, without identities."""
        verdict = {
            "present": "Intracranial hemorrhage: suspected",
            "absent": "Intracranial hemorrhage: not found",
            "undetermined": f"Intracranial hemorrhage: not found, {self._doubts}",
        }[self.verdict]
        lost = f", {self.n_lost} not read or missing" if self.n_lost else ""
        score = f"score {self.score:.3f}, " if np.isfinite(self.score) else ""
        return (
            f"{verdict} ({score}threshold {self.diagnosis.threshold:.3g}; {len(self.slices)} slices"
            f" read{lost}). {NOTICE}: a negative verdict does not exclude a hemorrhage."
        )

    @cached_property
    def _headers(self) -> dict[Path, pydicom.Dataset]:
        headers = {}
        for s in self.slices:
            path = s.source.path
            if path not in headers:
                headers[path] = read_header(path)
                if not headers[path].SOPClassUID:
                    raise ValueError(f"{s.file}: has no SOP Class UID, so nothing can refer to it.")
        return headers

    def header(self, of: SliceDiagnosis) -> pydicom.Dataset:
        """The header of a slice's image, complete enough to be referenced."""
        return self._headers[of.source.path]

    @property
    def headers(self) -> list[pydicom.Dataset]:
        """Of all images of the study that were read, each once."""
        return list(self._headers.values())

    def uid(self, *what: str | int) -> str:
        """A UID that is the same whenever the same model says the same of the same images of the
        same patient, so that an object which is sent twice is one object (PS3.5, B.2), and one that
        says anything else, such as of a corrected Patient ID, is another."""
        model = self.diagnosis.model.get("sha256", "")
        images = sorted(f"{s.source.identity.sop_uid}#{s.source.frame}" for s in self.slices)
        whose = [str(self.headers[0].get(keyword, "")) for keyword in _TYPE_2]
        # As engines round alike.
        found = [f"{f.source.source.identity.sop_uid} {f.score:.3f}" for f in self.findings]
        found += [f"{s.source.identity.sop_uid}#{s.source.frame} positive" for s in self.positive]
        told = (
            __version__,
            model,
            repr(self.diagnosis.threshold),
            self.sentence,
            *whose,
            *images,
            *sorted(found),
            *what,
        )
        digest = hashlib.sha256("\n".join(map(str, (self.study_uid, *told))).encode()).digest()
        return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def studies(diagnosis: Diagnosis) -> Iterator[StudyDiagnosis]:
    """The studies of a diagnosis.

    Raises:
        ValueError: naming a slice that is no DICOM file, or has no study or series of its own.
    """
    patients = {p.patient: p for p in diagnosis.patients}
    found: dict[tuple[str, str], list[SliceDiagnosis]] = defaultdict(list)
    for s in diagnosis.slices:
        own = s.source.identity
        if not (own.study_uid and own.series_uid and own.sop_uid):
            raise ValueError(
                f"{s.file}: has no Study, Series or SOP Instance UID, so no result can be filed"
                " beside it in a PACS; give the DICOM files of the study."
            )
        found[s.patient, s.source.identity.study_uid].append(s)
    for (patient, study_uid), slices in found.items():
        yield StudyDiagnosis(diagnosis, patients[patient], study_uid, tuple(slices))


def read_header(path: Path) -> pydicom.Dataset:
    """The header of an image, with what the standard asks of it and some scanners leave out."""
    header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
    _fit(header)
    header.decode()
    header.SpecificCharacterSet = "ISO_IR 192"
    if not header.get("SOPClassUID"):
        header.SOPClassUID = header.file_meta.get("MediaStorageSOPClassUID", "")
    for keyword in _TYPE_2:
        if keyword not in header or header[keyword].value is None:
            setattr(header, keyword, "")
    if header.PatientSex not in ("M", "F", "O"):
        header.PatientSex = ""
    # Type 1C: it says how identities were removed, where they were.
    if "DeidentificationMethod" in header and not header.DeidentificationMethod:
        del header.DeidentificationMethod
    if header.get("PatientIdentityRemoved") == "YES" and not (
        header.get("DeidentificationMethod") or header.get("DeidentificationMethodCodeSequence")
    ):
        header.DeidentificationMethod = "Unknown"
    return header


def _fit(header: pydicom.Dataset) -> None:
    """Makes values what their VR and multiplicity allow (PS3.5, 6.2); those that cannot be read are
    taken out."""
    for tag in list(header.keys()):
        try:
            element = header[tag]
        except Exception:  # whatever pydicom raises on damage
            del header[tag]
            continue
        if element.VR == "SQ":
            for item in element.value:
                _fit(item)
            continue
        if element.is_empty or tag.is_private:
            continue
        value = element.value
        if dictionary_has_tag(tag) and dictionary_VM(tag) == "1" and isinstance(value, MultiValue):
            value = value[0]
        if element.VR in _FITTING:
            fit = partial(_FITTING[element.VR], element.keyword)
            value = [fit(v) for v in value] if isinstance(value, MultiValue) else fit(value)
        if value != element.value or str(value) != str(element.value):
            header[tag] = pydicom.DataElement(tag, element.VR, value)


def _cut(keyword: str, value: str, length: int) -> str:
    """A text of a length; a part of an identifier would be another's."""
    return value if len(value) <= length else "" if keyword in _IDENTIFIERS else value[:length]


def _person(keyword: str, value) -> str:
    """Up to three groups of components of 64 characters each."""
    return "=".join(group[:64] for group in str(value).split("=")[:3])


def _date(keyword: str, value) -> str:
    """YYYYMMDD, also of YYYY.MM.DD, which was DICOM's before 1993."""
    text = re.sub(r"^(\d{4})\.(\d\d)\.(\d\d)$", r"\1\2\3", str(value).strip())
    return text if _is(DA, text) and len(text) == 8 else ""


def _time(keyword: str, value) -> str:
    """HHMMSS.FFFFFF, also of HH:MM:SS."""
    text = str(value).strip().replace(":", "")
    return text if _is(TM, text) else ""


def _is(kind: type, text: str) -> bool:
    try:
        return kind(text) is not None
    except ValueError:
        return False


def _age(keyword: str, value) -> str:
    text = str(value).strip().upper().zfill(4)
    return text if re.fullmatch(r"\d{3}[DWMY]", text) else ""


def _decimal(keyword: str, value) -> str:
    text = str(value).strip()
    return text if len(text) <= 16 else format_number_as_ds(float(value))


_FITTING = {
    "SH": lambda keyword, value: _cut(keyword, str(value), 16),
    "LO": lambda keyword, value: _cut(keyword, str(value), 64),
    "PN": _person,
    "DA": _date,
    "TM": _time,
    "AS": _age,
    "DS": _decimal,
}
