"""Detectron2 evaluator that turns boxes into diagnoses."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm
from tabulate import tabulate

from ..files import write_csv, write_json
from .analysis import Settings, levels_of, summaries, threshold_rows
from .diagnosis import COST_RATIO, METRICS
from .mask_evaluator import MASK_METRICS, type_of
from .plots import plot_roc, plot_thresholds
from .predictions import SMOOTHED, Predictions, write_boxes, write_predictions
from .smoothing import check_weights, smooth_boxes, smooth_scores

DIAGNOSIS = "diagnosis.json"
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
TABLE_FIELDS = ("level", "threshold", "tp", "fp", "tn", "fn", *METRICS)


class DiagnosisEvaluator(DatasetEvaluator):
    """Image- and patient-level diagnosis over many thresholds, of any detector or classifier.

    Writes ``image_scores.csv``, ``diagnosis_thresholds.csv``, ``diagnosis.json``, the curves and,
    with the truth, ``lesions.csv``.
    """

    def __init__(
        self,
        *,
        thresholds,
        operating_threshold: float,
        cost_ratio: float = COST_RATIO,
        patient_rule: str = "any",
        smoothing: Sequence[float] = (),
        smoothing_iou: float = 0.0,
        smoothing_boxes: Sequence[float] = (),
        truth: Sequence[dict] | None = None,
        output_dir=None,
        distributed: bool = True,
    ):
        """
        Args:
            thresholds: image scores at which the diagnosis is tabulated.
            operating_threshold: an image or patient scored at least this is called positive.
            cost_ratio: cost of a missed bleed, in false alarms.
            patient_rule: of ``patient_scores``.
            smoothing: weights of ``smooth_scores``, by which images and patients are diagnosed;
                none leaves the scores as they are.
            smoothing_iou: of ``smooth_boxes``, with smoothing; 0: boxes keep their scores.
            smoothing_boxes: weights of ``smooth_boxes``; none takes those of ``smoothing``.
            truth: dataset dicts with the true boxes ("annotations"; a "type" if known), for the
                numbers of lesions; None does without.
            output_dir: folder for the files; None writes none.
            distributed: gather the images of all processes.
        """
        self.settings = Settings(
            thresholds, operating_threshold, cost_ratio=cost_ratio, patient_rules=(patient_rule,)
        )
        self.smoothing = check_weights(smoothing) if len(smoothing) else None
        self.smoothing_iou = smoothing_iou if len(smoothing) else 0.0
        own = len(smoothing_boxes) > 0
        self.smoothing_boxes = check_weights(smoothing_boxes) if own else self.smoothing
        self.truth = None if truth is None else {str(d["image_id"]): d for d in truth}
        self.output_dir = Path(output_dir) if output_dir else None
        self.distributed = distributed
        self.reset()

    def reset(self) -> None:
        self._rows = []

    def process(self, inputs, outputs) -> None:
        """
        Args:
            inputs: mapped dataset dicts, with "image_label"; without it, an image is positive if
                the truth has a box. For smoothing, "series" and "position_mm"; without them, an
                image keeps its score.
            outputs: dicts with "image_score", or with "instances" that have "scores", of which the
                highest is the image's, and, for lesions, "pred_boxes".
        """
        for x, y in zip(inputs, outputs):
            image, boxes, scores, size = str(x["image_id"]), None, np.zeros(0), (1, 1)
            if "instances" in y:
                instances = y["instances"].to("cpu")
                size = instances.image_size
                scores = instances.scores.double().numpy()
                if instances.has("pred_boxes"):
                    corners = instances.pred_boxes.tensor.double().numpy().reshape(-1, 4)
                    boxes = np.c_[scores, corners[:, :2], corners[:, 2:] - corners[:, :2]]
            score = (
                float(y["image_score"]) if "image_score" in y else scores.max(initial=0.0).item()
            )
            patient, label = str(x.get("patient_id", image)), x.get("image_label")
            if label is None:
                label = int(len((self.truth or {image: {}})[image].get("annotations", [])) > 0)
            place = x.get("series"), x.get("position_mm", np.nan), size
            self._rows.append((image, patient, x["file_name"], label, score, boxes, *place))

    def evaluate(self) -> dict:
        """
        Returns:
            ``{"diagnosis": {"image_auc": ..., "patient_recall": ..., "lesion_cpm_iou": ...}}`` on
            the main process, elsewhere an empty dict.

        Raises:
            ValueError: if no image was processed, a score is NaN, or scores are to be smoothed and
                no image's place is known.
        """
        rows = self._rows
        if self.distributed:
            comm.synchronize()
            rows = list(itertools.chain(*comm.gather(rows, dst=0)))
            if not comm.is_main_process():
                return {}
        predictions = self._predictions(rows)
        if self.output_dir is not None:
            summary = write_evaluation(self.output_dir, predictions, self.settings)
            if self.smoothing_iou and predictions.boxes is not None:
                write_boxes(predictions, self.output_dir, SMOOTHED)
            else:
                (self.output_dir / SMOOTHED).unlink(missing_ok=True)
        else:
            summary = summaries(predictions, self.settings)
        logging.getLogger(__name__).info(
            "Diagnosis at the operating threshold %g:\n%s",
            self.settings.operating_threshold,
            format_summary(summary),
        )
        return {"diagnosis": _metrics(summary)}

    def _predictions(self, rows: list[tuple]) -> Predictions:
        # The samplers of several processes may hand an image out twice.
        rows = sorted({row[0]: row for row in rows}.values(), key=lambda row: row[0])
        columns = zip(*rows) if rows else [()] * 9
        images, patients, files, labels, scores, boxes, series, positions, sizes = columns
        scores, raw_scores = np.array(scores, dtype=float), None
        if self.smoothing is not None:
            raw_scores = scores
            scores, boxes = self._smooth(scores, boxes, patients, series, positions, sizes)
        true_boxes = types = None
        if self.truth is not None:
            annotations = [self.truth[image].get("annotations", []) for image in images]
            true_boxes = [
                np.array(
                    [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS) for a in entry],
                    dtype=float,
                ).reshape(-1, 4)
                for entry in annotations
            ]
            types = [[type_of(a) for a in e] for e in annotations]
        return Predictions(
            *(list(images), list(patients), list(map(str, files))),
            labels=np.array(labels, dtype=int),
            scores=scores,
            boxes=None if any(entry is None for entry in boxes) else list(boxes),
            true_boxes=true_boxes,
            types=types,
            raw_scores=raw_scores,
        )

    def _smooth(self, scores, boxes, patients, series, positions, sizes) -> tuple:
        if len(scores) and np.isnan(positions).all():
            raise ValueError(
                "smoothing needs the place of each image in its series, got none; expected"
                ' "series" and "position_mm" in the dataset dicts.'
            )
        where = [*zip(patients, series)], positions
        if self.smoothing_iou and not any(entry is None for entry in boxes):
            weights, iou = self.smoothing_boxes, self.smoothing_iou
            scores, boxes = smooth_boxes(scores, boxes, *where, weights, iou, sizes=sizes)
        return smooth_scores(scores, *where, self.smoothing), boxes


def _metrics(summary: dict[str, dict]) -> dict[str, float]:
    return {
        f"{level}_{key}": float(value)
        for level, values in summary.items()
        for key, value in values.items()
        if key not in ("threshold", "n", "n_positive", "n_lesions")
    }


def metric_names(
    classes: Sequence[str] | None, *, masks: bool = False, segm: bool = False
) -> list[str]:
    """What a validation gives, as the event storage names it: "diagnosis/image_auc", "bbox/AP50".

    Args:
        classes: of a detector; None for a classifier, which has no boxes.
        masks: of a detector whose masks are evaluated.
        segm: and as COCO does.
    """
    ids, box = ["a"], None if classes is None else [np.zeros((1, 4))]
    found = None if classes is None else [np.zeros((1, 5))]
    one = Predictions(ids, ids, ids, np.ones(1, int), np.ones(1), found, box, [["a"]])
    names = [f"diagnosis/{key}" for key in _metrics(summaries(one, Settings([], 0.5)))]
    if classes is None:
        return names
    # Of Detectron2's COCOEvaluator.
    classes = [f"AP-{name}" for name in classes] if len(classes) > 1 else []
    tasks = ("bbox", "segm") if segm else ("bbox",)
    names += [f"{task}/{key}" for task in tasks for key in (*COCO_METRICS, *classes)]
    return [*names, *(f"masks/{key}" for key in MASK_METRICS if masks)]


def write_evaluation(folder: Path, predictions: Predictions, settings: Settings) -> dict[str, dict]:
    """Writes the tables, the summary and the curves of a dataset.

    Args:
        folder: made if need be.
        predictions: of the dataset.
        settings: thresholds, costs and rules to judge them by.

    Returns:
        The summary, of ``summaries``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(predictions, folder)
    rows = threshold_rows(predictions, settings)
    write_csv(folder / "diagnosis_thresholds.csv", TABLE_FIELDS, rows)
    threshold = settings.operating_threshold
    summary = summaries(predictions, settings)
    write_json(folder / DIAGNOSIS, {"operating_threshold": threshold, **summary})
    plot_thresholds(rows, threshold, folder / "diagnosis_thresholds.png")
    levels = levels_of(predictions, settings.patient_rules[0])
    plot_roc({k: v[:2] for k, v in levels.items()}, threshold, folder / "roc.png")
    return summary


def format_summary(summary: dict[str, dict]) -> str:
    """The summaries of image and patient level as a table for the terminal."""
    keys = ("n", "n_positive", "auc", "recall", "specificity", "precision", "accuracy")
    keys += ("recall_at_specificity_0.90", "tp", "fp", "tn", "fn")
    levels = ("image", "patient")
    return tabulate(
        [[key, *(summary[level][key] for level in levels)] for key in keys],
        headers=["", *levels],
        floatfmt=".3f",
        tablefmt="github",
    )
