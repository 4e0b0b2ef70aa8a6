"""What a model found on a dataset and what is true there: in memory, and as stored files.

Shape glossary: M images; of an image, D predicted and G true boxes, in pixels, x, y, width, height.
"""

import csv
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..files import write_csv, write_json
from .boxes import coco_precision, voc_average_precision
from .diagnosis import group_index
from .froc import HITS, froc_curve, match_detections

SCORES, LESIONS, RESULTS = "image_scores.csv", "lesions.csv", "coco_instances_results.json"
SMOOTHED = "smoothed_boxes.json"
"""As RESULTS, the same boxes with scores smoothed along the series, where they are."""
SCORE_FIELDS = ("image_id", "file_name", "patient_id", "label", "score")
RAW_SCORE = "raw_score"
LESION_FIELDS = ("image_id", "patient_id", "type", "x", "y", "width", "height")


@dataclass(frozen=True)
class Predictions:
    """A dataset, image by image.

    Attributes:
        image_ids, patients: M names each.
        files: M paths or bare names of the images.
        labels: int (M,), 1 hemorrhage, 0 none.
        scores: float64 (M,), by which images are diagnosed; a detector's highest box score, 0
            without boxes, or these smoothed.
        boxes: M arrays (D, 5): score, smoothed or not, x, y, width, height; None if only the scores
            are known.
        true_boxes: M arrays (G, 4); None if only the labels are known.
        types: M lists of the names of the G types; None as ``true_boxes``.
        raw_scores: float64 (M,), the scores before smoothing; None if they are not smoothed.

    Raises:
        ValueError: if there is no image, an image is there twice, or a score is not a number.
    """

    image_ids: list[str]
    patients: list[str]
    files: list[str]
    labels: np.ndarray
    scores: np.ndarray
    boxes: list[np.ndarray] | None = None
    true_boxes: list[np.ndarray] | None = None
    types: list[list[str]] | None = None
    raw_scores: np.ndarray | None = None

    def __post_init__(self):
        if not self.image_ids:
            raise ValueError("the predictions hold no image, expected at least one.")
        image, times = Counter(self.image_ids).most_common(1)[0]
        if times > 1:
            raise ValueError(
                f"image '{image}' is there {times} times, expected once; leave the copies out."
            )
        if np.isnan(self.scores).any():
            image = self.image_ids[int(np.isnan(self.scores).argmax())]
            raise ValueError(f"the score of image '{image}' is NaN, expected a number.")

    @cached_property
    def judged(self) -> list[int]:
        """Indices of the images on which boxes are judged; needs true boxes.

        Left out are bleeding images without a true box, where no predicted box is a false alarm.
        """
        pairs = zip(self.labels, self.true_boxes)
        return [i for i, (label, boxes) in enumerate(pairs) if len(boxes) or not label]

    @cached_property
    def boxed(self) -> "Predictions":
        """Those of :attr:`judged`; all if there is none, as then nothing of boxes is defined."""
        return self.take([self.image_ids[i] for i in self.judged]) if self.judged else self

    @cached_property
    def lesion_scores(self) -> dict[str, float]:
        """AP and CPM of the boxes, which no threshold changes; needs boxes and true boxes."""
        found = self.boxed
        precision = coco_precision(found.boxes, found.true_boxes)
        _, scans = group_index(found.patients)
        scores = {
            "coco_ap": float(precision.mean()),
            "coco_ap50": float(precision[0].mean()),
            "voc_ap50": voc_average_precision(found.boxes, found.true_boxes),
        }
        for hit in HITS:
            matches = match_detections(found.boxes, found.true_boxes, hit=hit)
            scores[f"cpm_{hit}"] = froc_curve(matches).cpm
            scores[f"patient_cpm_{hit}"] = froc_curve(matches, scans).cpm
        return scores

    def take(self, image_ids: Sequence[str]) -> "Predictions":
        """These images alone, in this order."""
        place = {image: i for i, image in enumerate(self.image_ids)}
        order = [place[image] for image in image_ids]

        def pick(values):
            return None if values is None else [values[i] for i in order]

        return Predictions(
            *map(pick, (self.image_ids, self.patients, self.files)),
            *(self.labels[order], self.scores[order]),
            *map(pick, (self.boxes, self.true_boxes, self.types)),
            raw_scores=None if self.raw_scores is None else self.raw_scores[order],
        )

    @classmethod
    def joined(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Several datasets as one; boxes and raw scores only if all have them."""

        def chain(name):
            values = [getattr(part, name) for part in parts]
            return None if any(v is None for v in values) else list(itertools.chain(*values))

        names = ("image_ids", "patients", "files", "boxes", "true_boxes", "types")
        raw_scores = chain("raw_scores")
        return cls(
            **{name: chain(name) for name in names},
            labels=np.concatenate([part.labels for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
            raw_scores=None if raw_scores is None else np.array(raw_scores),
        )


# ---- files -----------------------------------------------------------------------------------


def write_predictions(predictions: Predictions, folder: Path) -> None:
    """Writes ``image_scores.csv`` and, where true boxes are known, ``lesions.csv``.

    Smoothed scores have the raw ones in a last column.
    """
    columns = (predictions.image_ids, predictions.files, predictions.patients)
    rows = [
        dict(zip(SCORE_FIELDS, (image, Path(file).name, patient, int(label), float(score))))
        for image, file, patient, label, score in zip(
            *columns, predictions.labels, predictions.scores
        )
    ]
    fields = SCORE_FIELDS
    if predictions.raw_scores is not None:
        fields = (*SCORE_FIELDS, RAW_SCORE)
        rows = [row | {RAW_SCORE: float(raw)} for row, raw in zip(rows, predictions.raw_scores)]
    write_csv(folder / SCORES, fields, rows)
    if predictions.true_boxes is not None:
        rows = [
            dict(zip(LESION_FIELDS, (image, patient, name, *map(float, box))))
            for image, patient, boxes, names in zip(
                *(predictions.image_ids, predictions.patients),
                *(predictions.true_boxes, predictions.types),
            )
            for box, name in zip(boxes, names)
        ]
        write_csv(folder / LESIONS, LESION_FIELDS, rows)


def write_boxes(predictions: Predictions, folder: Path, name: str = RESULTS) -> None:
    """Writes the predicted boxes as COCO results, beside :func:`write_predictions`."""
    rows = [
        {"image_id": image, "category_id": 0, "bbox": row[1:], "score": row[0]}
        for image, boxes in zip(predictions.image_ids, predictions.boxes or ())
        for row in boxes.tolist()
    ]
    write_json(folder / name, rows)


def read_predictions(
    path: str | Path, *, truth: str | Path | None = None, patients: str | Path | None = None
) -> Predictions:
    """Reads stored predictions, of this project or of any other detector.

    Args:
        path: a folder with ``image_scores.csv``, as an evaluation leaves it; boxes are read from
            ``smoothed_boxes.json`` or else ``coco_instances_results.json`` beside it, true ones
            from ``truth``, ``lesions.csv`` or the folder's ``*_coco_format.json``, as far as they
            are there. Or such a CSV file, or COCO results (JSON), which need ``truth``.
        truth: COCO ground truth; an image may have a "patient_id". An image is positive if it has
            an annotation.
        patients: CSV file ``image,patient``; without any, each image is a patient of its own.

    Raises:
        FileNotFoundError, ValueError: one sentence that names the file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder; expected a folder with {SCORES}, such a file, or COCO"
            " results (JSON)."
        )
    known = _read_patients(Path(patients)) if patients is not None else {}
    if path.is_file() and path.suffix.lower() == ".json":
        if truth is None:
            raise ValueError(f"{path}: COCO results say nothing of the truth; give --truth too.")
        return _read_coco(path, Path(truth), known)
    folder = path if path.is_dir() else path.parent
    table = path / SCORES if path.is_dir() else path
    if not table.is_file():
        raise FileNotFoundError(f"{folder}: holds no {SCORES}; expected one, as an evaluation.")
    rows = _read_rows(table, SCORE_FIELDS)
    ids = [row["image_id"] for row in rows]
    try:
        labels = np.array([int(row["label"]) for row in rows], dtype=int)
        scores = np.array([float(row["score"]) for row in rows], dtype=float)
        raw = [float(row[RAW_SCORE]) for row in rows if RAW_SCORE in row]
    except ValueError as error:
        raise ValueError(f"{table}: {error}; expected label 0 or 1 and a number.") from error
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{table}: label is {labels.max()}, expected 0 or 1.")
    boxes = true_boxes = types = None
    for results in (path / SMOOTHED, path / RESULTS) if path.is_dir() else ():
        if boxes is None and results.is_file():
            boxes = _boxes_of(results, ids)
    formats = sorted(path.glob("*_coco_format.json")) if path.is_dir() else []
    paths = [row["file_name"] for row in rows]
    if truth is None and formats:
        truth_file, found = formats[0], _read_truth(formats[0])
        paths = [found[image].file if image in found else p for image, p in zip(ids, paths)]
    else:
        truth_file, found = truth, _read_truth(Path(truth)) if truth is not None else {}
    if path.is_dir() and truth is None and (path / LESIONS).is_file():
        true_boxes, types = _lesions_of(path / LESIONS, ids)
    elif found:
        _check_ids(ids, found, f"{table}", f"{truth_file}")
        true_boxes, types = [found[i].boxes for i in ids], [found[i].types for i in ids]
    try:
        return Predictions(
            *(ids, [known.get(row["image_id"], row["patient_id"]) for row in rows], paths),
            *(labels, scores, boxes, true_boxes, types),
            raw_scores=np.array(raw) if raw else None,
        )
    except ValueError as error:
        raise ValueError(f"{table}: {error}") from error


