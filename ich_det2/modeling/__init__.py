"""Models: importing this package registers its parts in Detectron2's registries."""

from . import backbone as _  # noqa: F401  only registration
from . import roi_heads as _  # noqa: F401  only registration
from .anchor_generator import ClusteredAnchorGenerator
from .rpn import CostSensitiveRPN, CostSensitiveRPNHead
from .sampling import ANCHOR_SAMPLER_REGISTRY, AdaptiveRatioSampler, FixedRatioSampler

__all__ = [
    "ANCHOR_SAMPLER_REGISTRY",
    "AdaptiveRatioSampler",
    "ClusteredAnchorGenerator",
    "CostSensitiveRPN",
    "CostSensitiveRPNHead",
    "FixedRatioSampler",
]
