"""Write a synthetic data set of head CT series with intracranial hemorrhage.

The heads are computed, not scanned: an analytic 3D model (ellipsoids, tubes and sheets, bent by
smooth random fields) is sampled slice by slice, so that neighbouring slices agree. The result is a
VOC tree with real DICOM CT series, for demonstrations, tests and continuous integration. It is a
caricature of head CT: good enough to train, evaluate and diagnose end to end, and no base for any
clinical claim.

    python datasets/prepare_phantom.py --output datasets/phantom

Output, a folder that ``ich_det2.data.register_ich_voc`` reads::

    DICOM/P0007_012.dcm            one CT Image Storage instance per slice
    Annotations/P0007_012.xml      VOC boxes; healthy slices have a file without objects
    ImageSets/Main/{train,val,test}.txt
    patients.csv                   image,patient,study
    phantom.json                   the parameters; written last, marks a complete data set

Coordinates. Patient coordinates are DICOM's, in mm: x to the patient's left, y to posterior, z to
the head (PS3.3 C.7.6.2.1.1). The head model lives in its own frame, turned and moved for every
patient, with the origin near the third ventricle. "Distance" always means a signed distance in mm,
negative inside.

Shapes in this module:
    D: number of slices of a patient
    H, W: rows and columns of a slice (both ``size``)
    G: rows and columns of the coarser grid on which the soft tissue is computed
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from scipy import ndimage

from ich_det2.data.voc import write_voc

VERSION = 1
"""Version of the model; raise it whenever the same seed gives other files."""

TYPES = ("EDH", "SDH", "IPH", "IVH", "SAH")
"""Object names in the annotations: epidural, subdural, intraparenchymal, intraventricular,
subarachnoid."""

SPLITS = {"train": 0.5, "val": 0.2, "test": 0.3}
"""Share of the patients in each image set."""

MARKER = "phantom.json"

NUM_SLICES = 13
SLICE_THICKNESS_MM = 5.0
SLICE_SPACING_MM = 7.5
"""Distance between the centres of neighbouring slices: sequential slices with a gap, which keeps
the data set small and still covers the head from the skull base to the vertex."""

MIN_LESION_MM2 = 16.0
MIN_LESION_MM = 2.0
"""A bleed with a smaller visible area in a slice, or thinner everywhere, is taken out of the slice
and of its annotation."""

SKULL_BASE_MM = 8.0
"""Orbits, petrous bones and sinuses lie below this height of the head frame."""

VISIBLE_LIFT_HU = 9.0
VISIBLE_HU = (45.0, 110.0)
"""A pixel belongs to a bleed where the blood lifts the noise-free image by at least
``VISIBLE_LIFT_HU`` to a value in ``VISIBLE_HU``: above grey matter, and not half bone."""

MERGE_MM = {"EDH": 1.0, "SDH": 2.0, "IPH": 1.5, "IVH": 2.0, "SAH": 8.0}
"""Parts of one bleed nearer to each other than about this are one lesion, so one box."""

AIR_HU = -1000.0
RESCALE_INTERCEPT = -1024
FAR_MM = 99.0
SKIP_MM = 14.0
"""Shapes that lie further above or below a plane than this are not computed on it."""

Array = np.ndarray


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesion:
    """One visible bleed in one slice.

    Attributes:
        name: type of the bleed, one of ``TYPES``.
        box: ``(x0, y0, x1, y1)`` in pixels, 0-based, x1 and y1 exclusive; tight on the mask.
        area_mm2: visible area.
    """

    name: str
    box: tuple[int, int, int, int]
    area_mm2: float


@dataclass
class Phantom:
    """A synthetic patient.

    Attributes:
        hu: (D, H, W) float32, HU, with noise. Slice 0 is the lowest (nearest to the feet).
        labels: (D, H, W) uint8; value i + 1 marks the pixels of ``lesions[d][i]``, 0 none.
        lesions: D lists, the bleeds of each slice.
        position_mm: (D, 3) float64, centre of each slice's first pixel in patient coordinates.
        pixel_mm: in-plane pixel spacing.
        kernel: name of the convolution kernel, for the header.
    """

    hu: Array
    labels: Array
    lesions: list[list[Lesion]]
    position_mm: Array
    pixel_mm: float
    kernel: str


@dataclass
class _Head:
    """Parameters of one head; lengths in mm, angles in radians, HU where named so."""

    fov: float
    grid: int
    rotation: Array  # (3, 3), patient frame -> head frame
    shift: Array  # (3,), position of the head's origin in patient coordinates
    scale: Array  # (3,)
    bone: float
    scalp: float
    cortex_csf: float
    sulcus: float
    ventricle: float
    grey_hu: float
    white_hu: float
    csf_hu: float
    falx_hu: float
    sinus_hu: float
    falx_bend: float
    cupping_hu: float
    calcifications: list[tuple[tuple[float, float, float], float, float]]
    midline_shift: float = 0.0
    midline_y: float = 0.0
    planes: dict[str, Callable[[float], Array]] = field(default_factory=dict)
    folds: Callable[[Array, Array, Array], Array] | None = None


@dataclass
class _Bleed:
    """One bleed of a patient: its type, blood density and a function of the slice's fields.

    ``distance`` takes the slice's ``_Fields`` and returns a signed distance in mm, (G, G).
    """

    name: str
    blood_hu: float
    distance: Callable[[_Fields], Array]
    oedema_mm: float = 0.0
    push_mm: float = 0.0  # midline shift, positive to the left
    texture_hu: float = 3.0


@dataclass
class _Fields:
    """Everything known about one thin plane, on the (G, G) grid. Distances in mm."""

    x: Array
    y: Array
    z: Array
    y_patient: Array
    cavity: Array
    texture: Array
    lumpy: Array
    ventricle: Array | None = None
    csf: Array | None = None

    def cut(self, window: tuple[slice, slice]) -> _Fields:
        """The same fields on a part of the plane, before ventricles and CSF are known."""
        names = ("x", "y", "z", "y_patient", "cavity", "texture", "lumpy")
        return _Fields(**{name: getattr(self, name)[window] for name in names})


# ---------------------------------------------------------------------------------------------
# Shapes: signed distances in mm
# ---------------------------------------------------------------------------------------------


def _ellipsoid(x: Array, y: Array, z: Array, centre: Sequence[float], radii: Sequence[float]):
    """First-order signed distance to an ellipsoid: f / |grad f| with f = k (k - 1)."""
    if z.min() > centre[2] + radii[2] + SKIP_MM:
        return np.full_like(z, FAR_MM)
    u, v, w = ((p - c) / r for p, c, r in zip((x, y, z), centre, radii))
    k = np.sqrt(u * u + v * v + w * w)
    u, v, w = u / radii[0], v / radii[1], w / radii[2]
    return k * (k - 1.0) / (np.sqrt(u * u + v * v + w * w) + 1e-6)


def _ball(x, y, z, centre, radii):
    """Cheap signed distance to an ellipsoid; good near its surface, ``FAR_MM`` far below it."""
    if z.min() > centre[2] + radii[2] + SKIP_MM or z.max() < centre[2] - radii[2] - SKIP_MM:
        return np.full_like(z, FAR_MM)
    u, v, w = ((p - c) / r for p, c, r in zip((x, y, z), centre, radii))
    return (np.sqrt(u * u + v * v + w * w) - 1.0) * min(radii)


def _tube(x, y, z, points: Sequence[Sequence[float]]):
    """Signed distance to a chain of round cones; each point is (x, y, z, radius)."""
    best = np.full_like(x, FAR_MM)
    low, high = z.min(), z.max()
    for (ax, ay, az, ar), (bx, by, bz, br) in itertools.pairwise(points):
        if low > max(az + ar, bz + br) + SKIP_MM or high < min(az - ar, bz - br) - SKIP_MM:
            continue
        ux, uy, uz = bx - ax, by - ay, bz - az
        t = ((x - ax) * ux + (y - ay) * uy + (z - az) * uz) / (ux * ux + uy * uy + uz * uz)
        t = np.clip(t, 0.0, 1.0)
        dx, dy, dz = x - ax - t * ux, y - ay - t * uy, z - az - t * uz
        np.minimum(best, np.sqrt(dx * dx + dy * dy + dz * dz) - (ar + t * (br - ar)), out=best)
    return best


def _union(a: Array, b: Array, smooth_mm: float) -> Array:
    """Union of two signed distances whose crease is rounded over ``smooth_mm``."""
    h = np.maximum(smooth_mm - np.abs(a - b), 0.0) / smooth_mm
    return np.minimum(a, b) - h * h * (smooth_mm / 4.0)


def _cover(distance: Array, soft_mm: float) -> Array:
    """Part of a pixel that lies inside, in [0, 1], for an edge ``soft_mm`` wide."""
    return np.clip(0.5 - distance / soft_mm, 0.0, 1.0)


def _mix(hu: Array, value, cover: Array) -> Array:
    return hu + cover * (value - hu)


def _noise_volume(
    rng: np.random.Generator, shape: tuple[int, int, int], low: float, high: float | None = None
) -> Array:
    """Smooth random field of mean 0 and standard deviation 1.

    Args:
        rng: source of randomness.
        shape: size of the volume, voxels.
        low: sigma of the Gaussian that smooths white noise, voxels.
        high: sigma of a second one that is subtracted, which makes the field band-limited.

    Returns:
        Float32 volume of that shape.
    """
    white = rng.standard_normal(shape, dtype=np.float32)
    volume = ndimage.gaussian_filter(white, low, mode="wrap", truncate=3.0)
    if high is not None:
        volume -= ndimage.gaussian_filter(white, high, mode="wrap", truncate=3.0)
    volume -= volume.mean()
    volume /= volume.std()
    return volume


def _noise_planes(
    rng: np.random.Generator,
    *,
    fov_mm: float,
    grid: int,
    z_range_mm: tuple[float, float],
    low_mm: float,
    high_mm: float | None = None,
) -> Callable[[float], Array]:
    """Smooth random field over the field of view.

    Args:
        rng: source of randomness.
        fov_mm: side of the square field of view.
        grid: G.
        z_range_mm: lowest and highest z that will be asked for.
        low_mm: as ``low`` of ``_noise_volume``.
        high_mm: as ``high`` of ``_noise_volume``.

    Returns:
        A function of z (mm, patient frame) that gives the field on the plane, (G, G) float32.
    """
    step = 2.0 if low_mm < 6 else 4.0
    count = int(np.ceil(fov_mm / step))
    depth = int(np.ceil((z_range_mm[1] - z_range_mm[0]) / step)) + 2
    volume = _noise_volume(rng, (depth, count, count), low_mm / step, high_mm and high_mm / step)

    def plane(z_mm: float) -> Array:
        position = min(max((z_mm - z_range_mm[0]) / step, 0.0), depth - 1.001)
        index = int(position)
        part = np.float32(position - index)
        mixed = volume[index] * (1 - part) + volume[index + 1] * part
        return cv2.resize(mixed, (grid, grid), interpolation=cv2.INTER_CUBIC)

    return plane


def _folds(rng: np.random.Generator) -> Callable[[Array, Array, Array], Array]:
    """Random field of the head frame whose zero crossings look like sulci.

    The field is drawn out along the rays from the middle of the brain, so that its zero crossings
    are sheets that stand upright on the brain's surface.

    Returns:
        A function of x, y and z that gives the distance to the nearest sheet, with a sign.
    """
    step, half = 2.0, 96.0
    count = int(2 * half / step) + 1
    volume = _noise_volume(rng, (count, count, count), 4.4 / step, 7.0 / step)

    def field(x: Array, y: Array, z: Array) -> Array:
        k = np.sqrt((x / 67) ** 2 + (y / 84) ** 2 + ((z - 5) / 70) ** 2)
        k = np.clip(k, 0.25, 1.2)
        stretch = k**-0.75
        index = [(p * stretch + half) / step for p in (z, y, x)]
        value = ndimage.map_coordinates(volume, index, order=1, mode="nearest")
        return value / (0.27 * stretch)

    return field


# ---------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------


def _rotation(turn: float, nod: float, lean: float) -> Array:
    """Rotation about z, then x, then y; angles in radians."""
    cz, sz, cx, sx, cy, sy = (f(a) for a in (turn, nod, lean) for f in (np.cos, np.sin))
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return about_y @ about_x @ about_z


def _make_head(
    rng: np.random.Generator, size: int, types: Sequence[str], z_range_mm: tuple[float, float]
) -> _Head:
    """Draw the parameters of a head; patients with IVH get ventricles wide enough to bleed in."""
    age = rng.beta(1.6, 1.6)  # 0 young, full brain; 1 old, wide sulci and ventricles
    degrees = np.pi / 180
    ventricle = 0.75 + 0.75 * age + rng.normal(0, 0.08)
    calcifications = []
    if rng.random() < 0.6:  # pineal gland
        spot = (rng.normal(0, 0.6), 24 + rng.normal(0, 1), 3 + rng.normal(0, 2))
        calcifications.append((spot, rng.uniform(1.5, 3.2), rng.uniform(110, 280)))
    for side in (-1, 1):
        if rng.random() < 0.5:  # choroid plexus in the atrium
            spot = (side * rng.uniform(21, 25), 31 + rng.normal(0, 3), 9 + rng.normal(0, 4))
            calcifications.append((spot, rng.uniform(1.5, 4.2), rng.uniform(90, 260)))
    if rng.random() < 0.2:  # globus pallidus: of age, so on both sides alike
        y, z, hu = -3 + rng.normal(0, 2), 2 + rng.normal(0, 2), rng.uniform(100, 200)
        for side in (-1, 1):
            spot = (side * rng.uniform(17, 20), y + rng.normal(0, 0.7), z + rng.normal(0, 0.7))
            calcifications.append((spot, rng.uniform(2, 3.5), hu))
    if rng.random() < 0.25:  # plaque of the falx
        spot = (rng.normal(0, 0.5), -50 + rng.normal(0, 6), rng.uniform(25, 45))
        calcifications.append((spot, rng.uniform(1.5, 3.5), rng.uniform(120, 300)))
    grid = min(size, 256)
    fov = rng.uniform(222, 240)
    head = _Head(
        fov=fov,
        grid=grid,
        rotation=_rotation(
            rng.normal(0, 4) * degrees, rng.normal(0, 4) * degrees, rng.normal(0, 2.2) * degrees
        ),
        shift=np.array([rng.normal(0, 4), rng.normal(-3, 3), 0.0]),
        scale=np.array([rng.normal(1, 0.03), rng.normal(1, 0.03), rng.normal(1, 0.03)]),
        bone=rng.uniform(4.8, 7.5),
        scalp=rng.uniform(4.0, 7.0),
        cortex_csf=0.5 + 1.6 * age * rng.uniform(0.6, 1.2),
        sulcus=0.25 + 1.15 * age + rng.normal(0, 0.08),
        ventricle=max(ventricle, 1.05) if "IVH" in types else ventricle,
        grey_hu=rng.normal(38, 1.0),
        white_hu=rng.normal(28.5, 0.8),
        csf_hu=rng.normal(8, 1.5),
        falx_hu=rng.normal(52, 3),
        sinus_hu=rng.normal(55, 4),
        falx_bend=rng.normal(0, 1.2),
        cupping_hu=rng.uniform(2, 7),
        calcifications=calcifications,
    )
    head.folds = _folds(rng)
    for name, low, high in (
        ("shape", 14.0, None),
        ("lumpy", 6.0, None),
        ("texture", 2.6, 5.0),
        ("cells", 1.7, 3.4),
    ):
        head.planes[name] = _noise_planes(
            rng, fov_mm=fov, grid=grid, z_range_mm=z_range_mm, low_mm=low, high_mm=high
        )
    return head


def _dome(x, y, z):
    """Distance to the smooth upper part of the cranial cavity."""
    narrow = 1.0 + 0.0012 * y  # the forehead is narrower than the parietal region
    return _ellipsoid(x / narrow, y, np.where(z > 0, z, z * 1.9), (0, 0, 0), (67, 84, 73))


def _cavity(x, y, z):
    """Distance to the cranial cavity: dome, middle fossae and posterior fossa."""
    distance = _dome(x, y, z)
    mirrored = np.abs(x)
    distance = _union(distance, _ellipsoid(mirrored, y, z, (41, -9, -20), (25, 34, 27)), 14.0)
    return _union(distance, _ellipsoid(x, y, z, (0, 40, -24), (57, 39, 38)), 14.0)


def _ventricles(x, y, z, width: float):
    """Distance to the ventricles; ``width`` 1 is normal, 1.5 wide."""
    side = np.abs(x)
    w = width
    horns = _tube(
        side * (1.15 - 0.12 * w),
        y,
        z,
        (
            (9.5, -33, 6, 2.6 * w),
            (7, -22, 11, 3.9 * w),
            (9, -2, 18, 3.9 * w),
            (15, 20, 18, 4.6 * w),
            (24, 35, 8, 5.8 * w),
            (25, 50, 4, 3.4 * w),
            (21, 59, 3, 1.4 * w),
        ),
    )
    temporal = _tube(
        side, y, z, ((24, 33, 6, 4.4 * w), (32, 12, -9, 1.7 * w), (31, -6, -14, 1.3 * w))
    )
    horns = np.minimum(horns, temporal)
    # the third ventricle is a slit, the fourth a tent
    third = _ball(x, y, z, (0, 2, -1), (1.6 + 1.4 * w, 15, 11))
    fourth = _ball(x, y, z, (0, 36, -29), (5.5 + 2.0 * w, 5.5 + w, 11))
    return np.minimum(horns, np.minimum(third, fourth))


def _cisterns(x, y, z, lumpy, atrophy: float):
    """Distance to the basal cisterns and the Sylvian fissures."""
    side = np.abs(x)
    grow = 0.7 * atrophy
    star = _ball(x, y, z, (0, -12, -19), (10 + grow, 9 + grow, 8))
    arms = _tube(
        side,
        y,
        z,
        (
            (4, -14, -18, 3.2 + grow),
            (18, -19, -17, 1.3 + grow),
            (32, -23, -12, 1.2 + grow),
            (40, -16, -4, 1.3 + grow),
        ),
    )
    front = _tube(x, y, z, ((0, -14, -17, 2.6 + grow), (0, -42, -8, 1.6 + grow)))
    # cisterns around the midbrain and behind it
    ring = np.abs(_ball(x, y, z, (0, 8, -12), (17, 16, 30)) + 1.2 * lumpy)
    ring = np.maximum(ring - (0.9 + 0.5 * grow), np.maximum(np.abs(z + 12) - 9, 2 - y))
    quadrigeminal = _ball(x, y, z, (0, 27, -3), (8 + grow, 3.2 + grow, 7))
    insula = np.maximum(
        np.abs(side - 41 + 0.012 * (y + 4) ** 2) - (0.8 + 0.6 * grow),
        _ball(x * 0, y, z, (0, -4, 5), (1, 19, 13)) * 1.0,
    )
    operculum = np.maximum(
        np.abs(y + 18 - 1.1 * (z - 2)) * 0.67 - (0.7 + 0.6 * grow),
        np.maximum(40 - side, np.abs(z - 4) - 12),
    )
    distance = np.minimum(np.minimum(star, arms), np.minimum(front, ring))
    return np.minimum(np.minimum(distance, quadrigeminal), np.minimum(insula, operculum))


def _tentorium_z(x, y):
    """Height of the tentorium, mm in the head frame."""
    return 9.0 - 0.5 * np.abs(x) - 0.33 * (y - 15)


def _tissue(head: _Head, f: _Fields, midline: Array) -> tuple[Array, Array]:
    """HU of what fills the cranial cavity, without blood, and the distance to all CSF."""
    x, y, z = f.x, f.y, f.z
    depth = -f.cavity
    tent = z - _tentorium_z(x, y)
    below = _cover(tent, 3.0) * _cover(6 - y, 14.0)  # 1 in the posterior fossa
    stem = _ball(x, y, z, (0, 10 - 0.25 * (z + 10), -25), (15, 14, 32))

    fold = np.abs(head.folds(x, y, z))
    reach = np.clip(1.0 - depth / np.maximum(19.0 + 5.0 * f.lumpy, 4.0), 0.0, 1.0) * (1 - below)
    sulcus = fold - (head.sulcus + 0.2) * 1.5 * reach
    sulcus = np.where(reach > 0.02, sulcus, FAR_MM)
    fissure = np.abs(midline) - (0.5 + 0.9 * head.sulcus)
    opening = np.sqrt((y / 50) ** 2 + ((z - 4) / 30) ** 2)  # the corpus callosum lies inside
    fissure = np.maximum(fissure, np.maximum((1 - opening) * 25, -10 - z))
    fissure = np.where(tent > 0, fissure, FAR_MM)
    cisterns = _cisterns(x, y, z, f.lumpy, head.sulcus)
    csf = np.minimum(np.minimum(sulcus, fissure), np.minimum(cisterns, depth - head.cortex_csf))

    ribbon = np.minimum(fold - 4.0 * reach, depth - 4.0)
    ribbon = np.minimum(ribbon, np.maximum(np.abs(midline) - 4.5, (1 - opening) * 25))
    side = np.abs(x)
    nuclei = np.minimum(
        _ball(side, y, z, (25 - 0.15 * y, -3, 3), (6.5, 17, 12)),
        _ball(side, y, z, (10, 13, 4), (8, 12, 9)),
    )
    nuclei = np.minimum(nuclei, _ball(side, y, z, (14, -22, 9), (4.5, 8, 9)))
    nuclei = np.minimum(nuclei, np.maximum(np.abs(side - 38) - 2.0, nuclei - 5))
    grey = _cover(np.minimum(ribbon + 0.5, nuclei), 4.0)
    grey = grey * (1 - below) + below * (0.5 + 0.1 * np.clip(fold, 0, 4))
    grey = np.where(stem < 0, 0.35, grey)
    hu = head.white_hu + (head.grey_hu - head.white_hu) * grey + 0.7 * f.texture
    hu = _mix(hu, head.csf_hu, _cover(csf, 1.2))
    hu = _mix(hu, head.csf_hu - 1.0, _cover(f.ventricle, 1.2))

    falx = np.maximum(np.abs(midline) - 0.55, np.maximum((1.12 - opening) * 30, -6 - z))
    falx = np.where(tent > -1, falx, FAR_MM)
    notch = np.sqrt((x / 19) ** 2 + ((y - 10) / 27) ** 2)
    sheet = np.maximum(np.abs(tent) * 0.85 - 0.6, np.maximum((1.0 - notch) * 15, 4 - y))
    hu = _mix(hu, head.falx_hu, _cover(np.minimum(falx, sheet), 1.0) * 0.8)
    # Dural sinuses: as bright as thin blood, in every patient.
    sagittal = np.abs(midline) * 1.5 + depth - 5.0
    sagittal = np.where((z > 20) | (y > 30), sagittal, FAR_MM)
    sagittal = np.where((z > -8) & ((y > -20) | (z > 30)), sagittal, FAR_MM)
    transverse = np.sqrt(tent**2 + (depth - 1.5) ** 2) - 3.6
    transverse = np.where(y > 25, transverse, FAR_MM)
    hu = _mix(hu, head.sinus_hu, _cover(np.minimum(sagittal, transverse), 1.2))
    basilar = np.hypot(x - 0.8, y + 6) - 1.7
    hu = np.where((z < -12) & (z > -40), _mix(hu, 46.0, _cover(basilar, 1.2)), hu)
    for centre, radius, value in head.calcifications:
        if np.abs(z - centre[2]).min() < radius:
            spot = _ball(x, y, z, centre, (radius, radius, radius)) + 0.3 * f.texture
            hu = _mix(hu, value, _cover(spot, 1.2))
    # Beam hardening: brighter along the bone, a dark bar between the petrous bones.
    hu = hu + head.cupping_hu * np.exp(np.minimum(f.cavity, 0) / 4.0)
    bar = np.exp(-(((z + 27) / 7) ** 2) - ((y - 8) / 9) ** 2) * np.clip(1.2 - side / 45, 0, 1)
    return hu - 6.0 * bar * (1 + 0.4 * f.lumpy), csf


def _skull_base(
    f: _Fields, cells: Array, skin: Array, bone: Array, soft: Array
) -> tuple[Array, ...]:
    """Add the skull base, the orbits and the air-filled cells to what ``_outside`` made."""
    x, y, z = f.x, f.y, f.z
    side, inside = np.abs(x), -skin
    along, across = 0.72 * (side - 38) + 0.69 * (y - 10), -0.69 * (side - 38) + 0.72 * (y - 10)
    petrous = np.sqrt((along / 34) ** 2 + (across / 9.5) ** 2 + ((z + 31) / 12) ** 2)
    petrous = (petrous - 1) * 9.5
    sella = _ball(x, y, z, (0, -4, -36), (12, 6.5, 10))
    wing = np.maximum(np.abs(y + 46 - 0.28 * side) - 3.2, np.maximum(np.abs(z + 22) - 9, side - 58))
    wing = np.maximum(wing, 12 - side)
    crista = np.maximum(side - 1.0, np.maximum(np.abs(y + 74) - 8, np.abs(z + 19) - 5))
    occiput = _ball(x, y, z, (0, 84, -14), (6, 7, 12))
    base = np.minimum(np.where(f.cavity > -9, petrous, FAR_MM), np.minimum(sella, crista))
    base = np.minimum(base, np.where(f.cavity > -5, np.minimum(wing, occiput), FAR_MM))
    bone = np.minimum(bone, base)

    # orbits, sinuses, mastoid cells
    orbit = _ball(side, y, z, (31 - 0.1 * (y + 70), -66, -34), (18, 26, 17))
    soft = _mix(soft, -85.0 + 6 * f.texture, _cover(orbit, 1.5))
    rectus = np.abs(_ball(side, y, z, (30, -66, -34), (12, 26, 12))) - 1.0
    soft = np.where((y > -76) & (orbit < 0), _mix(soft, 48.0, _cover(rectus, 1.5)), soft)
    nerve = np.maximum(np.hypot(side - 27 + 0.35 * (y + 62), z + 34) - 2.2, -72 - y)
    soft = np.where(orbit < 0, _mix(soft, 42.0, _cover(nerve, 1.5)), soft)
    globe = np.sqrt((side - 31) ** 2 + (y + 82) ** 2 + (z + 34) ** 2) - 12.0
    soft = _mix(soft, 55.0, _cover(globe, 1.0))
    soft = _mix(soft, 9.0, _cover(globe + 1.6, 1.0))
    lens = _ball(side, y, z, (31, -91.5, -34), (4.5, 1.9, 4.5))
    soft = _mix(soft, 85.0, _cover(lens, 1.0))
    skin = np.minimum(skin, globe - 1.5)
    wall = np.maximum(np.abs(orbit - 1.0) - 1.2, -88 - y)
    bone = np.minimum(np.where(orbit > -0.4, bone, np.maximum(bone, -orbit)), wall)

    ethmoid = np.maximum(np.maximum(side - 12, np.abs(y + 64) - 26), z + 26)
    frontal = _ball(side, y, z, (11, -84, -9), (11, 4.0, 12)) + 0.8 * f.lumpy
    sphenoid = _ball(side, y, z, (7, -24, -36), (8, 11, 8))
    mastoid = _ball(side, y, z, (58, 30, -34), (10, 16, 16))
    honeycomb = 1.0 - 1.5 * np.abs(cells)
    bone = np.where(ethmoid < 1, np.abs(ethmoid) - 0.8, bone)
    bone = np.minimum(bone, np.maximum(frontal - 2.5, f.lumpy * 0 - inside + 3))
    bone = np.minimum(bone, np.maximum(sphenoid - 1.5, 0 * z))
    bone = np.minimum(bone, mastoid - 1.0)
    air = np.minimum(np.maximum(ethmoid + 1.0, honeycomb), np.minimum(frontal, sphenoid))
    air = np.minimum(air, np.maximum(mastoid, honeycomb + 0.1))
    canal = np.maximum(np.hypot(y - 14, z + 33) - 3.0, 56 - side)
    air = np.minimum(air, canal)
    return skin, bone, base, soft, air


def _outside(head: _Head, f: _Fields, cells: Array, shape: Array) -> tuple[Array, ...]:
    """What lies around the brain.

    Returns:
        Distances to skin, bone and the bone that juts into the cavity; HU of soft tissue and of
        bone; distance to air-filled cells.
    """
    x, y, z = f.x, f.y, f.z
    side = np.abs(x)
    thick = head.bone * (1.0 + 0.18 * shape + 0.16 * np.clip((np.abs(y) - 55) / 25, 0, 1))
    thick = thick + 2.0 * np.clip((z - 45) / 25, 0, 1)
    shell = np.abs(f.cavity - thick / 2) - thick / 2
    inward = 1 - np.abs(f.cavity - thick / 2) / (thick / 2)  # 1 in the middle of the shell

    dome = _dome(x, y, np.where(z < 0, z * 0.8, z)) - (head.bone + head.scalp)
    face = _ball(x, y, z, (0, -42, -62), (64, 52, 56))
    neck = _ball(x, y, z, (0, 30, -75), (62, 62, 62))
    ears = _ball(side, y, z, (75.5, 0.2 * side, -28), (4.5, 14, 20))
    skin = _union(_union(dome, face, 20.0), neck, 20.0)
    skin = np.minimum(skin, ears + 0.6 * f.texture)
    inside = -skin

    # scalp: skin, fat, galea; temporal muscle; the face is fat with strands of muscle
    soft = np.where(inside < 2.2, 45.0, -70.0 + 8 * f.texture)
    temporal = _ball(side, y, z, (68, -24, -14), (13, 30, 36))
    neck_muscle = _ball(side, y, z, (26, 70, -52), (32, 20, 30))
    muscle = np.minimum(temporal, neck_muscle)
    soft = np.where(inside > 3.0, _mix(soft, 54.0 + 4 * f.texture, _cover(muscle, 2.0)), soft)
    deep = (z < -12) & (inside > 6) & (f.lumpy > -0.2) & (muscle > 0)
    soft = np.where(deep & (side > 42), 40.0 + 8 * f.texture, soft)

    bone = shell
    base = air = np.full_like(x, FAR_MM)
    if z.min(where=skin < 10, initial=FAR_MM) < SKULL_BASE_MM:
        skin, bone, base, soft, air = _skull_base(f, cells, skin, shell, soft)
    diploe = np.clip(inward * 2.2 - 0.5, 0, 1) * (0.5 + 0.5 * (bone == shell).astype(np.float32))
    bone_hu = 1350 - 650 * diploe + 90 * f.texture * diploe + 60 * shape
    return skin, bone, base, soft, bone_hu, air


def _couch(x: Array, y: Array, radius_mm: float, top_mm: float) -> Array:
    """HU of air, the head holder and its cushion, in the patient frame."""
    bowl = (np.sqrt((x / radius_mm) ** 2 + (np.maximum(y, 0) / 113) ** 2) - 1) * radius_mm
    shell = np.maximum(np.abs(bowl) - 1.6, top_mm - y)
    cushion = np.maximum(bowl + 2.0, 40 - y)
    hu = _mix(np.full_like(x, AIR_HU), -960.0, _cover(cushion, 1.5))
    return _mix(hu, 420.0, _cover(shell, 1.5))


# ---------------------------------------------------------------------------------------------
# The bleeds
# ---------------------------------------------------------------------------------------------


def _surface_point(direction: Array, z_mm: float) -> tuple[Array, Array]:
    """Point of the inner table on a horizontal ray at height ``z_mm``, and the normal there."""
    t = np.linspace(5, 95, 361)
    x, y, z = direction[0] * t, direction[1] * t, np.full_like(t, z_mm)
    inside = _cavity(x, y, z) < 0
    last = int(np.flatnonzero(inside)[-1]) if inside.any() else 0
    point = np.array([x[last], y[last], z_mm])
    steps = np.concatenate([np.eye(3), -np.eye(3)]) + point
    value = _cavity(*steps.T)
    normal = value[:3] - value[3:]
    return point, normal / np.linalg.norm(normal)


def _make_edh(rng: np.random.Generator) -> _Bleed:
    """Epidural: a lens between the inner table and a ball that dents the brain."""
    side = int(rng.choice([-1, 1]))
    azimuth = rng.choice([rng.uniform(-60, -25), rng.uniform(-25, 35), rng.uniform(35, 62)])
    azimuth *= np.pi / 180
    point, normal = _surface_point(
        np.array([side * np.cos(azimuth), np.sin(azimuth)]), rng.uniform(-2, 42)
    )
    depth = rng.uniform(7, 24)
    half = depth * rng.uniform(1.15, 1.9) + 4
    radius = (half * half + depth * depth) / (2 * depth)
    cx, cy, cz = map(float, point + normal * (radius - depth))
    flat = rng.uniform(0.9, 1.2)

    def distance(f: _Fields) -> Array:
        dz = (f.z - cz) / flat
        ball = np.sqrt((f.x - cx) ** 2 + (f.y - cy) ** 2 + dz * dz) - radius
        return ball + 0.5 * f.lumpy

    push = -side * rng.uniform(0.1, 0.3) * depth
    return _Bleed("EDH", rng.uniform(60, 76), distance, push_mm=push)


def _make_sdh(rng: np.random.Generator) -> _Bleed:
    """Subdural: a crescent, the layer under the inner table of one hemisphere."""
    side = int(rng.choice([-1, 1]))
    middle = rng.uniform(-30, 30) * np.pi / 180
    reach = rng.uniform(50, 82) * np.pi / 180
    z_middle, z_reach = rng.uniform(12, 36), rng.uniform(20, 38)
    thick = rng.uniform(6.5, 15)

    def distance(f: _Fields) -> Array:
        u = (np.arctan2(f.y, side * f.x) - middle) / reach
        v = (f.z - z_middle) / z_reach
        window = np.clip(1 - u * u - v * v, 0, 1) ** 0.7
        layer = -f.cavity - (thick * window * (1 + 0.1 * f.lumpy) - 0.8)
        return np.maximum(layer, 2.5 - side * f.x)

    push = -side * rng.uniform(0.1, 0.5) * thick
    return _Bleed("SDH", rng.uniform(57, 73), distance, push_mm=push)


def _make_iph(rng: np.random.Generator) -> _Bleed:
    """Intraparenchymal: a lumpy ball, deep or lobar, with oedema around it."""
    side = int(rng.choice([-1, 1]))
    place = rng.choice(["ganglia", "thalamus", "lobar", "lobar", "cerebellum"], p=None)
    if place == "ganglia":
        centre, radius = (side * 26, -2 + rng.normal(0, 5), 5 + rng.normal(0, 4)), (7, 19)
    elif place == "thalamus":
        centre, radius = (side * 13, 13 + rng.normal(0, 2), 6 + rng.normal(0, 2)), (6, 12)
    elif place == "cerebellum":
        centre, radius = (side * rng.uniform(14, 26), 50 + rng.normal(0, 4), -24.0), (8, 15)
    else:
        centre = (side * rng.uniform(26, 40), rng.uniform(-48, 46), rng.uniform(8, 42))
        radius = (6, 20)
    r = rng.uniform(*radius)
    radii = [r * float(v) for v in np.exp(rng.normal(0, 0.16, 3))]
    bumps = rng.uniform(0.10, 0.22) * r

    def distance(f: _Fields) -> Array:
        ball = _ball(f.x, f.y, f.z, centre, radii) + bumps * f.lumpy
        return np.maximum(ball, f.cavity + 3.5)

    return _Bleed("IPH", rng.uniform(58, 78), distance, oedema_mm=rng.uniform(2.5, 7.0))


def _make_ivh(rng: np.random.Generator) -> _Bleed:
    """Intraventricular: blood that settles to the back of the ventricles of a lying patient."""
    sides = [(-1, 1), (1,), (-1,)][rng.choice(3, p=[0.6, 0.2, 0.2])]
    level = rng.uniform(10, 40) if rng.random() < 0.65 else rng.uniform(-45, 5)
    fourth = rng.random() < 0.4

    def distance(f: _Fields) -> Array:
        settled = level - f.y_patient + 0.5 * f.lumpy
        blood = np.maximum(f.ventricle + 0.3, settled)
        if len(sides) == 1:
            blood = np.maximum(blood, -sides[0] * f.x)
        return blood if fourth else np.where(f.z < -18, FAR_MM, blood)

    return _Bleed("IVH", rng.uniform(58, 74), distance)


def _make_sah(rng: np.random.Generator) -> _Bleed:
    """Subarachnoid: CSF spaces full of blood, in the basal cisterns or over one convexity."""
    side = int(rng.choice([-1, 1]))
    place = rng.choice(["basal", "sylvian", "convexity"], p=[0.45, 0.25, 0.3])
    if place == "basal":
        centre, radii = (0.0, -10.0, -15.0), rng.uniform(0.95, 1.35) * np.array([40.0, 32.0, 19.0])
    elif place == "sylvian":
        centre = (side * 44, -14.0, 1.0)
        radii = rng.uniform(0.8, 1.2) * np.array([23, 24, 17])
    else:
        azimuth = rng.uniform(-60, 60) * np.pi / 180
        point, _ = _surface_point(
            np.array([side * np.cos(azimuth), np.sin(azimuth)]), rng.uniform(18, 48)
        )
        centre, radii = tuple(point * 0.93), rng.uniform(0.8, 1.25) * np.array([24, 26, 20])
    centre, radii = [float(v) for v in centre], [float(v) for v in radii]
    widen = rng.uniform(0.6, 1.3)

    def distance(f: _Fields) -> Array:
        region = _ball(f.x, f.y, f.z, centre, radii) + 3.0 * f.lumpy
        return np.maximum(f.csf - widen, region)

    return _Bleed("SAH", rng.uniform(56, 70), distance)


_MAKERS = {
    "EDH": _make_edh,
    "SDH": _make_sdh,
    "IPH": _make_iph,
    "IVH": _make_ivh,
    "SAH": _make_sah,
}


# ---------------------------------------------------------------------------------------------
# From the head to slices
# ---------------------------------------------------------------------------------------------


def _window(mask: Array) -> tuple[slice, slice] | None:
    """Bounding box of a mask as slices of rows and columns, None for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return None
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _inside(head: _Head, bleeds: Sequence[_Bleed], skull: _Fields) -> tuple[Array, Array]:
    """Fill the cranial cavity.

    Args:
        head: the head.
        bleeds: the patient's bleeds.
        skull: fields of the skull's frame, cut out around the cavity.

    Returns:
        HU without blood, and for every bleed the HU that it adds.
    """
    x, y, z, lumpy = skull.x, skull.y, skull.z, skull.lumpy
    # Extra-axial blood keeps to the skull, which a shifted midline does not move.
    push = head.midline_shift * np.exp(-((x / 45) ** 2) - ((y - head.midline_y) / 50) ** 2)
    brain = replace(skull, x=x - push)
    wavy = brain.x + 0.7 * lumpy
    brain.ventricle = _ventricles(wavy, y + 0.6 * lumpy, z, head.ventricle)
    tissue, brain.csf = _tissue(head, brain, brain.x - head.falx_bend * np.sin(y / 28))
    covers = []
    for bleed in bleeds:
        distance = bleed.distance(skull if bleed.name in ("EDH", "SDH") else brain)
        if bleed.oedema_mm:
            rim = np.clip(1 - np.maximum(distance, 0) / bleed.oedema_mm, 0, 1)
            tissue = _mix(tissue, np.minimum(tissue, 21.0), np.sqrt(rim))
        covers.append(_cover(distance, 1.2))
    filled, lifts = tissue, np.zeros((len(bleeds), *x.shape), np.float32)
    for index, (bleed, cover) in enumerate(zip(bleeds, covers)):
        blood = bleed.blood_hu + bleed.texture_hu * 0.5 * (skull.texture + lumpy)
        lifts[index] = cover * np.maximum(blood - filled, 0)
        filled = filled + lifts[index]
    return tissue, lifts


