"""A diagnosis: of slices, of patients, and what was not read."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ..data.dicom import read_spacing
from ..data.masks import decode_mask
from ..data.pictures import is_picture
from ..evaluation.diagnosis import diagnose as is_positive
from ..evaluation.diagnosis import patient_scores
from ..evaluation.predictions import RAW_SCORE
from ..evaluation.visualize import draw_overlay
from ..evaluation.volumes import volumes_ml
from ..version import __version__
from .slices import Noticed, Skipped, Slice

TOOL = "ich_det2 tools/diagnose.py"
NOTICE = (
    "For research only, not for clinical use: a negative verdict does not exclude a hemorrhage."
)
SLICE_FIELDS = ("patient", "series", "slice", "file", "score", "verdict", "n_boxes")
PATIENT_FIELDS = (
    "patient",
    "n_slices",
    "n_slices_failed",
    "n_positive_slices",
    "score",
    "verdict",
    "worst_slice_file",
)
NOTE_FIELDS = ("n_slices_missing", "complete", "notes")
KEY_FIELDS = (
    *("patient", "series", "slice", "file", "path", "frame"),
    *("patient_id", "study_uid", "series_uid", "sop_uid"),
)

Progress = Callable[[Iterable, str, int], Iterable]
"""Passes items on, and shows a person how far they are: (items, what is done, how many)."""


def silent(items: Iterable, what: str, total: int) -> Iterable:
    """No progress is shown."""
    return items


@dataclass(frozen=True)
class SliceDiagnosis:
    """What a model finds on a slice.

    Attributes:
        source: the slice: file, patient, series, index, and whose it is.
        score: the model's own of the slice, else the highest of its boxes; smoothed along the
            series if the model does so.
        verdict: "positive" or "negative".
        boxes: float32 (M, 4): x0, y0, x1, y1 in pixels of the original image, of those from half
            the threshold up, and always the highest.
        scores: float64 (M,), of the boxes.
        classes: M names.
        raw_score: the score before smoothing; None without smoothing.
        raw_scores: float64 (M,), those of the boxes before smoothing; None where they keep theirs.
        masks: M masks, as ``data.masks.encode_mask`` keeps them; None of a model without.
        area_mm2: by class, of the masks at or above the threshold; None of a model without masks,
            or where pixel spacing is not known.
    """

    source: Slice = field(repr=False)
    score: float
    verdict: str
    boxes: np.ndarray
    scores: np.ndarray
    classes: tuple[str, ...]
    raw_score: float | None = None
    raw_scores: np.ndarray | None = None
    masks: tuple[dict, ...] | None = field(default=None, repr=False)
    area_mm2: dict[str, float] | None = None

    @property
    def patient(self) -> str:
        return self.source.patient

    @property
    def series(self) -> str:
        return self.source.series

    @property
    def index(self) -> int:
        """0-based, along the slice normal in a DICOM series."""
        return self.source.index

    @property
    def file(self) -> str:
        """Its name, which tells no identity unless that was asked for."""
        return self.source.file

    @property
    def overlay(self) -> str:
        """Where a drawing of it is, in the folder of the results."""
        return f"overlays/{self.patient}/{self.series}-{self.index:03d}.png"


@dataclass(frozen=True)
class PatientDiagnosis:
    """What the slices of a patient add up to.

    Attributes:
        patient: its pseudonym.
        n_slices: diagnosed.
        n_slices_failed: files that could not be read, or are of a study without axial slices.
        n_positive_slices: of those diagnosed.
        score: by the model's patient rule; None where there are not enough slices for it.
        verdict: "positive", "negative", or "undetermined" without a score.
        worst_slice_file: of the highest score; None without a slice.
        n_slices_missing: that seem to be missing between those that are there.
        notes: what a person should know of the files.
        volume_ml: by class, of the masks at or above the threshold: of the series in which it is
            largest in all. None of a model without masks, or where pixel spacing or positions of
            slices are not known.
        patient_id: as in the header.
    """

    patient: str
    n_slices: int
    n_slices_failed: int
    n_positive_slices: int
    score: float | None
    verdict: str
    worst_slice_file: str | None
    n_slices_missing: int = 0
    notes: tuple[str, ...] = ()
    volume_ml: dict[str, float] | None = None
    patient_id: str = field(default="", repr=False)

    @property
    def complete(self) -> bool:
        """Whether all slices were there and were read; a bleed may hide in one that was not."""
        return self.n_slices_failed == self.n_slices_missing == 0

    @property
    def wording(self) -> str:
        """The verdict for a person: "negative, incomplete" where a slice is lost or missing."""
        incomplete = self.verdict == "negative" and not self.complete
        return f"{self.verdict}, incomplete" if incomplete else self.verdict


@dataclass(frozen=True)
class Diagnosis:
    """What a model finds in files, see :func:`ich_det2.diagnose`.

    Attributes:
        slices: by patient, series and index.
        patients: by name.
        skipped: files that were not diagnosed, and why.
        model: facts of the model: run, weights and their SHA-256, operating point, patient rule,
            and the weights of the smoothing if there is one.
        threshold: positive at this score and above.
        identify: whether Patient IDs and UIDs are in what is written.
        notice: what it may be used for.
        inputs: files and folders that were diagnosed.
    """

    slices: tuple[SliceDiagnosis, ...]
    patients: tuple[PatientDiagnosis, ...]
    skipped: tuple[Skipped, ...]
    model: dict
    threshold: float
    identify: bool = False
    notice: str = NOTICE
    inputs: tuple[Path, ...] = field(default=(), repr=False)
    read_image: Callable[[Path, int | None], np.ndarray] | None = field(default=None, repr=False)

    @cached_property
    def key(self) -> list[dict]:
        """Rows that lead each slice and skipped file back to where it came from: as identifying as
        the files, and in no other output."""
        rows = []
        for source in (*(s.source for s in self.slices), *self.skipped):
            of_slice = isinstance(source, Slice)
            rows.append(
                {
                    "patient": source.patient if of_slice else " ".join(source.patients),
                    "series": source.series if of_slice else "",
                    "slice": source.index if of_slice else "",
                    "file": source.file,
                    "path": _text(source.path.absolute()),
                    "frame": source.frame + 1 if of_slice and source.frame is not None else "",
                    "patient_id": source.identity.patient_id,
                    "study_uid": source.identity.study_uid,
                    "series_uid": source.identity.series_uid,
                    "sop_uid": source.identity.sop_uid,
                }
            )
        return rows

    def draw(self, of: SliceDiagnosis, caption: str | None = None) -> np.ndarray:
        """A picture of a slice, uint8 (rows, columns, 3): its boxes, and below it score, verdict,
        caption and what it may be used for. The file is read again."""
        if caption is None:
            caption = f"{of.patient}   {of.series}   slice {of.index}"
        return draw_overlay(
            self.read_image(of.source.path, of.source.frame),
            of.boxes,
            of.scores,
            of.classes,
            threshold=self.threshold,
            score=of.score,
            caption=caption,
            masks=None if of.masks is None else [decode_mask(mask) for mask in of.masks],
        )

    def to_dict(self) -> dict:
        """The content of ``diagnosis.json``, without identities unless asked for."""
        by_patient: dict[str, list[dict]] = {p.patient: [] for p in self.patients}
        for s, row in zip(self.slices, slice_rows(self), strict=True):
            left = {k: v for k, v in row.items() if k not in ("patient", "n_boxes")}
            boxes = [
                {"box": [round(float(v), 2) for v in box], "score": float(score), "class": name}
                for box, score, name in zip(s.boxes, s.scores, s.classes, strict=True)
            ]
            for box, raw in zip(boxes, [] if s.raw_scores is None else s.raw_scores):
                box[RAW_SCORE] = float(raw)
            for box, mask in zip(boxes, s.masks or ()):
                box["mask"] = mask
            by_patient[s.patient].append({**left, "boxes": boxes})
        return {
            "tool": TOOL,
            "version": __version__,
            "notice": self.notice,
            "model": self.model,
            "threshold": self.threshold,
            "boxes": "[x0, y0, x1, y1] in pixels of the original image, from half the threshold up,"
            " and each slice's highest",
            **(
                {"masks": "COCO's run lengths (pycocotools), of the size [rows, columns]"}
                if any(s.masks is not None for s in self.slices)
                else {}
            ),
            "patients": [
                {**row, "slices": by_patient[row["patient"]]} for row in patient_rows(self)
            ],
            "skipped": [
                {
                    "file": entry.file,
                    "reason": entry.reason,
                    "lost_slice": entry.lost,
                    "patients": list(entry.patients),
                }
                for entry in self.skipped
            ],
        }

    def write(
        self,
        folder: str | os.PathLike,
        *,
        overlays: str = "positive",
        viewer: bool = False,
        key: str | os.PathLike | None = None,
        force: bool = False,
        progress: Progress = silent,
    ) -> None:
        """Writes all outputs, or none.

        Args:
            folder: new, or to be replaced.
            overlays: drawings of slices: "positive" ones and each patient's highest scored, "all",
                or "none".
            viewer: also a page to look through the slices, ``viewer.html``; of several patients
                each gets ``viewers/<patient>.html``.
            key: file for ``self.key``, which its owner alone may read.
            force: replace an earlier result, and an earlier key.
            progress: shows how far the drawing is.

        Raises:
            ValueError: the folder or the key may not be written there, see ``check_outputs``.
        """
        from .outputs import write_outputs  # which is about a Diagnosis

        write_outputs(
            self,
            folder,
            overlays=overlays,
            viewer=viewer,
            key=key,
            force=force,
            progress=progress,
        )


def summarize_patients(
    slices: Sequence[SliceDiagnosis],
    skipped: Sequence[Skipped],
    noticed: dict[str, Noticed],
    threshold: float,
    rule: str,
    classes: Sequence[str] = (),
) -> tuple[PatientDiagnosis, ...]:
    """Patients by name; positive by the rule, see ``patient_scores``. The classes are the model's,
    for the volumes."""
    names = dict.fromkeys([*noticed, *(n for s in skipped for n in s.patients)])
    found: dict[str, list[SliceDiagnosis]] = {name: [] for name in names}
    for s in slices:
        found.setdefault(s.patient, []).append(s)
    patients = []
    for name, own in found.items():
        score, worst = -math.inf, None
        if own:
            worst = max(own, key=lambda s: s.score)
            scores = [s.score for s in own]
            (score,) = patient_scores([0] * len(own), scores, 1, rule).tolist()
        known = noticed.get(name, Noticed())
        patients.append(
            PatientDiagnosis(
                patient=name,
                n_slices=len(own),
                n_slices_failed=sum(name in entry.patients for entry in skipped),
                n_positive_slices=sum(s.verdict == "positive" for s in own),
                score=score if math.isfinite(score) else None,
                verdict=verdict(score, threshold) if math.isfinite(score) else "undetermined",
                worst_slice_file=worst and worst.file,
                n_slices_missing=known.n_missing,
                notes=known.notes,
                volume_ml=find_volumes(own, classes),
                patient_id=own[0].source.identity.patient_id if own else "",
            )
        )
    return tuple(patients)


def find_volumes(
    slices: Sequence[SliceDiagnosis], classes: Sequence[str]
) -> dict[str, float] | None:
    """Volumes of a patient's lesions by class, see :attr:`PatientDiagnosis.volume_ml`."""
    series: dict[str, list[SliceDiagnosis]] = {}
    for s in slices:
        series.setdefault(s.series, []).append(s)
    found: list[np.ndarray] = []
    for own in series.values():
        if any(s.masks is None for s in own):
            continue
        unknown = dict.fromkeys(classes, math.nan)
        areas = np.array([[*(s.area_mm2 or unknown).values()] for s in own])
        volumes, _ = volumes_ml(areas, [s.source.position_mm for s in own])
        found += [volumes] if np.isfinite(volumes).all() else []
    if not found:
        return None
    return dict(zip(classes, max(found, key=np.sum).tolist()))


