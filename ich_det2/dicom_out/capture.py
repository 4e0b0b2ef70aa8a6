"""Pictures for every viewer: colour Secondary Capture of the slices that a reader should see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from highdicom.sc import SCImage
from highdicom.spatial import get_closest_patient_orientation
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from .equipment import device, series_attributes
from .study import NOTICE, StudyDiagnosis

if TYPE_CHECKING:
    from ..inference.results import SliceDiagnosis

_COPIED = (
    *("StudyDescription", "PatientIdentityRemoved", "DeidentificationMethod"),
    *("DeidentificationMethodCodeSequence", "PatientAge", "FrameOfReferenceUID"),
)


def build_captures(study: StudyDiagnosis) -> Iterator[SCImage]:
    """The positive slices and the study's worst with their boxes, score and verdict as pixels."""
    for number, s in enumerate(study.shown, start=1):
        header = study.header(s)
        picture = SCImage.from_ref_dataset(
            header,
            pixel_array=study.diagnosis.draw(_faint(study, s), _caption(header, s.source.frame)),
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=_orientation(header, s.source.frame),
            transfer_syntax_uid=ExplicitVRLittleEndian,
            **series_attributes(study, "sc", number),
            **device(study),
        )
        # The library takes over less of the study than a PACS files by.
        for keyword in _COPIED:
            if keyword in header:
                picture.add(header[keyword])
        picture.Laterality = ""
        picture.BurnedInAnnotation = "NO"  # of an identity
        picture.DerivationDescription = f"Boxes of suspected hemorrhage. {NOTICE}."
        source = Dataset()
        source.ReferencedSOPClassUID = header.SOPClassUID
        source.ReferencedSOPInstanceUID = header.SOPInstanceUID
        if s.source.frame is not None:
            source.ReferencedFrameNumber = s.source.frame + 1
        picture.SourceImageSequence = [source]
        yield picture


def _faint(study: StudyDiagnosis, s: SliceDiagnosis) -> SliceDiagnosis:
    """A slice as it is to be drawn: a box on a negative one is no finding, whatever its score."""
    if s.verdict == "positive":
        return s
    below = np.nextafter(study.diagnosis.threshold, -np.inf)
    return replace(s, scores=np.minimum(s.scores, below))


def _caption(header: Dataset, frame: int | None) -> str:
    """Which image it is, in the numbers that a viewer shows."""
    frame = "" if frame is None else f"   frame {frame + 1}"
    return (
        f"series {header.get('SeriesNumber', '')}   image {header.get('InstanceNumber', '')}{frame}"
    )


def _orientation(header: Dataset, frame: int | None) -> tuple[str, str]:
    """Where the rows and the columns of an image point to, in letters, such as L and P.

    That of an axial slice of a patient on the back, where the header does not say.
    """
    groups = [header]
    if frame is not None and "PerFrameFunctionalGroupsSequence" in header:
        groups = [
            header.PerFrameFunctionalGroupsSequence[frame],
            *header.get("SharedFunctionalGroupsSequence", ()),
        ]
    for group in groups:
        plane = group.get("PlaneOrientationSequence", [group])[0]
        if cosines := plane.get("ImageOrientationPatient"):
            along = np.array(cosines, float).reshape(2, 3)
            normal = np.cross(*along)
            letters = get_closest_patient_orientation(np.column_stack([*along, normal]))
            return letters[0].value, letters[1].value
    return "L", "P"
