"""Diagnose files with a trained model, from Python."""

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..evaluation.smoothing import smooth_boxes, smooth_scores
from ..zoo import DEFAULT
from .diagnoser import Detections, Diagnoser
from .results import (
    Diagnosis,
    Progress,
    SliceDiagnosis,
    find_areas,
    silent,
    summarize_patients,
    verdict,
)
from .slices import Skipped, Slice, find_slices


def diagnose(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    model: str | os.PathLike | Diagnoser = DEFAULT,
    *,
    threshold: float | None = None,
    device: str = "",
    identify: bool = False,
    batch_size: int | None = None,
    any_body_part: bool = False,
    progress: Progress = silent,
) -> Diagnosis:
    """Looks for hemorrhage in head CT; for research only, not for clinical use.

    Args:
        paths: a DICOM file, a PNG or JPEG that is windowed already, a folder of them, or several.
        model: OUTPUT_DIR of a training, ``zoo://NAME`` of one that comes with the package (see its
            model card in ``ich_det2/zoo/``), or a ``Diagnoser.load`` of it, which a service loads
            once.
        threshold: positive at this score and above; the model's operating point if None.
        device: "cpu" or "cuda"; a GPU if there is any.
        identify: keep Patient IDs and UIDs in what is written, and in names of files.
        batch_size: slices in a batch; the config's if None.
        any_body_part: also slices whose Body Part Examined names another part than the head.
        progress: is shown items, what is done with them, and how many there are; passes them on.

    Returns:
        Slices, patients, and what was skipped and why. A patient is incomplete where a slice could
        not be read, or seems to be missing.

    Raises:
        FileNotFoundError, ValueError: one sentence, of a given file that cannot be read, or if no
            slice can.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected a score from 0 to 1.")
    if not isinstance(model, Diagnoser):
        model = Diagnoser.load(model, device=device, batch_size=batch_size)
    elif device or batch_size is not None:
        raise ValueError("device and batch_size are those of the Diagnoser; give them to its load.")
    threshold = model.threshold if threshold is None else float(threshold)
    found = find_slices(paths, identify=identify, any_body_part=any_body_part, **model.context)
    slices, failed = _detect(model, found.slices, threshold, progress)
    if not slices:
        raise ValueError(
            f"none of {len(found.slices)} slices can be decoded; the first, {failed[0].file}, "
            f"{failed[0].reason.rstrip('.')}."
        )
    skipped = (*found.skipped, *failed)
    return Diagnosis(
        slices=tuple(slices),
        patients=summarize_patients(
            *(slices, skipped, found.noticed, threshold, model.patient_rule, model.classes)
        ),
        skipped=skipped,
        model=model.facts,
        threshold=threshold,
        identify=identify,
        inputs=tuple(map(Path, paths)),
        read_image=model.mapper.read_image,
    )


def _detect(
    model: Diagnoser, slices: Sequence[Slice], threshold: float, progress: Progress
) -> tuple[list[SliceDiagnosis], list[Skipped]]:
    """What is found on slices, and those of folders that could not be decoded.

    Raises:
        ValueError: naming a given file that cannot be decoded.
    """
    answers: list[Detections | None] = []
    failed = []
    outputs = model(slices)
    # Those of low scores may be of a bleed that is clearer in the next slice.
    least = 0.0 if model.smoothing_iou else threshold / 2
    with contextlib.closing(outputs):
        pairs = zip(slices, outputs, strict=True)
        for entry, found in progress(pairs, "detecting", len(slices)):
            if isinstance(found, Detections):
                answers.append(found.at_least(least))
                continue
            answers.append(None)
            if entry.given:
                raise ValueError(f"{entry.path}: {found}")
            failed.append(
                Skipped(
                    entry.file,
                    str(found),
                    lost=True,
                    patients=(entry.patient,),
                    path=entry.path,
                    identity=entry.identity,
                )
            )
    if model.smoothing:
        answers = _smooth(answers, slices, model)
    results = []
    for entry, found in zip(slices, answers, strict=True):
        if found is None:
            continue
        shown = found.at_least(threshold / 2)
        classes = tuple(model.classes[i] for i in shown.classes)
        area_mm2 = None
        if shown.masks is not None:
            which = shown.masks, classes, shown.scores, threshold
            area_mm2 = find_areas(entry.path, *which, model.classes)
        results.append(
            SliceDiagnosis(
                source=entry,
                score=found.score,
                verdict=verdict(found.score, threshold),
                boxes=shown.boxes,
                scores=shown.scores,
                classes=classes,
                raw_score=shown.raw_score,
                raw_scores=shown.raw_scores,
                masks=shown.masks,
                area_mm2=area_mm2,
            )
        )
    return results, failed


def _smooth(
    found: Sequence[Detections | None], slices: Sequence[Slice], model: Diagnoser
) -> list[Detections | None]:
    """What was found, scored along each series; None for slices that were not read."""
    scores = np.array([math.nan if d is None else d.score for d in found])
    where = (
        [(entry.patient, entry.series) for entry in slices],
        [entry.position_mm for entry in slices],
    )
    smoothed = list(found)
    if model.smoothing_iou:
        rows = [np.zeros((0, 5)) if d is None else _as_rows(d) for d in found]
        weights, iou = model.smoothing_boxes or model.smoothing, model.smoothing_iou
        sizes = [(1, 1) if d is None else d.size for d in found]
        scores, rows = smooth_boxes(scores, rows, *where, weights, iou, sizes=sizes)
        for i, (d, own) in enumerate(zip(found, rows)):
            if d is not None:
                order = np.argsort(-own[:, 0], kind="stable")
                smoothed[i] = replace(d, scores=own[:, 0], raw_scores=d.scores).of(order)
    scores = smooth_scores(scores, *where, model.smoothing)
    return [
        own and replace(own, image_score=score, raw_score=d.score)
        for own, d, score in zip(smoothed, found, scores.tolist())
    ]


def _as_rows(found: Detections) -> np.ndarray:
    """Boxes as (D, 5): score, x, y, width, height."""
    corners = found.boxes.astype(float).reshape(-1, 4)
    return np.c_[found.scores, corners[:, :2], corners[:, 2:] - corners[:, :2]]
