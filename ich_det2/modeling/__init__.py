"""Models: importing this package registers its parts in Detectron2's registries."""

from .anchor_generator import ClusteredAnchorGenerator
from .backbone import TimmBackbone
from .classifier import ImageClassifier
from .classifier_networks import CLASSIFIER_REGISTRY
from .roi_heads import CostSensitiveRes5ROIHeads, CostSensitiveROIHeads
from .rpn import CostSensitiveRPN, CostSensitiveRPNHead
from .sampling import ANCHOR_SAMPLER_REGISTRY, AdaptiveRatioSampler, FixedRatioSampler

__all__ = [
    "ANCHOR_SAMPLER_REGISTRY",
    "CLASSIFIER_REGISTRY",
    "AdaptiveRatioSampler",
    "ClusteredAnchorGenerator",
    "CostSensitiveROIHeads",
    "CostSensitiveRPN",
    "CostSensitiveRPNHead",
    "CostSensitiveRes5ROIHeads",
    "FixedRatioSampler",
    "ImageClassifier",
    "TimmBackbone",
]
