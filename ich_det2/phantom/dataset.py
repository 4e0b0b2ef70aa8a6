"""A data set of synthetic patients: a VOC tree of DICOM CT series, divided by patient.

DICOM/P0007_012.dcm            one CT Image Storage instance per slice
Annotations/P0007_012.xml      VOC boxes; healthy slices have a file without objects
SegmentationObject/P0007_012.png   the bleeds' pixels, where there is one: value i is object i
ImageSets/Main/{train,val,test}.txt
patients.csv                   image,patient,study
phantom.json                   the parameters; written last, marks a complete data set
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import multiprocessing
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2
import numpy as np

from ..cli import progress
from ..data.pictures import write_picture
from ..data.tree import ANNOTATIONS, IMAGE_FOLDERS, OBJECT_MASKS, VocTree
from ..data.voc import write_voc
from .bleeds import TYPES
from .dicom import GENERATOR, patient_name, write_slices
from .patient import VERSION, make_patient

SPLITS = {"train": 0.5, "val": 0.2, "test": 0.3}
"""Share of the patients in each image set."""

SECOND = {"EDH": "IPH", "SDH": "IPH", "IPH": "IVH", "IVH": "IPH", "SAH": "IVH"}
"""The bleed that may come with another."""

MARKER = "phantom.json"


def write_dataset(
    root: str | Path, *, patients: int = 80, seed: int = 0, size: int = 512, workers: int = 1
) -> dict:
    """Write a data set into an empty folder that exists.

    Args:
        root: the folder.
        patients: number of patients, at least 6.
        seed: seed of everything.
        size: rows and columns of a slice, pixels.
        workers: number of processes; the files do not depend on it.

    Returns:
        Counts: patients, slices, slices with a bleed, boxes of each type, patients per split.

    Raises:
        ValueError: the system has ended a worker.
    """
    root = Path(root)
    for folder in (IMAGE_FOLDERS[0], ANNOTATIONS, OBJECT_MASKS):
        (root / folder).mkdir(parents=True)
    plan = plan_patients(patients, seed)
    run = functools.partial(_write_patient, root, seed, size)
    with _workers(workers) as run_all:
        found = run_all(run, range(1, patients + 1), plan)
        slices = list(progress(found, "patients", total=patients))
    splits = split_patients(plan)
    lists = {s: [i for n in numbers for i in slices[n - 1]] for s, numbers in splits.items()}
    owners = dict(zip(map(patient_name, range(1, patients + 1)), slices))
    studies = {stem: (name, f"{name}_1") for name, stems in owners.items() for stem in stems}
    VocTree(root).write_lists(lists, patients=studies)
    names = [names for stems in slices for names in stems.values()]
    boxes = Counter(itertools.chain(*names))
    counts = {
        "patients": patients,
        "bleeding_patients": sum(map(bool, plan)),
        "slices": len(names),
        "bleeding_slices": sum(map(bool, names)),
        "boxes": {name: boxes[name] for name in TYPES},
        "split_patients": {name: len(numbers) for name, numbers in splits.items()},
    }
    marker = {"parameters": parameters(patients, seed, size), "counts": counts}
    (root / MARKER).write_text(json.dumps(marker, indent=2) + "\n", newline="\n")
    return counts


def parameters(patients: int, seed: int, size: int) -> dict:
    """All that a data set depends on, as its marker keeps it."""
    return dict(generator=GENERATOR, version=VERSION, patients=patients, seed=seed, size=size)


def read_parameters(folder: Path) -> dict | None:
    """The parameters of the complete data set in ``folder``, None if there is no such."""
    try:
        found = json.loads((folder / MARKER).read_text())["parameters"]
        return found if found["generator"] == GENERATOR else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
    plan: list[tuple[str, ...]] = [()] * patients
    for index in range(bleeding):
        name = TYPES[index % len(TYPES)]
        plan[index] = (name, SECOND[name]) if rng.random() < 0.3 else (name,)
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


def _write_patient(
    root: Path, seed: int, size: int, patient: int, types: tuple[str, ...]
) -> dict[str, list[str]]:
    """Make and write one patient; returns the types of the bleeds by the stem of each slice."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng(np.random.SeedSequence([seed, patient]))
    phantom = make_patient(rng, types=types, size=size)
    paths = write_slices(phantom, root / IMAGE_FOLDERS[0], patient=patient, seed=seed)
    for path, lesions, labels in zip(paths, phantom.lesions, phantom.labels):
        if lesions:
            write_picture(root / OBJECT_MASKS / f"{path.stem}.png", labels)
        write_voc(
            root / ANNOTATIONS / f"{path.stem}.xml",
            filename=path.name,
            width=size,
            height=size,
            objects=[(lesion.name, lesion.box) for lesion in lesions],
            database=GENERATOR,
            segmented=bool(lesions),
        )
    return {p.stem: [lesion.name for lesion in found] for p, found in zip(paths, phantom.lesions)}


@contextlib.contextmanager
def _workers(number: int) -> Iterator[Callable]:
    """A ``map`` whose calls run in worker processes; a single one is this process itself."""
    if number == 1:
        yield map
        return
    pool = ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn"))
    stopped: list[int] = []

    def run_all(*args):
        # Ctrl-C on a terminal reaches all processes, but only this one is to stop them: those
        # that start while the signal is blocked never see it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            found = pool.map(*args)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for result in found:
            if stopped:
                raise KeyboardInterrupt
            yield result

    # An exception out of a signal's handler may leave one of the pool's locks taken, for which
    # its threads then wait forever; so it is raised between two results.
    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if here:
        signal.signal(signal.SIGINT, lambda number, frame: stopped.append(number))
    try:
        yield run_all
    except BrokenProcessPool:
        raise ValueError(
            "a worker was ended by the system, perhaps for lack of memory; start again with fewer"
            " --workers."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        if here:
            signal.signal(signal.SIGINT, before)
    if stopped:
        raise KeyboardInterrupt