def find_areas(
    path: Path,
    masks: Sequence[dict],
    names: Sequence[str],
    scores: Sequence[float],
    threshold: float,
    classes: Sequence[str],
) -> dict[str, float] | None:
    """Areas of a slice's lesions by class, mm2; a pixel in several masks of a class counts once.

    Args:
        path: of the slice.
        masks: M masks.
        names: their M classes.
        scores: M.
        threshold: a mask counts from this score on.
        classes: of the model.

    Returns:
        None where the file does not say how large a pixel is.
    """
    rows_mm, columns_mm = (math.nan, math.nan) if is_picture(path) else read_spacing(path)
    if math.isnan(rows_mm * columns_mm):
        return None
    unions: dict[str, np.ndarray] = dict.fromkeys(classes, np.zeros(1, dtype=bool))
    for mask, name, score in zip(masks, names, scores, strict=True):
        if score >= threshold:
            unions[name] = unions[name] | decode_mask(mask)
    return {name: float(union.sum()) * rows_mm * columns_mm for name, union in unions.items()}


def verdict(score: float, threshold: float) -> str:
    """In a word."""
    return "positive" if is_positive([score], threshold) else "negative"


def slice_rows(diagnosis: Diagnosis) -> Iterator[dict]:
    for s in diagnosis.slices:
        row = {
            "patient": s.patient,
            "series": s.series,
            "slice": s.index,
            "file": s.file,
            "score": s.score,
            "verdict": s.verdict,
            "n_boxes": int((s.scores >= diagnosis.threshold).sum()),
        }
        if diagnosis.identify:
            own = s.source.identity
            row |= {
                "patient_id": own.patient_id,
                "series_uid": own.series_uid,
                "sop_uid": own.sop_uid,
            }
        if s.masks is not None:
            row["area_mm2"] = s.area_mm2
        yield row if s.raw_score is None else row | {RAW_SCORE: s.raw_score}


def patient_rows(diagnosis: Diagnosis) -> Iterator[dict]:
    for p in diagnosis.patients:
        row = {name: getattr(p, name) for name in PATIENT_FIELDS}
        if diagnosis.identify:
            row["patient_id"] = p.patient_id
        if any(other.volume_ml is not None for other in diagnosis.patients):
            row["volume_ml"] = p.volume_ml
        yield row | {name: getattr(p, name) for name in NOTE_FIELDS} | {"notes": list(p.notes)}


def _text(path: Path) -> str:
    """A path as text; names of files need not be."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
