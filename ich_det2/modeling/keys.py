"""Which part of a model or training reads a key of the config: what none reads is refused.

A part that derives from one here reads what that reads. A part of a user's own, registered from
neither Detectron2 nor this package, may read anything.
"""

import re
from collections.abc import Callable, Iterator, Mapping

from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    RetinaNet,
    build_resnet_backbone,
)
from detectron2.modeling.backbone.fpn import (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)
from detectron2.modeling.proposal_generator.rpn import RPN, RPN_HEAD_REGISTRY
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from fvcore.common.registry import Registry

from .anchor_generator import ClusteredAnchorGenerator
from .backbone import (
    build_hybrid3d_backbone,
    build_inception_v3_backbone,
    build_timm_backbone,
    build_timm_fpn_backbone,
)
from .classifier import ImageClassifier
from .classifier_networks import CLASSIFIER_REGISTRY
from .diagnosis_rcnn import DiagnosisRCNN
from .dynunet import DynUNetSegmenter
from .ensemble import EnsembleRCNN
from .inception_roi_heads import InceptionV3ROIHeads
from .lesion_segmenter import LesionSegmenter, LevelSetSegmenter
from .rfcn_roi_heads import RFCNROIHeads
from .roi_heads import CostSensitiveMixin, CostSensitiveROIHeads
from .rpn import CostSensitiveRPN, CostSensitiveRPNHead
from .sampling import ANCHOR_SAMPLER_REGISTRY, AdaptiveRatioSampler, FixedRatioSampler

Config = Mapping[str, object]
"""Values by whole key, as in ``{"MODEL.RPN.COST.ALPHA": 1.0}``."""

_META = "MODEL.META_ARCHITECTURE"
_BACKBONE = "MODEL.BACKBONE.NAME"
_ANCHORS = "MODEL.ANCHOR_GENERATOR.NAME"
_RPN = "MODEL.PROPOSAL_GENERATOR.NAME"
_RPN_HEAD = "MODEL.RPN.HEAD_NAME"
_SAMPLER = "MODEL.RPN.SAMPLER.NAME"
_ROI_HEADS = "MODEL.ROI_HEADS.NAME"
_CLASSIFIER = "MODEL.CLASSIFIER.NAME"

# Key that names a part: its registry, and the architectures that build it.
_PARTS: dict[str, tuple[Registry, tuple[type, ...]]] = {
    _META: (META_ARCH_REGISTRY, (object,)),
    _BACKBONE: (BACKBONE_REGISTRY, (GeneralizedRCNN, RetinaNet)),
    _ANCHORS: (ANCHOR_GENERATOR_REGISTRY, (GeneralizedRCNN, RetinaNet)),
    _RPN: (PROPOSAL_GENERATOR_REGISTRY, (GeneralizedRCNN,)),
    _RPN_HEAD: (RPN_HEAD_REGISTRY, (GeneralizedRCNN,)),
    _SAMPLER: (ANCHOR_SAMPLER_REGISTRY, (GeneralizedRCNN,)),
    _ROI_HEADS: (ROI_HEADS_REGISTRY, (GeneralizedRCNN,)),
    _CLASSIFIER: (CLASSIFIER_REGISTRY, (ImageClassifier,)),
}


def _of(*parts, but=()) -> Callable[[object], bool]:
    """Whether a registered part is one of these, or derives from one of them."""
    classes = tuple(part for part in parts if isinstance(part, type))

    def reads(part) -> bool:
        derived = isinstance(part, type) and issubclass(part, classes)
        return part in parts or derived and not issubclass(part, but)

    return reads


