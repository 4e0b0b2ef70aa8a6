"""CostSensitiveRPN: stock when switched off, then what each switch does, by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from ich_det2.modeling import (
    AdaptiveRatioSampler,
    ClusteredAnchorGenerator,
    CostSensitiveRPN,
    CostSensitiveRPNHead,
    FixedRatioSampler,
)

STRIDES = {"p3": 8, "p4": 16}
LN2 = math.log(2)


def make_rpn(cls, head_cls, levels, batch_size=64, positive_fraction=0.5, **kwargs):
    """An RPN of either class; the same weights for the same levels."""
    torch.manual_seed(0)
    head = head_cls(in_channels=8, num_anchors=6)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    generator = DefaultAnchorGenerator(
        sizes=[[12.0, 24.0]],
        aspect_ratios=[[0.5, 1.0, 2.0]],
        strides=[STRIDES[level] for level in levels],
    )
    return cls(
        in_features=levels,
        head=head,
        anchor_generator=generator,
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=batch_size,
        positive_fraction=positive_fraction,
        pre_nms_topk=(500, 500),  # at least all anchors: 480
        post_nms_topk=(20, 20),
        **kwargs,
    )


def run(rpn, levels, seed):
    """Losses, gradients by name and proposals of a batch: two boxes, many boxes, none."""
    torch.manual_seed(seed)
    features = {k: torch.randn(3, 8, 64 // STRIDES[k], 64 // STRIDES[k]) for k in levels}
    for feature in features.values():
        feature.requires_grad_()
    corners = 40 * torch.rand(20, 2)
    many = torch.cat([corners, corners + 6 + 18 * torch.rand(20, 2)], dim=1)
    two = torch.tensor([[4.0, 6.0, 30.0, 28.0], [40.0, 40.0, 52.0, 50.0]])
    targets = [Instances((64, 64), gt_boxes=Boxes(b)) for b in (two, many, torch.zeros(0, 4))]
    images = ImageList(torch.zeros(3, 3, 64, 64), [(64, 64)] * 3)
    with EventStorage():
        proposals, losses = rpn(images, features, targets)
    sum(losses.values()).backward()
    grads = {name: p.grad for name, p in rpn.named_parameters()}
    return losses, {**grads, **{k: f.grad for k, f in features.items()}}, proposals


def assert_same(ours, stock):
    for one, other in zip(ours[:2], stock[:2]):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key
    for one, other in zip(ours[2], stock[2]):
        assert torch.equal(one.proposal_boxes.tensor, other.proposal_boxes.tensor)
        assert torch.equal(one.objectness_logits, other.objectness_logits)


@pytest.mark.parametrize(
    ("batch_size", "screen"),
    [
        # Positives or negatives run short, or neither.
        (8, 0.0),
        (256, 0.0),
        # IoU is never above 1, and all anchors are among the 2 * 256 screened: as without.
        (256, 1.0),
    ],
)
@pytest.mark.parametrize("levels", [["p4"], ["p3", "p4"]], ids=["one_level", "fpn"])
def test_switched_off_equals_stock_bit_for_bit(levels, batch_size, screen):
    stock = run(make_rpn(RPN, StandardRPNHead, levels, batch_size), levels, seed=5)
    ours = make_rpn(
        CostSensitiveRPN,
        CostSensitiveRPNHead,
        levels,
        batch_size,
        anchor_sampler=AdaptiveRatioSampler(num_samples=batch_size, max_ratio=1),
        screen_nms_thresh=screen,
    )
    assert_same(run(ours, levels, seed=5), stock)
    assert all(grad.abs().sum() > 0 for grad in stock[1].values())


def test_fixed_ratio_equals_stock_positive_fraction_bit_for_bit():
    stock = run(make_rpn(RPN, StandardRPNHead, ["p4"], 32, 0.25), ["p4"], seed=6)
    ours = make_rpn(
        CostSensitiveRPN,
        CostSensitiveRPNHead,
        ["p4"],
        32,
        anchor_sampler=FixedRatioSampler(num_samples=32, positive_fraction=0.25),
    )
    assert_same(run(ours, ["p4"], seed=6), stock)


# ---- the head ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [0.01, 0.5, 0.9])
def test_prior_is_the_initial_objectness(prior):
    head = CostSensitiveRPNHead(in_channels=8, num_anchors=6, prior_prob=prior)
    logits, _ = head([torch.zeros(1, 8, 4, 4)])
    assert logits[0].shape == (1, 6, 4, 4)
    assert logits[0].sigmoid().flatten().tolist() == pytest.approx([prior] * 96, rel=1e-5)


def test_without_prior_the_head_is_stock_bit_for_bit():
    heads = []
    for cls in (StandardRPNHead, CostSensitiveRPNHead):
        torch.manual_seed(2)
        heads.append(cls(in_channels=8, num_anchors=6).state_dict())
    assert heads[0].keys() == heads[1].keys()
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])


# ---- the loss ----------------------------------------------------------------------------------


def simple_rpn(num_samples=8, shortfall="fill", max_ratio=1.0, **kwargs):
    return make_rpn(
        CostSensitiveRPN,
        CostSensitiveRPNHead,
        ["p4"],
        num_samples,
        anchor_sampler=AdaptiveRatioSampler(
            num_samples=num_samples, max_ratio=max_ratio, shortfall=shortfall
        ),
        **kwargs,
    )


def losses_of(rpn, logits, labels, boxes=None):
    """Losses of one image's anchors, their deltas all 0.1, and the scalars stored."""
    num_images, num_anchors = logits.shape
    if boxes is None:
        corners = 20.0 * torch.arange(num_anchors)[:, None].expand(-1, 2)
        boxes = torch.cat([corners, corners + 10], dim=1)
    labels = [torch.tensor(x, dtype=torch.int8) for x in labels]
    deltas = torch.full((num_images, num_anchors, 4), 0.1)
    with EventStorage() as storage:
        losses = rpn.losses([Boxes(boxes)], [logits], labels, [deltas], [boxes] * num_images)
    return losses, {name: value for name, (value, _) in storage.latest().items()}


