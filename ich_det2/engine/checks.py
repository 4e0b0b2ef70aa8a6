"""The checks of a run, before anything is written."""

import difflib
import itertools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads.mask_head import ROI_MASK_HEAD_REGISTRY
from detectron2.utils.file_io import PathManager

from .. import zoo
from ..data.datasets import check_images, fingerprint, register_ich_datasets
from ..data.mapper import IchDatasetMapper
from ..data.samplers import PositiveShareSampler, image_labels
from ..evaluation.evaluator import metric_names
from ..modeling import KnownMaskHead
from ..modeling.keys import THAWED, check_read_keys
from ..modeling.weights import LIBRARY_PREFIXES
from .anchors import fill_anchors, take_trained_anchors
from .checkpoint import IchCheckpointer
from .config import (
    class_count_key,
    dataset_settings,
    differences,
    first_line,
    flatten,
    has_all_masks,
    is_classifier,
    is_dynunet,
    is_retinanet,
    is_segmenter,
    load_config,
)
from .launched import Launched
from .operating_point import check_operating_point
from .partitions import ROLES, overlaps
from .plan import fill_plan, take_trained_plan
from .run_folder import Fingerprints, RunFolder, in_words

logger = logging.getLogger(__name__)

CHANNELS = 3
"""Of the mapper's images."""

_INF = math.inf
# Key: the least and the greatest value of numbers, or of each in a list, which may not be empty.
_RANGES: dict[str, tuple[float, float]] = {
    "SOLVER.MAX_ITER": (1, _INF),
    "SOLVER.IMS_PER_BATCH": (1, _INF),
    "SOLVER.BASE_LR": (0, _INF),
    "SOLVER.CHECKPOINT_PERIOD": (1, _INF),
    "SOLVER.WARMUP_ITERS": (0, _INF),
    "DATALOADER.NUM_WORKERS": (0, _INF),
    "INPUT.MIN_SIZE_TRAIN": (1, _INF),
    "INPUT.MAX_SIZE_TRAIN": (1, _INF),
    "INPUT.MIN_SIZE_TEST": (0, _INF),
    "INPUT.MAX_SIZE_TEST": (1, _INF),
    "INPUT.SCAN_SLICES": (0, _INF),
    "INPUT.AUG.SHIFT": (0, 1),
    "INPUT.AUG.SCALE": (0, _INF),
    "INPUT.AUG.ROTATE": (0, 180),
    "INPUT.AUG.JITTER": (0, 1),
    "INPUT.AUG.EXPAND": (1, _INF),
    "INPUT.AUG.EXPAND_SHIFT": (0, 1),
    "INPUT.AUG.EXPAND_SCALE": (0, _INF),
    "MODEL.PIXEL_MEAN": (-_INF, _INF),
    "MODEL.PIXEL_STD": (0, _INF),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": (1, _INF),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": (1, _INF),
    "MODEL.CLASSIFIER.INPUT_SIZE": (1, _INF),
    "MODEL.DYNUNET.BASE_FILTERS": (1, _INF),
    "MODEL.DYNUNET.MIN_PIXELS": (1, _INF),
    "TEST.EVAL_PERIOD": (0, _INF),
    "TEST.BATCH_SIZE": (1, _INF),
    "TEST.DIAGNOSIS.THRESHOLDS": (0, 1),
    "TEST.DIAGNOSIS.OPERATING_THRESHOLD": (0, 1),
    "TEST.DIAGNOSIS.RESAMPLES": (1, _INF),
    "TEST.DIAGNOSIS.PATIENCE": (0, _INF),
}
# Of these, what must be more than its least value.
_POSITIVE = {"SOLVER.BASE_LR", "MODEL.PIXEL_STD", "TEST.DIAGNOSIS.OPERATING_THRESHOLD"}


