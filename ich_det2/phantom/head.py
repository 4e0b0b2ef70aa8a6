"""The head: its random parameters, and what fills the cavity and lies around it, plane by plane.

Names that begin with ``to_`` are distances in mm, negative inside; x, y, z are in the head's frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .shapes import (
    FAR_MM,
    Array,
    coverage,
    intersection,
    mix,
    noise_planes,
    noise_volume,
    smooth_union,
    to_ball,
    to_ellipsoid,
    to_tube,
    union,
)

AIR_HU = -1000.0

SKULL_BASE_MM = 8.0
"""Orbits, petrous bones and sinuses lie below this height of the head's frame."""


@dataclass
class Head:
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
    calcifications: list[tuple[tuple[float, float, float], float, float]]  # centre, radius, HU
    folds: Callable[[Array, Array, Array], Array]
    planes: dict[str, Callable[[float], Array]]  # random fields over z, see ``noise_planes``
    midline_shift: float = 0.0
    midline_y: float = 0.0


@dataclass
class Fields:
    """Everything known about one thin plane, on the (G, G) grid. Distances in mm."""

    x: Array
    y: Array
    z: Array
    y_patient: Array
    cavity: Array
    texture: Array
    lumpy: Array
    ventricle: Array
    csf: Array

    def cut(self, window: tuple[slice, slice]) -> Fields:
        """The same fields on a part of the plane."""
        return Fields(*(value[window] for value in vars(self).values()))


def draw_folds(rng: np.random.Generator) -> Callable[[Array, Array, Array], Array]:
    """Random field of the head frame whose zero crossings look like sulci.

    The field is drawn out along the rays from the middle of the brain, so that its zero crossings
    are sheets that stand upright on the brain's surface.

    Returns:
        A function of x, y and z that gives the distance to the nearest sheet, with a sign.
    """
    step, half = 2.0, 96.0
    count = int(2 * half / step) + 1
    volume = noise_volume(rng, (count, count, count), 4.4 / step, 7.0 / step)

    def field(x: Array, y: Array, z: Array) -> Array:
        k = np.sqrt((x / 67) ** 2 + (y / 84) ** 2 + ((z - 5) / 70) ** 2)
        k = np.clip(k, 0.25, 1.2)
        stretch = k**-0.75
        index = [(p * stretch + half) / step for p in (z, y, x)]
        value = ndimage.map_coordinates(volume, index, order=1, mode="nearest")
        return value / (0.27 * stretch)

    return field


def _rotation(turn: float, nod: float, lean: float) -> Array:
    """Rotation about z, then x, then y; angles in radians."""
    cz, sz, cx, sx, cy, sy = (f(a) for a in (turn, nod, lean) for f in (np.cos, np.sin))
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return about_y @ about_x @ about_z


def draw_head(
    rng: np.random.Generator, size: int, types: Sequence[str], heights: tuple[float, float]
) -> Head:
    """Draw a head for slices at ``heights``, lowest and highest in mm; patients with IVH get
    ventricles wide enough to bleed in."""
    age = rng.beta(1.6, 1.6)  # 0 young, full brain; 1 old, wide sulci and ventricles
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
    return Head(
        fov=fov,
        grid=grid,
        rotation=_rotation(*(rng.normal(0, (4, 4, 2.2)) * np.pi / 180)),
        shift=np.array([rng.normal(0, 4), rng.normal(-3, 3), 0.0]),
        scale=rng.normal(1, 0.03, 3),
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
        folds=draw_folds(rng),
        planes={
            "shape": noise_planes(rng, fov, grid, heights, 14.0),
            "lumpy": noise_planes(rng, fov, grid, heights, 6.0),
            "texture": noise_planes(rng, fov, grid, heights, 2.6, 5.0),
            "cells": noise_planes(rng, fov, grid, heights, 1.7, 3.4),
        },
    )


def to_dome(x, y, z):
    """Distance to the smooth upper part of the cranial cavity."""
    narrow = 1.0 + 0.0012 * y  # the forehead is narrower than the parietal region
    return to_ellipsoid(x / narrow, y, np.where(z > 0, z, z * 1.9), (0, 0, 0), (67, 84, 73))


def to_cavity(x, y, z):
    """Distance to the cranial cavity: dome, middle fossae and posterior fossa."""
    middle = to_ellipsoid(np.abs(x), y, z, (41, -9, -20), (25, 34, 27))
    posterior = to_ellipsoid(x, y, z, (0, 40, -24), (57, 39, 38))
    return smooth_union(smooth_union(to_dome(x, y, z), middle, 14.0), posterior, 14.0)