def test_alpha_raises_the_gradients_of_positives_only():
    labels = [[1, 1, 0, 0, 0, 0, -1, -1]]
    results = []
    for alpha in (1.0, 5.0):
        logits = torch.linspace(-2, 2, 8)[None].requires_grad_()
        losses, _ = losses_of(simple_rpn(num_samples=8, alpha=alpha), logits, labels)
        losses["loss_rpn_cls"].backward()
        results.append((logits.grad[0], losses["loss_rpn_loc"]))
    (plain, loc), (costly, costly_loc) = results
    assert torch.allclose(costly[:2], 5 * plain[:2]) and (plain[:2] < 0).all()
    assert torch.equal(costly[2:], plain[2:]) and (plain[2:6] > 0).all()
    assert torch.equal(costly_loc, loc) and loc > 0


@pytest.mark.parametrize(
    ("normalizer", "alpha", "expected"),
    [
        # Each anchor's loss is ln 2 at logit 0; 2 positives and 4 negatives of N = 8.
        ("num_samples", 1.0, 6 * LN2 / 8),
        ("num_samples", 3.0, (2 * 3 + 4) * LN2 / 8),
        ("sum_weights", 1.0, 6 * LN2 / 6),
        ("sum_weights", 3.0, (2 * 3 + 4) * LN2 / (2 * 3 + 4)),
    ],
)
def test_hand_worked_normalizers(normalizer, alpha, expected):
    rpn = simple_rpn(alpha=alpha, normalizer=normalizer)
    losses, _ = losses_of(rpn, torch.zeros(1, 7), [[1, 1, 0, 0, 0, 0, -1]])
    assert losses["loss_rpn_cls"].item() == pytest.approx(expected)


def test_sum_weights_without_any_anchor_is_zero():
    rpn = simple_rpn(normalizer="sum_weights")
    losses, _ = losses_of(rpn, torch.zeros(1, 2), [[-1, -1]])
    assert losses["loss_rpn_cls"].item() == 0


def test_loss_weight_scales_the_loss():
    rpn = simple_rpn(loss_weight={"loss_rpn_cls": 0.5, "loss_rpn_loc": 1.0})
    losses, _ = losses_of(rpn, torch.zeros(1, 2), [[1, 0]])
    assert losses["loss_rpn_cls"].item() == pytest.approx(0.5 * 2 * LN2 / 8)