_RESNETS = (build_resnet_backbone, build_resnet_fpn_backbone, build_retinanet_resnet_fpn_backbone)
# Key, or begin of keys, that says what a part does: the parts of which one has to be there. Where
# several fit, all count.
_READERS: dict[str, dict[str, Callable[[object], bool]]] = {
    "MODEL.RPN.COST.": {_RPN: _of(CostSensitiveRPN)},
    "MODEL.RPN.SAMPLER.": {_RPN: _of(CostSensitiveRPN)},
    "MODEL.RPN.SAMPLER.MAX_RATIO": {_SAMPLER: _of(AdaptiveRatioSampler)},
    "MODEL.RPN.POSITIVE_FRACTION": {
        _SAMPLER: _of(FixedRatioSampler),
        _RPN: _of(RPN, but=CostSensitiveRPN),
    },
    "MODEL.RPN.PRIOR_PROB": {_RPN_HEAD: _of(CostSensitiveRPNHead)},
    "MODEL.ROI_HEADS.COST.": {_ROI_HEADS: _of(CostSensitiveMixin, RFCNROIHeads)},
    **{
        f"MODEL.ROI_HEADS.{key}_TEST": {
            _ROI_HEADS: _of(CostSensitiveMixin, RFCNROIHeads, but=CascadeROIHeads)
        }
        for key in ("SOFT_NMS_SIGMA", "VOTE_THRESH")
    },
    "MODEL.ROI_HEADS.REFINE_": {_ROI_HEADS: _of(CostSensitiveROIHeads)},
    "MODEL.MASK_ON": {_ROI_HEADS: _of(StandardROIHeads, Res5ROIHeads)},
    "MODEL.ROI_MASK_HEAD.": {_ROI_HEADS: _of(StandardROIHeads, Res5ROIHeads)},
    "MODEL.ROI_BOX_CASCADE_HEAD.": {_ROI_HEADS: _of(CascadeROIHeads)},
    "MODEL.ANCHOR_GENERATOR.CLUSTERS.": {_ANCHORS: _of(ClusteredAnchorGenerator)},
    "MODEL.ANCHOR_GENERATOR.PAIRS": {_ANCHORS: _of(ClusteredAnchorGenerator)},
    "MODEL.TIMM.": {
        _BACKBONE: _of(build_timm_backbone, build_timm_fpn_backbone, build_hybrid3d_backbone)
    },
    "MODEL.TORCHVISION.": {
        _BACKBONE: _of(build_inception_v3_backbone),
        _ROI_HEADS: _of(InceptionV3ROIHeads),
    },
    "MODEL.RESNETS.": {
        _BACKBONE: _of(*_RESNETS),
        _ROI_HEADS: _of(Res5ROIHeads, but=InceptionV3ROIHeads),
    },
    "MODEL.FPN.": {_BACKBONE: _of(*_RESNETS[1:], build_timm_fpn_backbone)},
    "MODEL.BACKBONE.": {_META: _of(GeneralizedRCNN, RetinaNet)},
    "MODEL.RETINANET.": {_META: _of(RetinaNet)},
    "MODEL.IMAGE_HEAD.": {_META: _of(DiagnosisRCNN)},
    "MODEL.ENSEMBLE.": {_META: _of(EnsembleRCNN)},
    "MODEL.CLASSIFIER.": {_META: _of(ImageClassifier)},
    "MODEL.SEGMENTER.": {_META: _of(LesionSegmenter)},
    "MODEL.SEGMENTER.CENTERS": {_META: _of(LevelSetSegmenter)},
    "MODEL.SEGMENTER.ITERATIONS": {_META: _of(LevelSetSegmenter)},
    "MODEL.SEGMENTER.AREA": {_META: _of(LevelSetSegmenter)},
    "MODEL.DYNUNET.": {_META: _of(DynUNetSegmenter)},
    "INPUT.SCAN_SLICES": {_CLASSIFIER: lambda part: getattr(part, "takes_scan", False)},
    "INPUT.SEQUENCE_SLICES": {_CLASSIFIER: lambda part: getattr(part, "takes_sequence", False)},
}

_POSITIVE_SHARE = "DATALOADER.POSITIVE_SHARE"
_BOXES_ALONE = "the data have boxes alone"
# Keys, or begins of keys, that nothing reads when a model is trained, and why.
_NOT_READ = {
    "INPUT.CROP.": "IchDatasetMapper does not crop at random; use INPUT.AUG.SHIFT and"
    " INPUT.AUG.SCALE, or INPUT.HEAD_CROP",
    "INPUT.FORMAT": "the channels are those of INPUT.WINDOWS, in their order",
    "TEST.AUG.": "each image is tested once, as it is",
    "TEST.KEYPOINT_OKS_SIGMAS": _BOXES_ALONE,
    "TEST.EXPECTED_RESULTS": "it is compared by --eval-only alone",
    "MODEL.LOAD_PROPOSALS": "proposals are the RPN's",
    "DATASETS.PROPOSAL_FILES_": "proposals are the RPN's",
    "DATASETS.PRECOMPUTED_PROPOSAL_": "proposals are the RPN's",
    "MODEL.SEM_SEG_HEAD.": _BOXES_ALONE,
    "MODEL.PANOPTIC_FPN.": _BOXES_ALONE,
}
# Of these, what is of an evaluation too.
_OF_TESTS = re.compile(r"TEST\.AUG\.|MODEL\.LOAD_PROPOSALS$")
# Switches of heads that only a data set of a user's own can train.
_OWN_DATA = ("MODEL.KEYPOINT_ON",)