def to_ventricles(x, y, z, width: float):
    """Distance to the ventricles; ``width`` 1 is normal, 1.5 wide."""
    side, w = np.abs(x), width
    horn = (
        (9.5, -33, 6, 2.6 * w),
        (7, -22, 11, 3.9 * w),
        (9, -2, 18, 3.9 * w),
        (15, 20, 18, 4.6 * w),
        (24, 35, 8, 5.8 * w),
        (25, 50, 4, 3.4 * w),
        (21, 59, 3, 1.4 * w),
    )
    temporal = ((24, 33, 6, 4.4 * w), (32, 12, -9, 1.7 * w), (31, -6, -14, 1.3 * w))
    horns = union(to_tube(side * (1.15 - 0.12 * w), y, z, horn), to_tube(side, y, z, temporal))
    # the third ventricle is a slit, the fourth a tent
    third = to_ball(x, y, z, (0, 2, -1), (1.6 + 1.4 * w, 15, 11))
    fourth = to_ball(x, y, z, (0, 36, -29), (5.5 + 2.0 * w, 5.5 + w, 11))
    return union(horns, third, fourth)


def to_cisterns(x, y, z, lumpy, atrophy: float):
    """Distance to the basal cisterns and the Sylvian fissures."""
    side, grow = np.abs(x), 0.7 * atrophy
    star = to_ball(x, y, z, (0, -12, -19), (10 + grow, 9 + grow, 8))
    arm = (
        (4, -14, -18, 3.2 + grow),
        (18, -19, -17, 1.3 + grow),
        (32, -23, -12, 1.2 + grow),
        (40, -16, -4, 1.3 + grow),
    )
    arms = to_tube(side, y, z, arm)
    front = to_tube(x, y, z, ((0, -14, -17, 2.6 + grow), (0, -42, -8, 1.6 + grow)))
    # cisterns around the midbrain and behind it
    ring = np.abs(to_ball(x, y, z, (0, 8, -12), (17, 16, 30)) + 1.2 * lumpy)
    ring = intersection(ring - (0.9 + 0.5 * grow), np.abs(z + 12) - 9, 2 - y)
    quadrigeminal = to_ball(x, y, z, (0, 27, -3), (8 + grow, 3.2 + grow, 7))
    insula = np.abs(side - 41 + 0.012 * (y + 4) ** 2) - (0.8 + 0.6 * grow)
    insula = intersection(insula, to_ball(x * 0, y, z, (0, -4, 5), (1, 19, 13)))
    operculum = np.abs(y + 18 - 1.1 * (z - 2)) * 0.67 - (0.7 + 0.6 * grow)
    operculum = intersection(operculum, 40 - side, np.abs(z - 4) - 12)
    return union(star, arms, front, ring, quadrigeminal, insula, operculum)


