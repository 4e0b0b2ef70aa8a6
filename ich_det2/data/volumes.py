"""NIfTI volumes as axial slices, turned as a radiologist sees them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from operator import attrgetter

import nibabel as nib
import numpy as np

MAX_VOXELS = 1 << 30
"""Most voxels of a volume that is accepted; 512 x 512 x 1000 are a quarter of it."""


@dataclass(frozen=True)
class Volume:
    """A volume as a stack of slices from the feet to the head.

    Attributes:
        slices: (D, H, W); rows run to the patient's back, columns to the patient's left.
        spacing_mm: of slices, of rows, of columns.
        axes: where those of the file's voxels ran to, e.g. "LPS".
    """

    slices: np.ndarray
    spacing_mm: tuple[float, float, float]
    axes: str


def read_nifti(path: str | os.PathLike, dtype=np.float32) -> Volume:
    """Read a volume of three axes.

    Args:
        path: .nii or .nii.gz.
        dtype: of the values; whole numbers for a mask.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no NIfTI file, not three axes, too large, or damaged; the message names it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        image = nib.load(path)
        shape = [n for n in image.shape[3:] if n != 1]
        if len(image.shape) < 3 or shape or np.prod(image.shape, dtype=float) > MAX_VOXELS:
            raise ValueError(f"has the shape {image.shape}, expected three axes of a head")
        axes = "".join(str(axis) for axis in nib.aff2axcodes(image.affine))
        # RAS+: to the right, to the front, to the head.
        image = nib.as_closest_canonical(image)
        data = np.asanyarray(image.dataobj).reshape(image.shape[:3])
        x, y, z = (float(v) for v in image.header.get_zooms()[:3])
    except Exception as error:  # nibabel answers damage with many kinds of errors
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: is not a NIfTI volume of a head ({detail}).") from error
    if np.issubdtype(dtype, np.integer):
        data = np.rint(data)  # a mask with a scale holds 0.9999 for 1
    return Volume(np.ascontiguousarray(data[::-1, ::-1].T.astype(dtype)), (z, y, x), axes)


def read_with_mask(
    path: str | os.PathLike, mask_path: str | os.PathLike
) -> tuple[Volume, np.ndarray]:
    """Read a scan in HU and its mask.

    Returns:
        The scan, and int32 (D, H, W).

    Raises:
        FileNotFoundError, ValueError: as ``read_nifti``, or the two do not lie on each other.
    """
    scan, mask = read_nifti(path), read_nifti(mask_path, np.int32)
    for what in ("slices.shape", "axes"):
        own, other = (attrgetter(what)(volume) for volume in (scan, mask))
        if own != other:
            raise ValueError(
                f"{path}: the scan has the {what.split('.')[-1]} {own}, its mask {other}; save the "
                "mask with the shape and the affine of the scan."
            )
    return scan, mask.slices
