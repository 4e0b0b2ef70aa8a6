"""From a command line to a config that is known to run: read, completed, checked."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from ..anchors.clustering import (
    AnchorPairs,
    Anchors,
    anchor_recall,
    cluster_anchors,
    cluster_pairs,
)
from ..config import add_ich_config
from ..data.datasets import check_images, register_ich_datasets
from ..data.dicom import read_spacing
from ..data.mapper import IchDatasetMapper, pixel_ratio
from ..modeling.anchor_generator import anchors_given
from ..modeling.backbone.timm_backbone import pretrained_state_dict
from ..modeling.backbone.torchvision_weights import pretrained_checkpoint
from .checkpoint import LIBRARY_PREFIXES, TIMM_PREFIX, TORCHVISION_PREFIX, IchCheckpointer

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def log_to_terminal() -> Iterator[None]:
    """Shows this package's messages before Detectron2's logger is set up, which writes files."""
    package, handler = logging.getLogger("ich_det2"), logging.StreamHandler()
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def load_config(config_file: str | Path, opts: Sequence[str] = ()) -> CfgNode:
    """Reads a config file and ``KEY VALUE`` pairs on top of all defaults.

    Without a GPU, ``MODEL.DEVICE`` becomes "cpu".

    Args:
        config_file: YAML; "" for the defaults alone.
        opts: alternating keys and values.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if a key does not exist or a value does not fit.
    """
    cfg = get_cfg()
    add_ich_config(cfg)
    if config_file:
        if not Path(config_file).is_file():
            raise FileNotFoundError(f"--config-file '{config_file}' is no file; see configs/.")
        try:
            # Never YAML that could run code.
            cfg.merge_from_file(str(config_file), allow_unsafe=False)
        except (KeyError, AssertionError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{config_file}: {_message(error)}") from error
    try:
        cfg.merge_from_list(list(opts))
    except (KeyError, AssertionError, ValueError) as error:
        raise ValueError(f"command line, KEY VALUE pairs: {_message(error)}") from error
    if cfg.MODEL.DEVICE != "cpu" and not torch.cuda.is_available():
        logger.warning(
            "MODEL.DEVICE is '%s', but there is no GPU: using the CPU.", cfg.MODEL.DEVICE
        )
        cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(cfg.DATASETS.ICH_CLASSES)
    return cfg


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
        raise ValueError(_message(error)) from error
    if not resume:
        if cfg.MODEL.WEIGHTS == f"{TORCHVISION_PREFIX}resnet50" and cfg.MODEL.RESNETS.STRIDE_IN_1X1:
            raise ValueError(
                f"MODEL.WEIGHTS is '{cfg.MODEL.WEIGHTS}', whose stride is in the 3x3 convolutions;"
                " set MODEL.RESNETS.STRIDE_IN_1X1 False, and MODEL.PIXEL_MEAN and PIXEL_STD to"
                " ImageNet's of RGB images (see tools/convert_weights.py --help)."
            )
        check_weights(cfg.MODEL.WEIGHTS, trained=eval_only)


def is_classifier(cfg: CfgNode) -> bool:
    """Whether the model scores whole images, without boxes."""
    return cfg.MODEL.META_ARCHITECTURE == "ImageClassifier"


def context_settings(cfg: CfgNode) -> dict:
    """Which neighbours the mapper asks for, as arguments of :func:`register_ich_datasets`."""
    sequence = cfg.INPUT.SEQUENCE_SLICES
    return {"context": sequence or cfg.INPUT.CONTEXT_SLICES, "by_name": sequence > 0}


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


def needs_anchors(cfg: CfgNode) -> bool:
    """Whether the config's anchor generator waits for clustered anchors."""
    generator = cfg.MODEL.ANCHOR_GENERATOR
    given = anchors_given(generator.PAIRS) or (
        anchors_given(generator.SIZES) and anchors_given(generator.ASPECT_RATIOS)
    )
    return generator.NAME == "ClusteredAnchorGenerator" and not given and not is_classifier(cfg)


def fill_anchors(cfg: CfgNode) -> None:
    """Clusters the training boxes and writes the anchors into the config, if it has none.

    Raises:
        ValueError: if there is not a single training box, or the anchors cannot be dealt to the
            levels of the model.
    """
    if not needs_anchors(cfg):
        return
    boxes_wh = training_boxes_wh(cfg)
    anchors = clustered_anchors(cfg, boxes_wh)
    settings = anchor_settings(cfg, anchors)
    cfg.MODEL.ANCHOR_GENERATOR.update(settings)
    logger.info(
        "Anchors clustered from %d training boxes: %s; best possible recall %.3f at IoU 0.5,"
        " %.3f at 0.7.",
        len(boxes_wh),
        ", ".join(f"{key} {values}" for key, values in settings.items()),
        anchor_recall(boxes_wh, anchors, 0.5),
        anchor_recall(boxes_wh, anchors, 0.7),
    )


def clustered_anchors(cfg: CfgNode, boxes_wh: np.ndarray) -> Anchors | AnchorPairs:
    """Clusters boxes as ``MODEL.ANCHOR_GENERATOR.CLUSTERS`` says.

    Args:
        boxes_wh: (M, 2), network-input pixels.

    Raises:
        ValueError: if a setting does not fit.
    """
    clusters = cfg.MODEL.ANCHOR_GENERATOR.CLUSTERS
    if clusters.METHOD == "joint":
        return cluster_pairs(boxes_wh, clusters.NUM_SIZES * clusters.NUM_RATIOS)
    if clusters.METHOD != "separate":
        raise ValueError(
            f"MODEL.ANCHOR_GENERATOR.CLUSTERS.METHOD is '{clusters.METHOD}', expected 'separate' or"
            " 'joint'."
        )
    return cluster_anchors(
        boxes_wh, clusters.NUM_SIZES, clusters.NUM_RATIOS, ratio_space=clusters.RATIO_SPACE
    )


