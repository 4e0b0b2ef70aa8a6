"""The anchors of a config: clustered from the training boxes, or taken from a trained run."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import BoxMode

from ..anchors.clustering import (
    AnchorPairs,
    Anchors,
    anchor_recall,
    cluster_anchors,
    cluster_pairs,
)
from ..data.dicom import pixel_ratio, read_spacing
from ..modeling.anchor_generator import anchors_given
from .config import is_classifier, is_retinanet, is_segmenter
from .run_folder import trained_config

logger = logging.getLogger(__name__)


def needs_anchors(cfg: CfgNode) -> bool:
    """Whether the config's anchor generator waits for clustered anchors."""
    generator = cfg.MODEL.ANCHOR_GENERATOR
    given = anchors_given(generator.PAIRS) or (
        anchors_given(generator.SIZES) and anchors_given(generator.ASPECT_RATIOS)
    )
    clustered = generator.NAME == "ClusteredAnchorGenerator"
    return clustered and not given and not is_classifier(cfg) and not is_segmenter(cfg)


def fill_anchors(cfg: CfgNode) -> None:
    """Clusters the training boxes and writes the anchors into the config, if it has none.

    Raises:
        ValueError: if half of them are given, there is not a single training box, or the anchors
            cannot be dealt to the levels of the model.
    """
    if not needs_anchors(cfg):
        return
    generator = cfg.MODEL.ANCHOR_GENERATOR
    for given, other in (("SIZES", "ASPECT_RATIOS"), ("ASPECT_RATIOS", "SIZES")):
        if anchors_given(generator[given]):
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR.{given} is {generator[given]}, but {other} is open; give"
                " both, or leave both open, [[]], to have them clustered."
            )
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
    head = model.RETINANET if is_retinanet(cfg) else model.RPN
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
        (M, 2), network-input pixels, after the crop to the head, the resize of pixels that are not
        square, and that to the middle of ``INPUT.MIN_SIZE_TRAIN``. A box that the crop leaves
        nothing of is none.
    """
    boxes = []
    for name in datasets:
        for d in DatasetCatalog.get(name):
            if not d.get("annotations"):
                continue
            left, top, right, bottom = d.get("crop", (0, 0, d["width"], d["height"]))
            (height, _), ratio = input_size(cfg, d)
            scale = height / round((bottom - top) * ratio)
            for a in d["annotations"]:
                box = np.array([a["bbox"]], dtype=float)
                ((x0, y0, x1, y1),) = BoxMode.convert(box, a["bbox_mode"], BoxMode.XYXY_ABS)
                w, h = min(x1, right) - max(x0, left), min(y1, bottom) - max(y0, top)
                if w > 0 and h > 0:
                    boxes.append((w * scale, h * ratio * scale))
    return np.array(boxes).reshape(-1, 2)


def input_size(cfg: CfgNode, dataset_dict: dict) -> tuple[tuple[int, int], float]:
    """(H, W) of a slice at the network's input in training, as :func:`boxes_wh_of` takes it, and
    the height of its own pixels over their width."""
    path, ratio, sizes = dataset_dict["file_name"], 1.0, cfg.INPUT.MIN_SIZE_TRAIN
    if path.lower().endswith(".dcm"):  # the mapper makes the pixels square first
        ratio = pixel_ratio(read_spacing(path))
    whole = (0, 0, dataset_dict["width"], dataset_dict["height"])
    left, top, right, bottom = dataset_dict.get("crop", whole)
    short_edge = sizes if isinstance(sizes, int) else int(round(np.median(sizes)))
    size = ResizeShortestEdge.get_output_shape(
        round((bottom - top) * ratio), right - left, short_edge, cfg.INPUT.MAX_SIZE_TRAIN
    )
    return size, ratio


def take_trained_anchors(cfg: CfgNode, *folders: str | Path) -> None:
    """Fills open anchors with those a model was trained with: they are not in its checkpoint.

    Args:
        cfg: its anchors are filled in.
        folders: of training runs, the first that knows is taken; by default that of MODEL.WEIGHTS,
            then OUTPUT_DIR.

    Raises:
        ValueError: if none has a record of the anchors.
    """
    if not needs_anchors(cfg):
        return
    what = "anchors", "MODEL.ANCHOR_GENERATOR"
    trained = trained_config(cfg, folders, needs_anchors, *what).MODEL.ANCHOR_GENERATOR
    own = cfg.MODEL.ANCHOR_GENERATOR
    for key in ("CLUSTERS", "SIZES", "ASPECT_RATIOS", "PAIRS"):
        if key == "CLUSTERS" or not anchors_given(own[key]):
            own[key] = trained[key]
