"""Defaults are stock Detectron2, and the configs that ship fit the keys."""

import json
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from ich_det2 import add_ich_config

FOLDER = Path(__file__).parents[1] / "configs"
# Those of configs/experiments are Hydra's.
CONFIGS = sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("quick/*.yaml")])


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_ich_config(cfg)
    return cfg


def without_added(node, stock):
    """The part of a config that a stock config has too, as plain dicts."""
    return {
        key: without_added(node[key], value) if isinstance(value, dict) else node[key]
        for key, value in stock.items()
    }


def test_keys_of_detectron2_keep_their_defaults(cfg):
    stock = get_cfg()
    assert without_added(cfg, stock) == without_added(stock, stock)


def test_cost_and_sampler_are_stock_by_default(cfg):
    rpn = cfg.MODEL.RPN
    assert (rpn.COST.ALPHA, rpn.COST.NORMALIZER) == (1.0, "num_samples")
    assert (rpn.SAMPLER.MAX_RATIO, rpn.SAMPLER.SHORTFALL, rpn.SAMPLER.NMS_THRESH) == (
        1.0,
        "fill",
        0.0,
    )
    assert (rpn.PRIOR_PROB, cfg.MODEL.ROI_HEADS.COST.ALPHA) == (0.0, 1.0)
    assert (cfg.INPUT.AUG.SHIFT, cfg.INPUT.AUG.SCALE, cfg.INPUT.AUG.EXPAND) == (0.0, 0.0, 1)


def test_data_defaults_are_the_papers(cfg):
    assert cfg.INPUT.WINDOWS == [[50.0, 100.0]]  # level, width in HU
    assert cfg.DATASETS.ICH_CLASSES == ["hemorrhage"]
    clusters = cfg.MODEL.ANCHOR_GENERATOR.CLUSTERS
    assert (clusters.NUM_SIZES, clusters.NUM_RATIOS, clusters.RATIO_SPACE) == (3, 3, "linear")
    assert clusters.METHOD == "separate"


def test_thresholds_are_0_05_to_0_95(cfg):
    thresholds = cfg.TEST.DIAGNOSIS.THRESHOLDS
    assert thresholds == [
        0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5,
        0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95,
    ]  # fmt: skip


def test_a_key_that_does_not_exist_is_an_error(cfg):
    with pytest.raises((KeyError, AssertionError), match="ALFA"):
        cfg.merge_from_list(["MODEL.RPN.COST.ALFA", "2"])


def test_a_dumped_config_reads_back_the_same(cfg, tmp_path):
    cfg.MODEL.RPN.COST.ALPHA = 100.0
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = get_cfg()
    add_ich_config(again)
    again.merge_from_file(str(tmp_path / "config.yaml"), allow_unsafe=False)
    assert again.MODEL.RPN == cfg.MODEL.RPN and again.TEST.DIAGNOSIS == cfg.TEST.DIAGNOSIS
    # As JSON, since Detectron2's tuples within tuples come back as lists.
    assert json.dumps(again, sort_keys=True) == json.dumps(cfg, sort_keys=True)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_config_fits_and_keeps_healthy_slices(cfg, path):
    cfg.merge_from_file(str(path), allow_unsafe=False)
    assert not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    assert cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST <= 0.01
    assert cfg.DATASETS.VAL == ("ich_val",) and cfg.DATASETS.TEST == ("ich_test",)