def check_config(cfg: CfgNode, *, eval_only: bool, resume: bool, num_processes: int = 1) -> None:
    """Finds out, before anything is written, whether a run can work; completes the config.

    Values, data and their files' headers are checked, the model is built once, weights are looked
    for. Anchors that the config leaves open are clustered from the training boxes, or taken from
    the trained run; so is the plan of a segmentation network. An evaluation of the last checkpoint
    gets it as ``MODEL.WEIGHTS``.

    Args:
        cfg: of :func:`load_config`; it is completed.
        eval_only: only DATASETS.TEST is needed, and trained weights.
        resume: the training in OUTPUT_DIR goes on, or its last checkpoint is evaluated, if there
            is one.
        num_processes: over which a batch is split.

    Raises:
        FileNotFoundError, ValueError: one sentence with the remedy.
    """
    check_values(cfg)
    run = RunFolder(cfg.OUTPUT_DIR)
    run.check_writable()
    checkpoint = run.checkpoint() if resume else None
    if eval_only and checkpoint is not None:
        cfg.MODEL.WEIGHTS = str(checkpoint)
    if eval_only and cfg.MODEL.WEIGHTS.startswith(zoo.PREFIX):
        cfg.MODEL.WEIGHTS = str(zoo.weights(cfg.MODEL.WEIGHTS))  # beside it is its record
    continues = checkpoint is not None and not eval_only
    if not eval_only:
        _check_training(cfg, num_processes)
    trained = RunFolder.beside(cfg.MODEL.WEIGHTS) if eval_only else run
    if continues or eval_only:
        if trained.config.is_file() and not trained.read_config().MODEL.WEIGHTS and _is_frozen(cfg):
            _thaw(cfg)
    if continues:
        take_trained_anchors(cfg, run.path)
        take_trained_plan(cfg, run.path)
        run.check_continues(cfg)
    read = _check_data(cfg, eval_only)
    data = {name: fingerprint(dicts) for name, dicts in read.items()}
    if continues:
        run.check_same_data(data)
    _check_read(cfg, trained if continues or eval_only else None, training=not eval_only)
    if not eval_only:
        _check_best_metric(cfg, read)
    IchDatasetMapper(cfg, is_train=not eval_only)
    if eval_only:
        take_trained_anchors(cfg)
        take_trained_plan(cfg)
    elif not continues:
        thaw_without_weights(cfg)
        fill_anchors(cfg)
        fill_plan(cfg)
    try:
        model = build_model(cfg)
    except (KeyError, AssertionError) as error:
        raise ValueError(f"{first_line(error)}.") from error
    if getattr(model, "needs_fit", False) and not eval_only:
        _check_labels(cfg)
    if continues:
        check_fits(model, checkpoint)
        return
    if (
        cfg.MODEL.WEIGHTS.partition("?")[0] == "torchvision://resnet50"
        and cfg.MODEL.RESNETS.STRIDE_IN_1X1
    ):
        raise ValueError(
            f"MODEL.WEIGHTS is '{cfg.MODEL.WEIGHTS}', whose stride is in the 3x3 convolutions;"
            " set MODEL.RESNETS.STRIDE_IN_1X1 False, and MODEL.PIXEL_MEAN and PIXEL_STD to"
            " ImageNet's of RGB images (see tools/convert_weights.py --help)."
        )
    check_weights(cfg.MODEL.WEIGHTS, trained=eval_only)
    if cfg.MODEL.WEIGHTS:
        check_fits(model, cfg.MODEL.WEIGHTS, whole=eval_only)
    if eval_only:
        _place_evaluation(cfg, run, trained, data)


def _check_read(cfg: CfgNode, trained: RunFolder | None, *, training: bool) -> None:
    """Refuses keys that nothing reads, but for what a model was trained with before."""
    flat, defaults = flatten(cfg), flatten(load_config("", ["MODEL.DEVICE", "cpu"]))
    if trained is not None and trained.config.is_file():
        new = differences(trained.read_config(), cfg)
        defaults |= {key: value for key, value in flat.items() if key not in new}
    check_read_keys(flat, defaults, training=training)


def _place_evaluation(cfg: CfgNode, run: RunFolder, trained: RunFolder, data: Fingerprints) -> None:
    if differs := trained.answers_differ(cfg, data):
        logger.warning("A what-if: the model was trained with %s.", in_words(differs))
    place = run.place_of(cfg, data)
    if place is not run:
        logger.warning("The results are written to %s.", place.path)
        cfg.OUTPUT_DIR = str(place.path)