def _slice_without_noise(
    head: _Head, bleeds: Sequence[_Bleed], z_mm: float, size: int
) -> tuple[Array, Array]:
    """Noise-free slice.

    Returns:
        (H, W) HU without blood, and (len(bleeds), H, W), what each bleed adds to it in HU.
    """
    pixel = head.fov / head.grid
    along = ((np.arange(head.grid) + 0.5) * pixel - head.fov / 2).astype(np.float32)
    px, py = np.meshgrid(along, along)
    hu = np.zeros((size, size), np.float32)
    added = np.zeros((len(bleeds), size, size), np.float32)
    fine = head.fov / size
    soft = max(0.9, 1.2 * fine)

    def full(plane: Array) -> Array:
        plane = plane.astype(np.float32, copy=False)
        if head.grid == size:
            return plane
        return cv2.resize(plane, (size, size), interpolation=cv2.INTER_LINEAR)

    couch = full(_couch(px, py, 0.47 * head.fov, -0.12 * head.fov))
    offsets = (np.arange(3) - 1) * (SLICE_THICKNESS_MM / 3)
    for z_plane in z_mm + offsets:
        local = [
            head.rotation[i, 0] * (px - head.shift[0])
            + head.rotation[i, 1] * (py - head.shift[1])
            + head.rotation[i, 2] * (z_plane - head.shift[2])
            for i in range(3)
        ]
        x, y, z = ((p / s).astype(np.float32) for p, s in zip(local, head.scale))
        shape, lumpy, texture, cells = (
            head.planes[name](float(z_plane)) for name in ("shape", "lumpy", "texture", "cells")
        )
        # Bend everything a little, so that no head is symmetric.
        x = x + 1.1 * shape
        y = y - 1.1 * np.roll(shape, head.grid // 3, axis=1)
        cavity = _cavity(x, y, z)
        outside = _Fields(x=x, y=y, z=z, y_patient=py, cavity=cavity, texture=texture, lumpy=lumpy)
        skin, bone, base, soft_hu, bone_hu, air = _outside(head, outside, cells, shape)
        tissue = np.full_like(x, head.white_hu)
        lifts = np.zeros((len(bleeds), *x.shape), np.float32)
        window = _window(cavity < 2.0)
        if window is not None:
            cut = (slice(None), *window)
            tissue[window], lifts[cut] = _inside(head, bleeds, outside.cut(window))

        in_cavity = _cover(full(np.maximum(cavity, -base)), soft)
        plane = _mix(couch, full(soft_hu), _cover(full(skin), soft))
        plane = _mix(plane, full(bone_hu), _cover(full(bone), soft))
        plane = _mix(plane, AIR_HU, _cover(full(air), soft))
        plane = _mix(plane, full(tissue), in_cavity)
        hu += plane / len(offsets)
        for index, lift in enumerate(lifts):
            added[index] += full(lift) * in_cavity / len(offsets)

    sigma = 0.42 / fine  # point spread of the scanner
    if sigma > 0.3:
        hu = cv2.GaussianBlur(hu, (0, 0), sigma)
        for index in range(len(added)):
            added[index] = cv2.GaussianBlur(added[index], (0, 0), sigma)
    return hu, added


def _find_lesions(
    bleeds: Sequence[_Bleed], hu: Array, added: Array, pixel_mm: float
) -> tuple[Array, list[Lesion], Array]:
    """Find what is visible, and take out what is too small or too thin to count.

    Args:
        bleeds: the patient's bleeds.
        hu: (H, W), HU without blood.
        added: (len(bleeds), H, W), HU that each adds.
        pixel_mm: pixel spacing.

    Returns:
        ``added`` without the blood that is not annotated, the lesions,
        and their (H, W) uint8 label image.
    """
    labels = np.zeros(added.shape[1:], np.uint8)
    lesions: list[Lesion] = []
    kept = np.zeros_like(added)
    total = hu + added.sum(0)
    bright = (total >= VISIBLE_HU[0]) & (total <= VISIBLE_HU[1])
    for index, bleed in enumerate(bleeds):
        visible = (added[index] >= VISIBLE_LIFT_HU) & bright
        for other in range(len(bleeds)):  # where two meet, the stronger has the pixel
            if other != index:
                visible &= added[index] > added[other] - 1e-3 * (index < other)
        if not visible.any():
            continue
        reach = max(round(MERGE_MM[bleed.name] / 2 / pixel_mm), 1)
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
        merged = cv2.dilate(visible.astype(np.uint8), kernel)
        count, parts = cv2.connectedComponents(merged, connectivity=8)
        parts = np.where(visible, parts, 0)
        area = np.bincount(parts.ravel(), minlength=count) * pixel_mm**2
        radius = cv2.distanceTransform(visible.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)
        thick = np.zeros(count)
        np.maximum.at(thick, parts[visible], (2 * radius[visible] - 1) * pixel_mm)
        good = [
            p for p in range(1, count) if area[p] >= MIN_LESION_MM2 and thick[p] >= MIN_LESION_MM
        ]
        if not good:
            continue
        if len(good) == count - 1:
            kept[index] = added[index]
        else:
            # Faint blood belongs to the nearest part and goes with it.
            nearest = ndimage.distance_transform_edt(
                parts == 0, return_distances=False, return_indices=True
            )
            kept[index] = added[index] * np.isin(parts[tuple(nearest)], good)
        for part in good:
            mask = parts == part
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            lesions.append(Lesion(bleed.name, tuple(map(int, box)), float(area[part])))
            labels[mask] = len(lesions)
    return kept, lesions, labels


def _scanner_noise(rng: np.random.Generator, size: int, pixel_mm: float) -> Array:
    """Correlated noise with the grain of filtered back projection; (H, W), sigma 1."""
    white = rng.standard_normal((size, size), dtype=np.float32)
    fine = cv2.GaussianBlur(white, (0, 0), max(0.42 / pixel_mm, 0.35))
    noise = fine - 0.85 * cv2.GaussianBlur(white, (0, 0), max(1.3 / pixel_mm, 0.7))
    return noise / noise.std()


def make_patient(
    rng: np.random.Generator,
    *,
    types: Sequence[str] = (),
    size: int = 512,
    num_slices: int = NUM_SLICES,
) -> Phantom:
    """Make one synthetic patient.

    Args:
        rng: source of all randomness.
        types: the bleeds, names out of ``TYPES``; empty for a healthy patient.
        size: rows and columns of a slice, pixels.
        num_slices: D.

    Returns:
        The patient. Every name in ``types`` is visible in at least one slice, and at least one
        slice of the patient shows no bleed.

    Raises:
        ValueError: if a name in ``types`` is unknown.
    """
    unknown = [name for name in types if name not in TYPES]
    if unknown:
        raise ValueError(f"types: got {unknown}, expected names out of {list(TYPES)}.")
    first = -29.0 + rng.uniform(-3, 3)
    heights = first + SLICE_SPACING_MM * np.arange(num_slices)
    margin = SLICE_THICKNESS_MM / 2
    head = _make_head(rng, size, types, (heights[0] - margin, heights[-1] + margin))
    pixel = head.fov / size
    sigma = rng.uniform(2.9, 4.3)
    kernel, grain = [("H31s", 1.0), ("H37s", 1.08)][rng.choice(2, p=[0.6, 0.4])]
    for _ in range(20):
        bleeds = [_MAKERS[name](rng) for name in types]
        head.midline_shift = sum(bleed.push_mm for bleed in bleeds)
        head.midline_y = rng.uniform(-15, 15)
        clean = [_slice_without_noise(head, bleeds, z, size) for z in heights]
        found = [_find_lesions(bleeds, hu, added, pixel) for hu, added in clean]
        seen = {lesion.name for _, lesions, _ in found for lesion in lesions}
        healthy_slices = sum(not lesions for _, lesions, _ in found)
        if seen == set(types) and healthy_slices:
            break
    else:
        raise RuntimeError(f"No visible bleed of types {list(types)} after 20 attempts.")
    volume = np.empty((num_slices, size, size), np.float32)
    for index, ((hu, _), (kept, _, _)) in enumerate(zip(clean, found)):
        # More noise where more bone is in the way.
        bone = min(1.35, 0.9 + 0.9 * float((hu > 300).mean() / 0.12) * 0.35)
        noise = _scanner_noise(rng, size, pixel) * (sigma * grain * bone)
        volume[index] = np.clip(hu + kept.sum(0) + noise, -1024, 3071)
    corner = pixel / 2 - head.fov / 2
    position = np.stack([np.full(num_slices, corner), np.full(num_slices, corner), heights], axis=1)
    return Phantom(
        hu=volume,
        labels=np.stack([labels for _, _, labels in found]),
        lesions=[lesions for _, lesions, _ in found],
        position_mm=np.round(position, 4),
        pixel_mm=round(pixel, 6),
        kernel=kernel,
    )


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def patient_name(patient: int) -> str:
    """Stem of a patient's files and PatientID, such as ``P0007``."""
    return f"P{patient:04d}"


def _uid(*parts: object) -> pydicom.uid.UID:
    """Unique identifier that depends on nothing but ``parts``."""
    return generate_uid(entropy_srcs=["ich_det2 phantom", *map(str, parts)])


def dicom_slice(phantom: Phantom, index: int, *, patient: int, seed: int) -> Dataset:
    """Make the CT image of one slice (CT Image IOD, PS3.3 A.3).

    Args:
        phantom: the patient.
        index: slice, 0 is the lowest.
        patient: number of the patient.
        seed: seed of the data set; part of every unique identifier.

    Returns:
        The data set, with its file meta information, ready to be written.
    """
    key = (VERSION, seed, patient, phantom.hu.shape[1])
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = _uid(*key, "instance", index)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian

    ds = Dataset()
    ds.file_meta = meta
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID = meta.MediaStorageSOPClassUID
    ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20000101"
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "120000"
    ds.AccessionNumber = ""
    ds.Modality = "CT"
    ds.Manufacturer = "ich_det2 phantom"
    ds.ReferringPhysicianName = ""
    ds.StudyDescription = "Synthetic head, not a patient"
    ds.SeriesDescription = "Head, plain"
    ds.ManufacturerModelName = f"prepare_phantom {VERSION}"
    ds.PatientName = f"PHANTOM^{patient:04d}"
    ds.PatientID = patient_name(patient)
    ds.PatientBirthDate = ""
    ds.PatientSex = ""
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = "Synthetic, computed from a seed"
    ds.BodyPartExamined = "HEAD"
    ds.SliceThickness = SLICE_THICKNESS_MM
    ds.KVP = 120
    ds.SpacingBetweenSlices = SLICE_SPACING_MM
    ds.ReconstructionDiameter = round(phantom.pixel_mm * phantom.hu.shape[2], 3)
    ds.GantryDetectorTilt = 0
    ds.ConvolutionKernel = phantom.kernel
    ds.PatientPosition = "HFS"
    ds.StudyInstanceUID = _uid(*key, "study")
    ds.SeriesInstanceUID = _uid(*key, "series")
    ds.StudyID = "1"
    ds.SeriesNumber = 1
    ds.AcquisitionNumber = 1
    ds.InstanceNumber = index + 1
    ds.ImagePositionPatient = [float(v) for v in phantom.position_mm[index]]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.FrameOfReferenceUID = _uid(*key, "frame")
    ds.PositionReferenceIndicator = ""
    ds.SliceLocation = float(phantom.position_mm[index, 2])
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = phantom.hu.shape[1:]
    ds.PixelSpacing = [phantom.pixel_mm, phantom.pixel_mm]
    ds.BitsAllocated = 16
    ds.BitsStored = 12
    ds.HighBit = 11
    ds.PixelRepresentation = 0
    ds.WindowCenter = 40
    ds.WindowWidth = 80
    ds.RescaleIntercept = RESCALE_INTERCEPT
    ds.RescaleSlope = 1
    ds.RescaleType = "HU"
    stored = np.clip(np.rint(phantom.hu[index]) - RESCALE_INTERCEPT, 0, 4095)
    ds.PixelData = stored.astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    return ds


def write_patient(phantom: Phantom, root: Path, *, patient: int, seed: int) -> list[str]:
    """Write the DICOM files and annotations of one patient.

    Args:
        phantom: the patient.
        root: folder with ``DICOM`` and ``Annotations``, which exist.
        patient: number of the patient.
        seed: seed of the data set.

    Returns:
        The stems of the slices, lowest first.
    """
    stems = []
    rows, columns = phantom.hu.shape[1:]
    for index, lesions in enumerate(phantom.lesions):
        stem = f"{patient_name(patient)}_{index + 1:03d}"
        ds = dicom_slice(phantom, index, patient=patient, seed=seed)
        pydicom.dcmwrite(root / "DICOM" / f"{stem}.dcm", ds, enforce_file_format=True)
        write_voc(
            root / "Annotations" / f"{stem}.xml",
            filename=f"{stem}.dcm",
            width=columns,
            height=rows,
            objects=[(lesion.name, lesion.box) for lesion in lesions],
            database="ich_det2 phantom",
        )
        stems.append(stem)
    return stems


# ---------------------------------------------------------------------------------------------
# The data set
# ---------------------------------------------------------------------------------------------


def plan_patients(patients: int, seed: int) -> list[tuple[str, ...]]:
    """Decide who bleeds.

    Args:
        patients: number of patients.
        seed: seed of the data set.

    Returns:
        For every patient the types of the bleeds. Half of the patients (rounded up) bleed, each
        type first in every fifth of them, and three in ten have a second type.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    bleeding = (patients + 1) // 2
    plan: list[tuple[str, ...]] = []
    second = {"EDH": "IPH", "SDH": "IPH", "IPH": "IVH", "IVH": "IPH", "SAH": "IVH"}
    for index in range(bleeding):
        name = TYPES[index % len(TYPES)]
        plan.append((name, second[name]) if rng.random() < 0.3 else (name,))
    plan += [()] * (patients - bleeding)
    return [plan[i] for i in rng.permutation(patients)]


def split_patients(plan: Sequence[tuple[str, ...]]) -> dict[str, list[int]]:
    """Divide patients between the image sets.

    Args:
        plan: bleeds of every patient, from ``plan_patients``; patient 1 is the first.

    Returns:
        Patient numbers of every split. Bleeding and healthy patients are divided apart, the
        bleeding ones sorted by type, so the splits resemble each other.
    """
    result: dict[str, list[int]] = {name: [] for name in SPLITS}
    order = sorted(range(len(plan)), key=lambda i: (plan[i][:1], i))
    for bleeding in (True, False):
        counts = dict.fromkeys(SPLITS, 0)
        members = [i for i in order if bool(plan[i]) == bleeding]
        for done, index in enumerate(members):
            # The split that lags furthest behind its share.
            name = max(SPLITS, key=lambda s: SPLITS[s] * (done + 1) - counts[s])
            counts[name] += 1
            result[name].append(index + 1)
    return {name: sorted(numbers) for name, numbers in result.items()}


def _run_patient(
    patient: int, types: tuple[str, ...], root: str, seed: int, size: int
) -> tuple[int, list[str], list[list[str]]]:
    """Make and write one patient; runs in a worker."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng(np.random.SeedSequence([seed, patient]))
    phantom = make_patient(rng, types=types, size=size)
    stems = write_patient(phantom, Path(root), patient=patient, seed=seed)
    return patient, stems, [[lesion.name for lesion in lesions] for lesions in phantom.lesions]


def _run_all(jobs: list[Callable[[], tuple]], workers: int, console: Console) -> Iterable[tuple]:
    """Run the jobs in ``workers`` processes with a progress bar; yields in any order."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("patients", total=len(jobs))
        if workers == 1:
            for job in jobs:
                yield job()
                progress.advance(task)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            futures = [pool.submit(job) for job in jobs]
            try:
                for future in as_completed(futures):
                    yield future.result()
                    progress.advance(task)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def write_dataset(
    root: Path, *, patients: int, seed: int, size: int, workers: int, console: Console
) -> dict:
    """Write the whole data set into an existing empty folder.

    Args:
        root: the folder.
        patients: number of patients, at least 6.
        seed: seed of the data set.
        size: rows and columns of a slice, pixels.
        workers: number of processes; the files do not depend on it.
        console: where the progress bar goes.

    Returns:
        Counts: patients, slices, slices with a bleed, boxes of each type, patients per split.
    """
    for folder in ("DICOM", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    plan = plan_patients(patients, seed)
    jobs = [
        functools.partial(_run_patient, number, types, str(root), seed, size)
        for number, types in enumerate(plan, start=1)
    ]
    results = {}
    for number, stems, names in _run_all(jobs, workers, console):
        results[number] = (stems, names)
    splits = split_patients(plan)
    for name, numbers in splits.items():
        lines = [stem for number in numbers for stem in results[number][0]]
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text(
            "\n".join(lines) + "\n", newline="\n"
        )
    with open(root / "patients.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "patient", "study"])
        for number in sorted(results):
            name = patient_name(number)
            writer.writerows([stem, name, f"{name}_1"] for stem in results[number][0])
    slices = [names for _, per_slice in results.values() for names in per_slice]
    boxes = [name for names in slices for name in names]
    counts = {
        "patients": patients,
        "bleeding_patients": sum(bool(types) for types in plan),
        "slices": len(slices),
        "bleeding_slices": sum(bool(names) for names in slices),
        "boxes": {name: boxes.count(name) for name in TYPES},
        "split_patients": {name: len(numbers) for name, numbers in splits.items()},
    }
    return counts


def _parameters(patients: int, seed: int, size: int) -> dict:
    return {
        "generator": "ich_det2 phantom",
        "version": VERSION,
        "patients": patients,
        "seed": seed,
        "size": size,
    }


def _read_marker(folder: Path) -> dict | None:
    """Parameters of the phantom in ``folder``, or None if it is not one."""
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None
    parameters = marker.get("parameters") if isinstance(marker, dict) else None
    if not isinstance(parameters, dict):
        return None
    return parameters if parameters.get("generator") == "ich_det2 phantom" else None


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _put_in_place(fresh: Path, output: Path, old: Path) -> None:
    """Rename ``fresh`` to ``output``; what was there goes to ``old``, or back if that fails."""
    replaces = output.exists()
    if replaces:
        os.rename(output, old)
    try:
        os.rename(fresh, output)
    except OSError:
        if replaces:
            os.rename(old, output)
        raise


def _default_workers() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < minimum:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected a whole number of at least {minimum}"
            )
        return value

    return parse


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description="Write a synthetic data set of head CT series (DICOM, with VOC boxes of five "
        "types of intracranial hemorrhage), for demonstrations and tests without any download.",
        epilog="The same patients, seed and size give the same files, whatever the workers. "
        "The data are computed and contain nothing of any person; results on them say nothing "
        "about performance on patients.",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write, e.g. datasets/phantom"
    )
    parser.add_argument(
        "--patients",
        type=_at_least(6),
        default=80,
        help=f"number of patients, {NUM_SLICES} slices each, half of them bleeding; at least 6 "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, help="seed of everything (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=_at_least(1),
        default=_default_workers(),
        help="number of processes (default: the processors of this machine, %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=_at_least(64),
        default=512,
        help="rows and columns of a slice, pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an older phantom in the output folder; never touches any other folder",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None for ``sys.argv``.

    Returns:
        Exit code: 0 done or already there, 2 refused because of the output folder.
    """
    args = build_parser().parse_args(argv)
    console = Console(stderr=True)
    output: Path = args.output.resolve()

    def refuse(message: str) -> int:
        print(f"error: {message}", file=sys.stderr)
        return 2

    parameters = _parameters(args.patients, args.seed, args.size)
    exists = os.path.lexists(output) and not _is_empty(output)
    if exists:
        found = _read_marker(output)
        if found is None:
            return refuse(
                f"{args.output} exists and is not a phantom data set, so it stays as it is; "
                "give another --output (--force replaces phantoms only)."
            )
        if found == parameters and not args.force:
            print(f"{args.output} already holds this phantom data set; nothing to do.")
            return 0
        if not args.force:
            differences = ", ".join(
                f"{key} {found.get(key)} (asked for {value})"
                for key, value in parameters.items()
                if found.get(key) != value
            )
            return refuse(
                f"{args.output} holds a phantom data set with other parameters: {differences}; "
                "replace it with --force or give another --output."
            )

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        return refuse(f"cannot write to {output.parent} ({error}); give another --output.")
    try:
        fresh = work / "new"
        fresh.mkdir()
        counts = write_dataset(
            fresh,
            patients=args.patients,
            seed=args.seed,
            size=args.size,
            workers=min(args.workers, args.patients),
            console=console,
        )
        marker = {"parameters": parameters, "counts": counts}
        (fresh / MARKER).write_text(json.dumps(marker, indent=2) + "\n", newline="\n")
        _put_in_place(fresh, output, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    boxes = ", ".join(f"{name} {count}" for name, count in counts["boxes"].items())
    splits = ", ".join(f"{name} {count}" for name, count in counts["split_patients"].items())
    print(
        f"{args.output}: {counts['patients']} patients ({counts['bleeding_patients']} bleeding; "
        f"{splits}), {counts['slices']} slices ({counts['bleeding_slices']} with a bleed), "
        f"boxes: {boxes}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
