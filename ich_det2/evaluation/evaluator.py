"""Detectron2 evaluator that turns boxes into diagnoses."""

import csv
import itertools
import json
import logging
import math
from pathlib import Path

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tabulate import tabulate

from ..files import write_atomically
from .diagnosis import METRICS, diagnosis_table, group_scores, summarize
from .plots import plot_roc, plot_thresholds

SCORE_FIELDS = ("image_id", "file_name", "patient_id", "label", "score")
TABLE_FIELDS = ("level", "threshold", "tp", "fp", "tn", "fn", *METRICS)


class DiagnosisEvaluator(DatasetEvaluator):
    """Image- and patient-level diagnosis over many thresholds.

    Writes ``image_scores.csv``, ``diagnosis_thresholds.csv`` and ``diagnosis.json``.
    """

    def __init__(
        self, *, thresholds, operating_threshold: float, output_dir=None, distributed: bool = True
    ):
        """
        Args:
            thresholds: image scores at which the diagnosis is tabulated.
            operating_threshold: an image or patient scored at least this is called positive.
            output_dir: folder for the files; None writes none.
            distributed: gather the images of all processes.
        """
        self.thresholds = sorted(set(thresholds) | {operating_threshold})
        self.operating_threshold = operating_threshold
        self.output_dir = Path(output_dir) if output_dir else None
        self.distributed = distributed
        self.reset()

    def reset(self) -> None:
        self._rows = []

    def process(self, inputs, outputs) -> None:
        """
        Args:
            inputs: mapped dataset dicts, with "image_label".
            outputs: dicts with "instances" that have "scores".
        """
        for x, y in zip(inputs, outputs):
            scores = y["instances"].scores
            self._rows.append(
                {
                    "image_id": x["image_id"],
                    "file_name": Path(x["file_name"]).name,
                    "patient_id": x.get("patient_id", x["image_id"]),
                    "label": x["image_label"],
                    "score": scores.max().item() if len(scores) else 0.0,
                }
            )

    def evaluate(self) -> dict:
        """
        Returns:
            ``{"diagnosis": {"image_auc": ..., "patient_recall": ..., ...}}`` on the main process,
            elsewhere an empty dict.
        """
        rows = self._rows
        if self.distributed:
            comm.synchronize()
            rows = list(itertools.chain(*comm.gather(rows, dst=0)))
            if not comm.is_main_process():
                return {}
        # The samplers of several processes may hand an image out twice.
        rows = sorted({row["image_id"]: row for row in rows}.values(), key=lambda r: r["image_id"])
        y_true = np.array([row["label"] for row in rows], dtype=int)
        y_score = np.array([row["score"] for row in rows], dtype=float)
        _, patient_true, patient_score = group_scores(
            [row["patient_id"] for row in rows], y_true, y_score
        )
        levels = {"image": (y_true, y_score), "patient": (patient_true, patient_score)}
        summary = {k: summarize(*v, self.operating_threshold) for k, v in levels.items()}
        table = [row for k, v in levels.items() for row in diagnosis_table(k, *v, self.thresholds)]
        if self.output_dir is not None:
            self._write(rows, table, summary)
            plot_thresholds(
                table, self.operating_threshold, self.output_dir / "diagnosis_thresholds.png"
            )
            plot_roc(levels, self.operating_threshold, self.output_dir / "roc.png")
        logging.getLogger(__name__).info(
            "Diagnosis at the operating threshold %g:\n%s",
            self.operating_threshold,
            format_summary(summary),
        )
        return {
            "diagnosis": {
                f"{level}_{key}": float(value)
                for level, values in summary.items()
                for key, value in values.items()
                if key not in ("threshold", "n", "n_positive")
            }
        }

    def _write(self, rows: list[dict], table: list[dict], summary: dict) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_csv(self.output_dir / "image_scores.csv", SCORE_FIELDS, rows)
        write_csv(self.output_dir / "diagnosis_thresholds.csv", TABLE_FIELDS, table)
        with write_atomically(self.output_dir / "diagnosis.json") as file:
            # JSON has no NaN: what is undefined is null.
            levels = {k: {n: _finite(x) for n, x in v.items()} for k, v in summary.items()}
            json.dump({"operating_threshold": self.operating_threshold, **levels}, file, indent=2)


def format_summary(summary: dict[str, dict]) -> str:
    """The summaries of image and patient level as a table for the terminal."""
    keys = ("n", "n_positive", "auc", "recall", "specificity", "precision", "accuracy")
    keys += ("recall_at_specificity_0.90", "tp", "fp", "tn", "fn")
    return tabulate(
        [[key, *(values[key] for values in summary.values())] for key in keys],
        headers=["", *summary],
        floatfmt=".3f",
        tablefmt="github",
    )


def write_csv(path: Path, fields, rows: list[dict]) -> None:
    """Writes rows to a CSV file, whole or not at all."""
    with write_atomically(path) as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
