"""Splits of a VOC tree that keep a patient in one piece.

Neighbouring slices of one patient are near copies. A split by image therefore shows the network
its test images in training; a split by patient does not.

N is the number of images, S the number of splits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Hashable, Sequence

import numpy as np


def split_by_group(
    groups: Sequence[Hashable],
    ratios: Sequence[float],
    *,
    stratify: Sequence[bool] | None = None,
    seed: int = 0,
) -> list[np.ndarray]:
    """Divide images into splits so that no group (patient) is in two of them.

    A group is positive if any of its images is. Positive and negative groups are divided
    separately, each by ``ratios`` as closely as whole groups allow (largest remainder), but every
    split gets at least one group of each kind if there are enough. Which groups go where depends
    on their labels and the seed only, not on the order of the images.

    Args:
        groups: the N groups of the images.
        ratios: the S shares, not negative, of sum 1. A split of share 0 stays empty.
        stratify: N labels, true for a positive image; None takes all groups as of one kind.
        seed: another seed gives another split.

    Returns:
        S ascending arrays of indices into ``groups``; together they hold each of 0 ... N-1 once.

    Raises:
        ValueError: wrong ratios or lengths, or fewer groups than splits of a positive share.
    """
    shares = _check_ratios(ratios)
    labels = [str(group) for group in groups]
    positive = [False] * len(labels) if stratify is None else [bool(p) for p in stratify]
    if len(positive) != len(labels):
        raise ValueError(f"stratify has {len(positive)} labels, expected {len(labels)}, one each.")

    of_kind: dict[bool, list[str]] = {True: [], False: []}
    positives = {label for label, flag in zip(labels, positive, strict=True) if flag}
    for label in sorted(set(labels), key=lambda label: _draw(label, seed)):
        of_kind[label in positives].append(label)
    counts = _count_groups([len(members) for members in of_kind.values()], shares)

    split_of: dict[str, int] = {}
    for members, row in zip(of_kind.values(), counts, strict=True):
        split_of.update(zip(members, np.repeat(np.arange(len(shares)), row), strict=True))
    assigned = np.array([split_of[label] for label in labels], dtype=int)
    return [np.flatnonzero(assigned == split) for split in range(len(shares))]


def split_stratified(
    groups: Sequence[Hashable],
    types: Sequence[Collection[str]],
    ratios: Sequence[float],
    *,
    seed: int = 0,
) -> list[np.ndarray]:
    """Divide images by group (patient) with like shares of images, positives and types.

    Groups are placed one by one, those with the rarest types and the most images first, each where
    the counts of images, of positive images and of images of each type then deviate least from
    their shares (a greedy form of iterative stratification, Sechidis et al. 2011, on groups). The
    last groups with positive images go to splits that would stay without, so that no split is,
    where there are groups enough.

    Args:
        groups: the N groups of the images.
        types: N collections of the types that an image shows; an empty one is a negative image.
        ratios: the S shares, not negative, of sum 1. A split of share 0 stays empty.
        seed: another seed gives another split.

    Returns:
        S ascending arrays of indices into ``groups``; together they hold each of 0 ... N-1 once.

    Raises:
        ValueError: wrong ratios or lengths, or fewer groups than splits of a positive share.
    """
    shares = _check_ratios(ratios)
    if len(types) != len(groups):
        raise ValueError(f"types has {len(types)} entries, expected {len(groups)}, one each.")
    labels = [str(group) for group in groups]
    names = sorted({name for shown in types for name in shown})
    rows = np.array([[1, bool(t), *(n in t for n in names)] for t in types], dtype=float)
    rows = rows.reshape(len(labels), 2 + len(names))
    order = sorted(set(labels), key=lambda label: _draw(label, seed))
    counts = {label: np.zeros(rows.shape[1]) for label in order}
    for label, row in zip(labels, rows, strict=True):
        counts[label] += row
    wanted = np.flatnonzero(shares)
    if len(order) < len(wanted):
        raise ValueError(
            f"There are {len(order)} groups for {len(wanted)} splits, expected at least one each; "
            "give more groups or fewer splits."
        )
    # Images, and types, count as shares of their whole; what is rare weighs as much as the rest.
    total = np.maximum(rows.sum(axis=0), 1)
    weight = {label: count / total for label, count in counts.items()}
    order.sort(key=lambda label: -weight[label].max())

    filled = np.zeros((len(shares), rows.shape[1]))
    split_of: dict[str, int] = {}
    for place, label in enumerate(order):
        empty = [s for s in wanted if not filled[s].any()]
        # The last groups go to splits that would stay empty.
        allowed = empty if len(order) - place <= len(empty) else wanted
        lacking = [s for s in wanted if not filled[s, 1]]
        left = sum(weight[other][1] > 0 for other in order[place:])
        if weight[label][1] and left <= len(lacking):
            allowed = [s for s in lacking if s in allowed] or lacking
        missing = shares[:, None] - filled
        gain = [
            (missing[s] ** 2).sum() - ((missing[s] - weight[label]) ** 2).sum() for s in allowed
        ]
        best = allowed[int(np.argmax(np.round(gain, 12)))]
        filled[best] += weight[label]
        split_of[label] = int(best)
    assigned = np.array([split_of[label] for label in labels], dtype=int)
    return [np.flatnonzero(assigned == split) for split in range(len(shares))]


def split_by_image(
    images: Sequence[Hashable],
    ratios: Sequence[float],
    *,
    stratify: Sequence[bool] | None = None,
    seed: int = 0,
) -> list[np.ndarray]:
    """Divide images as the paper does, whoever they show: ``split_by_group`` of groups of one.

    Args:
        images: N different image ids.
        ratios, stratify, seed: as in ``split_by_group``.

    Returns:
        S ascending arrays of indices into ``images``.

    Raises:
        ValueError: as ``split_by_group``, or an image is named twice.
    """
    if len({str(image) for image in images}) < len(images):
        raise ValueError("The images have ids that repeat, expected each id once.")
    return split_by_group(images, ratios, stratify=stratify, seed=seed)


def make_folds(
    groups: Sequence[Hashable],
    types: Sequence[Collection[str]],
    folds: int,
    *,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Divide images for K-fold cross-validation by group (patient), see ``split_stratified``.

    Args:
        groups, types, seed: as in ``split_stratified``.
        folds: K, at least 2.

    Returns:
        Ascending arrays of indices into ``groups`` by name: ``fold<i>_train`` and ``fold<i>_val``;
        each image is in the val list of exactly one fold.

    Raises:
        ValueError: as ``split_stratified``, or fewer than 2 folds.
    """
    if folds < 2:
        raise ValueError(f"There are {folds} folds, expected at least 2.")
    parts = split_stratified(groups, types, [1 / folds] * folds, seed=seed)
    everything, lists = np.arange(len(groups)), {}
    for i, part in enumerate(parts):
        lists[f"fold{i}_train"] = np.setdiff1d(everything, part)
        lists[f"fold{i}_val"] = part
    return lists


