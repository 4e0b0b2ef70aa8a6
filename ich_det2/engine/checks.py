"""The checks of a run, before anything is written."""

import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from ..data.datasets import check_images, register_ich_datasets
from ..data.mapper import IchDatasetMapper
from ..modeling.backbone.timm_backbone import pretrained_state_dict
from ..modeling.backbone.torchvision_weights import pretrained_checkpoint
from .anchors import fill_anchors, take_trained_anchors
from .checkpoint import LIBRARY_PREFIXES, TIMM_PREFIX, TORCHVISION_PREFIX
from .config import context_settings, first_line, is_classifier

logger = logging.getLogger(__name__)


def check_config(cfg: CfgNode, *, eval_only: bool, resume: bool, num_processes: int = 1) -> None:
    """Finds out, before anything is written, whether a run can work; completes the anchors.

    Data are read and their files' headers checked, the model is built once, weights are looked
    for. Anchors that the config leaves open are clustered from the training boxes.

    Args:
        cfg: of :func:`load_config`; its anchors are filled in.
        eval_only: only DATASETS.TEST is needed, and trained weights.
        resume: training goes on from OUTPUT_DIR if there is a checkpoint.
        num_processes: over which a batch is split.

    Raises:
        FileNotFoundError, ValueError: one sentence with the remedy.
    """
    resume = resume and (Path(cfg.OUTPUT_DIR) / "last_checkpoint").is_file()
    if cfg.SOLVER.IMS_PER_BATCH % num_processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, expected a multiple of the"
            f" {num_processes} processes."
        )
    register_ich_datasets(cfg.DATASETS.ICH_ROOT, cfg.DATASETS.ICH_CLASSES, **context_settings(cfg))
    splits = () if eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.VAL)
    patients: dict[str, str] = {}
    for name in dict.fromkeys((*splits, *cfg.DATASETS.TEST)):
        if name not in DatasetCatalog:
            raise ValueError(
                f"dataset '{name}' is not registered, expected one of"
                f" {sorted(n for n in DatasetCatalog.list() if n.startswith('ich_'))}."
            )
        dicts = DatasetCatalog.get(name)
        if name.startswith("ich_"):
            check_images(dicts)
            for patient in {d["patient_id"] for d in dicts}:
                if patients.setdefault(patient, name) != name:
                    logger.warning(
                        "Patient '%s' is in %s and in %s: the evaluation is too optimistic.",
                        patient,
                        patients[patient],
                        name,
                    )
    if not eval_only and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        logger.warning(
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS is True: no healthy slice is trained on."
        )
    IchDatasetMapper(cfg, is_train=not eval_only)
    if not eval_only:
        thaw_without_weights(cfg)
    if eval_only or resume:
        take_trained_anchors(cfg)
    else:
        fill_anchors(cfg)
    try:
        build_model(cfg)
    except (KeyError, AssertionError) as error:
        raise ValueError(first_line(error)) from error
    if not resume:
        if cfg.MODEL.WEIGHTS == f"{TORCHVISION_PREFIX}resnet50" and cfg.MODEL.RESNETS.STRIDE_IN_1X1:
            raise ValueError(
                f"MODEL.WEIGHTS is '{cfg.MODEL.WEIGHTS}', whose stride is in the 3x3 convolutions;"
                " set MODEL.RESNETS.STRIDE_IN_1X1 False, and MODEL.PIXEL_MEAN and PIXEL_STD to"
                " ImageNet's of RGB images (see tools/convert_weights.py --help)."
            )
        check_weights(cfg.MODEL.WEIGHTS, trained=eval_only)


def thaw_without_weights(cfg: CfgNode) -> None:
    """Lets a backbone without weights learn: frozen layers and norms are for loaded ones.

    Frozen batch norms that were never trained let a ResNet's features grow until they overflow.
    """
    frozen = cfg.MODEL.BACKBONE.FREEZE_AT > 0 or cfg.MODEL.RESNETS.NORM == "FrozenBN"
    if cfg.MODEL.WEIGHTS or not frozen or is_classifier(cfg):
        return
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.TIMM.FREEZE_BN = False
    cfg.MODEL.TORCHVISION.FREEZE_BN = False
    logger.warning(
        "MODEL.WEIGHTS is empty: training starts from random weights, so no layer and no batch norm"
        " of the backbone is frozen."
    )


def check_weights(weights: str, *, trained: bool) -> None:
    """Makes sure that ``MODEL.WEIGHTS`` can be had; downloads them into the cache if need be.

    Args:
        weights: path, URL, "detectron2://...", "timm://NAME", "torchvision://NAME", or "" for
            random weights.
        trained: the weights have to be those of a whole detector.

    Raises:
        ValueError: with the way to go on without.
    """
    if trained and (not weights or weights.startswith(LIBRARY_PREFIXES)):
        raise ValueError(
            f"--eval-only needs a trained model, but MODEL.WEIGHTS is '{weights}'; add"
            " MODEL.WEIGHTS OUTPUT_DIR/model_best.pth, or --resume for OUTPUT_DIR's last one."
        )
    if not weights:
        return
    try:
        if weights.startswith(TIMM_PREFIX):
            pretrained_state_dict(weights[len(TIMM_PREFIX) :])
            return
        if weights.startswith(TORCHVISION_PREFIX):
            pretrained_checkpoint(weights[len(TORCHVISION_PREFIX) :])
            return
        path = PathManager.get_local_path(weights)
        if not Path(path).is_file():
            raise FileNotFoundError("there is no such file")
    except Exception as error:  # a download raises whatever its transport raises
        way_out = (
            "give the path of a checkpoint"
            if trained
            else "give the path of a copy, or go on from random weights by MODEL.WEIGHTS ''"
        )
        raise ValueError(
            f"MODEL.WEIGHTS '{weights}' cannot be had ({first_line(error)}); {way_out}."
        ) from error
