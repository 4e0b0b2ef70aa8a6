"""A key that no built part reads is refused; a part of a user's own is not."""

import itertools
from pathlib import Path

import hydra
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    StandardROIHeads,
    build_model,
)

from ich_det2.engine.config import flatten, load_config
from ich_det2.experiments.experiment import build_cells
from ich_det2.modeling import CLASSIFIER_REGISTRY, CostSensitiveRPN
from ich_det2.modeling.backbone import build_timm_backbone
from ich_det2.modeling.keys import check_read_keys

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = [p for p in sorted(CONFIGS.rglob("*.yaml")) if "frcnn" in p.stem or "class" in p.stem]
DEFAULTS = flatten(load_config(""))


def check(config, *opts):
    check_read_keys(flatten(load_config(CONFIGS / config, list(map(str, opts)))), DEFAULTS)


def refusal(config, *opts):
    with pytest.raises(ValueError, match=r"^[^\n]+\.$") as error:
        check(config, *opts)
    return str(error.value)


@pytest.mark.parametrize("config", SHIPPED, ids=lambda p: p.stem)
def test_each_config_is_read_whole_and_so_is_what_it_is_dumped_as(config, tmp_path):
    check(config)
    dumped = tmp_path / "config.yaml"
    dumped.write_text(load_config(config).dump())
    check(dumped)


def test_each_cell_of_each_experiment_is_read_whole():
    folder, composed = CONFIGS / "experiments", []
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        figures = ("figure2", "figure3", "figure4", "systems")
        for figure, hardware in itertools.product(figures, ("cpu", "gpu", "tiny")):
            opts = [f"hardware={hardware}", "data=phantom", "seeds=[0]", f"configs={CONFIGS}"]
            composed += build_cells(hydra.compose(figure, opts))
        for detector in ("r50_fpn", "vgg16", "inception_v3"):
            opts = ["hardware=gpu", "data=phantom", "seeds=[0]", f"configs={CONFIGS}"]
            composed += build_cells(hydra.compose("figure4", [*opts, f"detector={detector}"]))
    settings = {(c.config, tuple(map(str, c.opts.items()))): c.settings() for c in composed}
    assert len(settings) > 50
    for values in settings.values():
        check_read_keys({**DEFAULTS, **values}, DEFAULTS)


R50, FPN, LITE0 = "frcnn_r50.yaml", "frcnn_r50_fpn.yaml", "csfrcnn_effnet_lite0.yaml"
BATCH_NORM = ("MODEL.RESNETS.NORM", "BN")