@dataclass(frozen=True)
class _Truth:
    patient: str
    file: str
    boxes: np.ndarray
    types: list[str]


def _read_coco(path: Path, truth: Path, known: dict[str, str]) -> Predictions:
    found = _read_truth(truth)
    ids = list(found)
    boxes = _boxes_of(path, ids)
    try:
        return Predictions(
            image_ids=ids,
            patients=[known.get(image, found[image].patient) for image in ids],
            files=[found[image].file for image in ids],
            labels=np.array([len(found[image].boxes) > 0 for image in ids], dtype=int),
            scores=np.array([rows[:, 0].max(initial=0.0) for rows in boxes]),
            boxes=boxes,
            true_boxes=[found[image].boxes for image in ids],
            types=[found[image].types for image in ids],
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_truth(path: Path) -> dict[str, _Truth]:
    content = _read_json(path)
    try:
        names = {c["id"]: str(c.get("name", c["id"])) for c in content.get("categories", [])}
        rows: dict[str, list] = {str(image["id"]): [] for image in content["images"]}
        if len(rows) < len(content["images"]):
            raise ValueError(f"{path}: an image id is there twice, expected once.")
        for entry in content.get("annotations", []):
            name = str(entry.get("type", names.get(entry["category_id"], entry["category_id"])))
            rows[str(entry["image_id"])].append((entry["bbox"], name))
        return {
            str(image["id"]): _Truth(
                patient=str(image.get("patient_id", image["id"])),
                file=str(image.get("file_name", image["id"])),
                boxes=_array([box for box, _ in rows[str(image["id"])]], 4),
                types=[name for _, name in rows[str(image["id"])]],
            )
            for image in content["images"]
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: is no COCO ground truth (at {error}); expected images and annotations with"
            " image_id, category_id and bbox."
        ) from error


def _boxes_of(path: Path, ids: Sequence[str]) -> list[np.ndarray]:
    """Predicted boxes of each image, from COCO results."""
    by_image: dict[str, list] = {image: [] for image in ids}
    try:
        for entry in _read_json(path):
            image = str(entry["image_id"])
            if image not in by_image:
                raise ValueError(
                    f"{path}: has a box of image '{image}', which is not among the {len(by_image)}"
                    " images; the files are not of one dataset."
                )
            by_image[image].append((entry["score"], *entry["bbox"]))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: are no COCO results (at {error}); expected a list of image_id, score, bbox."
        ) from error
    return [_array(rows, 5) for rows in by_image.values()]


