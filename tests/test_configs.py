"""Every detector that ships trains, is saved, goes on and is evaluated."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_backbone, build_roi_heads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from ich_det2.engine import IchTrainer
from ich_det2.engine.checks import check_config
from ich_det2.engine.config import load_config
from ich_det2.evaluation import plots

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*frcnn_*.yaml"))
RFCN = [ROOT / f"configs/{p}rfcn_effnet_lite0.yaml" for p in ("", "cs")]
IMAGE_HEAD = ROOT / "configs/diagnosis_effnet_lite0.yaml"
NETWORKS = ("effnet_lite0", "inception_v3", "r50", "r50_fpn", "vgg16")
# Small where size is all that matters; anchors are clustered, and the loop is the real one.
SMALL = (
    *("MODEL.WEIGHTS", "", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "4"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "4", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "8"),
    # Whatever is finite counts: statistics of four images, one of them flat, saturate scores.
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "-1.0"),
    *("SOLVER.IMS_PER_BATCH", "1", "SOLVER.STEPS", "(3,)", "TEST.EVAL_PERIOD", "4"),
    *("TEST.DIAGNOSIS.RESAMPLES", "10", "DATALOADER.NUM_WORKERS", "0"),
    *("TEST.DIAGNOSIS.SMOOTHING", "[]"),  # the slices are at no known place
)


@pytest.fixture
def root(voc_tree):
    """Slices with boxes of five sizes and three ratios, so that anchors can be clustered."""
    corners = [(18, 16), (20, 30), (34, 20), (40, 44), (60, 40)]
    images = {f"t{i}": [("IPH", (9, 9, *xy))] for i, xy in enumerate(corners)}
    voc_tree({**images, "healthy": []})
    voc_tree({"v": [("IPH", (9, 9, 30, 30))], "w": []}, split="val")
    return voc_tree({"x": [("IPH", (9, 9, 30, 30))], "y": []}, split="test")


def test_each_network_has_its_config_and_its_plain_twin():
    assert [p.stem for p in CONFIGS] == sorted(
        f"{p}frcnn_{n}" for p in ("cs", "") for n in NETWORKS
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_the_plain_twin_differs_by_cost_sensitivity_alone(network):
    ours, plain = (load_config(ROOT / f"configs/{p}frcnn_{network}.yaml") for p in ("cs", ""))
    assert ours.MODEL.RPN.COST.ALPHA > 1
    assert plain.MODEL.PROPOSAL_GENERATOR.NAME == "RPN"
    ours.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    ours.MODEL.RPN.HEAD_NAME = "StandardRPNHead"
    heads = ours.MODEL.ROI_HEADS.NAME.replace("CostSensitiveROI", "StandardROI")
    ours.MODEL.ROI_HEADS.NAME = heads.removeprefix("CostSensitive")
    for cfg in (ours, plain):  # which the plain parts do not read
        cfg.MODEL.RPN.COST = cfg.MODEL.RPN.SAMPLER = cfg.MODEL.ROI_HEADS.COST = None
        cfg.OUTPUT_DIR = ""
    assert ours.dump() == plain.dump()


@pytest.mark.parametrize("network", NETWORKS[1:])
def test_the_papers_settings_are_shared(network):
    ours, papers = (load_config(ROOT / f"configs/csfrcnn_{n}.yaml") for n in (network, "r50"))
    assert ours.SOLVER == papers.SOLVER and ours.INPUT == papers.INPUT
    assert ours.MODEL.RPN.COST == papers.MODEL.RPN.COST
    assert ours.MODEL.RPN.SAMPLER == papers.MODEL.RPN.SAMPLER
    assert ours.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE == 128


def second_stage_losses(config, *opts):
    """Losses and gradients of a config's ROI heads on an image with a lesion and one without."""
    cfg = load_config(ROOT / "configs" / config, [*SMALL, *map(str, opts)])
    with torch.device("meta"):
        shapes = build_backbone(cfg).output_shape()
    torch.manual_seed(0)
    heads = build_roi_heads(cfg, shapes).train()
    features = {}
    for name in cfg.MODEL.ROI_HEADS.IN_FEATURES:
        side = 64 // shapes[name].stride
        features[name] = torch.rand(2, shapes[name].channels, side, side)
    proposals, targets = [], []
    for boxes in ([[8.0, 8.0, 40.0, 40.0]], torch.zeros(0, 4)):
        corners = 30 * torch.rand(6, 2)
        found = Boxes(torch.cat([corners, corners + 10 + 20 * torch.rand(6, 2)], dim=1))
        logits = torch.rand(6)
        proposals.append(Instances((64, 64), proposal_boxes=found, objectness_logits=logits))
        targets.append(Instances((64, 64), gt_boxes=Boxes(torch.as_tensor(boxes))))
        targets[-1].gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    with EventStorage():
        losses = heads(None, features, proposals, targets)[1]
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in heads.named_parameters() if p.requires_grad}


CASCADE = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True, "MODEL.ROI_HEADS.NAME")


