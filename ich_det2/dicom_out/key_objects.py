"""A selection of key images, by which a worklist or a viewer leads to the slices."""

from __future__ import annotations

from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument

from .codes import OF_INTEREST
from .equipment import observer, series_attributes
from .study import StudyDiagnosis


def build_key_objects(study: StudyDiagnosis) -> KeyObjectSelectionDocument:
    """The positive slices and the study's worst, with the verdict in words."""
    images = list({s.source.path: study.header(s) for s in study.shown}.values())
    return KeyObjectSelectionDocument(
        evidence=images,
        content=KeyObjectSelection(
            document_title=OF_INTEREST,
            referenced_objects=images,
            observer_device_context=observer(study),
            description=study.sentence,
        ),
        **series_attributes(study, "kos"),
    )
