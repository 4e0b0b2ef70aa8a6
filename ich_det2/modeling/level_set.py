"""Distance-regularized level set evolution in two dimensions (pure functions).

Li, Xu, Gui and Fox, "Distance regularized level set evolution and its application to image
segmentation", IEEE Transactions on Image Processing 19(12):3243, 2010, whose equations are in the
docstrings. The object is where phi is negative. Shape glossary: H and W, rows and columns of an
image; lengths are in pixels.
"""

import numpy as np
from scipy import ndimage

MAX_RATE = 0.25
"""Below which the time step times the regularization's weight must be, or it is not stable."""


def initial_level_set(mask: np.ndarray, height: float = 2.0) -> np.ndarray:
    """phi_0 = -c_0 in the object and c_0 outside of it; the regularization does the rest.

    Args:
        mask: bool (H, W).
        height: c_0 > 0.

    Returns:
        float32 (H, W).
    """
    return np.where(mask, -height, height).astype(np.float32)


def edge_indicator(image: np.ndarray, *, sigma: float = 1.5, contrast: float = 1.0) -> np.ndarray:
    """g = 1 / (1 + |grad (G_sigma * I)|^2): 1 where the image is flat, near 0 at its edges.

    Args:
        image: I, (H, W).
        sigma: of the Gaussian.
        contrast: grey values a pixel that make g one half; the publication has 1.

    Returns:
        float32 (H, W) in (0, 1].
    """
    smooth = ndimage.gaussian_filter(np.asarray(image, dtype=np.float32), sigma, mode="nearest")
    dy, dx = np.gradient(smooth)
    return 1 / (1 + (dx**2 + dy**2) / np.float32(contrast) ** 2)


def evolve(
    phi: np.ndarray,
    edges: np.ndarray,
    iterations: int,
    *,
    time_step: float = 4.0,
    regularization: float = 0.05,
    length: float = 5.0,
    area: float = 0.0,
    width: float = 1.5,
) -> np.ndarray:
    """Moves the zero level of phi to the edges of an image.

    Each iteration adds, times the time step, mu div(d_p(|grad phi|) grad phi)
    + lambda delta(phi) div(g grad phi / |grad phi|) + alpha g delta(phi): the distance
    regularization, which makes |grad phi| 1 around the zero level and 0 far from it; the contour's
    length, weighed by g, which draws it to edges and smooths it; and its area, weighed by g, which
    makes it shrink (alpha > 0) or grow (alpha < 0) where there is no edge.

    Args:
        phi: float (H, W), of :func:`initial_level_set`; H and W at least 2.
        edges: g, (H, W), of :func:`edge_indicator`.
        iterations: of the evolution.
        time_step: dt.
        regularization: mu; mu dt < 1/4.
        length: lambda.
        area: alpha.
        width: epsilon of delta.

    Returns:
        float32 (H, W).

    Raises:
        ValueError: if mu dt is too large.
    """
    if not time_step * regularization < MAX_RATE:
        raise ValueError(
            f"time_step {time_step} times regularization {regularization} is"
            f" {time_step * regularization:g}, expected below {MAX_RATE}, or it is not stable."
        )
    phi, edges = np.asarray(phi, dtype=np.float32), np.asarray(edges, dtype=np.float32)
    edge_dy, edge_dx = np.gradient(edges)
    for _ in range(iterations):
        phi = _without_flux(phi)
        dy, dx = np.gradient(phi)
        slope = np.sqrt(dx**2 + dy**2)
        unit_x, unit_y = dx / (slope + 1e-10), dy / (slope + 1e-10)
        # div(d_p grad phi) = laplacian + div((d_p - 1) grad phi): the former by its five points,
        # since differences over two pixels do not see what alternates from one to the next.
        rate = diffusion_rate(slope) - 1
        regular = ndimage.laplace(phi, mode="nearest") + _divergence(rate * dx, rate * dy)
        # div(g n) = grad g . n + g div n
        curvature = _divergence(unit_x, unit_y)
        edge_term = edge_dx * unit_x + edge_dy * unit_y + edges * curvature
        at_contour = dirac(phi, width)
        phi = phi + np.float32(time_step) * (
            regularization * regular + at_contour * (length * edge_term + area * edges)
        )
    return phi


def diffusion_rate(slope: np.ndarray) -> np.ndarray:
    """d_p(s) = p'(s) / s of the double-well potential p.

    p(s) = (1 - cos 2 pi s) / (2 pi)^2 for s <= 1 and (s - 1)^2 / 2 above, with minima at 0 and 1;
    so d_p is sin(2 pi s) / (2 pi s) and 1 - 1 / s.

    Args:
        slope: s >= 0, |grad phi|, any shape.

    Returns:
        In [-1, 1]: above 0 where diffusion makes the slope less, below 0 where it makes it more.
    """
    return np.where(slope <= 1, np.sinc(2 * slope), 1 - 1 / np.maximum(slope, 1))


def dirac(phi: np.ndarray, width: float) -> np.ndarray:
    """delta(x) = (1 + cos(pi x / epsilon)) / (2 epsilon) for |x| <= epsilon, else 0.

    Args:
        phi: x, any shape.
        width: epsilon > 0.
    """
    near = np.abs(phi) <= width
    return np.where(near, (1 + np.cos(np.pi / width * phi)) / (2 * width), 0)


def _without_flux(phi: np.ndarray) -> np.ndarray:
    """With borders equal to what lies next to them, so that nothing flows over them."""
    return np.pad(phi[1:-1, 1:-1], 1, mode="edge") if min(phi.shape) > 2 else phi


def _divergence(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.gradient(x, axis=1) + np.gradient(y, axis=0)
