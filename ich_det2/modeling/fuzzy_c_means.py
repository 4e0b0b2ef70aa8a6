"""Fuzzy c-means of numbers (pure functions).

Bezdek, "Pattern Recognition with Fuzzy Objective Function Algorithms", 1981. Shape glossary: M
values, K clusters.
"""

import numpy as np


def fuzzy_c_means(
    values: np.ndarray,
    centers: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    fuzziness: float = 2.0,
    max_iter: int = 100,
    tolerance: float = 1e-2,
) -> tuple[np.ndarray, np.ndarray]:
    """Clusters values, each of which belongs to all clusters by degrees.

    Alternates :func:`memberships` and :func:`cluster_centers`, each of which minimizes
    J = sum_k sum_m w_m u_km^q (x_m - c_k)^2 while the other stays.

    Args:
        values: x, (M,).
        centers: c to begin with, (K,); the order of the clusters stays.
        weights: w, (M,), >= 0: how often each value occurs, so that an image of 256 grey values
            costs no more than those. None: once.
        fuzziness: q > 1; near 1 each value belongs to one cluster.
        max_iter: of both steps.
        tolerance: it ends when no centre moves further.

    Returns:
        Centres, (K,), and memberships by them, (K, M).

    Raises:
        ValueError: if the fuzziness is not above 1, or there is no centre.
    """
    if not fuzziness > 1 or not len(centers):
        raise ValueError(
            f"fuzziness is {fuzziness} and there are {len(centers)} centres, expected above 1, and"
            " one or more."
        )
    values, centers = np.asarray(values, dtype=float), np.asarray(centers, dtype=float)
    members = memberships(values, centers, fuzziness)
    for _ in range(max_iter):
        moved = cluster_centers(values, members, centers, weights=weights, fuzziness=fuzziness)
        members = memberships(values, moved, fuzziness)
        step, centers = np.abs(moved - centers).max(), moved
        if step <= tolerance:
            break
    return centers, members


def memberships(values: np.ndarray, centers: np.ndarray, fuzziness: float = 2.0) -> np.ndarray:
    """u_km = 1 / sum_j (|x_m - c_k| / |x_m - c_j|)^(2 / (q - 1)).

    A value at a centre belongs to it alone; at several centres it is shared among them equally.

    Args:
        values: (M,).
        centers: (K,).
        fuzziness: q.

    Returns:
        (K, M), of sum 1 over clusters.
    """
    values, centers = np.asarray(values, dtype=float), np.asarray(centers, dtype=float)
    distances = np.abs(values - centers[:, None])
    # A mean of equal values may be off by rounding.
    distances[distances <= 1e-12 * np.maximum(np.abs(values), np.abs(centers)[:, None])] = 0
    nearest = distances.min(axis=0)
    # By the ratio to the nearest, so that no power of a small distance overflows.
    near = np.where(
        nearest > 0,
        (nearest / np.where(distances > 0, distances, 1)) ** (2 / (fuzziness - 1)),
        distances == 0,
    )
    return near / near.sum(axis=0)


def cluster_centers(
    values: np.ndarray,
    members: np.ndarray,
    centers: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    fuzziness: float = 2.0,
) -> np.ndarray:
    """c_k = sum_m w_m u_km^q x_m / sum_m w_m u_km^q; one to which nothing belongs stays.

    Args:
        values: (M,).
        members: (K, M).
        centers: (K,), of before.
        weights: (M,) or None.
        fuzziness: q.

    Returns:
        (K,).
    """
    powers = members**fuzziness * (1.0 if weights is None else np.asarray(weights))
    sums = powers.sum(axis=1)
    return np.where(sums > 0, powers @ values / np.where(sums > 0, sums, 1), centers)