@pytest.mark.parametrize("normalizer", ["num_samples", "sum_weights"])
def test_repeat_equals_rows_written_out(normalizer):
    # N = 8, k = 1: 4 positives and 4 negatives wanted. The first image has 1 positive, for 4;
    # the second has 2, each for 2. Each has just the 4 negatives.
    logits = torch.linspace(-3, 3, 14).reshape(2, 7)
    labels = [[1, 0, 0, 0, 0, -1, -1], [0, 1, 0, 1, 0, 0, -1]]
    rows = torch.cat([logits[0, :1].repeat(4), logits[0, 1:5]])
    rows = [rows, torch.cat([logits[1, [1, 1, 3, 3]], logits[1, [0, 2, 4, 5]]])]
    target = torch.tensor([1.0] * 4 + [0.0] * 4)
    alpha = 3.0
    weight = torch.tensor([alpha] * 4 + [1.0] * 4)
    total = sum(
        F.binary_cross_entropy_with_logits(r, target, weight=weight, reduction="sum") for r in rows
    )
    # num_samples: 2 images of 8. sum_weights: 2 images of 4 * 3 + 4.
    expected = total / (16 if normalizer == "num_samples" else 32)
    rpn = simple_rpn(shortfall="repeat", alpha=alpha, normalizer=normalizer)
    losses, _ = losses_of(rpn, logits, labels)
    assert losses["loss_rpn_cls"].item() == pytest.approx(expected.item(), rel=1e-6)


# ---- sampling within the RPN -------------------------------------------------------------------