def check_values(cfg: CfgNode) -> None:
    """Values that Detectron2 takes, but that a run would fail by, or ignore.

    Raises:
        ValueError: naming the key, what it is and what is expected.
    """
    flat = flatten(cfg)
    for key, (least, most) in _RANGES.items():
        value, strict = flat[key], key in _POSITIVE
        several = isinstance(value, (list, tuple))
        numbers = value if several else [value]
        good = all(
            _is_number(n) and least <= n <= most and (n > least or not strict) for n in numbers
        )
        if not good or not numbers:
            ends = [
                f"above {least:g}" if strict else f"of at least {least:g}" if least > -_INF else ""
            ]
            ends += [f"at most {most:g}"] if most < _INF else []
            words = " and ".join(filter(None, ends))
            kind = "one number or more" if several else "a number"
            raise ValueError(f"{key} is {value!r}, expected {kind} {words}".rstrip() + ".")
    reach = cfg.INPUT.CONTEXT_SLICES
    channels = 2 * reach + 1 if reach > 0 else CHANNELS
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(cfg.MODEL[key]) != channels:
            raise ValueError(
                f"MODEL.{key} has {len(cfg.MODEL[key])} values {list(cfg.MODEL[key])}, expected"
                f" {channels}: images have {channels} channels, with INPUT.CONTEXT_SLICES {reach},"
                " whatever INPUT.WINDOWS is."
            )
    for window in cfg.INPUT.WINDOWS:
        pair = isinstance(window, (list, tuple)) and len(window) == 2
        if not (pair and all(map(_is_number, window))):
            raise ValueError(
                f"INPUT.WINDOWS is {cfg.INPUT.WINDOWS}, expected pairs of numbers [level, width]."
            )
    names = cfg.DATASETS.ICH_CLASSES
    if (
        not names
        or not all(isinstance(n, str) and n for n in names)
        or len(set(names)) < len(names)
    ):
        raise ValueError(f"DATASETS.ICH_CLASSES is {names}, expected different names, one or more.")
    if not cfg.OUTPUT_DIR:
        raise ValueError("OUTPUT_DIR is empty, expected a folder to write to.")
    for role in ROLES:
        sets = cfg.DATASETS[role]
        if not all(isinstance(name, str) for name in sets) or len(set(sets)) < len(sets):
            raise ValueError(f"DATASETS.{role} is {sets}, expected names of data sets, each once.")
    check_operating_point(cfg)


def _is_number(value) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def check_processes(
    num_gpus: int, num_machines: int, machine_rank: int, launched: Launched | None = None
) -> None:
    """The number of processes that a command line asks for, or that a launcher has started.

    Raises:
        ValueError: if it cannot be had.
    """
    if launched is not None:
        if (num_gpus, num_machines, machine_rank) != (1, 1, 0):
            raise ValueError(
                f"--num-gpus is {num_gpus}, --num-machines {num_machines}, --machine-rank"
                f" {machine_rank}, but {launched.by} has started {launched.world_size} processes;"
                " leave these out."
            )
        launched.check()
        return
    if num_gpus < 1 or num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--num-gpus is {num_gpus}, --num-machines {num_machines}, --machine-rank"
            f" {machine_rank}; expected at least one process on one machine, and a rank below the"
            " number of machines (MODEL.DEVICE cpu goes without a GPU)."
        )
    if torch.cuda.is_available() and num_gpus > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus is {num_gpus}, but there are {torch.cuda.device_count()}; give as many at"
            " most (CUDA_VISIBLE_DEVICES '' runs that many processes on the CPU)."
        )


def _check_training(cfg: CfgNode, num_processes: int) -> None:
    for role in ("TRAIN", "VAL"):
        if not cfg.DATASETS[role]:
            raise ValueError(f"DATASETS.{role} is empty, expected e.g. ('ich_{role.lower()}',).")
    if cfg.SOLVER.IMS_PER_BATCH % num_processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, expected a multiple of the"
            f" {num_processes} processes."
        )
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        raise ValueError("SOLVER.AMP.ENABLED is True, which needs a GPU; set it to False.")
    if cfg.TEST.DIAGNOSIS.PATIENCE and not cfg.TEST.EVAL_PERIOD:
        raise ValueError(
            f"TEST.DIAGNOSIS.PATIENCE is {cfg.TEST.DIAGNOSIS.PATIENCE}, but TEST.EVAL_PERIOD 0"
            " validates after the last iteration only; set a period, or PATIENCE 0."
        )
    if (asks := _asks_for_masks(cfg)) and cfg.INPUT.MASK_FORMAT != "bitmask":
        raise ValueError(
            f"{asks} with INPUT.MASK_FORMAT '{cfg.INPUT.MASK_FORMAT}', expected 'bitmask': masks of"
            " slices are pixels."
        )
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        logger.warning(
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS is True: no healthy slice is trained on."
        )
    part = "RETINANET" if is_retinanet(cfg) else "ROI_HEADS"
    least = cfg.MODEL[part].SCORE_THRESH_TEST
    if least > 0.01 and not is_classifier(cfg):
        logger.warning(
            "MODEL.%s.SCORE_THRESH_TEST is %s: boxes that score less are dropped, and the curves of"
            " ROC and FROC end there; the configs here have 0.001.",
            *(part, least),
        )


