"""The reports of a training run's evaluations, with what its config says of the method."""

import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..data.mapper import IchDatasetMapper
from ..evaluation.operating_point import OperatingPoint
from ..evaluation.predictions import read_predictions
from ..evaluation.report import Model, ReadImage, write_report
from ..version import __version__
from .config import is_classifier
from .operating_point import build_settings

HISTORY = "diagnosis_history.csv"

logger = logging.getLogger(__name__)


def write_reports(cfg: CfgNode, point: OperatingPoint | None) -> None:
    """Writes report.html and report.json of each of DATASETS.TEST from its stored predictions.

    Args:
        cfg: with the operating threshold.
        point: where that comes from.
    """
    folder = Path(cfg.OUTPUT_DIR)
    for name in cfg.DATASETS.TEST:
        inference = folder / "inference" / name
        model = Model(
            name=folder.resolve().name,
            predictions=read_predictions(inference),
            settings=build_settings(cfg),
            point=point,
            facts=training_facts(cfg),
            history=read_history(folder),
            training=read_metrics(folder),
        )
        write_report(
            inference,
            [model],
            dataset=name,
            read_image=_reader(cfg, name),
        )
        logger.info("Report: %s", inference / "report.html")


def _reader(cfg: CfgNode, dataset: str) -> ReadImage:
    """Reads a dataset's slices by path, or by the bare name that stored scores have."""
    mapper = IchDatasetMapper(cfg, is_train=False)
    files = {Path(d["file_name"]).name: d["file_name"] for d in DatasetCatalog.get(dataset)}
    return lambda file: mapper.read_image(files.get(file, file))


def read_history(folder: Path) -> list[dict]:
    """Rows of ``diagnosis_history.csv``; none where it is absent."""
    path = folder / HISTORY
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def read_metrics(folder: Path) -> list[dict]:
    """Rows of ``metrics.json``, by iteration; none where it is absent."""
    path = folder / "metrics.json"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # A resumed run measures again what came after its checkpoint.
    return [row for _, row in sorted({row["iteration"]: row for row in rows}.items())]


def training_facts(cfg: CfgNode) -> dict[str, str]:
    """What a config answers of the checklists, see ``evaluation.checklist``."""
    aug, solver = cfg.INPUT.AUG, cfg.SOLVER
    names = ("SHIFT", "SCALE", "ROTATE", "JITTER", "EXPAND")
    augmentation = ", ".join(f"{name.lower()} {aug[name]:g}" for name in names)
    facts = {
        "preprocessing": f"Windows (level, width in HU) {_plain(cfg.INPUT.WINDOWS)}; shorter side"
        f" resized to {cfg.INPUT.MIN_SIZE_TEST} pixels.",
        "model": f"{_model(cfg)} All parameters: config.yaml.",
        "software": f"ich_det2 {__version__}, Detectron2 {detectron2.__version__}, PyTorch"
        f" {torch.__version__}.",
        "initialization": f"Weights {Path(cfg.MODEL.WEIGHTS).name or 'random'}.",
        "training": f"{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images, learning rate"
        f" {solver.BASE_LR:g}, momentum {solver.MOMENTUM:g}; augmentation: {augmentation}.",
        "selection": f"Best {cfg.TEST.DIAGNOSIS.BEST_METRIC} on"
        f" {', '.join(cfg.DATASETS.VAL)}, every {cfg.TEST.EVAL_PERIOD} iterations.",
    }
    patients = {
        name: {d["patient_id"] for d in DatasetCatalog.get(name)}
        for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.VAL, *cfg.DATASETS.TEST))
        if name in DatasetCatalog
    }
    if patients:
        sizes = (f"{name} {len(members)} patients" for name, members in patients.items())
        facts["partitions"] = f"By given lists: {', '.join(sizes)}."
        facts["disjoint"] = _disjoint(list(patients.values()))
    return facts


def _model(cfg: CfgNode) -> str:
    model, rpn = cfg.MODEL, cfg.MODEL.RPN
    if is_classifier(cfg):
        classifier = model.CLASSIFIER
        return (
            f"{model.META_ARCHITECTURE}, {classifier.NAME} at {classifier.INPUT_SIZE} pixels with"
            f" {cfg.INPUT.SEQUENCE_SLICES} slices beside on either side; a positive image weighs"
            f" {classifier.POS_WEIGHT:g} in the loss; an image is positive if its probability is at"
            " least the threshold."
        )
    backbone = model.BACKBONE.NAME
    if backbone == "build_timm_backbone":
        backbone = model.TIMM.NAME
    return (
        f"{model.META_ARCHITECTURE}, {backbone}, {model.PROPOSAL_GENERATOR.NAME} with alpha"
        f" {rpn.COST.ALPHA:g}, R {rpn.SAMPLER.MAX_RATIO:g}, {rpn.SAMPLER.SHORTFALL}; anchors"
        f" {_plain(model.ANCHOR_GENERATOR.SIZES)} pixels, ratios"
        f" {_plain(model.ANCHOR_GENERATOR.ASPECT_RATIOS)}; an image is positive if a box scores at"
        " least the threshold."
    )


def _disjoint(groups: Sequence[set[str]]) -> str:
    shared = sum(map(len, groups)) - len(set().union(*groups))
    if shared:
        return f"Not by patient: {shared} patients are in more than one partition."
    return "By patient: checked, no patient is in two partitions."


def _plain(value) -> str:
    return str([list(v) if isinstance(v, tuple) else v for v in value])