@pytest.mark.parametrize("network", [*NETWORKS, "cascade"])
def test_the_second_stages_weight_counts_in_each_config(network):
    more, plain = (), ()
    if network == "cascade":
        network = "r50_fpn"
        more, plain = (*CASCADE, "CostSensitiveCascadeROIHeads"), (*CASCADE, "CascadeROIHeads")
    ours, alpha = f"csfrcnn_{network}.yaml", "MODEL.ROI_HEADS.COST.ALPHA"
    stock, stock_grads = second_stage_losses(f"frcnn_{network}.yaml", *plain)
    one, one_grads = second_stage_losses(ours, *more, alpha, 1.0)
    assert one.keys() == stock.keys() and one_grads.keys() == stock_grads.keys()
    assert all(torch.equal(one[key], stock[key]) for key in stock)
    assert all(torch.equal(one_grads[key], stock_grads[key]) for key in stock_grads)
    weighed, _ = second_stage_losses(ours, *more, alpha, 3.0)
    for key, loss in weighed.items():
        assert (loss != stock[key]) == key.startswith("loss_cls"), key


class Trainer(IchTrainer):
    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.5  # by 0.1 they would follow random weights for 20 iterations
        return model


def train(config, root, out, max_iter, resume=False):
    data = ("DATASETS.ICH_ROOT", str(root), "OUTPUT_DIR", str(out))
    cfg = load_config(config, [*data, *SMALL, "SOLVER.MAX_ITER", max_iter])
    check_config(cfg, eval_only=False, resume=False)
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer, torch.load(out / "model_final.pth", weights_only=True)


@pytest.mark.parametrize("config", [*CONFIGS, *RFCN, IMAGE_HEAD], ids=lambda p: p.stem)
def test_it_trains_is_saved_goes_on_and_is_evaluated(config, root, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "save_figure", lambda figure, target: None)  # drawn in other tests
    out = tmp_path / "out"
    _, first = train(config, root, out, 2)
    assert first["iteration"] == 1
    trainer, last = train(config, root, out, 4, resume=True)
    assert (trainer.start_iter, last["iteration"]) == (2, 3)
    moved = [k for k, v in last["model"].items() if not torch.equal(v, first["model"][k])]
    for part in ("backbone.", "proposal_generator.rpn_head.", "roi_heads."):
        assert any(key.startswith(part) for key in moved), part
    lines = map(json.loads, (out / "metrics.json").read_text().splitlines())
    assert all(0 < line["total_loss"] < 1e3 for line in lines if "total_loss" in line)

    assert {"bbox", "diagnosis"} <= set(trainer.test_best())
    with open(out / "inference/ich_test/image_scores.csv", newline="") as file:
        rows = {row["image_id"]: row for row in csv.DictReader(file)}
    assert {i: row["label"] for i, row in rows.items()} == {"x": "1", "y": "0"}
    boxes = json.loads((out / "inference/ich_test/coco_instances_results.json").read_text())
    assert {box["image_id"] for box in boxes} == {"x", "y"}
    assert all(0 <= box["score"] <= 1 for box in boxes)
    anchors = trainer.cfg.MODEL.ANCHOR_GENERATOR
    assert len(anchors.SIZES) == (5 if "fpn" in config.stem else 1)
    assert all(anchors.SIZES) and len(anchors.ASPECT_RATIOS[0]) == 3
    shutil.rmtree(out)  # some hundred megabytes


RETINANET = (
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CONVS", "1"),
    *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", "18"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.OUT_FEATURES", "['res3', 'res4', 'res5']"),
    *("MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']"),
    *("MODEL.ANCHOR_GENERATOR.CLUSTERS.NUM_SIZES", "5"),
)


def test_a_retinanet_trains_on_the_datas_classes_and_clustered_anchors(root, tmp_path, caplog):
    """Without a second stage: the number of classes, anchors and thresholds are of its own keys."""
    names = ("DATASETS.ICH_CLASSES", "['IPH', 'SDH']")
    data = ("DATASETS.ICH_ROOT", str(root), "OUTPUT_DIR", str(tmp_path))
    small = (*SMALL, "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", "1e-4")
    cfg = load_config(ROOT / "configs/Base-ICH.yaml", [*data, *small, *RETINANET, *names])
    check_config(cfg, eval_only=False, resume=False)
    assert "MODEL.RETINANET.SCORE_THRESH_TEST is 0.05" in caplog.text
    trainer = IchTrainer(cfg)
    trainer.train()
    model = trainer.model
    assert model.head.cls_score.out_channels == 3 * 2  # ratios and classes
    assert type(model.anchor_generator).__name__ == "ClusteredAnchorGenerator"
    assert model.anchor_generator.num_anchors == [3] * 5
    model.eval().test_score_thresh = 0.0
    with torch.no_grad():
        (found,) = model([{"image": torch.rand(3, 64, 64), "height": 64, "width": 64}])
    assert set(found["instances"].pred_classes.tolist()) <= {0, 1} and len(found["instances"])
