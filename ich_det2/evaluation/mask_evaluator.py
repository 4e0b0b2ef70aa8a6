"""Detectron2 evaluator of masks: how they agree with the true ones, and how much blood they show.

Shape glossary: H x W a slice, D predicted instances.
"""

import itertools
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..data.dicom import read_spacing
from ..data.masks import decode_mask, encode_mask
from ..data.pictures import is_picture
from ..files import write_csv, write_json
from .smoothing import smooth_boxes
from .volumes import dice, relative_error, volumes_ml

ALL = "all"
"""As a type: the union of all masks."""

MASKS, VOLUMES, SUMMARY = "masks.csv", "volumes.csv", "masks.json"
MASK_METRICS = ("dice", "slice_dice", "volume_error")
_MASK_FIELDS = ("image_id", "patient_id", "true_pixels", "predicted_pixels", "both", "dice")
_VOLUME_FIELDS = (
    *("patient_id", "series", "type", "n_slices", "gaps"),
    *("true_ml", "predicted_ml", "relative_error"),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Slice:
    """Pixels of a slice by type, and of the unions.

    Attributes:
        true: by type of the truth, and of ``ALL``; None where a mask is not known.
        predicted: by class, and of ``ALL``.
        both: in both unions; 0 where the truth is not known.
        pixel_mm2: area of a pixel, NaN if it is not known.
    """

    image: str
    patient: str
    series: str | None
    position_mm: float
    pixel_mm2: float
    true: Counter | None
    predicted: Counter
    both: int


@dataclass(frozen=True)
class _Answer:
    """What a model finds on a slice: masks as run lengths, their boxes and classes."""

    inputs: dict
    size: tuple[int, int]
    boxes: np.ndarray  # (D, 5): score, x, y, width, height
    classes: Sequence[str]
    masks: Sequence[dict]


class MaskEvaluator(DatasetEvaluator):
    """Dice and volumes of the predicted masks that score at least a threshold.

    Where a diagnosis smooths boxes along the series, a mask has the score of its box after that.

    Writes ``masks.csv`` (a row for each slice of which the truth is known), ``volumes.csv`` (a row
    for each series and type, where pixel spacing and positions are known) and ``masks.json``.

    Where the model does not tell types, all that it finds in a series whose bleeds are of one type
    is compared with that type.
    """

    def __init__(
        self,
        *,
        classes: Sequence[str],
        threshold: float,
        truth: Sequence[dict],
        smoothing: Sequence[float] = (),
        smoothing_iou: float = 0.0,
        output_dir=None,
        distributed: bool = True,
    ):
        """
        Args:
            classes: names of the model's classes.
            threshold: a mask counts from this score on.
            truth: dataset dicts; the masks are "segmentation" of "annotations", run lengths. A
                slice with a box of no mask, or that bleeds and has no box, is not compared.
            smoothing: weights along the series by which boxes are smoothed, see ``smooth_boxes``.
            smoothing_iou: of it; 0 leaves scores as they are.
            output_dir: folder for the files; None writes none.
            distributed: gather the slices of all processes.
        """
        self.classes, self.threshold = tuple(classes), threshold
        self.truth = {str(d["image_id"]): d for d in truth}
        self.smoothing, self.smoothing_iou = smoothing, smoothing_iou if len(smoothing) else 0.0
        self.output_dir = Path(output_dir) if output_dir else None
        self.distributed = distributed
        self.reset()

    def reset(self) -> None:
        self._answers: list[_Answer] = []

    def process(self, inputs, outputs) -> None:
        """
        Args:
            inputs: mapped dataset dicts; for volumes with "series" and "position_mm".
            outputs: dicts with "instances" that have "scores", "pred_classes", "pred_masks", bool
                (D, H, W), and, to smooth them, "pred_boxes"; others are passed over.
        """
        keys = ("image_id", "patient_id", "series", "position_mm")
        for x, y in zip(inputs, outputs):
            if "instances" not in y or not y["instances"].has("pred_masks"):
                continue
            found = y["instances"].to("cpu")
            corners = np.zeros((len(found), 4))
            if self.smoothing_iou:  # which may raise any score
                corners = found.pred_boxes.tensor.double().numpy()
            else:
                found = found[found.scores >= self.threshold]
                corners = corners[: len(found)]
            boxes = np.c_[found.scores.double(), corners[:, :2], corners[:, 2:] - corners[:, :2]]
            names = [self.classes[k] for k in found.pred_classes]
            masks = [encode_mask(mask) for mask in found.pred_masks.numpy()]
            own = {key: x[key] for key in keys if key in x}
            self._answers.append(_Answer(own, found.image_size, boxes, names, masks))

    def evaluate(self) -> dict:
        """
        Returns:
            ``{"masks": {"dice": ..., "slice_dice": ..., "volume_error": ...}}`` on the main
            process: the mean Dice of patients (over all of their slices) and of slices that bleed,
            and the mean absolute relative error of the volume of series that bleed; NaN where there
            is none. An empty dict elsewhere, and where no mask was predicted or is known.
        """
        answers = self._answers
        if self.distributed:
            comm.synchronize()
            answers = list(itertools.chain(*comm.gather(answers, dst=0)))
            if not comm.is_main_process():
                return {}
        # The samplers of several processes may hand an image out twice.
        answers = {str(a.inputs["image_id"]): a for a in answers}
        answers = [answers[image] for image in sorted(answers)]
        slices = [
            self._compare(answer, scores)
            for answer, scores in zip(answers, self._scores(answers), strict=True)
        ]
        if not slices:
            logger.warning("The model gives no masks: Dice and volumes are not evaluated.")
            return {}
        known = [s for s in slices if s.true is not None]
        if not any(s.true[ALL] for s in known):
            logger.warning("No true mask is known: Dice and volumes are not evaluated.")
            return {}
        volumes = list(self._volumes(slices))
        summary = _summary(known, volumes)
        if self.output_dir is not None:
            self._write(known, volumes, summary, len(slices))
        logger.info("Masks that score at least %g: %s", self.threshold, summary)
        return {"masks": {name: summary[name] for name in MASK_METRICS}}

    def _scores(self, answers: Sequence[_Answer]) -> list[np.ndarray]:
        """Of the masks of each slice, as a diagnosis scores them."""
        boxes = [answer.boxes for answer in answers]
        if self.smoothing_iou:
            inputs = [answer.inputs for answer in answers]
            _, boxes = smooth_boxes(
                [b[:, 0].max(initial=0.0) for b in boxes],
                boxes,
                [(_patient(x), x.get("series")) for x in inputs],
                [x.get("position_mm", np.nan) for x in inputs],
                self.smoothing,
                self.smoothing_iou,
                sizes=[answer.size for answer in answers],
            )
        return [b[:, 0] for b in boxes]

    def _compare(self, answer: _Answer, scores: np.ndarray) -> _Slice:
        x, size = answer.inputs, answer.size
        entries = zip(answer.classes, answer.masks, scores, strict=True)
        kept = (
            (name, decode_mask(mask)) for name, mask, score in entries if score >= self.threshold
        )
        predicted, union = _count(kept, size)
        d = self.truth[str(x["image_id"])]
        true, both = None, 0
        if is_known(d):
            annotations = d["annotations"]
            true, whole = _count(
                ((type_of(a), decode_mask(a["segmentation"])) for a in annotations), size
            )
            both = int((union & whole).sum())
        path, spacing = d["file_name"], (np.nan, np.nan)
        if not is_picture(path):
            spacing = read_spacing(path)
        place = x.get("series"), float(x.get("position_mm", np.nan))
        area = spacing[0] * spacing[1]
        return _Slice(str(x["image_id"]), _patient(x), *place, area, true, predicted, both)

    def _volumes(self, slices: Sequence[_Slice]) -> Iterable[dict]:
        """Rows of ``volumes.csv``."""
        series: dict[tuple[str, str], list[_Slice]] = defaultdict(list)
        for s in slices:
            if s.series is not None:
                series[s.patient, s.series].append(s)
        numbers: Counter = Counter()  # in the place of UIDs, which tell whose a series is
        for (patient, _), own in sorted(series.items()):
            numbers[patient] += 1
            types = sorted({t for s in own for t in s.true or ()} - {ALL})
            true, gaps = _series_ml(own, [s.true for s in own], types)
            found, _ = _series_ml(own, [s.predicted for s in own], self.classes)
            if np.isnan(found[ALL]):
                continue
            if len(self.classes) == 1:  # which does not tell types
                found = {kind: found[ALL] for kind in (ALL, *(types if len(types) == 1 else ()))}
            for kind in (ALL, *sorted({*types, *(k for k in found if found[k] > 0)} - {ALL})):
                t = true.get(kind, 0 * true[ALL])  # NaN, if the truth is not known
                p = found.get(kind, np.nan)
                error = float(relative_error(t, p))
                values = patient, numbers[patient], kind, len(own), gaps, t, p, error
                yield dict(zip(_VOLUME_FIELDS, values))

    def _write(self, known, volumes, summary, number: int) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        rows = []
        for s in known:
            counts = s.true[ALL], s.predicted[ALL], s.both
            row = zip(_MASK_FIELDS, (s.image, s.patient, *counts, _cell(float(dice(*counts)))))
            rows.append(dict(row))
        write_csv(self.output_dir / MASKS, _MASK_FIELDS, rows)
        rows = [{key: _cell(value) for key, value in row.items()} for row in volumes]
        write_csv(self.output_dir / VOLUMES, _VOLUME_FIELDS, rows)
        counts = {"n_slices": len(known), "n_slices_without_truth": number - len(known)}
        why = {} if volumes else {"note": "volumes are not known: no pixel spacing or positions"}
        content = {"threshold": self.threshold, **counts, **summary, **why}
        write_json(self.output_dir / SUMMARY, content)


def _patient(inputs: dict) -> str:
    return str(inputs.get("patient_id", inputs["image_id"]))


def read_summary(folder: Path) -> dict | None:
    """What an evaluation left in ``masks.json``; None if it had no masks."""
    path = folder / SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def is_known(dataset_dict: dict) -> bool:
    """Whether the masks of all that bleeds in a slice are known; nothing bleeds in a healthy one.

    Args:
        dataset_dict: with "annotations" and, perhaps, "image_label".
    """
    annotations = dataset_dict.get("annotations", [])
    if not annotations:
        return not dataset_dict.get("image_label")
    return all(a.get("segmentation") for a in annotations)


def type_of(annotation: dict) -> str:
    """The type of a bleed, or its class where the data set keeps no types."""
    return str(annotation.get("type", annotation["category_id"]))


def _series_ml(
    slices: Sequence[_Slice], counts: Sequence[Counter | None], names: Sequence[str]
) -> tuple[dict[str, float], int]:
    """Volumes of a series by name, in all too, of the pixels in each slice; and its gaps."""
    names = [ALL, *names]
    areas = [
        [np.nan if c is None else c[name] * s.pixel_mm2 for name in names]
        for s, c in zip(slices, counts, strict=True)
    ]
    volumes, gaps = volumes_ml(areas, [s.position_mm for s in slices])
    return dict(zip(names, volumes.tolist())), gaps


def _count(entries: Iterable[tuple[str, np.ndarray]], size) -> tuple[Counter, np.ndarray]:
    """Pixels by name, of which a pixel counts once, and their union, bool (H, W)."""
    unions: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(size, dtype=bool))
    for name, mask in entries:
        unions[name] |= mask
        unions[ALL] |= mask
    return Counter({name: int(mask.sum()) for name, mask in unions.items()}), unions[ALL]


def _summary(known: Sequence[_Slice], volumes: Sequence[dict]) -> dict:
    patients: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))
    bleeding = []
    for s in known:
        counts = np.array([s.true[ALL], s.predicted[ALL], s.both], dtype=float)
        patients[s.patient] += counts
        bleeding += [counts] if counts[0] else []
    whole = [counts for counts in patients.values() if counts[0]]
    types = {}
    for kind in dict.fromkeys(row["type"] for row in volumes):
        own = [r for r in volumes if r["type"] == kind and not np.isnan(r["relative_error"])]
        if own:
            types[kind] = {
                "n_series": len(own),
                "true_ml": _mean(r["true_ml"] for r in own),
                "predicted_ml": _mean(r["predicted_ml"] for r in own),
                "volume_error": _mean(abs(r["relative_error"]) for r in own),
            }
    return {
        "dice": _mean(dice(*np.transpose(whole))),
        "slice_dice": _mean(dice(*np.transpose(bleeding))),
        "volume_error": types.get(ALL, {}).get("volume_error", float("nan")),
        "types": types,
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _cell(value):
    """A number as a table has it: empty where it is not known."""
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.6g}"
    return value