def _check_data(cfg: CfgNode, eval_only: bool) -> dict[str, list[dict]]:
    """Data sets are there and fit the model, their images can be read; says who is in two roles.

    Returns:
        Dataset dicts by name of the data set.
    """
    register_ich_datasets(cfg.DATASETS.ICH_ROOT, cfg.DATASETS.ICH_CLASSES, **dataset_settings(cfg))
    roles = ("TEST",) if eval_only else ROLES
    if eval_only and not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty, expected the data set to evaluate on.")
    known, read = DatasetCatalog.list(), {}
    for name in dict.fromkeys(name for role in roles for name in cfg.DATASETS[role]):
        if name not in known:
            ours = sorted(n for n in known if n.startswith("ich_"))
            raise ValueError(f"dataset '{name}' is not registered, expected one of {ours}.")
        read[name] = DatasetCatalog.get(name)
        check_images(read[name])
        _check_classes(cfg, name)
    if not eval_only:
        learnt = [d for name in cfg.DATASETS.TRAIN for d in read[name]]
        if _asks_for_masks(cfg):
            _check_masks(cfg, learnt)
        if cfg.DATALOADER.SAMPLER_TRAIN == PositiveShareSampler.__name__:
            settings = cfg.DATALOADER.POSITIVE_SHARE, cfg.SOLVER.IMS_PER_BATCH
            PositiveShareSampler(image_labels(learnt), *settings, seed=0)
    if cfg.TEST.DIAGNOSIS.SMOOTHING:
        scored = (cfg.DATASETS[role] for role in roles if role != "TRAIN")
        for name in dict.fromkeys(itertools.chain(*scored)):
            _check_places(name, read[name])
    for first, other, shared in overlaps(cfg, roles, read.__getitem__):
        patient = min(shared)
        logger.warning(
            "DATASETS.%s and DATASETS.%s share patients, %d of them, e.g. '%s' is in %s and in %s:"
            " the evaluation is too optimistic.",
            *(first, other, len(shared), patient, *shared[patient]),
        )
    return read


def _check_classes(cfg: CfgNode, name: str) -> None:
    key = class_count_key(cfg)
    classes = MetadataCatalog.get(name).get("thing_classes")
    if key and classes is not None and flatten(cfg)[key] != len(classes):
        whose = " of DATASETS.ICH_CLASSES" if name.startswith("ich_") else ""
        raise ValueError(
            f"{key} is {flatten(cfg)[key]}, but data set '{name}' has {len(classes)} classes"
            f" {list(classes)}{whose}; give as many, or leave {key} out."
        )


def _asks_for_masks(cfg: CfgNode) -> str:
    """Which setting learns from masks, in words; empty if none does."""
    if is_dynunet(cfg):
        return f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}"
    return "MODEL.MASK_ON is True" if cfg.MODEL.MASK_ON else ""


def _check_masks(cfg: CfgNode, dicts: Sequence[dict]) -> None:
    known = [bool(a.get("segmentation")) for d in dicts for a in d["annotations"]]
    names = ", ".join(cfg.DATASETS.TRAIN)
    if not any(known):
        without = "train a detector of boxes" if is_dynunet(cfg) else "set MODEL.MASK_ON False"
        raise ValueError(
            f"{_asks_for_masks(cfg)}, but no box of {names} has a mask; add"
            f" SegmentationObject/ or SegmentationClass/ to the tree, or {without}."
        )
    if all(known) or not cfg.MODEL.MASK_ON:  # others leave slices out, and say so
        return
    head, unknown = cfg.MODEL.ROI_MASK_HEAD.NAME, known.count(False)
    if head in ROI_MASK_HEAD_REGISTRY and not issubclass(
        ROI_MASK_HEAD_REGISTRY.get(head), KnownMaskHead
    ):
        raise ValueError(
            f"{unknown} of {len(known)} boxes of {names} have no mask, which MODEL.ROI_MASK_HEAD"
            f".NAME {head} would take for empty ones; set {KnownMaskHead.__name__}."
        )
    logger.warning(
        "%d of %d boxes of %s have no mask; they teach no mask.", unknown, len(known), names
    )


def _check_places(name: str, dicts: Sequence[dict]) -> None:
    unknown = [d["file_name"] for d in dicts if "position_mm" not in d]
    if len(unknown) == len(dicts):
        raise ValueError(
            f"TEST.DIAGNOSIS.SMOOTHING is set, but data set '{name}' does not say where in its"
            f" series a slice lies, e.g. {unknown[0]}; DICOM has Image Position (Patient)"
            " (0020,0032), for PNG and JPEG add the columns series and position_mm to patients.csv,"
            " or set TEST.DIAGNOSIS.SMOOTHING []."
        )
    if unknown:
        logger.warning(
            "%s: the place of %d of %d slices is not known, e.g. of %s: TEST.DIAGNOSIS.SMOOTHING"
            " leaves their scores as they are.",
            *(name, len(unknown), len(dicts), unknown[0]),
        )


