"""Presentation states: boxes and scores that a viewer draws over the images it has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from highdicom import ModalityLUTTransformation
from highdicom.pr import (
    GraphicAnnotation,
    GraphicLayer,
    GraphicObject,
    GrayscaleSoftcopyPresentationState,
    SoftcopyVOILUTTransformation,
    TextObject,
)
from pydicom import Dataset

from .equipment import device, series_attributes
from .study import Finding, StudyDiagnosis

BRAIN_WINDOW = (40.0, 80.0)
"""Level and width, HU, in which the images are shown."""

_LAYER = GraphicLayer("ICH", order=1, description="Intracranial hemorrhage, found by software")
# Over the picture, in units of the displayed area.
_STRIP = (0.02, 0.01, 0.98, 0.08)


def build_presentations(study: StudyDiagnosis) -> Iterator[GrayscaleSoftcopyPresentationState]:
    """A presentation state for each series of which slices are shown, the positive ones and the
    study's worst: boxes at or above the threshold with their scores, and the slice's verdict.

    A series whose images differ in size or in their rescale values gets one for each, since a state
    shows one area, by one modality LUT. So does each file of several frames.
    """
    alike = defaultdict(list)
    for s in study.shown:
        header = study.header(s)
        rescale = _rescale(header, s.source.frame)
        file = None if s.source.frame is None else s.source.path
        key = header.SeriesInstanceUID, header.Rows, header.Columns, rescale, file
        alike[key].append(s)
    level, width = BRAIN_WINDOW
    for number, ((*_, rescale, _), slices) in enumerate(alike.items(), start=1):
        images = list({s.source.path: study.header(s) for s in slices}.values())
        state = GrayscaleSoftcopyPresentationState(
            referenced_images=images,
            **series_attributes(study, "gsps", number),
            **device(study),
            content_label="ICH",
            content_description="Boxes of suspected hemorrhage",
            content_creator_name="ich_det2^software",
            graphic_layers=[_LAYER],
            graphic_annotations=[_annotate(study, s) for s in slices],
            modality_lut_transformation=rescale and ModalityLUTTransformation(*rescale),
            voi_lut_transformations=[SoftcopyVOILUTTransformation(level, width)],
        )
        state.Laterality = ""  # type 2C, which the library leaves out
        (area,) = state.DisplayedAreaSelectionSequence
        if spacing := images[0].get("PixelSpacing"):  # where pixels are not square
            del area.PresentationPixelAspectRatio
            area.PresentationPixelSpacing = spacing
        yield state


def _rescale(header: Dataset, frame: int | None) -> tuple[float, float, str] | None:
    """Rescale Intercept, Slope and Type of an image or of a frame; None where it has none."""
    groups = [header]
    if frame is not None and "PerFrameFunctionalGroupsSequence" in header:
        groups = [
            header.PerFrameFunctionalGroupsSequence[frame],
            *header.get("SharedFunctionalGroupsSequence", ()),
            header,
        ]
    for group in groups:
        values = group.get("PixelValueTransformationSequence", [group])[0]
        slope, intercept = values.get("RescaleSlope"), values.get("RescaleIntercept")
        if slope is not None and intercept is not None:
            return float(intercept), float(slope), values.get("RescaleType") or "HU"
    return None


def _annotate(study: StudyDiagnosis, s) -> GraphicAnnotation:
    """What is drawn over a slice."""
    frame = s.source.frame
    findings = [f for f in study.findings if f.source is s]
    strip = TextObject(
        f"{s.verdict.upper()} {s.score:.3f} - research only, not for clinical use",
        units="DISPLAY",
        bounding_box=_STRIP,
        text_justification="LEFT",
    )
    return GraphicAnnotation(
        referenced_images=[study.header(s)],
        referenced_frame_number=None if frame is None else frame + 1,
        graphic_layer=_LAYER,
        graphic_objects=[_outline(f) for f in findings] or None,
        text_objects=[strip, *(_label(f, study.header(s)) for f in findings)],
    )


def _outline(finding: Finding) -> GraphicObject:
    return GraphicObject("POLYLINE", finding.corners, units="PIXEL")


def _label(finding: Finding, header: Dataset) -> TextObject:
    x, y = (float(v) for v in finding.corners[0])
    return TextObject(
        f"{finding.name} {finding.score:.2f}",
        units="PIXEL",
        anchor_point=(min(max(x, 0.0), header.Columns), min(max(y, 0.0), header.Rows)),
        anchor_point_visible=False,
    )