@pytest.mark.parametrize(
    ("config", "opts", "message"),
    [
        (R50, ("MODEL.ROI_HEADS.COST.ALPHA", 3.0), "NAME Res5ROIHeads does not read it"),
        (R50, ("MODEL.ROI_HEADS.COST.ALPHA", 3.0), "CostSensitiveRes5ROIHeads or"),
        (FPN, ("MODEL.ROI_HEADS.COST.ALPHA", 3.0), "NAME StandardROIHeads does not read it"),
        (R50, ("MODEL.RPN.COST.ALPHA", 9.0), "NAME RPN does not read it; CostSensitiveRPN does"),
        (R50, ("MODEL.RPN.COST.NORMALIZER", "sum_weights"), "leave MODEL.RPN.COST.NORMALIZER at"),
        (R50, ("MODEL.RPN.SAMPLER.NAME", "FixedRatioSampler"), "CostSensitiveRPN does"),
        (R50, ("MODEL.RPN.SAMPLER.NMS_THRESH", 0.7), "MODEL.PROPOSAL_GENERATOR.NAME RPN"),
        (R50, ("MODEL.RPN.PRIOR_PROB", 0.01), "CostSensitiveRPNHead does (MODEL.RPN.HEAD_NAME)"),
        (LITE0, ("MODEL.RPN.SAMPLER.NAME", "FixedRatioSampler"), "AdaptiveRatioSampler does"),
        (LITE0, ("MODEL.RPN.POSITIVE_FRACTION", 0.25), "NAME AdaptiveRatioSampler"),
        (R50, ("MODEL.TIMM.NAME", "resnet18"), "or build_timm_fpn_backbone does"),
        (R50, ("MODEL.TIMM.FREEZE_BN", False), "or build_timm_fpn_backbone does"),
        ("frcnn_vgg16.yaml", ("MODEL.TORCHVISION.FREEZE_BN", False), "InceptionV3ROIHeads does"),
        ("frcnn_inception_v3.yaml", ("MODEL.RESNETS.DEPTH", 101), "InceptionV3ROIHeads does not"),
        (LITE0, ("MODEL.RESNETS.DEPTH", 101), "build_resnet_fpn_backbone"),
        (R50, ("MODEL.FPN.OUT_CHANNELS", 128), "build_resnet_fpn_backbone"),
        (FPN, ("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.5, 0.6)), "CascadeROIHeads"),
        (FPN, ("MODEL.RETINANET.NUM_CONVS", 2), "RetinaNet does"),
        (R50, ("MODEL.CLASSIFIER.NAME", "LeNet"), "ImageClassifier does"),
        (R50, ("INPUT.SEQUENCE_SLICES", 2), "GeneralizedRCNN does not read it; BHCNetGRU or"),
        ("classifier_lenet.yaml", ("INPUT.SEQUENCE_SLICES", 2), "NAME LeNet does not read it"),
        ("classifier_lenet.yaml", ("MODEL.RPN.COST.ALPHA", 2.0), "ImageClassifier does not read"),
        ("classifier_lenet.yaml", ("MODEL.ROI_HEADS.COST.ALPHA", 2.0), "ImageClassifier does not"),
        ("classifier_lenet.yaml", ("MODEL.BACKBONE.FREEZE_AT", 0), "ImageClassifier does not read"),
        ("csfrcnn_r50_fpn.yaml", ("MODEL.META_ARCHITECTURE", "RetinaNet"), "RetinaNet does not"),
        ("csfrcnn_r50.yaml", ("MODEL.META_ARCHITECTURE", "RetinaNet"), "SAMPLER.SHORTFALL)."),
        (FPN, ("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator"), "CLUSTERS.NUM_SIZES is 5"),
        (R50, ("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator",
               "MODEL.ANCHOR_GENERATOR.PAIRS", [[[9.0, 9.0]]]), "ClusteredAnchorGenerator does"),
        (R50, ("INPUT.CROP.ENABLED", True), "use INPUT.AUG.SHIFT and INPUT.AUG.SCALE, or"),
        (R50, ("INPUT.CROP.SIZE", [0.5, 0.5]), "IchDatasetMapper does not crop"),
        (R50, ("TEST.AUG.ENABLED", True), "each image is tested once"),
        (R50, ("TEST.AUG.FLIP", False), "each image is tested once"),
        (R50, ("TEST.EXPECTED_RESULTS", [["bbox", "AP", 30.0, 1.0]]), "by --eval-only alone"),
        (R50, ("INPUT.MASK_FORMAT", "rle"), "expected polygon or bitmask"),
        (R50, ("MODEL.KEYPOINT_ON", True), "'ich_train' has boxes alone"),
        (R50, ("MODEL.LOAD_PROPOSALS", True), "proposals are the RPN's"),
        (R50, ("DATASETS.PROPOSAL_FILES_TRAIN", ("p.pkl",)), "proposals are the RPN's"),
        (R50, ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"), "cannot train"),
        (R50, ("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"), "images and boxes cannot train"),
        (R50, ("MODEL.META_ARCHITECTURE", "PanopticFPN"), "images and boxes cannot train"),
        (R50, ("INPUT.FORMAT", "RGB"), "INPUT.WINDOWS"),
        (R50, ("INPUT.RANDOM_FLIP", "both"), "expected horizontal or vertical or none"),
        (R50, ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"), "the two ends of the range"),
        (R50, ("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler"), "RepeatFactorTraining"),
        (R50, ("DATALOADER.POSITIVE_SHARE", 0.3), "PositiveShareSampler does"),
        (R50, ("MODEL.IMAGE_HEAD.BOX_WEIGHT", 0.3), "DiagnosisRCNN does"),
        (R50, ("SOLVER.LR_SCHEDULER_NAME", "CosineLR"), "WarmupCosineLR"),
        (R50, ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "iou"), "expected smooth_l1 or giou"),
    ],
)  # fmt: skip
def test_a_key_that_nothing_reads_is_refused(config, opts, message):
    said = refusal(config, *opts)
    assert message in said and said.startswith(("MODEL.", "INPUT.", "TEST.", "DATA", "SOLVER."))


@pytest.mark.parametrize(
    "opts",
    [
        ("MODEL.ROI_HEADS.NAME", "CostSensitiveRes5ROIHeads", "MODEL.ROI_HEADS.COST.ALPHA", 3.0),
        ("MODEL.RPN.POSITIVE_FRACTION", 0.25),  # of the stock RPN
        ("INPUT.RANDOM_FLIP", "vertical", "MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou"),
        ("INPUT.MIN_SIZE_TRAIN", (400, 600), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"),
        ("MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask"),
        ("DATASETS.TRAIN", ("own_points",), "MODEL.KEYPOINT_ON", True),
        ("TEST.PRECISE_BN.ENABLED", True, "MODEL.RESNETS.DEPTH", 101),
        # What a training from random weights has written to its config.yaml.
        ("MODEL.WEIGHTS", "", "MODEL.TIMM.FREEZE_BN", False, *BATCH_NORM),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "no such name"),  # refused where it is built
    ],
)
def test_what_is_read_is_let_through(opts):
    check(R50, *opts)


def test_an_evaluation_refuses_what_only_it_would_read():
    config = flatten(load_config(CONFIGS / R50, ["TEST.AUG.ENABLED", "True"]))
    with pytest.raises(ValueError, match="TEST.AUG.ENABLED is True, but nothing reads it"):
        check_read_keys(config, DEFAULTS, training=False)
    # What a run was trained with, before such keys were refused, does not matter any more.
    config = flatten(load_config(CONFIGS / R50, ["INPUT.CROP.ENABLED", "True"]))
    check_read_keys({**config, "MODEL.RPN.COST.ALPHA": 9.0}, DEFAULTS, training=False)


def register(registry, part, name):
    part.__name__ = name
    if name not in registry:
        registry.register(part)


def test_a_part_derived_from_one_here_reads_its_keys():
    register(PROPOSAL_GENERATOR_REGISTRY, type("", (CostSensitiveRPN,), {}), "OwnRPN")
    own = ("MODEL.PROPOSAL_GENERATOR.NAME", "OwnRPN")
    check("csfrcnn_r50.yaml", *own)
    assert "OwnRPN" in refusal(R50, "MODEL.RPN.COST.ALPHA", 2.0)  # it would read it
    # What one here does not read, its own may.
    check("csfrcnn_r50.yaml", *own, "MODEL.RPN.POSITIVE_FRACTION", 0.25)


def test_a_part_of_a_users_own_may_read_anything():
    def own_backbone(cfg, input_shape):
        return build_timm_backbone(cfg, input_shape)

    register(BACKBONE_REGISTRY, own_backbone, "own_backbone")
    register(ROI_HEADS_REGISTRY, type("", (StandardROIHeads,), {}), "OwnROIHeads")
    register(META_ARCH_REGISTRY, type("", (GeneralizedRCNN,), {}), "OwnRCNN")
    register(CLASSIFIER_REGISTRY, lambda input_size: None, "own_network")
    heads = ("MODEL.ROI_HEADS.NAME", "OwnROIHeads")
    check(R50, "MODEL.BACKBONE.NAME", "own_backbone", "MODEL.TIMM.NAME", "resnet18", *heads)
    check(R50, *heads, "MODEL.ROI_HEADS.COST.ALPHA", 2.0)
    check(R50, "MODEL.META_ARCHITECTURE", "OwnRCNN", "MODEL.CLASSIFIER.INPUT_SIZE", 32,
          "MODEL.RPN.COST.ALPHA", 2.0, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2)  # fmt: skip
    own = ("MODEL.CLASSIFIER.NAME", "own_network")
    check("classifier_lenet.yaml", *own, "INPUT.SEQUENCE_SLICES", 2)
    assert "does not crop" in refusal(
        R50, "MODEL.META_ARCHITECTURE", "OwnRCNN", "INPUT.CROP.ENABLED", True
    )


def nodes_of(node, prefix=""):
    yield id(node), prefix
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from nodes_of(value, f"{prefix}{key}.")


KEYS = {
    "MODEL.RPN.COST.ALPHA": 7.0,
    "MODEL.RPN.COST.NORMALIZER": "sum_weights",
    "MODEL.RPN.SAMPLER.MAX_RATIO": 2.0,
    "MODEL.RPN.SAMPLER.SHORTFALL": "repeat",
    "MODEL.RPN.SAMPLER.NMS_THRESH": 0.5,
    "MODEL.RPN.PRIOR_PROB": 0.1,
    "MODEL.ROI_HEADS.COST.ALPHA": 7.0,
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": (0.5, 0.6, 0.8),
    "MODEL.ANCHOR_GENERATOR.PAIRS": [[[9.0, 9.0]]],
    "MODEL.TIMM.OUT_STRIDES": [8, 16],
    "MODEL.TIMM.BN_MOMENTUM": 0.2,
    "MODEL.TORCHVISION.FREEZE_BN": False,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 32,
    "MODEL.FPN.OUT_CHANNELS": 128,
    "MODEL.BACKBONE.FREEZE_AT": 1,
    "MODEL.RETINANET.NUM_CONVS": 2,
    "MODEL.CLASSIFIER.INPUT_SIZE": 400,
    "MODEL.CLASSIFIER.POS_WEIGHT": 2.0,
}
FIXED = ("MODEL.RPN.SAMPLER.NAME", "FixedRatioSampler", "MODEL.RPN.SAMPLER.MAX_RATIO", 1.0)
CASCADE = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
           True)  # fmt: skip
RETINANET = ("MODEL.META_ARCHITECTURE", "RetinaNet",
             "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
             "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"])  # fmt: skip


@pytest.mark.parametrize(
    ("config", "opts"),
    [(path, ()) for path in SHIPPED if "quick" not in str(path)]
    + [(CONFIGS / LITE0, FIXED), (CONFIGS / FPN, CASCADE)]
    + [(CONFIGS / FPN, RETINANET)],
    ids=lambda x: getattr(x, "stem", None),
)
def test_what_the_table_says_is_what_the_parts_do(config, opts, monkeypatch):
    cfg = load_config(config, list(map(str, opts)))
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16.0]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0]]
    seen, nodes, get = set(), dict(nodes_of(cfg)), CfgNode.__getattr__

    def note(node, key):
        seen.add(f"{nodes.get(id(node))}{key}")
        return get(node, key)

    monkeypatch.setattr(CfgNode, "__getattr__", note)
    with torch.device("meta"):
        build_model(cfg)
    for key, value in KEYS.items():
        if key in seen:
            check(config, *opts, key, value)
        else:
            assert key in refusal(config, *opts, key, value)
