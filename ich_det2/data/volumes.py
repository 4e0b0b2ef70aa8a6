"""NIfTI volumes as axial slices, turned as a radiologist sees them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

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
        affine: from voxels, in the order right, front, head, to mm; float (4, 4).
        guessed: why the orientation is a guess; empty if the file says it.
    """

    slices: np.ndarray
    spacing_mm: tuple[float, float, float]
    axes: str
    affine: np.ndarray
    guessed: str = ""


def read_nifti(path: str | os.PathLike, dtype=np.float32) -> Volume:
    """Read a volume of three axes.

    Args:
        path: .nii or .nii.gz.
        dtype: of the values; whole numbers for a mask.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no NIfTI file, not three axes, too large, damaged, colours, or of values that
            are no whole numbers where those are wanted; the message names it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        image: Any = nib.load(path)
        shape = [n for n in image.shape[3:] if n != 1]
        if len(image.shape) < 3 or shape or math.prod(image.shape) > MAX_VOXELS:
            raise ValueError(f"has the shape {image.shape}, expected three axes of a head")
        axes = "".join(str(axis) for axis in nib.aff2axcodes(image.affine))
        guessed = _doubt(image)
        # RAS+: to the right, to the front, to the head.
        image = nib.as_closest_canonical(image)
        data = np.asanyarray(image.dataobj).reshape(image.shape[:3])
        if data.dtype.fields or not np.issubdtype(data.dtype, np.number) or np.iscomplexobj(data):
            raise ValueError(f"holds {data.dtype.names or data.dtype}, expected one number a voxel")
        x, y, z = (float(v) for v in image.header.get_zooms()[:3])
        if np.issubdtype(dtype, np.integer):
            whole = np.rint(data)  # a mask with a scale holds 0.9999 for 1
            if not np.isfinite(data).all() or np.abs(data - whole).max(initial=0) > 0.01:
                raise ValueError("holds fractions or NaN, expected a mask of whole numbers")
            data = whole
    except Exception as error:  # nibabel answers damage with many kinds of errors
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: is not a NIfTI volume of a head ({detail}).") from error
    slices = np.ascontiguousarray(data[::-1, ::-1].T.astype(dtype))
    return Volume(slices, (z, y, x), axes, np.asarray(image.affine), guessed)


def _doubt(image) -> str:
    """Why the orientation that an image's affine says may not be that of the patient."""
    header = image.header
    codes = [int(header[key]) for key in ("sform_code", "qform_code") if key in header]
    if codes and not any(codes):
        return "its header gives no orientation (sform and qform codes are 0)"
    if np.allclose(image.affine[:3, :3], np.eye(3)):
        return "its affine is the identity, which a converter leaves where it does not know"
    return ""


def write_stack(path: str | os.PathLike, slices: np.ndarray, steps_mm: np.ndarray) -> None:
    """Write slices as a NIfTI volume, voxels in the order in which the slices have them.

    Args:
        path: .nii.gz or .nii.
        slices: (D, H, W).
        steps_mm: (3, 4), mm to the patient's left, to the back and to the head: from a column to
            the next, from a row, from a slice, and the middle of the first voxel.
    """
    affine = np.vstack([steps_mm, [0, 0, 0, 1]])
    affine[:2] *= -1  # NIfTI's axes run to the right and to the front
    image = nib.Nifti1Image(np.ascontiguousarray(slices.T), affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def read_stack(path: str | os.PathLike, like: str | os.PathLike) -> np.ndarray:
    """Read a mask of a volume of :func:`write_stack`, slice by slice as that has them.

    Args:
        path: .nii.gz or .nii; its axes may run the other way, as its affine says.
        like: the volume.

    Returns:
        int32 (D, H, W).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no NIfTI file, damaged, values that are no whole numbers, or of another shape or
            place than the volume; the message names it.
    """
    for file in (path, like):
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file}: no such file.")
    try:
        image: Any = nib.load(path)
        scan: Any = nib.load(like)
        orientations = [nib.io_orientation(i.affine) for i in (image, scan)]
        image = image.as_reoriented(nib.orientations.ornt_transform(*orientations))
        data = np.asanyarray(image.dataobj)
        whole = np.rint(data)
        if not np.isfinite(data).all() or np.abs(data - whole).max(initial=0) > 0.01:
            raise ValueError("holds fractions or NaN, expected a mask of whole numbers")
    except Exception as error:  # nibabel answers damage with many kinds of errors
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: is not a NIfTI mask of a head ({detail}).") from error
    if image.shape != scan.shape:
        raise ValueError(f"{path}: has the shape {image.shape}, its scan {like} {scan.shape}.")
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=float)
    corners[:, :3] *= scan.shape
    apart = np.abs((image.affine - scan.affine) @ corners.T).max()
    if not apart <= min(scan.header.get_zooms()[:3]) / 2:
        raise ValueError(
            f"{path}: by their affines it lies {apart:.1f} mm beside its scan {like} or is turned."
        )
    return whole.T.astype(np.int32)


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
    for what, own, other in (
        ("shape", scan.slices.shape, mask.slices.shape),
        ("axes", scan.axes, mask.axes),
    ):
        if own != other:
            raise ValueError(
                f"{path}: the scan has the {what} {own}, its mask {other}; save the mask with the"
                " shape and the affine of the scan."
            )
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=float)
    corners[:, :3] *= np.array(scan.slices.shape[::-1])
    apart = np.abs((scan.affine - mask.affine) @ corners.T).max()
    if not apart <= max(scan.spacing_mm):
        raise ValueError(
            f"{path}: by their affines its mask lies {apart:.1f} mm beside the scan or is turned;"
            " save the mask with the shape and the affine of the scan."
        )
    low, high = float(np.nanmin(scan.slices)), float(np.nanmax(scan.slices))
    if low < high and (not -32768 <= low < -200 or high > 32767):
        raise ValueError(
            f"{path}: holds values from {low:g} to {high:g}, expected Hounsfield units with air"
            " near -1000; give the scan before any window, scaling or stripping."
        )
    return scan, mask.slices
