"""Segmentations: the masks of what was found, which viewers lay over the images and measure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentDescription
from pydicom import Dataset

from ..data.masks import decode_mask
from .codes import ABNORMAL, ARTIFICIAL_INTELLIGENCE, BRAIN, HEMORRHAGE
from .equipment import MANUFACTURER, algorithm_facts, device, series_attributes
from .study import NoSegmentation, StudyDiagnosis


def build_segmentations(study: StudyDiagnosis) -> Iterator[Segmentation]:
    """A segmentation for each series in which something was found: a segment for each class, the
    union of its masks at or above the threshold on positive slices. A series whose images differ in
    size gets one for each size, since a segmentation is of one grid.

    Raises:
        NoSegmentation: the model gives no masks, or the images do not say where they lie.
    """
    alike = defaultdict(list)
    for s in study.slices:
        if s.masks is None:
            raise NoSegmentation(
                "the model gives boxes and no masks, so there is no segmentation to write; leave"
                " out seg, or take a model with MODEL.MASK_ON True."
            )
        header = study.header(s)
        alike[header.SeriesInstanceUID, header.Rows, header.Columns].append(s)
    number = 0
    for slices in alike.values():
        headers = list({s.source.path: study.header(s) for s in slices}.values())
        pixels, names = _segments(study, slices, headers)
        if not names:
            continue
        number += 1
        try:
            built = Segmentation(
                source_images=headers,
                pixel_array=pixels,
                segmentation_type="BINARY",
                segment_descriptions=[
                    _describe(study, k, name) for k, name in enumerate(names, start=1)
                ],
                **series_attributes(study, "seg", number),
                **device(study),
                content_label="ICH",
                content_description="Masks of suspected hemorrhage",
                content_creator_name="ich_det2^software",
            )
        except (AttributeError, KeyError, ValueError) as error:
            raise NoSegmentation(
                "a segmentation needs images that say where they lie (Frame of Reference UID,"
                f" Image Position and Orientation (Patient)); {str(error).rstrip('.')}."
            ) from error
        _fix_dimension_uid(built, study.uid("seg", "dimensions", number))
        yield built


def _segments(study: StudyDiagnosis, slices, headers) -> tuple[np.ndarray, list[str]]:
    """Pixels, uint8 (frames, rows, columns, segments), of the images in their order, and the names
    of the segments: the classes of which there is something."""
    first: dict[str, int] = {}  # of an image's frames
    frames = 0
    for header in headers:
        first[header.SOPInstanceUID] = frames
        frames += int(header.get("NumberOfFrames") or 1)
    threshold = study.diagnosis.threshold
    found = [
        (name, first[study.header(s).SOPInstanceUID] + (s.source.frame or 0), decode_mask(mask))
        for s in slices
        if s.verdict == "positive"
        for name, score, mask in zip(s.classes, s.scores, s.masks, strict=True)
        if score >= threshold
    ]
    names = sorted({name for name, _, mask in found if mask.any()})
    shape = frames, headers[0].Rows, headers[0].Columns, len(names)
    pixels = np.zeros(shape, dtype=np.uint8)
    for name, frame, mask in found:
        if name in names:
            pixels[frame, :, :, names.index(name)] |= mask
    return pixels, names


def _describe(study: StudyDiagnosis, number: int, name: str) -> SegmentDescription:
    named, version, parameters = algorithm_facts(study)
    return SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=ABNORMAL,
        segmented_property_type=HEMORRHAGE,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name=named,
            version=version,
            family=ARTIFICIAL_INTELLIGENCE,
            source=MANUFACTURER,
            parameters=parameters,
        ),
        tracking_uid=study.uid("seg", "segment", number, name),
        tracking_id=f"{name} {number}",
        anatomic_regions=[BRAIN],
    )


def _fix_dimension_uid(built: Dataset, uid: str) -> None:
    """The library draws it at random; the same answer shall be the same object."""
    for sequence in (built.DimensionOrganizationSequence, built.DimensionIndexSequence):
        for item in sequence:
            item.DimensionOrganizationUID = uid
