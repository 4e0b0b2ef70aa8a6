"""One model folder of several trained runs."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.modeling import build_model

from ..engine.checkpoint import load_tensors
from ..engine.config import plain_settings
from ..engine.run_folder import RunFolder
from ..files import write_atomically
from .diagnoser import load_run

_META = "MODEL.META_ARCHITECTURE"
_NO_DETECTORS = (
    *("EnsembleRCNN", "ImageClassifier"),
    *("DynUNetSegmenter", "LevelSetSegmenter", "ThresholdSegmenter"),
)
_SAME = ("INPUT.", "DATASETS.ICH_CLASSES", "MODEL.PIXEL_")
# Of these, what only a training reads.
_NOT_SEEN = ("INPUT.AUG.", "INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "INPUT.RANDOM_FLIP")
_NO_MEMBER = ("MODEL.ENSEMBLE.", "MODEL.WEIGHTS", "MODEL.DEVICE")


def combine_runs(
    runs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    flip: bool = False,
    iou_threshold: float | None = None,
    threshold: float | None = None,
) -> Path:
    """Writes an ``EnsembleRCNN`` of the runs' best models (else their last) as a run of its own.

    Args:
        runs: OUTPUT_DIRs of trainings.
        output: a folder that holds no training.
        flip: each member also sees the slice mirrored.
        iou_threshold: from which on boxes of different members are fused; that of the first run's
            NMS if None, which says from where on two boxes are of one lesion.
        threshold: operating threshold; that of the first run's config if None.

    Returns:
        The written weights.

    Raises:
        FileNotFoundError, ValueError: one sentence, if a run is not whole or does not take the same
            input as the first, or output holds a training.
    """
    run = RunFolder(output)
    run.check_free()
    run.check_writable()
    configs, files = zip(*(load_run(folder, device="cpu") for folder in runs))
    settings = [plain_settings(cfg) for cfg in configs]
    first = settings[0]
    for folder, own in zip(runs, settings):
        if own[_META] in _NO_DETECTORS:
            raise ValueError(f"{folder}: is of a {own[_META]}, expected a detector's run.")
        for key, value in own.items():
            if key.startswith(_SAME) and not key.startswith(_NOT_SEEN) and value != first.get(key):
                raise ValueError(
                    f"{folder}: {key} is {value!r}, but {first.get(key)!r} in {runs[0]}; expected"
                    " runs that take the same input and know the same classes."
                )
    cfg = configs[0].clone()
    cfg.defrost()
    names = [k for k in first if k.startswith("MODEL.") and not k.startswith(_NO_MEMBER)]
    cfg.MODEL.ENSEMBLE.MEMBERS = [
        [x for k in names if k == _META or own[k] != first[k] for x in (k, own[k])]
        for own in settings
    ]
    if iou_threshold is None:
        head = "RETINANET" if first[_META] == "RetinaNet" else "ROI_HEADS"
        iou_threshold = cfg.MODEL[head].NMS_THRESH_TEST
    cfg.MODEL.ENSEMBLE.FLIP, cfg.MODEL.ENSEMBLE.IOU_THRESHOLD = flip, iou_threshold
    cfg.MODEL.META_ARCHITECTURE = "EnsembleRCNN"
    cfg.OUTPUT_DIR = str(output)
    if threshold is not None:
        cfg.TEST.DIAGNOSIS.OPERATING_THRESHOLD = threshold
    cfg.TEST.DIAGNOSIS.OPERATING_POINT.RULE = "fixed"
    build_model(cfg)  # refuses what is out of its range
    state = {
        f"members.{i}.{key}": value
        for i, file in enumerate(files)
        for key, value in load_tensors(file)["model"].items()
    }
    run.begin(cfg, RunFolder(runs[0]).read_record().get("data"))
    with write_atomically(run.final, "wb") as file:
        torch.save({"model": state}, file)
    return run.final
