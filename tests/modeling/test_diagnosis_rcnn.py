"""DiagnosisRCNN: what slices with and without boxes teach, and the two scores together."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from ich_det2.modeling import DiagnosisRCNN

DIAGNOSIS = "diagnosis_effnet_lite0.yaml"


def slice_of(label, *boxes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    image = 255 * torch.rand(3, 64, 64, generator=generator)
    return {"image": image, "instances": instances, "image_label": label}


BOXED = slice_of(1, (8, 8, 36, 30))
HEALTHY = slice_of(0, seed=1)
UNBOXED = slice_of(1, seed=2)


@pytest.fixture
def make(tiny_cfg):
    """Factory of a model in training, whose slices do not touch each other in a batch norm."""

    def make(*opts, config=DIAGNOSIS):
        torch.manual_seed(0)
        fixed = ("MODEL.TIMM.FREEZE_BN", True, "MODEL.IMAGE_HEAD.DROPOUT", 0.0)
        return build_model(tiny_cfg(*fixed, *opts, config=config)).train()

    return make


def losses_of(model, *slices, seed=0):
    torch.manual_seed(seed)  # of the anchors and proposals that are drawn
    model.zero_grad(set_to_none=True)
    with EventStorage():
        return model([*slices])


def gradients(model, losses):
    sum(losses.values()).backward()
    return {
        name: None if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def of_boxes(losses):
    return {name: loss for name, loss in losses.items() if name != "loss_image"}


def test_a_slice_without_boxes_teaches_rpn_and_roi_heads_nothing(make):
    model = make("MODEL.RPN.SAMPLER.NAME", "FixedRatioSampler")  # the other learns a ratio
    alone = losses_of(model, BOXED)
    wanted = gradients(model, of_boxes(alone))
    beside = losses_of(model, BOXED, UNBOXED)
    assert of_boxes(beside) == of_boxes(alone)
    found = gradients(model, of_boxes(beside))
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        if name.startswith("image_head"):
            assert grad is None and found[name] is None
        else:  # the same sums, over a batch of another size
            torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6)
    # A healthy slice does teach.
    assert of_boxes(losses_of(model, BOXED, HEALTHY)) != of_boxes(alone)


def test_its_pixels_count_in_the_image_heads_loss_alone(make):
    model = make()
    image = UNBOXED["image"].clone().requires_grad_()
    losses = losses_of(model, BOXED, {**UNBOXED, "image": image})
    assert torch.autograd.grad(sum(of_boxes(losses).values()), image, retain_graph=True)[
        0
    ].abs().sum() == pytest.approx(0)
    assert torch.autograd.grad(losses["loss_image"], image)[0].abs().sum() > 0


def test_a_batch_without_known_boxes_gives_every_layer_a_gradient_of_0(make):
    model = make()
    losses = losses_of(model, UNBOXED, slice_of(1, seed=3))
    assert all(loss == 0 for loss in of_boxes(losses).values())
    for name, grad in gradients(model, losses).items():
        assert grad is not None, name
        if name.startswith(("proposal_generator", "roi_heads")):
            assert not grad.any(), name
        elif name.startswith("image_head"):
            assert grad.any(), name


def test_the_image_heads_gradient_by_hand(make):
    model = make("MODEL.IMAGE_HEAD.POS_WEIGHT", 3.0, "MODEL.IMAGE_HEAD.LOSS_WEIGHT", 0.5)
    batch = [BOXED, HEALTHY, UNBOXED]
    found = gradients(model, losses_of(model, *batch))["image_head.fc.bias"]
    images = model.preprocess_image(batch)
    with torch.no_grad():
        p = model.image_head(model.backbone(images.tensor)["stride32"]).sigmoid()
    # d/dz of -w y log s(z) - (1 - y) log (1 - s(z)) is w (p - 1) for y = 1, p for y = 0.
    wanted = 0.5 * (3 * (p[0] - 1) + p[1] + 3 * (p[2] - 1)) / 3
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_with_all_boxes_known_the_losses_are_stock(make):
    model = make()
    assert isinstance(model, DiagnosisRCNN)
    stock = make("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    loaded = stock.load_state_dict(model.state_dict(), strict=False)
    assert {key.partition(".")[0] for key in loaded.unexpected_keys} == {"image_head"}
    wanted = losses_of(stock, BOXED, HEALTHY)
    assert of_boxes(losses_of(model, BOXED, HEALTHY)) == wanted


@pytest.mark.parametrize(("w", "v"), [(0.0, 0.0), (1.0, 0.0), (0.25, 0.0), (0.5, 0.5), (0.5, 1.0)])
def test_scores_of_slice_and_boxes(make, w, v):
    model = make("MODEL.IMAGE_HEAD.SCORE_WEIGHT", w, "MODEL.IMAGE_HEAD.BOX_WEIGHT", v).eval()
    stock = make("MODEL.META_ARCHITECTURE", "GeneralizedRCNN").eval()
    stock.load_state_dict(model.state_dict(), strict=False)
    batch = [{**s, "height": 128, "width": 96} for s in (BOXED, HEALTHY)]
    with torch.no_grad():
        found, plain = model(batch), stock(batch)
        features = model.backbone(model.preprocess_image(batch).tensor)
        logits = model.image_head(features["stride32"])
    for y, before, logit in zip(found, plain, logits):
        boxes = before["instances"]
        top = boxes.scores.max().clamp(1e-4, 1 - 1e-4)
        z = w * logit + (1 - w) * torch.log(top / (1 - top))
        torch.testing.assert_close(y["image_score"], torch.sigmoid(z))
        assert torch.equal(y["instances"].pred_boxes.tensor, boxes.pred_boxes.tensor)
        wanted = boxes.scores ** (1 - v) * F.sigmoid(logit) ** v
        torch.testing.assert_close(y["instances"].scores, wanted)


def test_a_slice_without_detections_has_a_score(make):
    model = make("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.9999, "MODEL.IMAGE_HEAD.BOX_WEIGHT", 0.5)
    with torch.no_grad():
        (found,) = model.eval()([HEALTHY])
    assert len(found["instances"]) == 0 and 0 < found["image_score"] < 0.5


@pytest.mark.parametrize(
    ("key", "value"),
    [("SCORE_WEIGHT", 1.5), ("BOX_WEIGHT", -0.1), ("POS_WEIGHT", 0.0), ("LOSS_WEIGHT", -1.0)],
)
def test_weights_out_of_range_are_refused(make, key, value):
    with pytest.raises(ValueError, match=f"{key}.*{value}.*expected"):
        make(f"MODEL.IMAGE_HEAD.{key}", value)


def test_an_unknown_map_is_refused(make):
    with pytest.raises(ValueError, match="IN_FEATURE is 'p3', but .*'stride16', 'stride32'"):
        make("MODEL.IMAGE_HEAD.IN_FEATURE", "p3")


def test_maps_of_an_fpn(make):
    model = make(
        *("MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 16),
        *("MODEL.TIMM.OUT_STRIDES", [8, 16], "MODEL.IMAGE_HEAD.IN_FEATURE", ""),
        *("MODEL.RPN.IN_FEATURES", ["p3", "p4"], "MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[12.0], [24.0]]),
    )
    assert model.image_head_feature == "p4"
    found = gradients(model, losses_of(model, BOXED, HEALTHY))
    assert all(grad is not None for grad in found.values())
