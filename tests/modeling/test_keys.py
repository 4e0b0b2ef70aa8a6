"""A key that no built part reads is refused; a part of a user's own is not."""

from pathlib import Path

import pytest
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY

from ich_det2.engine.config import flatten, load_config
from ich_det2.modeling import CostSensitiveRPN
from ich_det2.modeling.keys import check_read_keys

CONFIGS = Path(__file__).parents[2] / "configs"
DEFAULTS = flatten(load_config(""))


def check(config, *opts):
    check_read_keys(flatten(load_config(CONFIGS / config, opts)), DEFAULTS)


@pytest.mark.parametrize(
    "config", [p.relative_to(CONFIGS) for p in sorted(CONFIGS.glob("[!B]*.yaml"))], ids=str
)
def test_each_config_is_read_whole(config):
    check(config)
    if str(config).startswith("csfrcnn"):
        more = (
            ("MODEL.ROI_HEADS.NAME", "CostSensitiveRes5ROIHeads") if "50.y" in str(config) else ()
        )
        check(config, "MODEL.ROI_HEADS.COST.ALPHA", "3.0", "MODEL.RPN.PRIOR_PROB", "0.01", *more)


@pytest.mark.parametrize(
    ("config", "key", "value", "message"),
    [
        ("frcnn_r50.yaml", "MODEL.ROI_HEADS.COST.ALPHA", "3.0", "CostSensitiveRes5ROIHeads"),
        ("frcnn_r50_fpn.yaml", "MODEL.ROI_HEADS.COST.ALPHA", "3.0", "NAME StandardROIHeads does"),
        ("frcnn_r50.yaml", "MODEL.RPN.COST.ALPHA", "9.0", "CostSensitiveRPN does"),
        ("frcnn_r50.yaml", "MODEL.RPN.SAMPLER.NMS_THRESH", "0.7", "NAME RPN does not read it"),
        ("frcnn_r50.yaml", "MODEL.RPN.PRIOR_PROB", "0.01", "CostSensitiveRPNHead does"),
        ("csfrcnn_r50.yaml", "MODEL.TIMM.NAME", "resnet18", "build_timm_backbone does"),
        ("csfrcnn_r50.yaml", "MODEL.CLASSIFIER.NAME", "LeNet", "ImageClassifier does"),
        ("csfrcnn_r50.yaml", "MODEL.META_ARCHITECTURE", "RetinaNet", "CostSensitiveRPN of General"),
        ("csfrcnn_r50.yaml", "MODEL.META_ARCHITECTURE", "RetinaNet", "SAMPLER.SHORTFALL)"),
        ("classifier_lenet.yaml", "MODEL.RPN.COST.ALPHA", "2.0", "ImageClassifier does not read"),
        ("csfrcnn_r50.yaml", "INPUT.CROP.ENABLED", "True", "IchDatasetMapper does not crop"),
        ("csfrcnn_r50.yaml", "TEST.AUG.ENABLED", "True", "tests each image once"),
        ("csfrcnn_r50.yaml", "MODEL.MASK_ON", "True", "no masks"),
        ("csfrcnn_r50.yaml", "MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator",
         "MODEL.ANCHOR_GENERATOR.CLUSTERS.NUM_SIZES"),
    ],
)  # fmt: skip
def test_a_key_that_nothing_reads_is_refused(config, key, value, message):
    more = ("MODEL.ANCHOR_GENERATOR.CLUSTERS.NUM_SIZES", "5") if "CLUSTERS" in message else ()
    with pytest.raises(ValueError) as error:
        check(config, key, value, *more)
    assert message in str(error.value)


def test_a_part_derived_from_one_here_reads_its_keys():
    class OwnRPN(CostSensitiveRPN):
        pass

    if "OwnRPN" not in PROPOSAL_GENERATOR_REGISTRY:
        PROPOSAL_GENERATOR_REGISTRY.register(OwnRPN)
    check("csfrcnn_r50.yaml", "MODEL.PROPOSAL_GENERATOR.NAME", "OwnRPN")
