"""Every number of an evaluation, with intervals over patients, from stored predictions.

A level is what is diagnosed: an image or a patient; its cases are all of them. A patient rule leads
from the images' scores to the patient's (``diagnosis.patient_scores``); the rule that chooses a
threshold is ``operating_point.Rule``.

Shape glossary: M images, P patients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from .boxes import SIZES, box_recall, thirds
from .calibration import calibrate, expected_calibration_error, reliability
from .compare import delong_test, mcnemar_test, paired_bootstrap
from .diagnosis import (
    COST_RATIO,
    METRICS,
    average_precision_score,
    confusion_at_thresholds,
    diagnosis_metrics,
    diagnosis_table,
    group_index,
    group_scores,
    recall_at_specificity,
    roc_auc_score,
    summarize,
    type_recall,
)
from .froc import CPM_RATES, HITS, froc_curve, match_detections
from .intervals import (
    bootstrap_by_group,
    delong_interval,
    wilson_by_group,
    wilson_interval,
)
from .predictions import Predictions

LEVELS = ("image", "patient")
# Proportions: which cases count, and which of those are hits, of the truth and the call.
_PROPORTIONS: dict[str, Callable] = {
    "accuracy": lambda true, called: (true == called, np.ones_like(true)),
    "recall": lambda true, called: (true & called, true),
    "precision": lambda true, called: (true & called, called),
    "specificity": lambda true, called: (~true & ~called, ~true),
    "npv": lambda true, called: (~true & ~called, ~called),
}


@dataclass(frozen=True)
class Settings:
    """How predictions are evaluated.

    Attributes:
        thresholds: scores at which the diagnosis is tabulated.
        operating_threshold: an image or patient scored at least this is called positive.
        cost_ratio: cost of a missed bleed, in false alarms.
        patient_rules: of ``patient_scores``; the first makes the diagnosis, the others are shown
            beside it.
        n_resamples, seed: of the bootstrap over patients.
    """

    thresholds: Sequence[float]
    operating_threshold: float
    cost_ratio: float = COST_RATIO
    patient_rules: Sequence[str] = ("any",)
    n_resamples: int = 2000
    seed: int = 0


Cases = tuple[np.ndarray, np.ndarray, Sequence[str]]
"""Labels, scores, and the patient of each."""

METHOD = "expanded percentiles (Hesterberg 2015) of patients drawn with replacement"
"""Of the intervals, see ``bootstrap_by_group``."""


def levels_of(predictions: Predictions, patient_rule: str) -> dict[str, Cases]:
    """The cases of both levels: "image" and, by a patient rule, "patient"."""
    y_true, y_score = predictions.labels, predictions.scores
    names, patient_true, patient_score = group_scores(
        predictions.patients, y_true, y_score, patient_rule
    )
    return {
        "image": (y_true, y_score, predictions.patients),
        "patient": (patient_true, patient_score, names),
    }


def summaries(predictions: Predictions, settings: Settings) -> dict[str, dict]:
    """``summarize`` of images and patients at the operating threshold, and the lesions' numbers.

    Returns:
        "image", "patient" and, where boxes and true boxes are known, "lesion".
    """
    summary = {
        name: summarize(
            y_true, y_score, settings.operating_threshold, cost_ratio=settings.cost_ratio
        )
        for name, (y_true, y_score, _) in levels_of(predictions, settings.patient_rules[0]).items()
    }
    if predictions.boxes is not None and predictions.true_boxes is not None:
        summary["lesion"] = lesion_summary(predictions, settings.operating_threshold)
    return summary


def threshold_rows(predictions: Predictions, settings: Settings) -> list[dict]:
    """Rows of ``diagnosis_thresholds.csv``: images, then patients, by rising threshold."""
    thresholds = sorted({*settings.thresholds, settings.operating_threshold})
    return [
        row
        for name, (y_true, y_score, _) in levels_of(predictions, settings.patient_rules[0]).items()
        for row in diagnosis_table(
            name, y_true, y_score, thresholds, cost_ratio=settings.cost_ratio
        )
    ]


def lesion_summary(predictions: Predictions, threshold: float) -> dict[str, float]:
    """Numbers of the boxes alone: AP, recall at the threshold, CPM; no intervals.

    Needs boxes and true boxes.
    """
    predicted, true = predictions.boxed.boxes, predictions.boxed.true_boxes
    scores = dict(predictions.lesion_scores)
    return {
        "n_lesions": sum(map(len, true)),
        **{name: scores.pop(name) for name in ("coco_ap", "coco_ap50", "voc_ap50")},
        "box_recall": box_recall(predicted, true, iou_threshold=0.5, score_threshold=threshold),
        **scores,
    }


def analyse(
    predictions: Predictions, settings: Settings, *, temperature: float | None = None
) -> dict:
    """Everything that the report shows, as plain numbers.

    Args:
        predictions: of one dataset.
        settings: thresholds, costs and rules to judge them by.
        temperature: of the calibration, fitted on other images.

    Returns:
        "n_images", "n_patients", "operating_threshold", "cost_ratio", "intervals" (how the
        bootstrap's were made), "levels" (image, patient: ``summarize`` with "intervals", "wilson"
        and "delong"), "thresholds", "patient_rules", "types", "sizes", "lesions" (None without
        boxes) and "calibration" (None unless the scores are in [0, 1]). What is undefined is NaN.
    """
    rule = settings.patient_rules[0]
    levels = levels_of(predictions, rule)
    return {
        "n_images": len(predictions.image_ids),
        "n_patients": len(levels["patient"][0]),
        "operating_threshold": settings.operating_threshold,
        "cost_ratio": settings.cost_ratio,
        "intervals": {
            "method": METHOD,
            "confidence": 0.95,
            "n_resamples": settings.n_resamples,
            "seed": settings.seed,
        },
        "patient_rule": rule,
        "levels": {name: _with_intervals(cases, settings) for name, cases in levels.items()},
        "thresholds": threshold_rows(predictions, settings),
        "patient_rules": {
            rule: _with_intervals(levels_of(predictions, rule)["patient"], settings)
            for rule in settings.patient_rules
        },
        "types": _types(predictions, levels, settings),
        "sizes": _sizes(predictions, settings),
        "lesions": _lesions(predictions, settings),
        "calibration": _calibration(levels, temperature),
    }


def _with_intervals(cases: Cases, settings: Settings) -> dict:
    y_true, y_score, patients = cases
    summary = summarize(
        y_true, y_score, settings.operating_threshold, cost_ratio=settings.cost_ratio
    )
    curves: dict[str, Callable] = {
        "auc": roc_auc_score,
        "average_precision": average_precision_score,
        "recall_at_specificity_0.90": partial(recall_at_specificity, specificity=0.90),
    }

    def statistic(weights):
        counts = confusion_at_thresholds(y_true, y_score, [settings.operating_threshold], weights)
        metrics = diagnosis_metrics(**counts, cost_ratio=settings.cost_ratio)
        return [
            *(curve(y_true, y_score, weights=weights) for curve in curves.values()),
            *(metrics[name][..., 0] for name in METRICS),
        ]

    bounds = bootstrap_by_group(
        statistic, patients, n_resamples=settings.n_resamples, seed=settings.seed
    )
    intervals = dict(zip((*curves, *METRICS), bounds.tolist()))
    true, called = y_true == 1, y_score >= settings.operating_threshold
    wilson = {
        name: _wilson(*proportion(true, called), patients)
        for name, proportion in _PROPORTIONS.items()
    }
    delong = delong_interval(y_true, y_score, patients).tolist()
    return {**summary, "intervals": intervals, "wilson": wilson, "delong": delong}


def _wilson(hits: np.ndarray, cases: np.ndarray, patients: Sequence[str]) -> list[float]:
    # Images of one patient are no independent cases, as Wilson's own interval takes them.
    if len(set(patients)) == len(patients):
        return wilson_interval(hits.sum(), cases.sum()).tolist()
    return wilson_by_group(hits, cases, patients).tolist()


def _types(predictions: Predictions, levels: dict[str, Cases], settings: Settings) -> dict:
    """Recall of each hemorrhage type at the operating threshold, by level."""
    if predictions.types is None:
        return {}
    names, index = group_index(predictions.patients)
    of_patient = [set() for _ in names]
    for place, types in zip(index, predictions.types):
        of_patient[place].update(types)
    result = {}
    for level, types in (("image", [set(t) for t in predictions.types]), ("patient", of_patient)):
        _, y_score, patients = levels[level]
        found = type_recall(types, y_score, [settings.operating_threshold])
        called = y_score >= settings.operating_threshold
        has = {name: np.array([name in entry for entry in types]) for name in found}
        result[level] = {
            name: {
                "n": entry["n"],
                "tp": int(entry["tp"][0]),
                "recall": float(entry["recall"][0]),
                "wilson": _wilson(has[name] & called, has[name], patients),
            }
            for name, entry in found.items()
        }
    return result


def _sizes(predictions: Predictions, settings: Settings) -> list[dict]:
    """Recall of the slices with true boxes, by the area of their largest one."""
    true = predictions.true_boxes or []
    area = np.array([(boxes[:, 2] * boxes[:, 3]).max(initial=-1) for boxes in true])
    has = np.flatnonzero(area >= 0)
    if not len(has):
        return []
    third, bounds = thirds(area[has])
    called = predictions.scores >= settings.operating_threshold
    healthy, rows = predictions.labels == 0, []
    for i, (name, (low, high)) in enumerate(zip(SIZES, bounds)):
        chosen = np.zeros(len(area), dtype=bool)
        chosen[has[third == i]] = True
        if not chosen.any():
            continue
        judged = chosen | healthy
        rows.append(
            {
                "size": name,
                "from": low,
                "to": high,
                "n": int(chosen.sum()),
                "tp": int((chosen & called).sum()),
                "recall": float(called[chosen].mean()),
                "wilson": _wilson(chosen & called, chosen, predictions.patients),
                "recall_at_specificity_0.90": recall_at_specificity(
                    chosen[judged], predictions.scores[judged], 0.90
                ),
            }
        )
    return rows


def _lesions(predictions: Predictions, settings: Settings) -> dict | None:
    if predictions.boxes is None or predictions.true_boxes is None:
        return None
    result = {**lesion_summary(predictions, settings.operating_threshold), "froc": {}}
    found = predictions.boxed
    _, patients = group_index(found.patients)
    for hit, words in HITS.items():
        matches = match_detections(found.boxes, found.true_boxes, hit=hit)
        for level, scans in (("image", None), ("patient", patients)):
            curve = froc_curve(matches, scans)

            def statistic(weights, matches=matches, scans=scans):
                rows = [froc_curve(matches, scans, w).sensitivity_at() for w in weights]
                return [*np.transpose(rows), np.mean(rows, axis=1)]

            bounds = bootstrap_by_group(
                statistic,
                found.patients,
                n_resamples=settings.n_resamples,
                seed=settings.seed,
            ).tolist()
            result["froc"][f"{level}_{hit}"] = {
                "hit": words,
                "rates": list(CPM_RATES),
                "sensitivity": curve.sensitivity_at().tolist(),
                "intervals": bounds[:-1],
                "cpm": curve.cpm,
                "cpm_interval": bounds[-1],
                "thresholds": curve.thresholds.tolist(),
                "curve": [curve.false_positives.tolist(), curve.sensitivity.tolist()],
            }
    return result


def _calibration(levels: dict[str, Cases], temperature: float | None) -> dict | None:
    result = {}
    for name, (y_true, y_score, _) in levels.items():
        if not ((y_score >= 0) & (y_score <= 1)).all():
            return None
        forms = {"as_scored": y_score}
        if temperature is not None:
            forms["scaled"] = calibrate(y_score, temperature)
        result[name] = {
            form: {
                "ece": expected_calibration_error(y_true, score),
                "brier": float(((score - y_true) ** 2).mean()),
                **{key: value.tolist() for key, value in reliability(y_true, score).items()},
            }
            for form, score in forms.items()
        }
    return {"temperature": temperature, **result}


def compare(
    first: Predictions, other: Predictions, first_settings: Settings, other_settings: Settings
) -> dict[str, dict]:
    """Two models on the same images, each at its own operating threshold, first minus other.

    Returns:
        level -> "bootstrap" (``paired_bootstrap``), "delong" (``delong_test``; with the images of a
        patient as one group) and "mcnemar" (``mcnemar_test`` of all, of the positive, and of the
        negative cases, a patient's images swapped together).

    Raises:
        ValueError: if the images, their labels or patients differ.
    """
    missing = set(first.image_ids) ^ set(other.image_ids)
    if missing:
        raise ValueError(
            f"image '{min(missing)}' is in one of the predictions alone ({len(missing)} such);"
            " models are compared on the same images."
        )
    other = other.take(first.image_ids)
    for image, *pair in zip(
        *(first.image_ids, first.labels, other.labels, first.patients, other.patients)
    ):
        if pair[0] != pair[1] or pair[2] != pair[3]:
            raise ValueError(
                f"image '{image}' is of label {pair[0]}, patient {pair[2]} in one of the"
                f" predictions and of {pair[1]}, {pair[3]} in the other; expected the same."
            )
    result = {}
    rules = first_settings.patient_rules[0], other_settings.patient_rules[0]
    for level in LEVELS:
        y_true, y_score, groups = levels_of(first, rules[0])[level]
        _, other_score, _ = levels_of(other, rules[1])[level]
        thresholds = first_settings.operating_threshold, other_settings.operating_threshold
        right = [(s >= t) == y_true for s, t in zip((y_score, other_score), thresholds)]
        groups = np.asarray(groups, dtype=str)
        result[level] = {
            "bootstrap": paired_bootstrap(
                y_true,
                (y_score, thresholds[0]),
                (other_score, thresholds[1]),
                groups,
                cost_ratio=first_settings.cost_ratio,
                n_resamples=first_settings.n_resamples,
                seed=first_settings.seed,
            ),
            "delong": delong_test(y_true, y_score, other_score, groups),
            "mcnemar": {
                name: mcnemar_test(right[0][chosen], right[1][chosen], groups[chosen])
                for name, chosen in (
                    ("accuracy", slice(None)),
                    ("recall", y_true == 1),
                    ("specificity", y_true == 0),
                )
            },
        }
    return result
