"""From a head and its bleeds to slices with noise, and to what of the bleeds is visible in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from scipy import ndimage

from .bleeds import DRAW, TYPES, Bleed
from .head import (
    AIR_HU,
    Fields,
    Head,
    draw_head,
    fill_cavity,
    fill_couch,
    fill_outside,
    to_cavity,
    to_ventricles,
)
from .shapes import FAR_MM, Array, coverage, mix

VERSION = 2
"""Version of the model; raise it whenever the same seed gives other files."""

NUM_SLICES = 13
SLICE_THICKNESS_MM = 5.0
SLICE_SPACING_MM = 7.5
"""Distance between the centres of neighbouring slices: sequential slices with a gap, which keeps
the data set small and still covers the head from the skull base to the vertex."""

MIN_LESION_MM2 = 16.0
MIN_LESION_MM = 2.0
"""A bleed with a smaller visible area in a slice, or thinner everywhere, is taken out of the slice
and of its annotation."""

VISIBLE_LIFT_HU = 9.0
VISIBLE_HU = (45.0, 110.0)
"""A pixel belongs to a bleed where the blood lifts the noise-free image by at least
``VISIBLE_LIFT_HU`` to a value in ``VISIBLE_HU``: above grey matter, and not half bone."""

MERGE_MM = {"EDH": 1.0, "SDH": 2.0, "IPH": 1.5, "IVH": 2.0, "SAH": 8.0}
"""Parts of one bleed nearer to each other than about this are one lesion, so one box."""


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


def _bounds(mask: Array) -> tuple[slice, slice]:
    """Bounding box, as rows and columns, of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)).tolist(), np.flatnonzero(mask.any(0)).tolist()
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _inside(head: Head, bleeds: Sequence[Bleed], skull: Fields) -> tuple[Array, Array]:
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
    brain.ventricle = to_ventricles(wavy, y + 0.6 * lumpy, z, head.ventricle)
    tissue, brain.csf = fill_cavity(head, brain, brain.x - head.falx_bend * np.sin(y / 28))
    covers = []
    for bleed in bleeds:
        distance = bleed.distance(skull if bleed.name in ("EDH", "SDH") else brain)
        if bleed.oedema_mm:
            rim = np.clip(1 - np.maximum(distance, 0) / bleed.oedema_mm, 0, 1)
            tissue = mix(tissue, np.minimum(tissue, 21.0), np.sqrt(rim))
        covers.append(coverage(distance, 1.2))
    filled, lifts = tissue, np.zeros((len(bleeds), *x.shape), np.float32)
    for index, (bleed, cover) in enumerate(zip(bleeds, covers)):
        blood = bleed.blood_hu + 1.5 * (skull.texture + lumpy)
        lifts[index] = cover * np.maximum(blood - filled, 0)
        filled = filled + lifts[index]
    return tissue, lifts


