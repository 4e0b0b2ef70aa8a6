"""Head-CT DICOM: pixels in Hounsfield units (HU), windows, and slices in anatomical order.

docs/dicom.md says what is read how, what is refused, and the exact formula of the window.
"""

from .body_part import may_be_head
from .elements import is_dicom
from .header import CT_STORAGE, MAX_FRAMES, MAX_SIDE, printable
from .identity import (
    Identity,
    group_patients,
    is_placeholder,
    patient_key,
    patient_keys,
    read_identity,
)
from .pixels import AIR_HU, check_dicom, read_hu, read_size, read_windowed
from .series import (
    CTFile,
    CTSeries,
    Finding,
    evenly_spaced,
    find_gaps,
    group_series,
    neighbours,
    pixel_ratio,
    read_file,
    read_place,
    read_plane,
    read_series,
    read_spacing,
)
from .window import apply_window, window_image

__all__ = [
    "AIR_HU",
    "CT_STORAGE",
    "MAX_FRAMES",
    "MAX_SIDE",
    "CTFile",
    "CTSeries",
    "Finding",
    "Identity",
    "apply_window",
    "check_dicom",
    "evenly_spaced",
    "group_patients",
    "find_gaps",
    "group_series",
    "is_dicom",
    "is_placeholder",
    "may_be_head",
    "neighbours",
    "patient_key",
    "patient_keys",
    "pixel_ratio",
    "printable",
    "read_file",
    "read_hu",
    "read_identity",
    "read_place",
    "read_plane",
    "read_series",
    "read_size",
    "read_spacing",
    "read_windowed",
    "window_image",
]
