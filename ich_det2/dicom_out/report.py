"""A structured report: the verdict of a study and its boxes (TID 1500)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from highdicom.sr import (
    CodeContentItem,
    Comprehensive3DSR,
    ComprehensiveSR,
    ContainerContentItem,
    FindingSite,
    ImageContentItem,
    ImageRegion,
    Measurement,
    MeasurementReport,
    ObservationContext,
    PlanarROIMeasurementsAndQualitativeEvaluations,
    SourceImageForRegion,
    TextContentItem,
    TrackingIdentifier,
)
from highdicom.sr.value_types import ContentSequence
from pydicom import Dataset
from pydicom.sr.codedict import codes

from .codes import (
    ABNORMAL,
    BRAIN,
    CERTAINTY,
    COMMENT,
    CT_OF_HEAD,
    HEMORRHAGE,
    PERCENT,
    QUALITATIVE_EVALUATIONS,
    SOURCE,
    VERDICTS,
)
from .equipment import algorithm, device, observer, series_attributes
from .study import Finding, StudyDiagnosis

if TYPE_CHECKING:
    from ..inference.results import SliceDiagnosis

_CLASSES = {"3d": Comprehensive3DSR, "comprehensive": ComprehensiveSR}

MAX_FINDINGS = 100
"""Boxes in a report, the strongest: viewers choke on hundreds. The text says how many there are."""


def build_report(
    study: StudyDiagnosis, sr_class: str = "3d", previous: Sequence[Dataset] = ()
) -> Comprehensive3DSR | ComprehensiveSR:
    """A report with a measurement group for each box: a closed polyline on its slice and the score
    as certainty; and the verdict as a qualitative evaluation, in code and in words, with references
    to the positive slices of which no box is in the report.

    Args:
        study: to report.
        sr_class: "3d" or "comprehensive".
        previous: reports of the same study that this one takes the place of.
    """
    shown = study.findings[:MAX_FINDINGS]
    groups = [_group(study, finding, i) for i, finding in enumerate(shown, start=1)]
    content = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=observer(study)),
        procedure_reported=CT_OF_HEAD,
        title=codes.DCM.ImagingMeasurementReport,
        # The library insists on a group, which a report without boxes must not have.
        imaging_measurements=groups or [_placeholder(study)],
    )[0]
    if not groups:
        del content.ContentSequence[-1]
    content.ContentSequence.append(_verdict(study, shown))
    return _CLASSES[sr_class](
        evidence=study.headers,
        content=content,
        **series_attributes(study, "sr", part=sr_class),
        **device(study),
        is_complete=True,
        is_final=False,
        performed_procedure_codes=[CT_OF_HEAD],
        previous_versions=list(previous) or None,
        record_evidence=True,
        transfer_syntax_uid="1.2.840.10008.1.2.1",
    )


def _group(
    study: StudyDiagnosis, finding: Finding, number: int
) -> PlanarROIMeasurementsAndQualitativeEvaluations:
    """A box, for TID 1410."""
    header, frame = study.header(finding.source), finding.source.source.frame
    return PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(
            uid=study.uid("finding", number), identifier=f"{finding.name} {number}"
        ),
        referenced_region=ImageRegion(
            graphic_type="POLYLINE",
            graphic_data=finding.corners,
            source_image=SourceImageForRegion(
                header.SOPClassUID,
                header.SOPInstanceUID,
                referenced_frame_numbers=None if frame is None else [frame + 1],
            ),
        ),
        finding_category=ABNORMAL,
        finding_type=HEMORRHAGE,
        finding_sites=[FindingSite(BRAIN)],
        algorithm_id=algorithm(study),
        measurements=[Measurement(CERTAINTY, round(100 * finding.score, 4), PERCENT)],
    )


def _placeholder(study: StudyDiagnosis) -> PlanarROIMeasurementsAndQualitativeEvaluations:
    box = study.worst.boxes[0] if len(study.worst.boxes) else (0, 0, 1, 1)
    return _group(study, Finding(study.worst, box, 0.0, "none"), 0)


def _verdict(study: StudyDiagnosis, shown: Sequence[Finding]) -> ContainerContentItem:
    """TID 1500's row of qualitative evaluations, which the library does not write."""
    sentence, n_found = study.sentence, len(study.findings)
    if n_found > len(shown):
        sentence += f" The {len(shown)} highest scored of {n_found} boxes are in this report."
    code = CodeContentItem(HEMORRHAGE, VERDICTS[study.verdict], relationship_type="CONTAINS")
    if others := [s for s in study.positive if all(f.source is not s for f in shown)]:
        sentence += f" {len(others)} positive slice(s) without a box here are referenced."
        code.ContentSequence = ContentSequence(_reference(study, s) for s in others)
    container = ContainerContentItem(QUALITATIVE_EVALUATIONS, relationship_type="CONTAINS")
    container.ContentSequence = ContentSequence(
        [code, TextContentItem(COMMENT, sentence, relationship_type="CONTAINS")]
    )
    return container


def _reference(study: StudyDiagnosis, s: SliceDiagnosis) -> ImageContentItem:
    """A slice that a verdict was inferred from."""
    header, frame = study.header(s), s.source.frame
    return ImageContentItem(
        SOURCE,
        header.SOPClassUID,
        header.SOPInstanceUID,
        referenced_frame_numbers=None if frame is None else [frame + 1],
        relationship_type="INFERRED FROM",
    )
