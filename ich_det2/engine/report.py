"""The reports of a training run's evaluations, with what its record says of the method."""

import functools
import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..data.datasets import fingerprints
from ..data.mapper import IchDatasetMapper
from ..evaluation.mask_evaluator import read_summary
from ..evaluation.operating_point import OperatingPoint
from ..evaluation.predictions import read_predictions
from ..evaluation.report import Model, ReadImage, write_report
from ..modeling.keys import is_read
from .config import (
    Differences,
    flatten,
    is_classifier,
    is_dynunet,
    is_retinanet,
    is_segmenter,
)
from .operating_point import build_settings
from .partitions import ROLES, names_of, overlaps, patients_of
from .run_folder import RunFolder, in_words, versions

logger = logging.getLogger(__name__)


def write_reports(
    cfg: CfgNode,
    point: OperatingPoint | None,
    trained: RunFolder | None = None,
    differs: Differences | None = None,
) -> None:
    """Writes the report of each of DATASETS.TEST from its stored predictions.

    Args:
        cfg: with the operating threshold, and OUTPUT_DIR in which the predictions are.
        point: where that comes from.
        trained: the run of the model, OUTPUT_DIR if None.
        differs: how the config differs from what the model was trained with.
    """
    run = RunFolder(cfg.OUTPUT_DIR)
    trained = run if trained is None else trained
    for name in cfg.DATASETS.TEST:
        inference = run.inference(name)
        model = Model(
            name=run.name,
            predictions=read_predictions(inference),
            settings=build_settings(cfg),
            point=point,
            facts=training_facts(cfg, trained),
            history=trained.read_history(),
            training=trained.read_metrics(),
            masks=read_summary(inference),
            differs=differs or {},
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


def training_facts(cfg: CfgNode, trained: RunFolder) -> dict[str, str]:
    """What is known of a model answers of the checklists, see ``evaluation.checklist``.

    Args:
        cfg: with which it is evaluated.
        trained: its run; what it was trained with stays open where that is not known.
    """
    facts = {
        "preprocessing": f"Windows (level, width in HU) {_plain(cfg.INPUT.WINDOWS)}; shorter side"
        f" resized to {cfg.INPUT.MIN_SIZE_TEST} pixels.",
        "model": f"{_model(cfg)}{_smoothing(cfg)} All parameters: {trained.config.name}.",
        "software": ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
    }
    if not trained.config.is_file() or trained.evaluation.is_file():
        return facts
    record = trained.read_config()
    aug, solver, period = record.INPUT.AUG, record.SOLVER, record.TEST.EVAL_PERIOD
    names = ("SHIFT", "SCALE", "ROTATE", "JITTER", "EXPAND")
    augmentation = ", ".join(f"{name.lower()} {aug[name]:g}" for name in names)
    when = f"every {period} iterations" if period else "after the last iteration"
    facts |= {
        "initialization": f"Weights {Path(record.MODEL.WEIGHTS).name or 'random'}.",
        "training": f"{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images, learning rate"
        f" {solver.BASE_LR:g}, momentum {solver.MOMENTUM:g}; augmentation: {augmentation}.",
        "selection": f"Best {record.TEST.DIAGNOSIS.BEST_METRIC} on"
        f" {', '.join(record.DATASETS.VAL)}, {when}.",
    }
    return facts | _partitions(cfg, trained)


def _partitions(cfg: CfgNode, trained: RunFolder) -> dict[str, str]:
    """Who was trained on, and whether it is who is tested on."""
    if trained.data_differ(cfg):
        root = trained.data_root()
        return {
            "disjoint": f"Not checked: the model was trained on data of another folder, {root}."
        }
    used = trained.read_config()
    used.DATASETS.TEST = cfg.DATASETS.TEST
    names = names_of(used)
    if any(name not in DatasetCatalog for name in names):
        return {}
    if differs := trained.changed_data(fingerprints(names)):
        return {"disjoint": f"Not checked: data have changed since training: {in_words(differs)}."}
    read = functools.cache(DatasetCatalog.get)
    sizes = ", ".join(f"{name} {len(patients_of([name], read))} patients" for name in names)
    roles = {"TRAIN": "trained on", "VAL": "selected on", "TEST": "tested on"}
    shared = "; ".join(
        f"{len(patients)} patients are both {roles[first]} and {roles[other]}"
        for first, other, patients in overlaps(used, ROLES, read)
    )
    return {
        "partitions": f"By given lists: {sizes}.",
        "disjoint": f"Not by patient: {shared}."
        if shared
        else "By patient: checked, no patient is in two partitions.",
    }


def _model(cfg: CfgNode) -> str:
    model = cfg.MODEL
    if is_classifier(cfg):
        classifier = model.CLASSIFIER
        sees = f"{cfg.INPUT.SEQUENCE_SLICES} slices beside on either side"
        if scan := cfg.INPUT.SCAN_SLICES:
            sees = f"{scan} slices of the whole scan, whose score each of its images gets"
        return (
            f"{model.META_ARCHITECTURE}, {classifier.NAME} at {classifier.INPUT_SIZE} pixels with"
            f" {sees}; a positive image weighs"
            f" {classifier.POS_WEIGHT:g} in the loss; an image is positive if its probability is at"
            " least the threshold."
        )
    if is_dynunet(cfg):
        return (
            f"{model.META_ARCHITECTURE}, filters {_plain(model.DYNUNET.FILTERS)}, strides"
            f" {_plain(model.DYNUNET.STRIDES)}; an image is positive if the mean of its"
            f" {model.DYNUNET.MIN_PIXELS} highest probabilities of a pixel is at least the"
            " threshold."
        )
    if is_segmenter(cfg):
        return (
            f"{model.META_ARCHITECTURE} with MODEL.SEGMENTER {dict(model.SEGMENTER)}: lesions are"
            " found without learning, only how likely one is blood is learnt, from its size,"
            " density and compactness; an image is positive if a lesion's probability is at least"
            " the threshold."
        )
    backbone = model.BACKBONE.NAME
    if backbone == "build_timm_backbone":
        backbone = model.TIMM.NAME
    # Only what a part of the model reads.
    settings = {
        "alpha": "MODEL.RPN.COST.ALPHA",
        "R": "MODEL.RPN.SAMPLER.MAX_RATIO",
        "with too few positives": "MODEL.RPN.SAMPLER.SHORTFALL",
        "alpha of the second stage": "MODEL.ROI_HEADS.COST.ALPHA",
    }
    flat = flatten(cfg)
    used = [f"{name} {flat[key]}" for name, key in settings.items() if is_read(flat, key)]
    stages = [] if is_retinanet(cfg) else [model.PROPOSAL_GENERATOR.NAME, model.ROI_HEADS.NAME]
    return (
        f"{', '.join([model.META_ARCHITECTURE, backbone, *stages, *used])}; anchors"
        f" {_plain(model.ANCHOR_GENERATOR.SIZES)} pixels, ratios"
        f" {_plain(model.ANCHOR_GENERATOR.ASPECT_RATIOS)}; an image is positive if a box scores at"
        " least the threshold."
    )


def _smoothing(cfg: CfgNode) -> str:
    weights = list(cfg.TEST.DIAGNOSIS.SMOOTHING)
    if not weights:
        return ""
    text = f" An image's score is the mean over its neighbours in the series, weighted {weights}"
    if iou := cfg.TEST.DIAGNOSIS.SMOOTHING_IOU:
        text += f", and a box's that of it and of boxes there that overlap it by IoU {iou:g}"
        if own := list(cfg.TEST.DIAGNOSIS.SMOOTHING_BOXES):
            text += f", weighted {own}"
    return f"{text}."


def _plain(value) -> str:
    return str([list(v) if isinstance(v, tuple) else v for v in value])
