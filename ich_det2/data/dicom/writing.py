"""HU as CT DICOM, for data that come in other formats."""

from __future__ import annotations

import io

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def encode_ct(
    hu: np.ndarray, *, name: str, series: str, height_mm: float, spacing_mm: tuple[float, float]
) -> bytes:
    """One axial slice as a CT Image Storage file.

    Args:
        hu: (H, W), rounded to whole HU; NaN becomes air.
        name, series: pseudonyms of the image and of its series; the UIDs follow from them.
        height_mm: of the slice.
        spacing_mm: of rows and of columns.

    Returns:
        The file's content.
    """
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    uid = generate_uid(entropy_srcs=["ich_det2", name])
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=["ich_det2", "series", series])
    ds.StudyInstanceUID = generate_uid(entropy_srcs=["ich_det2", "study", series])
    ds.PatientID, ds.Modality, ds.BodyPartExamined = series, "CT", "HEAD"
    ds.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    ds.ImagePositionPatient = [0, 0, round(float(height_mm), 4)]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing = [round(float(v), 6) for v in spacing_mm]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = hu.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, 0, "HU"
    ds.PixelData = (
        np.clip(np.rint(np.nan_to_num(hu, nan=-1024)), -0x8000, 0x7FFF).astype("<i2").tobytes()
    )
    ds["PixelData"].VR = "OW"
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()
