"""Models: importing this package registers its parts in Detectron2's registries."""

import importlib.util

if importlib.util.find_spec("detectron2") is not None:  # `modeling.cost` does without
    from . import weights as _  # noqa: F401  only registration
    from .anchor_generator import ClusteredAnchorGenerator
    from .autoencoder import AutoencoderAlexNetSVM
    from .backbone import TimmBackbone, TorchvisionBackbone
    from .classifier import ImageClassifier
    from .classifier_networks import CLASSIFIER_REGISTRY
    from .cnn3d import CNN3D
    from .diagnosis_rcnn import DiagnosisRCNN
    from .dynunet import DynUNetSegmenter
    from .ensemble import EnsembleRCNN
    from .glcm import GLCMNet
    from .inception_roi_heads import InceptionV3ROIHeads
    from .lesion_segmenter import LevelSetSegmenter, ThresholdSegmenter
    from .mask_head import KnownMaskHead
    from .radnet import RADNet
    from .rfcn_roi_heads import RFCNROIHeads
    from .roi_heads import (
        CostSensitiveCascadeROIHeads,
        CostSensitiveRes5ROIHeads,
        CostSensitiveROIHeads,
    )
    from .rpn import CostSensitiveRPN, CostSensitiveRPNHead
    from .sampling import ANCHOR_SAMPLER_REGISTRY, AdaptiveRatioSampler, FixedRatioSampler
    from .svm import SVM, AlexNetSVM

__all__ = [
    "ANCHOR_SAMPLER_REGISTRY",
    "CLASSIFIER_REGISTRY",
    "CNN3D",
    "SVM",
    "AdaptiveRatioSampler",
    "AlexNetSVM",
    "AutoencoderAlexNetSVM",
    "ClusteredAnchorGenerator",
    "CostSensitiveCascadeROIHeads",
    "CostSensitiveROIHeads",
    "CostSensitiveRPN",
    "CostSensitiveRPNHead",
    "CostSensitiveRes5ROIHeads",
    "DiagnosisRCNN",
    "DynUNetSegmenter",
    "EnsembleRCNN",
    "FixedRatioSampler",
    "GLCMNet",
    "ImageClassifier",
    "InceptionV3ROIHeads",
    "KnownMaskHead",
    "LevelSetSegmenter",
    "RADNet",
    "RFCNROIHeads",
    "ThresholdSegmenter",
    "TimmBackbone",
    "TorchvisionBackbone",
]
