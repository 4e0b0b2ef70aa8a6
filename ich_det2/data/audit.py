"""Leaks between splits: the same patient, study, image, or nearly the same pixels on two sides.

N is the number of images, T the side of a thumbnail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ..files import sha256
from .inspection import read_grey
from .tree import VocTree

THUMBNAIL = 64
"""T; slices are compared at T x T pixels."""

SAME_CORRELATION = 0.97
"""Thumbnails that correlate at least so much show one slice or neighbours of one patient. In CT-ICH
the most alike slices of different patients reach 0.920; a slice that was resized and saved as JPEG,
moved by two pixels, or brightened, keeps 0.992 to its original."""


@dataclass(frozen=True)
class Leak:
    """Two images in different splits that should be in one.

    Attributes:
        kind: "patient", "study", "SOP Instance UID", "image id", "file" or "pixels".
        splits: the two splits.
        images: one image of each, by id.
        detail: how alike the pixels are, or how many images share the patient.
    """

    kind: str
    splits: tuple[str, str]
    images: tuple[str, str]
    detail: str = ""

    @property
    def remedy(self) -> str:
        """What to do before the images are divided anew."""
        if self.kind == "study":
            return (
                "correct patients.csv, where a study of one name is one study: if each patient's"
                " are numbered, put the patient before the number"
            )
        return "correct patients.csv"


def find_leaks(
    tree: VocTree,
    names: Sequence[str],
    *,
    pixels: bool = True,
    files: bool = False,
    track: Callable[[Iterable], Iterable] = iter,
) -> list[Leak]:
    """Compare the images of different lists.

    Both ``patients.csv`` and the DICOM headers are believed: a patient with two pseudonyms is
    found by the header, and two names in headers by the list.

    Args:
        tree: the VOC tree.
        names: of its lists.
        pixels: compare pixels too, which reads every image.
        files: look for identical files too, by their hashes.
        track: wraps the loop over images, for a bar of progress.

    Returns:
        The leaks, one for each patient, study and image between two lists, and one for each pair
        of like pixels.

    Raises:
        ValueError, FileNotFoundError: a list or an image is missing or cannot be read.
    """
    place = [(name, image) for name in names for image in tree.read_list(name)]
    keys: dict[str, list[tuple[str, str]]] = {
        "patient": [], "study": [], "SOP Instance UID": [], "image id": [], "file": [],
    }  # fmt: skip
    thumbnails = []
    for _, image in track(place):
        listed_patient, listed_study = tree.patients.get(image, ("", ""))
        header = tree.header(image)
        keys["patient"].append((listed_patient, header[0]))
        # Without studies the patient stands for the study in patients.csv.
        keys["study"].append((listed_study if listed_study != listed_patient else "", header[1]))
        keys["SOP Instance UID"].append(("", header[2]))
        keys["image id"].append((image, ""))
        keys["file"].append((sha256(tree.images[image]) if files else "", ""))
        if pixels:
            thumbnails.append(thumbnail(tree.images[image]))
    leaks = [leak for kind, values in keys.items() for leak in _shared(kind, values, place)]
    if pixels:
        leaks += _alike(np.array(thumbnails), place)
    return leaks


def thumbnail(path: Path) -> np.ndarray:
    """A slice at T x T pixels in a brain window, float32 (T * T,), of mean 0 and length 1.

    Raises:
        ValueError: naming the file, if it cannot be read.
    """
    small = cv2.resize(read_grey(path), (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    small = small.astype(np.float32).ravel()
    small -= small.mean()
    return small / max(float(np.linalg.norm(small)), 1e-6)


def _shared(
    kind: str, values: Sequence[tuple[str, str]], place: Sequence[tuple[str, str]]
) -> list[Leak]:
    """One leak for each value, of the list or of the headers, that two splits share."""
    leaks: dict[tuple, Leak] = {}
    for source in (0, 1):
        holders: dict[str, dict[str, list[str]]] = {}
        for value, (split, image) in zip(values, place, strict=True):
            if value[source]:
                holders.setdefault(value[source], {}).setdefault(split, []).append(image)
        for by_split in holders.values():
            names = sorted(by_split)
            for i, first in enumerate(names):
                for second in names[i + 1 :]:
                    pair = by_split[first], by_split[second]
                    leak = Leak(
                        kind,
                        (first, second),
                        (pair[0][0], pair[1][0]),
                        f"{len(pair[0])} and {len(pair[1])} images",
                    )
                    leaks.setdefault((leak.splits, leak.images), leak)
    return list(leaks.values())


def _alike(
    thumbnails: np.ndarray, place: Sequence[tuple[str, str]], rows: int = 1024
) -> list[Leak]:
    """Pairs of nearly equal thumbnails (N, T * T) in different splits."""
    splits = np.array([split for split, _ in place])
    leaks = []
    for start in range(0, len(place), rows):
        correlation = thumbnails[start : start + rows] @ thumbnails.T
        for i, j in np.argwhere(correlation >= SAME_CORRELATION):
            first = start + i
            if first < j and splits[first] != splits[j]:
                pair = sorted([place[first], place[j]])
                leaks.append(
                    Leak(
                        "pixels",
                        (pair[0][0], pair[1][0]),
                        (pair[0][1], pair[1][1]),
                        f"correlation {correlation[i, j]:.4f}",
                    )
                )
    return leaks