def _slice_without_noise(
    head: Head, bleeds: Sequence[Bleed], z_mm: float, size: int
) -> tuple[Array, Array]:
    """Noise-free slice.

    Returns:
        (H, W) HU without blood, and (len(bleeds), H, W), what each bleed adds to it in HU.
    """
    pixel = head.fov / head.grid
    along = ((np.arange(head.grid) + 0.5) * pixel - head.fov / 2).astype(np.float32)
    px, py = np.meshgrid(along, along)
    hu, *added = images = np.zeros((1 + len(bleeds), size, size), np.float32)
    fine = head.fov / size
    soft = max(0.9, 1.2 * fine)

    def full(plane: Array) -> Array:
        plane = plane.astype(np.float32, copy=False)
        if head.grid == size:
            return plane
        return cv2.resize(plane, (size, size), interpolation=cv2.INTER_LINEAR)

    couch = full(fill_couch(px, py, 0.47 * head.fov, -0.12 * head.fov))
    offsets = (np.arange(3) - 1) * (SLICE_THICKNESS_MM / 3)
    for z_plane in z_mm + offsets:
        moved = [place - shift for place, shift in zip((px, py, z_plane), head.shift)]
        x, y, z = (
            (sum(r * p for r, p in zip(row, moved)) / scale).astype(np.float32)
            for row, scale in zip(head.rotation, head.scale)
        )
        shape, lumpy, texture, cells = (
            head.planes[name](float(z_plane)) for name in ("shape", "lumpy", "texture", "cells")
        )
        # Bend everything a little, so that no head is symmetric.
        x = x + 1.1 * shape
        y = y - 1.1 * np.roll(shape, head.grid // 3, axis=1)
        cavity = to_cavity(x, y, z)
        far = np.full_like(x, FAR_MM)
        outside = Fields(x, y, z, py, cavity, texture, lumpy, ventricle=far, csf=far)
        skin, bone, base, soft_hu, bone_hu, air = fill_outside(head, outside, cells, shape)
        tissue = np.full_like(x, head.white_hu)
        lifts = np.zeros((len(bleeds), *x.shape), np.float32)
        if cavity.min() < 2.0:
            window = _bounds(cavity < 2.0)
            tissue[window], lifts[(slice(None), *window)] = _inside(
                head, bleeds, outside.cut(window)
            )

        in_cavity = coverage(full(np.maximum(cavity, -base)), soft)
        plane = mix(couch, full(soft_hu), coverage(full(skin), soft))
        plane = mix(plane, full(bone_hu), coverage(full(bone), soft))
        plane = mix(plane, AIR_HU, coverage(full(air), soft))
        plane = mix(plane, full(tissue), in_cavity)
        hu += plane / len(offsets)
        for image, lift in zip(added, lifts):
            image += full(lift) * in_cavity / len(offsets)

    sigma = 0.42 / fine  # point spread of the scanner
    if sigma > 0.3:
        for image in images:
            cv2.GaussianBlur(image, (0, 0), sigma, dst=image)
    return hu, images[1:]


def find_lesions(
    bleeds: Sequence[Bleed], hu: Array, added: Array, pixel_mm: float
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
    kept, labels = np.zeros_like(added), np.zeros(hu.shape, np.uint8)
    lesions: list[Lesion] = []
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
        counts = (area >= MIN_LESION_MM2) & (thick >= MIN_LESION_MM)
        good = [part for part in range(1, count) if counts[part]]
        if len(good) == count - 1:
            kept[index] = added[index]
        elif good:
            # Faint blood belongs to the nearest part and goes with it.
            nearest = ndimage.distance_transform_edt(
                parts == 0, return_distances=False, return_indices=True
            )
            kept[index] = added[index] * np.isin(parts[tuple(nearest)], good)
        for part in good:
            rows, columns = _bounds(parts == part)
            box = (columns.start, rows.start, columns.stop, rows.stop)
            lesions.append(Lesion(bleed.name, box, float(area[part])))
            labels[parts == part] = len(lesions)
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
    heights = -29.0 + rng.uniform(-3, 3) + SLICE_SPACING_MM * np.arange(num_slices)
    margin = SLICE_THICKNESS_MM / 2
    head = draw_head(rng, size, types, (heights[0] - margin, heights[-1] + margin))
    pixel = head.fov / size
    sigma = rng.uniform(2.9, 4.3)
    kernel, grain = [("H31s", 1.0), ("H37s", 1.08)][rng.choice(2, p=[0.6, 0.4])]
    for _ in range(20):
        bleeds = [DRAW[name](rng) for name in types]
        head.midline_shift = sum(bleed.push_mm for bleed in bleeds)
        head.midline_y = rng.uniform(-15, 15)
        clean = [_slice_without_noise(head, bleeds, z, size) for z in heights]
        found = [find_lesions(bleeds, hu, added, pixel) for hu, added in clean]
        seen = {lesion.name for _, lesions, _ in found for lesion in lesions}
        if seen == set(types) and not all(lesions for _, lesions, _ in found):
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
    return Phantom(
        hu=volume,
        labels=np.stack([labels for _, _, labels in found]),
        lesions=[lesions for _, lesions, _ in found],
        position_mm=np.round(np.transpose(np.broadcast_arrays(corner, corner, heights)), 4),
        pixel_mm=round(pixel, 6),
        kernel=kernel,
    )
