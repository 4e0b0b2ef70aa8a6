"""A synthetic patient as a DICOM CT series."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID, generate_uid

from ..data.dicom.writing import make_ct
from ..files import write_atomically
from .bleeds import TYPES
from .patient import SLICE_SPACING_MM, SLICE_THICKNESS_MM, VERSION, Phantom, make_patient

GENERATOR = "ich_det2 phantom"
RESCALE_INTERCEPT = -1024


def write_exam(
    folder: str | Path, *, seed: int = 0, size: int = 256, bleeding: bool = True
) -> list[Path]:
    """Write the DICOM series of one synthetic patient.

    Args:
        folder: where to; made if need be.
        seed: of everything. Each seed is another patient, and bleeding another than healthy.
        size: rows and columns of a slice, pixels.
        bleeding: whether the patient bleeds; the type goes round with the seed, beginning with
            epidural.

    Returns:
        The files, lowest slice first.
    """
    patient = 2 * seed + (1 if bleeding else 2)
    phantom = make_patient(
        np.random.default_rng(np.random.SeedSequence([seed, patient])),
        types=[TYPES[seed % len(TYPES)]] if bleeding else [],
        size=size,
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    return write_slices(phantom, Path(folder), patient=patient, seed=f"exam {seed}")


def write_slices(phantom: Phantom, folder: Path, *, patient: int, seed: int | str) -> list[Path]:
    """Write a patient's slices into a folder that exists; returns the files, lowest first."""
    paths = []
    for index in range(len(phantom.hu)):
        path = folder / f"{patient_name(patient)}_{index + 1:03d}.dcm"
        with write_atomically(path, "wb") as file:
            ds = dicom_slice(phantom, index, patient=patient, seed=seed)
            ds.save_as(file, enforce_file_format=True)
        paths.append(path)
    return paths


def patient_name(patient: int) -> str:
    """Stem of a patient's files and PatientID, such as ``P0007``."""
    return f"P{patient:04d}"


def dicom_slice(phantom: Phantom, index: int, *, patient: int, seed: int | str) -> Dataset:
    """The CT image of one slice (CT Image IOD, PS3.3 A.3), ready to be written.

    Args:
        phantom: the patient.
        index: slice, 0 is the lowest.
        patient: number of the patient.
        seed: of the data set; part of every unique identifier.
    """

    def uid(*parts: object) -> UID:
        key = (GENERATOR, VERSION, seed, patient, phantom.hu.shape[1], *parts)
        return generate_uid(entropy_srcs=[str(part) for part in key])

    empty = "AccessionNumber ReferringPhysicianName PatientBirthDate PatientSex"
    return make_ct(
        np.clip(np.rint(phantom.hu[index]) - RESCALE_INTERCEPT, 0, 4095).astype("<u2"),
        uid("instance", index),
        intercept=RESCALE_INTERCEPT,
        bits=12,
        SpecificCharacterSet="ISO_IR 100",
        ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
        **{f"{of}Date": "20000101" for of in ("Study", "Series", "Acquisition", "Content")},
        **{f"{of}Time": "120000" for of in ("Study", "Series", "Acquisition", "Content")},
        **dict.fromkeys([*empty.split(), "PositionReferenceIndicator"], ""),
        Manufacturer=GENERATOR,
        StudyDescription="Synthetic head, not a patient",
        SeriesDescription="Head, plain",
        ManufacturerModelName=f"prepare_phantom {VERSION}",
        PatientName=f"PHANTOM^{patient:04d}",
        PatientID=patient_name(patient),
        PatientIdentityRemoved="YES",
        DeidentificationMethod="Synthetic, computed from a seed",
        BodyPartExamined="HEAD",
        SliceThickness=SLICE_THICKNESS_MM,
        KVP=120,
        SpacingBetweenSlices=SLICE_SPACING_MM,
        ReconstructionDiameter=round(phantom.pixel_mm * phantom.hu.shape[2], 3),
        GantryDetectorTilt=0,
        ConvolutionKernel=phantom.kernel,
        PatientPosition="HFS",
        StudyInstanceUID=uid("study"),
        SeriesInstanceUID=uid("series"),
        StudyID="1",
        SeriesNumber=1,
        AcquisitionNumber=1,
        InstanceNumber=index + 1,
        ImagePositionPatient=[float(v) for v in phantom.position_mm[index]],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        FrameOfReferenceUID=uid("frame"),
        SliceLocation=float(phantom.position_mm[index, 2]),
        PixelSpacing=[phantom.pixel_mm, phantom.pixel_mm],
        WindowCenter=40,
        WindowWidth=80,
    )