def fill_cavity(head: Head, f: Fields, midline: Array) -> tuple[Array, Array]:
    """HU of what fills the cranial cavity, without blood, and the distance to all CSF."""
    x, y, z = f.x, f.y, f.z
    side, depth = np.abs(x), -f.cavity
    tent = z - (9.0 - 0.5 * side - 0.33 * (y - 15))  # height above the tentorium
    below = coverage(tent, 3.0) * coverage(6 - y, 14.0)  # 1 in the posterior fossa
    stem = to_ball(x, y, z, (0, 10 - 0.25 * (z + 10), -25), (15, 14, 32))

    fold = np.abs(head.folds(x, y, z))
    reach = np.clip(1.0 - depth / np.maximum(19.0 + 5.0 * f.lumpy, 4.0), 0.0, 1.0) * (1 - below)
    sulcus = fold - (head.sulcus + 0.2) * 1.5 * reach
    sulcus = np.where(reach > 0.02, sulcus, FAR_MM)
    fissure = np.abs(midline) - (0.5 + 0.9 * head.sulcus)
    opening = np.sqrt((y / 50) ** 2 + ((z - 4) / 30) ** 2)  # the corpus callosum lies inside
    fissure = intersection(fissure, (1 - opening) * 25, -10 - z)
    fissure = np.where(tent > 0, fissure, FAR_MM)
    cisterns = to_cisterns(x, y, z, f.lumpy, head.sulcus)
    csf = union(sulcus, fissure, cisterns, depth - head.cortex_csf)

    cingulate = intersection(np.abs(midline) - 4.5, (1 - opening) * 25)
    ribbon = union(fold - 4.0 * reach, depth - 4.0, cingulate)
    putamen = to_ball(side, y, z, (25 - 0.15 * y, -3, 3), (6.5, 17, 12))
    thalamus = to_ball(side, y, z, (10, 13, 4), (8, 12, 9))
    caudate = to_ball(side, y, z, (14, -22, 9), (4.5, 8, 9))
    nuclei = union(putamen, thalamus, caudate)
    claustrum = intersection(np.abs(side - 38) - 2.0, nuclei - 5)
    grey = coverage(union(ribbon + 0.5, nuclei, claustrum), 4.0)
    grey = grey * (1 - below) + below * (0.5 + 0.1 * np.clip(fold, 0, 4))
    grey = np.where(stem < 0, 0.35, grey)
    hu = head.white_hu + (head.grey_hu - head.white_hu) * grey + 0.7 * f.texture
    hu = mix(hu, head.csf_hu, coverage(csf, 1.2))
    hu = mix(hu, head.csf_hu - 1.0, coverage(f.ventricle, 1.2))

    falx = intersection(np.abs(midline) - 0.55, (1.12 - opening) * 30, -6 - z)
    falx = np.where(tent > -1, falx, FAR_MM)
    notch = np.sqrt((x / 19) ** 2 + ((y - 10) / 27) ** 2)
    sheet = intersection(np.abs(tent) * 0.85 - 0.6, (1.0 - notch) * 15, 4 - y)
    hu = mix(hu, head.falx_hu, coverage(union(falx, sheet), 1.0) * 0.8)
    # Dural sinuses: as bright as thin blood, in every patient.
    sagittal = np.abs(midline) * 1.5 + depth - 5.0
    sagittal = np.where((z > 20) | (y > 30), sagittal, FAR_MM)
    sagittal = np.where((z > -8) & ((y > -20) | (z > 30)), sagittal, FAR_MM)
    transverse = np.sqrt(tent**2 + (depth - 1.5) ** 2) - 3.6
    transverse = np.where(y > 25, transverse, FAR_MM)
    hu = mix(hu, head.sinus_hu, coverage(union(sagittal, transverse), 1.2))
    basilar = np.hypot(x - 0.8, y + 6) - 1.7
    hu = np.where((z < -12) & (z > -40), mix(hu, 46.0, coverage(basilar, 1.2)), hu)
    for centre, radius, value in head.calcifications:
        if np.abs(z - centre[2]).min() < radius:
            spot = to_ball(x, y, z, centre, (radius, radius, radius)) + 0.3 * f.texture
            hu = mix(hu, value, coverage(spot, 1.2))
    # Beam hardening: brighter along the bone, a dark bar between the petrous bones.
    hu = hu + head.cupping_hu * np.exp(np.minimum(f.cavity, 0) / 4.0)
    bar = np.exp(-(((z + 27) / 7) ** 2) - ((y - 8) / 9) ** 2) * np.clip(1.2 - side / 45, 0, 1)
    return hu - 6.0 * bar * (1 + 0.4 * f.lumpy), csf