# Detectron2's parts that the data here cannot train.
_NO_PARTS = {
    _META: ("EnsembleRCNN", "PanopticFPN", "ProposalNetwork", "SemanticSegmentor"),
    _RPN: ("PrecomputedProposals", "RRPN"),
    _ROI_HEADS: ("RROIHeads",),
    _ANCHORS: ("RotatedAnchorGenerator",),
}
_BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
# Keys whose values are names, of which Detectron2 refuses others not before it needs them.
_NAMES = {
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "DATALOADER.SAMPLER_TRAIN": (
        *("TrainingSampler", "RepeatFactorTrainingSampler", "PositiveShareSampler"),
    ),
    "SOLVER.LR_SCHEDULER_NAME": (
        *("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    ),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
}

THAWED = {
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.TIMM.FREEZE_BN": False,
    "MODEL.TORCHVISION.FREEZE_BN": False,
}
"""What a training from random weights sets, whatever the backbone."""


def check_read_keys(config: Config, defaults: Config, *, training: bool = True) -> None:
    """Refuses a key that differs from its default and that nothing would read.

    Args:
        config: of the run.
        defaults: of a config without any setting. Keys that only one of both has are left out.
        training: without it only what an evaluation would read counts.

    Raises:
        ValueError: naming the key, and the parts that would read it or why there are none.
    """
    given = [
        key
        for key, value in config.items()
        if key in defaults and _as_lists(value) != _as_lists(defaults[key])
    ]
    for key in given if training else filter(_OF_TESTS.match, given):
        for why in () if _is_foreign_model(config, key) else _fitting(_NOT_READ, key):
            raise ValueError(
                f"{key} is {config[key]!r}, but nothing reads it: {why}; leave it at"
                f" {defaults[key]!r}."
            )
    if not training:
        return
    _check_values(config)
    if _POSITIVE_SHARE in given and config["DATALOADER.SAMPLER_TRAIN"] != "PositiveShareSampler":
        raise ValueError(
            f"{_POSITIVE_SHARE} is {config[_POSITIVE_SHARE]}, but DATALOADER.SAMPLER_TRAIN"
            f" {config['DATALOADER.SAMPLER_TRAIN']} does not read it; PositiveShareSampler does:"
            f" set that, or leave {_POSITIVE_SHARE} at {defaults[_POSITIVE_SHARE]}."
        )
    unread = [key for key in given if not is_read(config, key)]
    if unread:
        rest = f" (and so {', '.join(unread[1:])})" if unread[1:] else ""
        raise ValueError(
            f"{_who_reads(config, unread[0])}, or leave {unread[0]} at"
            f" {defaults[unread[0]]!r}{rest}."
        )


def is_read(config: Config, key: str) -> bool:
    """Whether a part that the model is built of reads a key, or may read it."""
    random = not config["MODEL.WEIGHTS"] and _is_built(config, _BACKBONE)
    if _is_foreign_model(config, key) or random and THAWED.get(key) == config[key]:
        return True
    return all(
        any(_may_read(config, part, reads) for part, reads in readers.items())
        for readers in _fitting(_READERS, key)
    )


def _check_values(config: Config) -> None:
    for key, names in _NAMES.items():
        if config[key] not in names:
            raise ValueError(f"{key} is {config[key]!r}, expected {' or '.join(names)}.")
    for key, names in _NO_PARTS.items():
        if config[key] in names:
            raise ValueError(f"{key} is {config[key]!r}, which images and boxes cannot train.")
    sizes = config["INPUT.MIN_SIZE_TRAIN"]
    if config["INPUT.MIN_SIZE_TRAIN_SAMPLING"] == "range" and len(sizes) != 2:
        raise ValueError(
            f"INPUT.MIN_SIZE_TRAIN is {sizes}, expected the two ends of the range that"
            " INPUT.MIN_SIZE_TRAIN_SAMPLING asks for."
        )
    ours = [name for name in config["DATASETS.TRAIN"] if str(name).startswith("ich_")]
    for key in _OWN_DATA:
        if config[key] and ours and not _is_foreign_model(config, key):
            raise ValueError(f"{key} is True, but '{ours[0]}' has boxes alone; set it to False.")


def _as_lists(value):
    """As YAML gives it, which has no tuples."""
    return [*map(_as_lists, value)] if isinstance(value, (list, tuple)) else value


def _fitting(table: Mapping, key: str) -> Iterator:
    """The values of a table of keys and of their begins, which end with "." or "_"."""
    for begin, value in table.items():
        if key == begin or begin.endswith((".", "_")) and key.startswith(begin):
            yield value


def _is_foreign_model(config: Config, key: str) -> bool:
    return key.startswith("MODEL.") and _is_foreign(_found(config, _META))


def _found(config: Config, part: str):
    """What is registered for a part; None where nothing is."""
    registry, name = _PARTS[part][0], config[part]
    return registry.get(name) if name in registry else None


def _is_foreign(found) -> bool:
    home = getattr(found, "__module__", "").partition(".")[0]
    return found is not None and home not in ("detectron2", "ich_det2")


def _is_built(config: Config, part: str) -> bool:
    built = _of(*_PARTS[part][1])(_found(config, _META))
    if part == _SAMPLER:
        return built and _may_read(config, _RPN, _of(CostSensitiveRPN))
    return built


def _may_read(config: Config, part: str, reads: Callable[[object], bool]) -> bool:
    found = _found(config, part)
    # A name that is not registered is refused where the part is built.
    known = found is not None and not _is_foreign(found)
    return _is_built(config, part) and (not known or reads(found))


def _who_reads(config: Config, key: str) -> str:
    has, wanted = {}, {}
    for readers in _fitting(_READERS, key):
        for part, reads in readers.items():
            name = part if _is_built(config, part) else _META
            has[f"{name} {config[name]}"] = None
            names = sorted(name for name, found in _PARTS[part][0] if reads(found))
            wanted[f"{' or '.join(names)} does ({part})"] = None
    return (
        f"{key} is {config[key]!r}, but {' and '.join(has)} does not read it; {', '.join(wanted)}:"
        " set that"
    )
