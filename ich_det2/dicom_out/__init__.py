"""A diagnosis as DICOM objects that a PACS files beside the images; extra ``dicom``.

Structured reports (TID 1500) and pictures (Secondary Capture) open in most viewers, presentation
states and key objects in some. They carry the identity of their source, since they go back to where
it came from: nothing here is written unless it is asked for, and into a folder of its own.
"""

from ..lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".write": [
            *("ALL_KINDS", "KINDS", "SR_CLASSES"),
            *("build_objects", "check_dicom_output", "write_dicom"),
        ],
        ".study": ["NoSegmentation", "StudyDiagnosis", "studies"],
    },
)
