"""The threshold a diagnosis is made at: chosen on validation, written down, used from then on."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from ..files import write_json
from .analysis import LEVELS, Settings, levels_of, summaries
from .calibration import fit_temperature
from .diagnosis import COST_RATIO, confusion_at_thresholds, diagnosis_metrics
from .predictions import Predictions

logger = logging.getLogger(__name__)

# What each rule maximizes over the thresholds; a missed bleed is worse than a false alarm, so of
# equals the lowest threshold is taken.
_AIMS: dict[str, Callable[[dict], np.ndarray]] = {
    "youden": lambda m: m["recall"] + m["specificity"],
    "f2": lambda m: m["f2"],
    "cost": lambda m: -m["expected_cost"],
}
RULES = ("recall", *_AIMS)


def choose_threshold(
    y_true,
    y_score,
    rule: str,
    *,
    target_recall: float = 0.95,
    cost_ratio: float = COST_RATIO,
) -> float:
    """Chooses a threshold on validation.

    Every set of positive calls that some threshold makes is tried; the threshold is put halfway
    between the lowest score called positive and the next lower one, so that neither is on the
    edge. It is above 0: an image without boxes scores 0 and is never positive.

    Args:
        y_true, y_score: of the validation images (patients), sized (M,), scores >= 0.
        rule: "recall" (the highest threshold with at least ``target_recall``; the lowest, if none
            has), "youden" (largest recall + specificity - 1), "f2" (largest F2) or "cost" (least
            expected cost).
        target_recall: of "recall".
        cost_ratio: of "cost", cost of a missed bleed in false alarms.

    Raises:
        ValueError: if the rule is unknown, a class that it needs is absent, or no score is above 0.
    """
    if rule not in RULES:
        raise ValueError(f"the rule is '{rule}', expected one of {', '.join(RULES)}.")
    y_true, y_score = np.asarray(y_true), np.asarray(y_score, dtype=np.float64)
    n_positive = int(np.sum(y_true == 1))
    if n_positive == 0 or (rule == "youden" and n_positive == len(y_true)):
        raise ValueError(
            f"the rule {rule} needs {'both classes' if rule == 'youden' else 'positive cases'}, got"
            f" {n_positive} positive of {len(y_true)}."
        )
    distinct = np.unique(np.r_[0.0, y_score[np.isfinite(y_score)]])
    if len(distinct) == 1:
        raise ValueError("no score is above 0, so there is no threshold to choose.")
    # The last one calls nothing positive.
    thresholds = np.r_[(distinct[1:] + distinct[:-1]) / 2, np.nextafter(distinct[-1], np.inf)]
    metrics = diagnosis_metrics(
        **confusion_at_thresholds(y_true, y_score, thresholds), cost_ratio=cost_ratio
    )
    if rule == "recall":
        enough = np.flatnonzero(metrics["recall"] >= target_recall)
        return float(thresholds[enough[-1] if len(enough) else 0])
    aim = _AIMS[rule](metrics)
    return float(thresholds[np.flatnonzero(aim >= np.nanmax(aim) - 1e-12)[0]])


@dataclass(frozen=True)
class Rule:
    """How an operating point is chosen.

    Attributes:
        name: of :func:`choose_threshold`, or "fixed": the settings' threshold stays.
        level: "image" or "patient": whose scores it looks at.
        target_recall: of the rule "recall".
    """

    name: str = "fixed"
    level: str = "image"
    target_recall: float = 0.95

    def __post_init__(self):
        if self.name not in ("fixed", *RULES):
            raise ValueError(f"the rule is '{self.name}', expected fixed, {', '.join(RULES)}.")
        if self.level not in LEVELS:
            raise ValueError(f"the level is '{self.level}', expected {' or '.join(LEVELS)}.")
        if not 0 < self.target_recall <= 1:
            raise ValueError(f"the target recall is {self.target_recall}, expected 0 < it <= 1.")


@dataclass(frozen=True)
class OperatingPoint:
    """A locked threshold and where it comes from.

    Attributes:
        threshold: score from which an image (patient) is called positive.
        rule: of :func:`choose_threshold`, or "fixed" (TEST.DIAGNOSIS.OPERATING_THRESHOLD).
        level: "image" or "patient", at which the rule was applied.
        patient_rule: of ``patient_scores``; from images to the patient.
        target_recall, cost_ratio: as :func:`choose_threshold`.
        dataset: on whose predictions it was chosen.
        weights_sha256: of the weights it belongs to.
        temperature: of ``calibrate``, fitted on the same dataset; None where undefined.
        alternatives: rule -> threshold it would have chosen there; None where undefined.
        validation: level -> ``summarize`` on that dataset at the threshold.
    """

    threshold: float
    rule: str
    level: str
    patient_rule: str
    target_recall: float
    cost_ratio: float
    dataset: str
    weights_sha256: str
    temperature: float | None
    alternatives: dict[str, float | None]
    validation: dict[str, dict]

    @classmethod
    def choose(
        cls,
        predictions: Predictions,
        settings: Settings,
        rule: Rule,
        *,
        dataset: str,
        weights_sha256: str = "",
    ) -> "OperatingPoint":
        """Chooses on validation.

        Where the rule needs a class that is absent, the settings' threshold stays and the rule
        becomes "fixed".

        Args:
            predictions: of the validation.
            settings: with the threshold of the rule "fixed".
            rule: which, and where.
            dataset: name of the validation.
            weights_sha256: of the model's weights.
        """
        y_true, y_score, _ = levels_of(predictions, settings.patient_rules[0])[rule.level]
        alternatives: dict[str, float | None] = {}
        for name in RULES:
            try:
                alternatives[name] = choose_threshold(
                    y_true,
                    y_score,
                    name,
                    target_recall=rule.target_recall,
                    cost_ratio=settings.cost_ratio,
                )
            except ValueError as error:
                alternatives[name] = None
                if name == rule.name:
                    logger.warning(
                        "No operating point on %s: %s The threshold %g is used.",
                        dataset,
                        error,
                        settings.operating_threshold,
                    )
        chosen = alternatives.get(rule.name)
        threshold = settings.operating_threshold if chosen is None else chosen
        temperature = math.nan
        if ((predictions.scores >= 0) & (predictions.scores <= 1)).all():
            temperature = fit_temperature(predictions.labels, predictions.scores)
        return cls(
            threshold=threshold,
            rule="fixed" if chosen is None else rule.name,
            level=rule.level,
            patient_rule=settings.patient_rules[0],
            target_recall=rule.target_recall,
            cost_ratio=settings.cost_ratio,
            dataset=dataset,
            weights_sha256=weights_sha256,
            temperature=None if math.isnan(temperature) else temperature,
            alternatives=alternatives,
            validation=summaries(predictions, replace(settings, operating_threshold=threshold)),
        )

    def save(self, path: Path) -> None:
        """Writes it as JSON; what is undefined is null."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "OperatingPoint":
        """
        Raises:
            ValueError: naming the file, if it is none of :meth:`save`.
        """
        try:
            point = cls(**json.loads(path.read_text(encoding="utf-8")))
            if not 0 < float(point.threshold) < np.inf:
                raise ValueError(f"threshold is {point.threshold}")
            return point
        except (TypeError, ValueError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise ValueError(
                f"{path}: is no operating point ({error}); expected JSON with {names}. Evaluate the"
                " model on validation again, or remove the file for the config's threshold."
            ) from error