def positive_groups(
    groups: Sequence[Hashable],
    positive: Sequence[bool],
    *,
    negatives_per_positive: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The images of positive groups (bleeding patients), as the paper's, with fewer negative ones.

    Args:
        groups: the N groups of the images.
        positive: N labels, true for a positive image; all of these are kept.
        negatives_per_positive: negative images drawn for each positive one, at most; None: all.
        seed: another seed draws others.

    Returns:
        Ascending indices into ``groups``.
    """
    wanted = {group for group, flag in zip(groups, positive, strict=True) if flag}
    kept = [i for i, flag in enumerate(positive) if flag]
    negatives = [i for i, g in enumerate(groups) if g in wanted and not positive[i]]
    order = np.random.default_rng(seed).permutation(len(negatives))
    if negatives_per_positive is not None:
        order = order[: round(min(negatives_per_positive * len(kept), len(negatives)))]
    return np.sort(np.array([*kept, *(negatives[i] for i in order)], dtype=int))


def _check_ratios(ratios: Sequence[float]) -> np.ndarray:
    shares = np.asarray(ratios, dtype=float)
    valid = shares.ndim == 1 and shares.size and np.isfinite(shares).all() and (shares >= 0).all()
    if not valid or not math.isclose(shares.sum(), 1, abs_tol=1e-6):
        raise ValueError(f"The ratios are {list(ratios)}, expected shares from 0 to 1 of sum 1.")
    return shares


def _draw(label: str, seed: int) -> bytes:
    """A group's place in the draw: random to the eye, the same on every machine and version."""
    return hashlib.sha256(f"{seed}:{label}".encode()).digest()


def _count_groups(sizes: Sequence[int], shares: np.ndarray) -> np.ndarray:
    """How many of the groups of each kind go into each split.

    Args:
        sizes: number of groups of each kind, K of them.
        shares: sized (S,), of sum 1.

    Returns:
        Sized (K, S); row k has the sum ``sizes[k]``.
    """
    wanted = shares > 0
    if sum(sizes) < wanted.sum():
        raise ValueError(
            f"There are {sum(sizes)} groups for {wanted.sum()} splits, expected at least one each; "
            "give more groups or fewer splits."
        )
    counts = np.zeros((len(sizes), len(shares)), dtype=int)
    owed = np.zeros(len(shares))  # groups that the kinds so far owe to each split
    for size, row in zip(sizes, counts, strict=True):
        row[:] = _largest_remainder(size, shares, owed)
        while size >= wanted.sum() and (row[wanted] == 0).any():
            row[row.argmax()] -= 1
            row[np.flatnonzero(wanted & (row == 0))[0]] += 1
        owed += size * shares - row
    # Kinds that are each too few for all splits may leave one empty that they could fill together.
    while (empty := wanted & (counts.sum(axis=0) == 0)).any():
        rich = counts.sum(axis=0).argmax()
        kind = counts[:, rich].argmax()
        counts[kind, rich] -= 1
        counts[kind, np.flatnonzero(empty)[0]] += 1
    return counts


def _largest_remainder(size: int, shares: np.ndarray, owed: np.ndarray) -> np.ndarray:
    """Round ``size * shares`` to whole groups of the same sum; of equal remainders, the split that
    is owed more goes first, so that the kinds do not all round the same way."""
    quota = (size * shares).round(9)  # 10 * 0.3 may be a hair below 3
    counts = np.floor(quota).astype(int)
    first = np.lexsort((-owed.round(9), (counts - quota).round(9)))
    counts[first[: size - counts.sum()]] += 1
    return counts