def _lesions_of(path: Path, ids: Sequence[str]) -> tuple[list[np.ndarray], list[list[str]]]:
    rows = _read_rows(path, LESION_FIELDS)
    boxes: dict[str, list] = {image: [] for image in ids}
    types: dict[str, list] = {image: [] for image in ids}
    for row in rows:
        if row["image_id"] not in boxes:
            raise ValueError(f"{path}: image '{row['image_id']}' is not in {SCORES}.")
        boxes[row["image_id"]].append([float(row[key]) for key in LESION_FIELDS[3:]])
        types[row["image_id"]].append(row["type"])
    return [_array(value, 4) for value in boxes.values()], list(types.values())


def _array(rows: list, columns: int) -> np.ndarray:
    return np.array(rows, dtype=np.float64).reshape(-1, columns)


def _check_ids(ids, found, table: str, truth: str) -> None:
    missing = [image for image in ids if image not in found]
    if missing:
        raise ValueError(f"{truth}: has no image '{missing[0]}', which {table} names.")


def _read_json(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}).") from error


def _read_rows(path: Path, fields: Sequence[str]) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        absent = [name for name in fields if name not in (reader.fieldnames or ())]
        if absent:
            raise ValueError(
                f"{path}: has no column {', '.join(absent)}; expected {','.join(fields)}."
            )
        return list(reader)


def _read_patients(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected CSV with image,patient.")
    return {row["image"]: row["patient"] for row in _read_rows(path, ("image", "patient"))}
