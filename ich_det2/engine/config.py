"""From a command line to a config: read, with what follows from it filled in; and two configs
compared."""

import difflib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet

from ..config import add_ich_config
from ..modeling import DiagnosisRCNN, DynUNetSegmenter, ImageClassifier
from ..modeling.lesion_segmenter import LesionSegmenter

logger = logging.getLogger(__name__)

# Where and how fast a model runs, not what it is or answers.
_PLACE = frozenset(
    "OUTPUT_DIR MODEL.DEVICE DATALOADER.NUM_WORKERS INPUT.CACHE_DIR TEST.BATCH_SIZE CUDNN_BENCHMARK"
    " VIS_PERIOD VERSION".split()
)
# What a training may be continued with, its record unchanged.
_CONTINUABLE = _PLACE | frozenset(
    "MODEL.WEIGHTS DATASETS.ICH_ROOT DATASETS.TEST SOLVER.MAX_ITER SOLVER.STEPS"
    " SOLVER.BASE_LR SOLVER.BASE_LR_END SOLVER.GAMMA SOLVER.NUM_DECAYS SOLVER.RESCALE_INTERVAL"
    " SOLVER.WARMUP_ITERS SOLVER.WARMUP_FACTOR SOLVER.WARMUP_METHOD SOLVER.MOMENTUM"
    " SOLVER.CHECKPOINT_PERIOD SOLVER.IMS_PER_BATCH SOLVER.REFERENCE_WORLD_SIZE TEST.EVAL_PERIOD"
    " TEST.EXPECTED_RESULTS TEST.DIAGNOSIS.BEST_METRIC TEST.DIAGNOSIS.PATIENCE"
    " TEST.DIAGNOSIS.RESAMPLES TEST.DIAGNOSIS.THRESHOLDS SOLVER.CLIP_GRADIENTS.ENABLED"
    " SOLVER.CLIP_GRADIENTS.CLIP_TYPE SOLVER.CLIP_GRADIENTS.CLIP_VALUE"
    " SOLVER.CLIP_GRADIENTS.NORM_TYPE".split()
)
_ANSWERS = re.compile(r"(INPUT|MODEL|TEST)\.|DATASETS\.ICH_CLASSES$")
# Of these, what only a training reads, or how answers are judged.
_NO_ANSWERS = re.compile(
    r"INPUT\.(AUG|CROP)\.|INPUT\.(RANDOM_FLIP|MASK_FORMAT)|MODEL\.WEIGHTS|MODEL\.ANCHOR_GENERATOR\.CLUSTERS"
    r"|.*_TRAIN(ING|_SAMPLING)?$|.*FREEZE|.*\.(COST|SAMPLER)\.|.*LOSS|.*(BATCH_SIZE_PER_IMAGE"
    r"|POSITIVE_FRACTION|IOU_THRESHOLDS|IOUS|PRIOR_PROB|POS_WEIGHT|BN_MOMENTUM|DROPOUT)$"
    r"|TEST\.(EVAL_PERIOD|EXPECTED_RESULTS|DIAGNOSIS(?!\.SMOOTHING(_IOU|_BOXES)?$))"
)
_UNSET = -1


def load_config(config_file: str | Path, opts: Sequence[str] = ()) -> CfgNode:
    """Reads a config file and ``KEY VALUE`` pairs on top of all defaults.

    Without a GPU, ``MODEL.DEVICE`` becomes "cpu". The model's number of classes, unless it is
    given, is that of ``DATASETS.ICH_CLASSES``.

    Args:
        config_file: YAML; "" for the defaults alone.
        opts: alternating keys and values.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if a key does not exist or a value does not fit.
    """
    cfg = get_cfg()
    add_ich_config(cfg)
    stock = {key: flatten(cfg)[key] for key in _CLASS_COUNTS}
    cfg.merge_from_list([x for key in _CLASS_COUNTS for x in (key, _UNSET)])
    if config_file:
        if not Path(config_file).is_file():
            raise FileNotFoundError(f"--config-file '{config_file}' is no file; see configs/.")
        try:
            # Never YAML that could run code.
            cfg.merge_from_file(str(config_file), allow_unsafe=False)
        except _NO_CONFIG as error:
            raise ValueError(f"{config_file}: {first_line(error)}.") from error
    _merge_pairs(cfg, list(opts))
    if cfg.MODEL.DEVICE != "cpu" and not torch.cuda.is_available():
        logger.warning(
            "MODEL.DEVICE is '%s', but there is no GPU: using the CPU.", cfg.MODEL.DEVICE
        )
        cfg.MODEL.DEVICE = "cpu"
    _count_classes(cfg, opts[::2], stock)
    return cfg


_NO_CONFIG = (KeyError, AssertionError, ValueError, AttributeError, TypeError, yaml.YAMLError)
_CLASS_COUNTS = ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES")


def _merge_pairs(cfg: CfgNode, opts: Sequence) -> None:
    where, known = "command line, KEY VALUE pairs:", flatten(cfg)
    if len(opts) % 2:
        raise ValueError(f"{where} '{opts[-1]}' has no partner, expected a key and its value.")
    for key, value in zip(opts[::2], opts[1::2]):
        if key not in known:
            like = difflib.get_close_matches(str(key), known, 1)
            raise ValueError(
                f"{where} there is no key {key}" + (f"; like it is {like[0]}." if like else ".")
            )
        try:
            cfg.merge_from_list([key, value])
        except _NO_CONFIG as error:
            kind = type(known[key]).__name__
            raise ValueError(
                f"{where} {key} is {value!r}, expected {kind}, such as {known[key]!r}."
            ) from error