def anchor_settings(cfg: CfgNode, anchors: Anchors | AnchorPairs) -> dict[str, list]:
    """Anchors as the values of their keys under ``MODEL.ANCHOR_GENERATOR``.

    They are rounded, so that the dumped config.yaml holds exactly what the model is built with.
    The levels of the model, taken to go from fine to coarse, get the sizes or pairs from small to
    large, equally many each; aspect ratios are shared.

    Raises:
        ValueError: if their number is no multiple of the number of levels.
    """
    if isinstance(anchors, AnchorPairs):
        key, values = "PAIRS", [[round(w, 2), round(h, 2)] for w, h in anchors.pairs]
    else:
        key, values = "SIZES", [round(size, 2) for size in anchors.sizes]
    levels = anchor_levels(cfg)
    per_level, rest = divmod(len(values), len(levels))
    if rest:
        raise ValueError(
            f"clustering gave {len(values)} {key} for MODEL.ANCHOR_GENERATOR, expected a multiple"
            f" of the model's {len(levels)} levels {list(levels)}; set"
            " MODEL.ANCHOR_GENERATOR.CLUSTERS.NUM_SIZES to such a multiple (fewer distinct boxes"
            f" give fewer), or give {key} by hand."
        )
    dealt = [values[i : i + per_level] for i in range(0, len(values), per_level)]
    if key == "PAIRS":
        return {key: dealt}
    return {key: dealt, "ASPECT_RATIOS": [[round(ratio, 3) for ratio in anchors.aspect_ratios]]}


def anchor_levels(cfg: CfgNode) -> Sequence[str]:
    """Names of the feature maps that get anchors."""
    model = cfg.MODEL
    head = model.RETINANET if model.META_ARCHITECTURE == "RetinaNet" else model.RPN
    return head.IN_FEATURES


def training_boxes_wh(cfg: CfgNode) -> np.ndarray:
    """Widths and heights of the training boxes at the network's input: of DATASETS.TRAIN.

    Returns:
        (M, 2), as of :func:`boxes_wh_of`.

    Raises:
        ValueError: if there is not a single training box.
    """
    boxes_wh = boxes_wh_of(cfg, cfg.DATASETS.TRAIN)
    if len(boxes_wh) == 0:
        raise ValueError(
            f"DATASETS.TRAIN {list(cfg.DATASETS.TRAIN)} has no box, so there is nothing to learn"
            " from and no anchor to cluster; check Annotations/ and ImageSets/."
        )
    return boxes_wh


def boxes_wh_of(cfg: CfgNode, datasets: Sequence[str]) -> np.ndarray:
    """Widths and heights of the boxes of datasets at the network's input in training.

    Returns:
        (M, 2), network-input pixels, after the resize of pixels that are not square, and that to
        the middle of ``INPUT.MIN_SIZE_TRAIN``.
    """
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    short_edge = sizes if isinstance(sizes, int) else int(round(np.median(sizes)))
    boxes = []
    for name in datasets:
        for d in DatasetCatalog.get(name):
            if not d["annotations"]:
                continue
            path, ratio = d["file_name"], 1.0
            if path.lower().endswith(".dcm"):  # the mapper makes the pixels square first
                ratio = pixel_ratio(path, read_spacing(path))
            height = round(d["height"] * ratio)
            resized, _ = ResizeShortestEdge.get_output_shape(
                height, d["width"], short_edge, cfg.INPUT.MAX_SIZE_TRAIN
            )
            scale = resized / height
            for x0, y0, x1, y1 in (a["bbox"] for a in d["annotations"]):
                boxes.append(((x1 - x0) * scale, (y1 - y0) * ratio * scale))
    return np.array(boxes).reshape(-1, 2)


def take_trained_anchors(cfg: CfgNode) -> None:
    """Fills open anchors with those a model was trained with: they are not in its checkpoint.

    Raises:
        ValueError: if no config.yaml stands beside MODEL.WEIGHTS or in OUTPUT_DIR.
    """
    if not needs_anchors(cfg):
        return
    folders = [Path(cfg.MODEL.WEIGHTS).parent, Path(cfg.OUTPUT_DIR)]
    for path in (folder / "config.yaml" for folder in folders):
        if path.is_file():
            trained = load_config(path)
            if not needs_anchors(trained):
                for key in ("CLUSTERS", "SIZES", "ASPECT_RATIOS", "PAIRS"):
                    cfg.MODEL.ANCHOR_GENERATOR[key] = trained.MODEL.ANCHOR_GENERATOR[key]
                logger.info("Anchors taken from %s.", path)
                return
    raise ValueError(
        "the config leaves the anchors of MODEL.ANCHOR_GENERATOR open, and there is no config.yaml"
        f" with the trained anchors beside MODEL.WEIGHTS '{cfg.MODEL.WEIGHTS}' or in"
        f" '{cfg.OUTPUT_DIR}'; use --config-file with the config.yaml of the training run."
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
            f"MODEL.WEIGHTS '{weights}' cannot be had ({_message(error)}); {way_out}."
        ) from error


def load_trained(cfg: CfgNode, weights: str | Path):
    """Builds a model and loads a trained checkpoint.

    Returns:
        The model in evaluation mode on ``cfg.MODEL.DEVICE``.

    Raises:
        ValueError: if the file is no checkpoint.
    """
    model = build_model(cfg)
    IchCheckpointer(model).load(str(weights))
    return model.eval()


def _message(error: BaseException) -> str:
    """First line of an error's text, as it reads within a sentence."""
    # str(KeyError) is a quoted repr.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0].rstrip(".")
