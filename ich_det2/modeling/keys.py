"""Which part of a model reads a key of the config: a key that none reads has no effect.

A part that a user has registered under a name of his own is given the benefit of the doubt, and
one that derives from a part here reads what that reads.
"""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY

from .anchor_generator import ClusteredAnchorGenerator
from .backbone.timm_backbone import build_timm_backbone
from .roi_heads import (
    CostSensitiveCascadeROIHeads,
    CostSensitiveRes5ROIHeads,
    CostSensitiveROIHeads,
)
from .rpn import CostSensitiveRPN, CostSensitiveRPNHead

_COST_HEADS = (CostSensitiveROIHeads, CostSensitiveRes5ROIHeads, CostSensitiveCascadeROIHeads)
# Key or begin of keys: the key that names the part, its registry, and the parts that read it.
_READERS = {
    "MODEL.RPN.COST.": (
        "MODEL.PROPOSAL_GENERATOR.NAME", PROPOSAL_GENERATOR_REGISTRY, (CostSensitiveRPN,)
    ),
    "MODEL.RPN.SAMPLER.": (
        "MODEL.PROPOSAL_GENERATOR.NAME", PROPOSAL_GENERATOR_REGISTRY, (CostSensitiveRPN,)
    ),
    "MODEL.RPN.PRIOR_PROB": (
        "MODEL.RPN.HEAD_NAME", RPN_HEAD_REGISTRY, (CostSensitiveRPNHead,)
    ),
    "MODEL.ROI_HEADS.COST.": ("MODEL.ROI_HEADS.NAME", ROI_HEADS_REGISTRY, _COST_HEADS),
    "MODEL.ANCHOR_GENERATOR.PAIRS": (
        "MODEL.ANCHOR_GENERATOR.NAME", ANCHOR_GENERATOR_REGISTRY, (ClusteredAnchorGenerator,)
    ),
    "MODEL.ANCHOR_GENERATOR.CLUSTERS.": (
        "MODEL.ANCHOR_GENERATOR.NAME", ANCHOR_GENERATOR_REGISTRY, (ClusteredAnchorGenerator,)
    ),
    "MODEL.TIMM.NAME": ("MODEL.BACKBONE.NAME", BACKBONE_REGISTRY, (build_timm_backbone,)),
    "MODEL.TIMM.OUT_STRIDES": ("MODEL.BACKBONE.NAME", BACKBONE_REGISTRY, (build_timm_backbone,)),
}  # fmt: skip

_UNREAD = {
    "INPUT.CROP.ENABLED": "IchDatasetMapper does not crop; use INPUT.AUG.SHIFT and SCALE",
    "TEST.AUG.ENABLED": "IchTrainer tests each image once, without augmentation",
    "MODEL.MASK_ON": "IchDatasetMapper gives boxes and no masks",
    "MODEL.KEYPOINT_ON": "IchDatasetMapper gives boxes and no keypoints",
    "MODEL.LOAD_PROPOSALS": "IchDatasetMapper loads no proposals",
}
"""Detectron2's switches that no part of this package reads, and why."""


def check_read_keys(flat: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """Refuses a key that differs from its default and that no built part reads.

    Args:
        flat: the config's values by whole key ("MODEL.RPN.COST.ALPHA").
        defaults: those of a config without any setting.

    Raises:
        ValueError: naming the key, the part that the config has, and those that would read it.
    """
    for key, why in _UNREAD.items():
        if flat.get(key):
            raise ValueError(f"{key} is {flat[key]}, but nothing reads it: {why}; set it to False.")
    changed = [key for key, value in flat.items() if key in defaults and value != defaults[key]]
    unread = [(key, remedy) for key in changed if (remedy := _remedy(key, flat))]
    if unread:
        key, (who, remedy) = unread[0]
        rest = ", ".join(other for other, _ in unread[1:])
        raise ValueError(
            f"{key} is {flat[key]}, but {who} does not read it; {remedy}, or leave the key at"
            f" {defaults[key]}{f' (and so {rest})' if rest else ''}."
        )


def _remedy(key: str, flat: Mapping[str, object]) -> tuple[str, str] | None:
    """Who does not read a key, and what would; None where it is read."""
    meta = str(flat["MODEL.META_ARCHITECTURE"])
    stock = meta in ("GeneralizedRCNN", "RetinaNet", "ImageClassifier")
    if key.startswith("MODEL.CLASSIFIER.") and meta in ("GeneralizedRCNN", "RetinaNet"):
        return f"MODEL.META_ARCHITECTURE {meta}", "ImageClassifier does: use that"
    for begin, (part, registry, readers) in _READERS.items():
        if not (key == begin or begin.endswith(".") and key.startswith(begin)):
            continue
        built, names = str(flat[part]), " or ".join(reader.__name__ for reader in readers)
        of_any_detector = "ANCHOR" in part or "BACKBONE" in part
        if not (meta == "GeneralizedRCNN" or of_any_detector and meta == "RetinaNet"):
            if not stock:
                return None
            return (
                f"MODEL.META_ARCHITECTURE {meta}",
                f"{names} of GeneralizedRCNN does: use that",
            )
        if built not in registry:  # an error of its own, when the model is built
            return None
        found = registry.get(built)
        if any(_is(found, reader) for reader in readers):
            return None
        if not found.__module__.startswith(("detectron2.", "ich_det2.")):
            return None
        return f"{part} {built}", f"{names} does: set {part} to that"
    return None


def _is(found, reader) -> bool:
    classes = isinstance(found, type) and isinstance(reader, type)
    return found is reader or classes and issubclass(found, reader)
