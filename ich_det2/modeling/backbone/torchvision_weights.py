"""torchvision's classification weights under the names of the detectors here."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision

# Names in torchvision -> names in a detector, by regular expression; the first that fits counts.
# "" drops what a detector has no place for. ResNet50 gets the names of Detectron2's own ImageNet
# weights, which its checkpointer finds by their ends: res5 in the head of C4, or within the FPN.
_RENAME = {
    "vgg16": {
        r"features\.": "backbone.features.",
        r"classifier\.0\.": "roi_heads.box_head.fc1.",
        r"classifier\.3\.": "roi_heads.box_head.fc2.",
        r"classifier\.6\.": "",
    },
    "inception_v3": {
        r"(AuxLogits|fc)\.": "",
        r"Mixed_7": "roi_heads.res5.Mixed_7",
        r"(Conv2d_|Mixed_)": r"backbone.features.\1",
    },
    "resnet50": {
        r"conv1\.": "stem.conv1.",
        r"bn1\.": "stem.conv1.norm.",
        r"layer1\.": "res2.",
        r"layer2\.": "res3.",
        r"layer3\.": "res4.",
        r"layer4\.": "res5.",
        r"fc\.": "",
    },
}
NETWORKS = tuple(_RENAME)

# Grey values 0..255 as the weights know them. Inception V3's are Google's: torchvision takes
# images by ImageNet's statistics, but turns them back by transform_input to (x - 0.5) / 0.5.
_IMAGENET = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])  # RGB
PIXEL_STATISTICS = {
    "vgg16": _IMAGENET,
    "inception_v3": ([127.5] * 3, [127.5] * 3),
    "resnet50": _IMAGENET,
}
"""Network -> MODEL.PIXEL_MEAN, MODEL.PIXEL_STD."""


def convert(network: str, state: Mapping[str, torch.Tensor]) -> dict:
    """A classifier's state dict as a checkpoint for ``MODEL.WEIGHTS``.

    Args:
        network: name in torchvision, one of NETWORKS.
        state: state dict of torchvision's model, for any number of classes.

    Returns:
        "model": tensors by their names in a detector; "matching_heuristics": whether these are
        only the ends of names there; "__author__".

    Raises:
        ValueError: if torchvision has no such network here, or the tensors are not its own.
    """
    if network not in NETWORKS:
        raise ValueError(f"the network is '{network}', expected one of {', '.join(NETWORKS)}")
    with torch.device("meta"):
        kwargs = {"init_weights": False} if network == "inception_v3" else {}
        expected = torchvision.models.get_model(network, weights=None, **kwargs).state_dict()
    model = {}
    for key, like in expected.items():
        name = _renamed(network, key)
        # Counts of batches are of use to no norm here, and some files lack them.
        if not name or key.endswith("num_batches_tracked"):
            continue
        shape = getattr(state.get(key), "shape", None)
        if shape != like.shape:
            found = "is missing" if shape is None else f"is sized {tuple(shape)}"
            raise ValueError(
                f"these are not the weights of torchvision's {network}: '{key}' {found}, expected"
                f" {tuple(like.shape)}."
            )
        model[name] = state[key]
    foreign = sorted(key for key in state if key not in expected)
    if foreign:
        raise ValueError(
            f"these are not the weights of torchvision's {network}, which has no '{foreign[0]}'"
            f" ({len(foreign)} such names)."
        )
    return {
        "model": model,
        "__author__": "torchvision",
        "matching_heuristics": network == "resnet50",
    }


def _renamed(network: str, key: str) -> str:
    for pattern, name in _RENAME[network].items():
        if re.match(pattern, key):
            if not name:
                return ""
            key = re.sub(f"^{pattern}", name, key)
            break
    if network == "resnet50":  # norms belong to their convolutions there
        key = re.sub(r"\.bn(\d)\.", r".conv\1.norm.", key)
        key = key.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return key


def library_file(network: str) -> Path:
    """Where torchvision keeps the weights that it has downloaded."""
    url = torchvision.models.get_model_weights(network).DEFAULT.url if network in NETWORKS else ""
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[-1])


def pretrained_checkpoint(network: str) -> dict:
    """torchvision's ImageNet weights of a network, downloaded, as :func:`convert` gives them.

    Raises:
        ValueError: if there is no such network here, or the weights cannot be had.
    """
    if network not in NETWORKS:
        raise ValueError(f"the network is '{network}', expected one of {', '.join(NETWORKS)}")
    weights = torchvision.models.get_model_weights(network).DEFAULT
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # a download raises whatever its transport raises
        raise ValueError(f"{weights.url} could not be fetched ({error})") from error
    return convert(network, state)
