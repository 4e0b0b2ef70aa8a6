"""HU as CT DICOM, for data that come in other formats."""

from __future__ import annotations

import io

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid


def make_ct(
    stored: np.ndarray, uid: UID, *, intercept: int = 0, bits: int = 16, **attributes: object
) -> Dataset:
    """One slice as a CT Image Storage data set, with its file meta information.

    Args:
        stored: (H, W), two bytes a pixel, signed or not; HU are ``stored + intercept``.
        uid: SOP Instance UID.
        intercept: Rescale Intercept.
        bits: Bits Stored.
        attributes: further ones by their keywords.
    """
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid
    ds.Modality = "CT"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = stored.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, bits, bits - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, intercept, "HU"
    ds.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return ds


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
    ds = make_ct(
        np.clip(np.rint(np.nan_to_num(hu, nan=-1024)), -0x8000, 0x7FFF).astype(np.int16),
        generate_uid(entropy_srcs=["ich_det2", name]),
        SeriesInstanceUID=generate_uid(entropy_srcs=["ich_det2", "series", series]),
        StudyInstanceUID=generate_uid(entropy_srcs=["ich_det2", "study", series]),
        PatientID=series,
        BodyPartExamined="HEAD",
        ImageType=["DERIVED", "SECONDARY", "AXIAL"],
        ImagePositionPatient=[0, 0, round(float(height_mm), 4)],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        PixelSpacing=[round(float(v), 6) for v in spacing_mm],
    )
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()