def test_scalars_of_the_ratio_are_stored():
    rpn = simple_rpn(num_samples=4, shortfall="shrink", max_ratio=3.0)
    # N = 4, k = 1 wants 2 + 2. First image: 1 positive at p = 1/2, so 1 negative. Second: 2
    # positives at p = 3/4 and 2 negatives. Third: no positive, 2 negatives.
    ln3 = math.log(3)
    logits = torch.tensor([[0.0, 0, 0, 0], [ln3, ln3, 0, 0], [0, 0, 0, 0]])
    losses, scalars = losses_of(rpn, logits, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert scalars["rpn/ratio_target"] == 1
    # Over the images with positives: 3 positives to 3 negatives, mean score (1/2 + 2 * 3/4) / 3.
    assert scalars["rpn/ratio_actual"] == 1
    assert scalars["rpn/pos_score_mean"] == pytest.approx(2 / 3)
    assert scalars["rpn/num_pos_anchors"] == pytest.approx(3 / 3)
    assert scalars["rpn/num_neg_anchors"] == pytest.approx(5 / 3)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc"}
    # Sampled are 2 and 4 anchors: k = 1 + 2/2 * 1/2 = 1.5, 1 + 2/4 * 2/4 = 1.25, mean 1.375.
    assert rpn.anchor_sampler.ratio == pytest.approx(1.375)
    _, scalars = losses_of(rpn, logits, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert scalars["rpn/ratio_target"] == pytest.approx(1.375)


def test_actual_ratio_counts_repeated_positives():
    rpn = simple_rpn(num_samples=8, shortfall="repeat", alpha=5.0)
    _, scalars = losses_of(rpn, torch.zeros(1, 5), [[1, 0, 0, 0, 0]])
    assert scalars["rpn/ratio_actual"] == 1  # one for four, to four negatives
    assert scalars["rpn/num_pos_anchors"] == 1
    assert scalars["rpn/pos_weight"] == 5 * 4  # alpha, four times


def test_batch_without_positives_stores_no_score():
    rpn = simple_rpn()
    losses, scalars = losses_of(rpn, torch.zeros(1, 3), [[0, 0, 0]])
    assert "rpn/pos_score_mean" not in scalars and "rpn/ratio_actual" not in scalars
    assert losses["loss_rpn_cls"].item() == pytest.approx(3 * LN2 / 8)
    assert losses["loss_rpn_loc"].item() == 0


def test_screening_is_called_only_when_on(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("screened")

    monkeypatch.setattr("ich_det2.modeling.rpn.screen_by_nms", refuse)
    losses, _ = losses_of(simple_rpn(), torch.zeros(1, 2), [[1, 0]])
    assert losses["loss_rpn_cls"].item() == pytest.approx(2 * LN2 / 8)
    with pytest.raises(RuntimeError, match="screened"):
        losses_of(simple_rpn(screen_nms_thresh=0.5), torch.zeros(1, 2), [[1, 0]])


def test_screening_keeps_the_best_scored_of_equal_candidates():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(4, 1)
    logits = torch.tensor([[1.0, 2.0, -1.0, 3.0]])
    rpn = simple_rpn(screen_nms_thresh=0.7)
    losses, scalars = losses_of(rpn, logits, [[1, 1, 0, 0]], boxes)
    # The positive of logit 2 and the negative of logit 3 stay: softplus(-2) + softplus(3), / 8.
    assert (scalars["rpn/num_pos_anchors"], scalars["rpn/num_neg_anchors"]) == (1, 1)
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(3))) / 8
    assert losses["loss_rpn_cls"].item() == pytest.approx(expected)


# ---- errors and config -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: simple_rpn(alpha=0),
            r"MODEL\.RPN\.COST\.ALPHA must be a positive number, got 0\.",
        ),
        (lambda: simple_rpn(alpha=math.inf), r"MODEL\.RPN\.COST\.ALPHA .* got inf"),
        (
            lambda: simple_rpn(normalizer="mean"),
            r"NORMALIZER is 'mean', expected one of \('num_samples', 'sum_weights'\)",
        ),
        (lambda: simple_rpn(screen_nms_thresh=1.5), r"NMS_THRESH must be in \[0, 1\], got 1\.5"),
        (
            lambda: CostSensitiveRPNHead(in_channels=8, num_anchors=6, prior_prob=1.0),
            r"MODEL\.RPN\.PRIOR_PROB must be in \[0, 1\), got 1\.0",
        ),
    ],
)
def test_bad_arguments_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_detector_builds_from_the_config_and_trains(tiny_cfg):
    cfg = tiny_cfg(
        "MODEL.RPN.COST.ALPHA", 7.0,
        "MODEL.RPN.SAMPLER.NMS_THRESH", 0.7,
        "MODEL.RPN.PRIOR_PROB", 0.01,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(cfg)
    rpn = model.proposal_generator
    assert type(rpn) is CostSensitiveRPN and type(rpn.rpn_head) is CostSensitiveRPNHead
    assert type(rpn.anchor_generator) is ClusteredAnchorGenerator
    assert type(rpn.anchor_sampler) is AdaptiveRatioSampler
    assert (rpn.alpha, rpn.normalizer, rpn.screen_nms_thresh) == (7.0, "sum_weights", 0.7)
    assert rpn.anchor_sampler.shortfall == "shrink" and rpn.anchor_sampler.max_ratio == 3
    expected = math.log(0.01 / 0.99)
    assert rpn.rpn_head.objectness_logits.bias.tolist() == pytest.approx([expected] * 6)

    sick = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[10.0, 12.0, 30.0, 40.0]])))
    sick.gt_classes = torch.zeros(1, dtype=torch.int64)
    healthy = Instances((64, 64), gt_boxes=Boxes(torch.zeros(0, 4)))
    healthy.gt_classes = torch.zeros(0, dtype=torch.int64)
    batch = [
        {"image": 255 * torch.rand(3, 64, 64), "instances": x, "height": 64, "width": 64}
        for x in (sick, healthy)
    ]
    with EventStorage() as storage:
        losses = model(batch)
        sum(losses.values()).backward()
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    assert all(math.isfinite(loss.item()) for loss in losses.values())
    assert "rpn/ratio_target" in storage.latest()
    assert rpn.anchor_sampler.ratio > 1  # positives start at p = 0.01, so they are missed
    assert "proposal_generator.anchor_sampler._ratio" in model.state_dict()

    with torch.no_grad():
        output = model.eval()(batch)
    assert len(output) == 2 and all("instances" in x for x in output)