def _count_classes(cfg: CfgNode, given: Sequence[str], stock: Mapping[str, int]) -> None:
    """Fills in the numbers of classes that neither a person nor a record has given."""
    number = len(cfg.DATASETS.ICH_CLASSES)
    for name in cfg.DATASETS.TRAIN:
        if not str(name).startswith("ich_") and name in MetadataCatalog.list():
            number = len(MetadataCatalog.get(name).get("thing_classes", cfg.DATASETS.ICH_CLASSES))
    read = class_count_key(cfg)
    for key in _CLASS_COUNTS:
        value = flatten(cfg)[key]
        # 1 is what Base-ICH.yaml says, for those who read it without this function.
        if key in given or value not in (_UNSET, 1):
            continue
        if key == read and value == 1 != number:
            logger.warning("%s becomes %d, the number of classes of the data.", key, number)
        number_here = number if key == read or "ROI_HEADS" in key else stock[key]
        cfg.merge_from_list([key, number_here])


def class_count_key(cfg: CfgNode) -> str:
    """The key of the number of classes that the model is built with; "" for a classifier."""
    if is_classifier(cfg):
        return ""
    return _CLASS_COUNTS[is_retinanet(cfg)]


def is_classifier(cfg: CfgNode) -> bool:
    """Whether the model scores whole images, without boxes."""
    return _derives(cfg, ImageClassifier)


def is_segmenter(cfg: CfgNode) -> bool:
    """Whether the model finds the pixels of bleeds, without anchors and backbone."""
    return _derives(cfg, (LesionSegmenter, DynUNetSegmenter))


def is_dynunet(cfg: CfgNode) -> bool:
    """Whether the model learns from masks alone, by a network that is planned from the data."""
    return _derives(cfg, DynUNetSegmenter)


def is_retinanet(cfg: CfgNode) -> bool:
    """Whether the model is Detectron2's RetinaNet, which has no second stage."""
    return _derives(cfg, RetinaNet)


def learns_from_labels(cfg: CfgNode) -> bool:
    """Whether slices that are known to bleed, but have no boxes, can be trained on.

    Detectron2's detectors would take such a slice as background; an architecture of a user's own
    is left to know.
    """
    if _derives(cfg, (GeneralizedRCNN, RetinaNet)):
        return _derives(cfg, DiagnosisRCNN)
    return True


def _derives(cfg: CfgNode, architecture: type | tuple[type, ...]) -> bool:
    name = cfg.MODEL.META_ARCHITECTURE
    found = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    return isinstance(found, type) and issubclass(found, architecture)


def context_settings(cfg: CfgNode) -> dict:
    """Which neighbours the mapper asks for, as arguments of :func:`find_slices`."""
    sequence, scan = cfg.INPUT.SEQUENCE_SLICES, cfg.INPUT.SCAN_SLICES
    by_name = sequence > 0 or scan > 0
    return {"context": sequence or cfg.INPUT.CONTEXT_SLICES, "scan": scan, "by_name": by_name}


def dataset_settings(cfg: CfgNode) -> dict:
    """What the mapper asks of a dataset, as arguments of :func:`register_ich_datasets`."""
    crop, masks = cfg.INPUT.HEAD_CROP, reads_masks(cfg)
    return {**context_settings(cfg), "head_crop": crop, "masks": masks}


def reads_masks(cfg: CfgNode) -> bool:
    """Whether the masks of a data set are read, for training or evaluation."""
    return cfg.INPUT.MASK_FORMAT == "bitmask"


def has_all_masks(dicts: Sequence[dict]) -> bool:
    """Whether each box of a data set has a mask, as COCO's evaluation of masks asks for."""
    return all(a.get("segmentation") for d in dicts for a in d["annotations"])


def first_line(error: BaseException) -> str:
    """First line of an error's text, as it reads within a sentence."""
    # str(KeyError) is a quoted repr.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# ---- two configs -----------------------------------------------------------------------------


def flatten(tree: Mapping, prefix: str = "") -> dict:
    """Nested mappings as one, its keys joined by dots."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def plain_settings(cfg: CfgNode) -> dict:
    """A config as key -> plain value, but for where it runs."""
    settings = {key: value for key, value in flatten(cfg).items() if key not in _PLACE}
    return json.loads(json.dumps(settings))  # tuples become lists, as in a file


Differences = dict[str, tuple[object, object]]


def differences(before: CfgNode | Mapping, now: CfgNode | Mapping) -> Differences:
    """Keys that both configs have, with their two values where these differ.

    Args:
        before, now: configs, or what :func:`plain_settings` made of them.
    """
    before, now = (plain_settings(c) if isinstance(c, CfgNode) else c for c in (before, now))
    shared = (key for key in now if key in before)
    return {key: (before[key], now[key]) for key in shared if before[key] != now[key]}


def not_continuable(differs: Differences) -> Differences:
    """Of differences those that a training cannot be continued with."""
    return {key: values for key, values in differs.items() if key not in _CONTINUABLE}


def change_answers(differs: Differences) -> Differences:
    """Of differences those that may change what a trained model answers."""
    return {
        key: values
        for key, values in differs.items()
        if _ANSWERS.match(key) and not _NO_ANSWERS.match(key)
    }
