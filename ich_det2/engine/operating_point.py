"""The operating point of a training run: chosen on validation, found again with the weights."""

import logging
from pathlib import Path

from detectron2.config import CfgNode

from ..evaluation.analysis import Settings
from ..evaluation.diagnosis import parse_rule
from ..evaluation.evaluator import write_evaluation
from ..evaluation.operating_point import OperatingPoint, Rule
from ..evaluation.predictions import Predictions, read_predictions
from ..evaluation.smoothing import check_weights
from ..files import sha256
from .run_folder import RunFolder

logger = logging.getLogger(__name__)


def check_operating_point(cfg: CfgNode) -> None:
    """Finds a wrong TEST.DIAGNOSIS before hours of training.

    Raises:
        ValueError: naming the key, what it is and what is expected.
    """
    try:
        build_rule(cfg)
    except ValueError as error:
        raise ValueError(f"TEST.DIAGNOSIS.OPERATING_POINT: {error}") from error
    if not cfg.TEST.DIAGNOSIS.COST_RATIO > 0:
        raise ValueError(
            f"TEST.DIAGNOSIS.COST_RATIO is {cfg.TEST.DIAGNOSIS.COST_RATIO}, expected above 0."
        )
    rules = cfg.TEST.DIAGNOSIS.PATIENT_RULES
    try:
        if not rules:
            raise ValueError("there is no patient rule, expected at least one.")
        for rule in rules:
            parse_rule(rule)
    except ValueError as error:
        raise ValueError(f"TEST.DIAGNOSIS.PATIENT_RULES is {list(rules)}: {error}") from error
    for key in ("SMOOTHING", "SMOOTHING_BOXES"):
        try:
            if weights := list(cfg.TEST.DIAGNOSIS[key]):
                check_weights(weights)
        except ValueError as error:
            raise ValueError(f"TEST.DIAGNOSIS.{key}: {error}") from error
    if not 0 <= cfg.TEST.DIAGNOSIS.SMOOTHING_IOU <= 1:
        raise ValueError(
            f"TEST.DIAGNOSIS.SMOOTHING_IOU is {cfg.TEST.DIAGNOSIS.SMOOTHING_IOU}, expected 0 to 1."
        )


def build_settings(cfg: CfgNode) -> Settings:
    """How a config wants predictions evaluated."""
    diagnosis = cfg.TEST.DIAGNOSIS
    return Settings(
        thresholds=diagnosis.THRESHOLDS,
        operating_threshold=diagnosis.OPERATING_THRESHOLD,
        cost_ratio=diagnosis.COST_RATIO,
        patient_rules=tuple(diagnosis.PATIENT_RULES),
        n_resamples=diagnosis.RESAMPLES,
    )


def build_rule(cfg: CfgNode) -> Rule:
    """How a config wants the operating point chosen."""
    wanted = cfg.TEST.DIAGNOSIS.OPERATING_POINT
    return Rule(wanted.RULE, wanted.LEVEL, wanted.TARGET_RECALL)


def choose_operating_point(cfg: CfgNode, weights: Path) -> OperatingPoint:
    """Chooses on the stored predictions of DATASETS.VAL and writes it beside the weights.

    Where the rule of the config needs a class that the validation lacks, OPERATING_THRESHOLD is
    taken, with a warning.

    Args:
        cfg: its OPERATING_THRESHOLD becomes the one chosen.
        weights: whose predictions stand in OUTPUT_DIR/inference.
    """
    folders = [RunFolder(cfg.OUTPUT_DIR).inference(name) for name in cfg.DATASETS.VAL]
    parts = [read_predictions(folder) for folder in folders]
    point = OperatingPoint.choose(
        parts[0] if len(parts) == 1 else Predictions.joined(parts),
        build_settings(cfg),
        build_rule(cfg),
        dataset=", ".join(cfg.DATASETS.VAL),
        weights_sha256=sha256(weights),
    )
    point.save(RunFolder.beside(weights).operating_point)
    cfg.TEST.DIAGNOSIS.OPERATING_THRESHOLD = point.threshold
    logger.info(
        "Operating point by the rule %s on %s: %g.", point.rule, point.dataset, point.threshold
    )
    # The validation's tables were written at the threshold before.
    settings = build_settings(cfg)
    for folder, part in zip(folders, parts):
        write_evaluation(folder, part, settings)
    return point


def find_operating_point(cfg: CfgNode, weights: Path) -> OperatingPoint | None:
    """The operating point that was locked with these weights.

    Args:
        cfg: its OPERATING_THRESHOLD becomes the locked one; one that was "fixed" leaves it.
        weights: whose folder may hold an operating point.

    Returns:
        None if there is none, or if it belongs to other weights (with a warning).

    Raises:
        ValueError: naming the file, if it cannot be read.
    """
    run = RunFolder.beside(weights)
    weights, path = run.path / weights.name.partition("?")[0], run.operating_point
    point = run.read_operating_point()
    if point is None or not weights.is_file():
        return None
    if point.weights_sha256 != sha256(weights):
        logger.warning(
            "%s belongs to other weights than %s: OPERATING_THRESHOLD %g is used.",
            path,
            weights.name,
            cfg.TEST.DIAGNOSIS.OPERATING_THRESHOLD,
        )
        return None
    if point.rule != "fixed":
        logger.info(
            "%s: %g, chosen by the rule %s on %s; OPERATING_THRESHOLD %g is not used.",
            *(path, point.threshold, point.rule, point.dataset),
            cfg.TEST.DIAGNOSIS.OPERATING_THRESHOLD,
        )
        cfg.TEST.DIAGNOSIS.OPERATING_THRESHOLD = point.threshold
        if point.patient_rule != cfg.TEST.DIAGNOSIS.PATIENT_RULES[0]:
            logger.warning(
                "%s was chosen with the patient rule %s, PATIENT_RULES begins with %s: patients are"
                " called by the latter.",
                *(path, point.patient_rule, cfg.TEST.DIAGNOSIS.PATIENT_RULES[0]),
            )
    return point
