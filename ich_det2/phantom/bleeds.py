"""The five types of bleed: each draws its place and size at random, and is then a distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .head import Fields, to_cavity
from .shapes import FAR_MM, Array, to_ball


@dataclass
class Bleed:
    """One bleed of a patient.

    Attributes:
        name: its type, one of ``TYPES``.
        blood_hu: density of the blood.
        distance: gives the distance to the bleed on a plane, (G, G), in mm and negative inside.
        oedema_mm: width of the dark rim around it.
        push_mm: what it adds to the midline shift, positive to the left.
    """

    name: str
    blood_hu: float
    distance: Callable[[Fields], Array]
    oedema_mm: float = 0.0
    push_mm: float = 0.0


def _surface_point(side: int, azimuth: float, z_mm: float) -> tuple[Array, Array]:
    """Point of the inner table on a horizontal ray at height ``z_mm``, and the normal there."""
    t = np.linspace(5, 95, 361)
    x, y, z = side * np.cos(azimuth) * t, np.sin(azimuth) * t, np.full_like(t, z_mm)
    inside = to_cavity(x, y, z) < 0
    last = int(np.flatnonzero(inside)[-1]) if inside.any() else 0
    point = np.array([x[last], y[last], z_mm])
    steps = np.concatenate([np.eye(3), -np.eye(3)]) + point
    value = to_cavity(*steps.T)
    normal = value[:3] - value[3:]
    return point, normal / np.linalg.norm(normal)


def draw_edh(rng: np.random.Generator) -> Bleed:
    """Epidural: a lens between the inner table and a ball that dents the brain."""
    side = int(rng.choice([-1, 1]))
    azimuth = rng.choice([rng.uniform(-60, -25), rng.uniform(-25, 35), rng.uniform(35, 62)])
    azimuth *= np.pi / 180
    point, normal = _surface_point(side, azimuth, rng.uniform(-2, 42))
    depth = rng.uniform(7, 24)
    half = depth * rng.uniform(1.15, 1.9) + 4
    radius = (half * half + depth * depth) / (2 * depth)
    cx, cy, cz = map(float, point + normal * (radius - depth))
    flat = rng.uniform(0.9, 1.2)

    def distance(f: Fields) -> Array:
        dz = (f.z - cz) / flat
        return np.sqrt((f.x - cx) ** 2 + (f.y - cy) ** 2 + dz * dz) - radius + 0.5 * f.lumpy

    push = -side * rng.uniform(0.1, 0.3) * depth
    return Bleed("EDH", rng.uniform(60, 76), distance, push_mm=push)


def draw_sdh(rng: np.random.Generator) -> Bleed:
    """Subdural: a crescent, the layer under the inner table of one hemisphere."""
    side = int(rng.choice([-1, 1]))
    middle = rng.uniform(-30, 30) * np.pi / 180
    reach = rng.uniform(50, 82) * np.pi / 180
    z_middle, z_reach = rng.uniform(12, 36), rng.uniform(20, 38)
    thick = rng.uniform(6.5, 15)

    def distance(f: Fields) -> Array:
        u = (np.arctan2(f.y, side * f.x) - middle) / reach
        v = (f.z - z_middle) / z_reach
        window = np.clip(1 - u * u - v * v, 0, 1) ** 0.7
        layer = -f.cavity - (thick * window * (1 + 0.1 * f.lumpy) - 0.8)
        return np.maximum(layer, 2.5 - side * f.x)

    push = -side * rng.uniform(0.1, 0.5) * thick
    return Bleed("SDH", rng.uniform(57, 73), distance, push_mm=push)


def draw_iph(rng: np.random.Generator) -> Bleed:
    """Intraparenchymal: a lumpy ball, deep or lobar, with oedema around it."""
    side = int(rng.choice([-1, 1]))
    place = rng.choice(["ganglia", "thalamus", "lobar", "lobar", "cerebellum"])
    if place == "ganglia":
        centre, radius = (side * 26.0, -2 + rng.normal(0, 5), 5 + rng.normal(0, 4)), (7, 19)
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

    def distance(f: Fields) -> Array:
        ball = to_ball(f.x, f.y, f.z, centre, radii) + bumps * f.lumpy
        return np.maximum(ball, f.cavity + 3.5)

    return Bleed("IPH", rng.uniform(58, 78), distance, oedema_mm=rng.uniform(2.5, 7.0))


def draw_ivh(rng: np.random.Generator) -> Bleed:
    """Intraventricular: blood that settles to the back of the ventricles of a lying patient."""
    sides = [(-1, 1), (1,), (-1,)][rng.choice(3, p=[0.6, 0.2, 0.2])]
    level = rng.uniform(10, 40) if rng.random() < 0.65 else rng.uniform(-45, 5)
    fourth = rng.random() < 0.4

    def distance(f: Fields) -> Array:
        settled = level - f.y_patient + 0.5 * f.lumpy
        blood = np.maximum(f.ventricle + 0.3, settled)
        if len(sides) == 1:
            blood = np.maximum(blood, -sides[0] * f.x)
        return blood if fourth else np.where(f.z < -18, FAR_MM, blood)

    return Bleed("IVH", rng.uniform(58, 74), distance)


def draw_sah(rng: np.random.Generator) -> Bleed:
    """Subarachnoid: CSF spaces full of blood, in the basal cisterns or over one convexity."""
    side = int(rng.choice([-1, 1]))
    place = rng.choice(["basal", "sylvian", "convexity"], p=[0.45, 0.25, 0.3])
    if place == "basal":
        at, size = np.array([0, -10, -15]), rng.uniform(0.95, 1.35) * np.array([40, 32, 19])
    elif place == "sylvian":
        at, size = np.array([side * 44, -14, 1]), rng.uniform(0.8, 1.2) * np.array([23, 24, 17])
    else:
        azimuth = rng.uniform(-60, 60) * np.pi / 180
        point, _ = _surface_point(side, azimuth, rng.uniform(18, 48))
        at, size = point * 0.93, rng.uniform(0.8, 1.25) * np.array([24, 26, 20])
    centre, radii = [float(v) for v in at], [float(v) for v in size]
    widen = rng.uniform(0.6, 1.3)

    def distance(f: Fields) -> Array:
        region = to_ball(f.x, f.y, f.z, centre, radii) + 3.0 * f.lumpy
        return np.maximum(f.csf - widen, region)

    return Bleed("SAH", rng.uniform(56, 70), distance)


DRAW = {"EDH": draw_edh, "SDH": draw_sdh, "IPH": draw_iph, "IVH": draw_ivh, "SAH": draw_sah}
TYPES = tuple(DRAW)
"""Object names in the annotations: epidural, subdural, intraparenchymal, intraventricular,
subarachnoid."""
