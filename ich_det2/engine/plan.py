"""The plan of a segmentation network: made from the training set, or taken from a trained run."""

import logging
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..modeling.dynunet import plan_network
from .anchors import input_size
from .config import is_dynunet
from .run_folder import trained_config

logger = logging.getLogger(__name__)

_PLAN = ("KERNELS", "STRIDES", "FILTERS")


def needs_plan(cfg: CfgNode) -> bool:
    """Whether the config's segmentation network waits for a plan."""
    return is_dynunet(cfg) and not any(cfg.MODEL.DYNUNET[key] for key in _PLAN)


def fill_plan(cfg: CfgNode) -> None:
    """Plans the network and writes the plan into the config, if it has none.

    It is planned for the median size of the training slices at the network's input, where pixels
    are square.

    Raises:
        ValueError: if the slices are too small.
    """
    if not needs_plan(cfg):
        return
    slices = [d for name in cfg.DATASETS.TRAIN for d in DatasetCatalog.get(name)]
    sizes = np.median([input_size(cfg, d)[0] for d in slices], axis=0).round().astype(int).tolist()
    base = cfg.MODEL.DYNUNET.BASE_FILTERS
    plan = plan_network(sizes, (1.0, 1.0), base_filters=base, max_filters=16 * base)
    cfg.MODEL.DYNUNET.update(zip(_PLAN, plan))
    logger.info(
        "A network planned for slices of %d x %d pixels: strides %s, filters %s.",
        *(*sizes, plan.strides, plan.filters),
    )


def take_trained_plan(cfg: CfgNode, *folders: str | Path) -> None:
    """Fills in the plan that a model was trained with: a checkpoint holds none.

    Args:
        cfg: its plan is filled in, if it has none.
        folders: as of :func:`trained_config`.

    Raises:
        ValueError: if none has a record of the plan.
    """
    if needs_plan(cfg):
        what = "plan", "MODEL.DYNUNET"
        trained = trained_config(cfg, folders, needs_plan, *what).MODEL.DYNUNET
        cfg.MODEL.DYNUNET.update({key: trained[key] for key in _PLAN})