def _skull_base(
    f: Fields, cells: Array, skin: Array, bone: Array, soft: Array
) -> tuple[Array, ...]:
    """Add the skull base, the orbits and the air-filled cells to what ``fill_outside`` made."""
    x, y, z = f.x, f.y, f.z
    side = np.abs(x)
    along, across = 0.72 * (side - 38) + 0.69 * (y - 10), -0.69 * (side - 38) + 0.72 * (y - 10)
    petrous = np.sqrt((along / 34) ** 2 + (across / 9.5) ** 2 + ((z + 31) / 12) ** 2)
    petrous = (petrous - 1) * 9.5
    sella = to_ball(x, y, z, (0, -4, -36), (12, 6.5, 10))
    wing = np.abs(y + 46 - 0.28 * side) - 3.2
    wing = intersection(wing, np.abs(z + 22) - 9, side - 58, 12 - side)
    crista = intersection(side - 1.0, np.abs(y + 74) - 8, np.abs(z + 19) - 5)
    occiput = to_ball(x, y, z, (0, 84, -14), (6, 7, 12))
    petrous = np.where(f.cavity > -9, petrous, FAR_MM)
    edge = np.where(f.cavity > -5, union(wing, occiput), FAR_MM)
    base = union(petrous, sella, crista, edge)
    bone = union(bone, base)

    # orbits, sinuses, mastoid cells
    orbit = to_ball(side, y, z, (31 - 0.1 * (y + 70), -66, -34), (18, 26, 17))
    soft = mix(soft, -85.0 + 6 * f.texture, coverage(orbit, 1.5))
    rectus = np.abs(to_ball(side, y, z, (30, -66, -34), (12, 26, 12))) - 1.0
    soft = np.where((y > -76) & (orbit < 0), mix(soft, 48.0, coverage(rectus, 1.5)), soft)
    nerve = intersection(np.hypot(side - 27 + 0.35 * (y + 62), z + 34) - 2.2, -72 - y)
    soft = np.where(orbit < 0, mix(soft, 42.0, coverage(nerve, 1.5)), soft)
    globe = np.sqrt((side - 31) ** 2 + (y + 82) ** 2 + (z + 34) ** 2) - 12.0
    soft = mix(soft, 55.0, coverage(globe, 1.0))
    soft = mix(soft, 9.0, coverage(globe + 1.6, 1.0))
    lens = to_ball(side, y, z, (31, -91.5, -34), (4.5, 1.9, 4.5))
    soft = mix(soft, 85.0, coverage(lens, 1.0))
    wall = intersection(np.abs(orbit - 1.0) - 1.2, -88 - y)
    bone = union(np.where(orbit > -0.4, bone, intersection(bone, -orbit)), wall)

    ethmoid = intersection(side - 12, np.abs(y + 64) - 26, z + 26)
    frontal = to_ball(side, y, z, (11, -84, -9), (11, 4.0, 12)) + 0.8 * f.lumpy
    sphenoid = to_ball(side, y, z, (7, -24, -36), (8, 11, 8))
    mastoid = to_ball(side, y, z, (58, 30, -34), (10, 16, 16))
    honeycomb = 1.0 - 1.5 * np.abs(cells)
    bone = np.where(ethmoid < 1, np.abs(ethmoid) - 0.8, bone)
    frontal_wall = intersection(frontal - 2.5, skin + 3)
    bone = union(bone, frontal_wall, np.maximum(sphenoid - 1.5, 0), mastoid - 1.0)
    canal = intersection(np.hypot(y - 14, z + 33) - 3.0, 56 - side)
    cells = union(intersection(ethmoid + 1.0, honeycomb), intersection(mastoid, honeycomb + 0.1))
    return union(skin, globe - 1.5), bone, base, soft, union(frontal, sphenoid, canal, cells)


def fill_outside(head: Head, f: Fields, cells: Array, shape: Array) -> tuple[Array, ...]:
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

    dome = to_dome(x, y, np.where(z < 0, z * 0.8, z)) - (head.bone + head.scalp)
    face = to_ball(x, y, z, (0, -42, -62), (64, 52, 56))
    neck = to_ball(x, y, z, (0, 30, -75), (62, 62, 62))
    ears = to_ball(side, y, z, (75.5, 0.2 * side, -28), (4.5, 14, 20))
    skin = smooth_union(smooth_union(dome, face, 20.0), neck, 20.0)
    skin = union(skin, ears + 0.6 * f.texture)
    inside = -skin

    # scalp: skin, fat, galea; temporal muscle; the face is fat with strands of muscle
    soft = np.where(inside < 2.2, 45.0, -70.0 + 8 * f.texture)
    temporal = to_ball(side, y, z, (68, -24, -14), (13, 30, 36))
    neck_muscle = to_ball(side, y, z, (26, 70, -52), (32, 20, 30))
    muscle = union(temporal, neck_muscle)
    soft = np.where(inside > 3.0, mix(soft, 54.0 + 4 * f.texture, coverage(muscle, 2.0)), soft)
    deep = (z < -12) & (inside > 6) & (f.lumpy > -0.2) & (muscle > 0)
    soft = np.where(deep & (side > 42), 40.0 + 8 * f.texture, soft)

    bone = shell
    base = air = np.full_like(x, FAR_MM)
    if z.min(where=skin < 10, initial=FAR_MM) < SKULL_BASE_MM:
        skin, bone, base, soft, air = _skull_base(f, cells, skin, shell, soft)
    diploe = np.clip(inward * 2.2 - 0.5, 0, 1) * (0.5 + 0.5 * (bone == shell).astype(np.float32))
    bone_hu = 1350 - 650 * diploe + 90 * f.texture * diploe + 60 * shape
    return skin, bone, base, soft, bone_hu, air


def fill_couch(x: Array, y: Array, radius_mm: float, top_mm: float) -> Array:
    """HU of air, the head holder and its cushion, in the patient frame."""
    bowl = (np.sqrt((x / radius_mm) ** 2 + (np.maximum(y, 0) / 113) ** 2) - 1) * radius_mm
    shell = intersection(np.abs(bowl) - 1.6, top_mm - y)
    cushion = intersection(bowl + 2.0, 40 - y)
    hu = mix(np.full_like(x, AIR_HU), -960.0, coverage(cushion, 1.5))
    return mix(hu, 420.0, coverage(shell, 1.5))
