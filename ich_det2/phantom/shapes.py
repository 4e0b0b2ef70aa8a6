"""Shapes as signed distances, the HU of soft edges, and smooth random fields.

A distance is in mm and negative inside. x, y, z are arrays of one shape.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from scipy import ndimage

Array = np.ndarray

FAR_MM = 99.0
SKIP_MM = 14.0
"""Shapes that lie further above or below a plane than this are not computed on it."""


def to_ellipsoid(x: Array, y: Array, z: Array, centre: Sequence, radii: Sequence[float]) -> Array:
    """First-order distance to an ellipsoid: f / |grad f| with f = k (k - 1)."""
    if z.min() > centre[2] + radii[2] + SKIP_MM:
        return np.full_like(z, FAR_MM)
    u, v, w = ((p - c) / r for p, c, r in zip((x, y, z), centre, radii))
    k = np.sqrt(u * u + v * v + w * w)
    u, v, w = u / radii[0], v / radii[1], w / radii[2]
    return k * (k - 1.0) / (np.sqrt(u * u + v * v + w * w) + 1e-6)


def to_ball(x: Array, y: Array, z: Array, centre: Sequence, radii: Sequence[float]) -> Array:
    """Cheap distance to an ellipsoid: good near its surface, ``FAR_MM`` on planes far from it."""
    if z.min() > centre[2] + radii[2] + SKIP_MM or z.max() < centre[2] - radii[2] - SKIP_MM:
        return np.full_like(z, FAR_MM)
    u, v, w = ((p - c) / r for p, c, r in zip((x, y, z), centre, radii))
    return (np.sqrt(u * u + v * v + w * w) - 1.0) * min(radii)


def to_tube(x: Array, y: Array, z: Array, points: Sequence[Sequence[float]]) -> Array:
    """Distance to a chain of round cones; each point is (x, y, z, radius)."""
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


def union(*distances: Array) -> Array:
    """Distance to what lies in any of several shapes."""
    return functools.reduce(np.minimum, distances)


def intersection(*distances: Array) -> Array:
    """Distance to what lies in all of several shapes."""
    return functools.reduce(np.maximum, distances)


def smooth_union(a: Array, b: Array, smooth_mm: float) -> Array:
    """Union of two distances whose crease is rounded over ``smooth_mm``."""
    h = np.maximum(smooth_mm - np.abs(a - b), 0.0) / smooth_mm
    return np.minimum(a, b) - h * h * (smooth_mm / 4.0)


def coverage(distance: Array, soft_mm: float) -> Array:
    """Part of a pixel that lies inside, in [0, 1], for an edge ``soft_mm`` wide."""
    return np.clip(0.5 - distance / soft_mm, 0.0, 1.0)


def mix(hu: Array, value: Array | float, cover: Array) -> Array:
    """HU where ``value`` covers a part of each pixel."""
    return hu + cover * (value - hu)


def noise_volume(
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


def noise_planes(
    rng: np.random.Generator,
    fov: float,
    grid: int,
    heights: tuple[float, float],
    low: float,
    high: float | None = None,
) -> Callable[[float], Array]:
    """Smooth random field over a square field of view, lengths in mm.

    Args:
        rng: source of randomness.
        fov: side of the field of view.
        grid: G.
        heights: lowest and highest z that will be asked for.
        low, high: as in ``noise_volume``.

    Returns:
        A function of z (patient frame) that gives the field on the plane, (G, G) float32.
    """
    step = 2.0 if low < 6 else 4.0
    count = int(np.ceil(fov / step))
    depth = int(np.ceil((heights[1] - heights[0]) / step)) + 2
    volume = noise_volume(rng, (depth, count, count), low / step, high and high / step)

    def plane(z: float) -> Array:
        position = min(max((z - heights[0]) / step, 0.0), depth - 1.001)
        index = int(position)
        part = np.float32(position - index)
        mixed = volume[index] * (1 - part) + volume[index + 1] * part
        return cv2.resize(mixed, (grid, grid), interpolation=cv2.INTER_CUBIC)

    return plane
