"""Head-CT DICOM: pixels in Hounsfield units (HU), windows, and slices in anatomical order.

docs/dicom.md says what is read how, what is refused, and the exact formula of the window.
"""

from .elements import is_dicom
from .header import CT_STORAGE, MAX_FRAMES, MAX_SIDE
from .identity import (
    Identity,
    group_patients,
    is_placeholder,
    patient_key,
    patient_keys,
    read_identity,
)
from .pixels import (
    AIR_HU,
    CTImage,
    check_dicom,
    read_hu,
    read_image,
    read_size,
    read_windowed,
)
from .series import (
    CTSeries,
    may_be_head,
    neighbours,
    read_place,
    read_series,
    read_spacing,
    sort_frames,
)
from .window import apply_window, window_image

__all__ = [
    "AIR_HU",
    "CT_STORAGE",
    "MAX_FRAMES",
    "MAX_SIDE",
    "CTImage",
    "CTSeries",
    "Identity",
    "apply_window",
    "check_dicom",
    "group_patients",
    "is_dicom",
    "is_placeholder",
    "may_be_head",
    "neighbours",
    "patient_key",
    "patient_keys",
    "read_hu",
    "read_identity",
    "read_image",
    "read_place",
    "read_series",
    "read_size",
    "read_spacing",
    "read_windowed",
    "sort_frames",
    "window_image",
]
