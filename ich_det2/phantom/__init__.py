"""Synthetic head CT with intracranial hemorrhage, for demonstrations and tests.

The heads are computed, not scanned: an analytic 3D model (ellipsoids, tubes and sheets, bent by
smooth random fields) is sampled slice by slice, so that neighbouring slices agree. They are a
caricature of head CT: good enough to train, evaluate and diagnose end to end, and no base for any
clinical claim.

    shapes      signed distances and random fields
    head        skull, brain, CSF and what lies around them
    bleeds      the five types of hemorrhage
    patient     slices with noise, and the boxes of what is visible in them
    dicom       CT series
    dataset     a whole VOC tree, which ``ich_det2.data.register_ich_voc`` reads

Coordinates. Patient coordinates are DICOM's, in mm: x to the patient's left, y to posterior, z to
the head (PS3.3 C.7.6.2.1.1). The head model lives in its own frame, turned and moved for every
patient, with the origin near the third ventricle. "Distance" always means a signed distance in mm,
negative inside.

Shapes in these modules:
    D: number of slices of a patient
    H, W: rows and columns of a slice (both ``size``)
    G: rows and columns of the coarser grid on which the soft tissue is computed
"""

from ..lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".bleeds": ["TYPES"],
        ".dataset": ["write_dataset"],
        ".dicom": ["write_exam"],
        ".patient": ["Lesion", "Phantom", "make_patient"],
    },
)
