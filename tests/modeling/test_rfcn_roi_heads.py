"""Position-sensitive scores by hand, and heads that Detectron2 trains."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_roi_heads
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

import ich_det2
from ich_det2.modeling.rfcn_roi_heads import PositionSensitiveOutputLayers, RFCNROIHeads
from ich_det2.phantom import write_exam

CONFIG = "rfcn_effnet_lite0.yaml"


def test_each_part_of_a_proposal_is_scored_by_a_map_of_its_own():
    layers = PositionSensitiveOutputLayers(
        ShapeSpec(channels=8, stride=2),
        side=2,
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        num_classes=1,
        cls_agnostic_bbox_reg=True,
    )
    with torch.no_grad():
        # The 8 maps of foreground and background are the 8 channels.
        layers.cls_score.weight[:] = torch.eye(8)[:, :, None, None]
        layers.bbox_pred.weight.zero_()
        layers.bbox_pred.bias[:] = torch.arange(16.0)
    features = torch.zeros(1, 8, 6, 6)
    # A box of 4 x 4 cells; of foreground's maps top left 1, top right 2, bottom left 3, bottom
    # right 4 in the part of their own, and 100 elsewhere.
    for part, value in enumerate((1.0, 2.0, 3.0, 4.0)):
        y, x = 1 + 2 * (part // 2), 1 + 2 * (part % 2)
        features[0, part] = 100.0
        features[0, part, y : y + 2, x : x + 2] = value
    features[0, 4:] = 8.0
    scores, deltas = layers(features, [torch.tensor([[2.0, 2.0, 10.0, 10.0]])])
    assert scores.tolist() == [[(1 + 2 + 3 + 4) / 4, 8.0]]
    assert deltas.tolist() == [[1.5, 5.5, 9.5, 13.5]]  # of four biases each


def heads(tiny_cfg, *opts):
    cfg = tiny_cfg("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8, *opts, config=CONFIG)
    torch.manual_seed(0)
    return build_roi_heads(cfg, {"stride16": ShapeSpec(channels=12, stride=16)})


def losses_of(made):
    torch.manual_seed(1)
    features = {"stride16": torch.randn(2, 12, 4, 4, requires_grad=True)}
    proposals, targets = [], []
    for boxes in ([[10.0, 10.0, 30.0, 34.0]], torch.zeros(0, 4)):
        corners = 40 * torch.rand(12, 2)
        p = Boxes(torch.cat([corners, corners + 5 + 15 * torch.rand(12, 2)], dim=1))
        proposals.append(Instances((64, 64), proposal_boxes=p, objectness_logits=torch.rand(12)))
        targets.append(Instances((64, 64), gt_boxes=Boxes(torch.as_tensor(boxes))))
        targets[-1].gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    images = ImageList(torch.zeros(2, 3, 64, 64), [(64, 64)] * 2)
    with EventStorage():
        _, losses = made(images, features, proposals, targets)
    sum(losses.values()).backward()
    return losses, features["stride16"].grad


def test_every_layer_learns_and_alpha_weighs_the_class_loss(tiny_cfg):
    made = heads(tiny_cfg)
    assert type(made) is RFCNROIHeads
    losses, grad = losses_of(made)
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    assert grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
    weighed, _ = losses_of(heads(tiny_cfg, "MODEL.ROI_HEADS.COST.ALPHA", 3.0))
    assert torch.equal(weighed["loss_box_reg"], losses["loss_box_reg"])
    assert weighed["loss_cls"] != losses["loss_cls"]


def test_the_number_of_parameters_is_the_layers_own(tiny_cfg):
    # 1 x 1 with a norm of two per channel, then k x k maps of two classes and of four deltas.
    conv = 12 * 128 + 2 * 128
    maps = (128 + 1) * 9 * (2 + 4)
    assert sum(p.numel() for p in heads(tiny_cfg).parameters()) == conv + maps


def test_an_image_without_proposals_has_no_box(tiny_cfg):
    made = heads(tiny_cfg).eval()
    empty = Instances((64, 64), proposal_boxes=Boxes(torch.zeros(0, 4)))
    found, _ = made(None, {"stride16": torch.rand(1, 12, 4, 4)}, [empty])
    assert len(found[0]) == 0


def test_a_pyramid_is_refused(tiny_cfg):
    with pytest.raises(ValueError, match="RFCNROIHeads take one map"):
        heads(tiny_cfg, "MODEL.ROI_HEADS.IN_FEATURES", ["stride16", "stride32"])


def test_a_whole_model_finds_boxes(tiny_cfg):
    cfg = tiny_cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, config=CONFIG)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        (found,) = model([{"image": torch.rand(3, 64, 64) * 255, "height": 64, "width": 64}])
    assert len(found["instances"]) > 0


def test_an_exam_is_diagnosed(write_run, tmp_path):
    write_exam(tmp_path / "exam", size=64)
    run = write_run("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, config=CONFIG)
    diagnosis = ich_det2.diagnose(tmp_path / "exam", run, threshold=0.0)
    assert len(diagnosis.slices) > 5
    assert all(len(s.boxes) and 0 <= s.score <= 1 for s in diagnosis.slices)
