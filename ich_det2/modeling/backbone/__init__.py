"""Feature networks beyond Detectron2's own."""

from .hybrid3d_backbone import Hybrid3DBackbone, build_hybrid3d_backbone
from .timm_backbone import TimmBackbone, build_timm_backbone, build_timm_fpn_backbone
from .torchvision_backbone import (
    TorchvisionBackbone,
    build_inception_v3_backbone,
    build_vgg16_backbone,
)

__all__ = [
    "Hybrid3DBackbone",
    "TimmBackbone",
    "TorchvisionBackbone",
    "build_hybrid3d_backbone",
    "build_inception_v3_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "build_vgg16_backbone",
]
