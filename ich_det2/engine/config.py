"""From a command line to a config: read, with what follows from it filled in."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from ..config import add_ich_config

logger = logging.getLogger(__name__)


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
            raise ValueError(f"{config_file}: {first_line(error)}") from error
    try:
        cfg.merge_from_list(list(opts))
    except (KeyError, AssertionError, ValueError) as error:
        raise ValueError(f"command line, KEY VALUE pairs: {first_line(error)}") from error
    if cfg.MODEL.DEVICE != "cpu" and not torch.cuda.is_available():
        logger.warning(
            "MODEL.DEVICE is '%s', but there is no GPU: using the CPU.", cfg.MODEL.DEVICE
        )
        cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(cfg.DATASETS.ICH_CLASSES)
    return cfg


def is_classifier(cfg: CfgNode) -> bool:
    """Whether the model scores whole images, without boxes."""
    return cfg.MODEL.META_ARCHITECTURE == "ImageClassifier"


def context_settings(cfg: CfgNode) -> dict:
    """Which neighbours the mapper asks for, as arguments of :func:`register_ich_datasets`."""
    sequence = cfg.INPUT.SEQUENCE_SLICES
    return {"context": sequence or cfg.INPUT.CONTEXT_SLICES, "by_name": sequence > 0}


def first_line(error: BaseException) -> str:
    """First line of an error's text, as it reads within a sentence."""
    # str(KeyError) is a quoted repr.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0].rstrip(".")