def _check_labels(cfg: CfgNode) -> None:
    dicts = itertools.chain(*map(DatasetCatalog.get, cfg.DATASETS.TRAIN))
    labels = image_labels(dicts)
    if len(set(labels)) < 2:
        raise ValueError(
            f"DATASETS.TRAIN {', '.join(cfg.DATASETS.TRAIN)}: the {len(labels)} slices are all of"
            f" label {labels[0]}, but {cfg.MODEL.CLASSIFIER.NAME} is fitted to slices with and"
            " without hemorrhage."
        )


def _check_best_metric(cfg: CfgNode, read: dict[str, list[dict]]) -> None:
    metric, sets = cfg.TEST.DIAGNOSIS.BEST_METRIC, cfg.DATASETS.VAL
    names = []
    for name in sets:
        annotations = [a for d in read[name] for a in d["annotations"]]
        metrics = metric_names(
            None if is_classifier(cfg) else _classes_of(cfg, name),
            masks=cfg.MODEL.MASK_ON and any(a.get("segmentation") for a in annotations),
            segm=cfg.MODEL.MASK_ON and has_all_masks(read[name]),
        )
        # As DefaultTrainer.test names the results of several data sets.
        names += [f"{name}/{metric}" if len(sets) > 1 else metric for metric in metrics]
    if metric not in names:
        close = ", ".join(difflib.get_close_matches(metric, names, 3, 0))
        raise ValueError(
            f"TEST.DIAGNOSIS.BEST_METRIC is '{metric}', which validation on {', '.join(sets)} does"
            f" not give; expected a metric such as {close}."
        )


def _classes_of(cfg: CfgNode, name: str) -> Sequence[str]:
    return MetadataCatalog.get(name).get("thing_classes", cfg.DATASETS.ICH_CLASSES)


# ---- weights ---------------------------------------------------------------------------------


def thaw_without_weights(cfg: CfgNode) -> None:
    """Lets a backbone without weights learn: frozen layers and norms are for loaded ones.

    Frozen batch norms that were never trained let a ResNet's features grow until they overflow.
    """
    if cfg.MODEL.WEIGHTS or not _is_frozen(cfg):
        return
    _thaw(cfg)
    logger.warning(
        "MODEL.WEIGHTS is empty: training starts from random weights, so no layer and no batch norm"
        " of the backbone is frozen."
    )


def _is_frozen(cfg: CfgNode) -> bool:
    frozen = cfg.MODEL.BACKBONE.FREEZE_AT > 0 or cfg.MODEL.RESNETS.NORM == "FrozenBN"
    return frozen and not is_classifier(cfg) and not is_segmenter(cfg)  # which have no backbone


def _thaw(cfg: CfgNode) -> None:
    cfg.merge_from_list([x for setting in THAWED.items() for x in setting])


class _Loader(IchCheckpointer):
    """Notes what does not fit in place of logging it."""

    def _log_incompatible_keys(self, incompatible) -> None:
        self.incompatible = incompatible


def check_fits(model, weights: str | Path, *, whole: bool = True) -> None:
    """Whether weights are a model's.

    Args:
        model: as the config builds it; the weights are loaded into it.
        weights: what ``MODEL.WEIGHTS`` takes; of a library's, the checkpointer checks the network.
        whole: a tensor that is missing or of another shape is an error; without it, other shapes
            are warned of, as a fine-tuning starts them at random.

    Raises:
        ValueError: naming a tensor.
    """
    loader = _Loader(model)
    loader.load(str(weights))
    shapes, missing = loader.incompatible.incorrect_shapes, loader.incompatible.missing_keys
    if not shapes and not (missing and whole):
        return
    if shapes:
        name, there, here = shapes[0]
        what = f"'{name}' is sized {tuple(there)}, in the config's model {tuple(here)}"
    else:
        what = f"'{missing[0]}' is missing"
    if whole:
        raise ValueError(
            f"{weights}: is of another model than the config ({what}, {len(shapes) + len(missing)}"
            " tensors in all); give the network, classes and anchors that it was trained with, as"
            " in the config.yaml of its training run."
        )
    logger.warning(
        "%s: %d tensors are of another shape (%s) and start at random.", weights, len(shapes), what
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
    url = urlparse(weights)
    if url.query not in ("", "matching_heuristics=True"):
        raise ValueError(
            f"MODEL.WEIGHTS is '{weights}', expected behind '?' nothing but"
            " matching_heuristics=True, which finds tensors by the ends of their names."
        )
    try:
        path = PathManager.get_local_path(url._replace(query="").geturl())
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
