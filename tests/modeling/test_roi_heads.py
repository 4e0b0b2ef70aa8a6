"""The cost-sensitive second stage: stock at alpha 1, a weighted mean otherwise."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import build_roi_heads
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou

from ich_det2.modeling.roi_heads import (
    CostSensitiveCascadeROIHeads,
    CostSensitiveFastRCNNOutputLayers,
    CostSensitiveRes5ROIHeads,
    CostSensitiveROIHeads,
    build_cost_sensitive_predictor,
    soft_nms,
    vote_boxes,
)

LN2 = math.log(2)
BOX = [0.0, 0.0, 10.0, 10.0]
HEADS = [
    ("StandardROIHeads", CostSensitiveROIHeads, "stride16"),
    ("Res5ROIHeads", CostSensitiveRes5ROIHeads, "res4"),
    ("CascadeROIHeads", CostSensitiveCascadeROIHeads, "stride16"),
]
HEAD_IDS = ["standard", "res5", "cascade"]


def build(tiny_cfg, name, feature, *opts):
    cfg = tiny_cfg(
        "MODEL.ROI_HEADS.NAME", name,
        "MODEL.ROI_HEADS.IN_FEATURES", [feature],
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8,
        # A fifth stage of 32 channels for Res5ROIHeads.
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 4,
        "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "Cascade" in name,
        *opts,
    )  # fmt: skip
    torch.manual_seed(0)
    return build_roi_heads(cfg, {feature: ShapeSpec(channels=16, stride=16)})


def run(heads, feature):
    """Losses and gradients of an image with a lesion and one without."""
    torch.manual_seed(1)
    features = {feature: torch.randn(2, 16, 4, 4, requires_grad=True)}
    images = ImageList(torch.zeros(2, 3, 64, 64), [(64, 64)] * 2)
    proposals, targets = [], []
    for boxes in ([[10.0, 10.0, 30.0, 34.0]], torch.zeros(0, 4)):
        corners = 40 * torch.rand(12, 2)
        p = torch.cat([corners, corners + 5 + 15 * torch.rand(12, 2)], dim=1)
        proposals.append(
            Instances((64, 64), proposal_boxes=Boxes(p), objectness_logits=torch.rand(12))
        )
        boxes = Boxes(torch.as_tensor(boxes))
        classes = torch.zeros(len(boxes), dtype=torch.int64)
        targets.append(Instances((64, 64), gt_boxes=boxes, gt_classes=classes))
    with EventStorage():
        _, losses = heads(images, features, proposals, targets)
    sum(losses.values()).backward()
    grads = {name: p.grad for name, p in heads.named_parameters() if p.grad is not None}
    return losses, {**grads, feature: features[feature].grad}


@pytest.mark.parametrize(("stock", "ours", "feature"), HEADS, ids=HEAD_IDS)
def test_alpha_one_equals_stock_bit_for_bit(tiny_cfg, stock, ours, feature):
    opts = ("MODEL.ROI_HEADS.COST.ALPHA", 1.0)
    heads, draws = [], []
    for name in (stock, ours.__name__):
        heads.append(build(tiny_cfg, name, feature, *opts))
        draws.append(torch.rand(1))  # what is built next starts from the same weights too
    initial = [h.state_dict() for h in heads]
    assert initial[0].keys() == initial[1].keys() and draws[0] == draws[1]
    assert all(torch.equal(initial[1][k], initial[0][k]) for k in initial[0])
    (stock_losses, stock_grads), (our_losses, our_grads) = (run(h, feature) for h in heads)
    assert our_losses.keys() == stock_losses.keys() and our_grads.keys() == stock_grads.keys()
    assert all(torch.equal(our_losses[k], stock_losses[k]) for k in stock_losses)
    assert all(torch.equal(our_grads[k], stock_grads[k]) for k in stock_grads)
    assert stock_grads[feature].abs().sum() > 0


@pytest.mark.parametrize(("stock", "ours", "feature"), HEADS, ids=HEAD_IDS)
def test_all_heads_build_from_the_config(tiny_cfg, stock, ours, feature):
    heads = build(tiny_cfg, ours.__name__, feature, "MODEL.ROI_HEADS.COST.ALPHA", 2.5)
    assert type(heads) is ours
    stages = getattr(heads, "num_cascade_stages", 1)
    predictors = heads.box_predictor if stages > 1 else [heads.box_predictor]
    assert [type(p) for p in predictors] == [CostSensitiveFastRCNNOutputLayers] * stages
    assert [p.alpha for p in predictors] == [2.5] * stages
    losses, _ = run(heads, feature)
    unweighed, _ = run(build(tiny_cfg, ours.__name__, feature), feature)
    assert len(losses) == 2 * stages
    for key, loss in losses.items():
        assert math.isfinite(loss.item())
        assert (loss != unweighed[key]) == key.startswith("loss_cls"), key


def test_a_predictor_of_a_users_own_stays(tiny_cfg):
    class Own(FastRCNNOutputLayers):
        pass

    stock = build(tiny_cfg, "StandardROIHeads", "stride16").box_predictor
    assert type(stock) is FastRCNNOutputLayers
    stock.__class__ = Own
    assert build_cost_sensitive_predictor(tiny_cfg(), stock) is stock


def layers(alpha, num_classes=1, **kwargs):
    return CostSensitiveFastRCNNOutputLayers(
        ShapeSpec(channels=4),
        alpha=alpha,
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        num_classes=num_classes,
        **kwargs,
    )


def losses_of(predictor, scores, classes):
    scores = torch.tensor(scores).reshape(len(classes), predictor.num_classes + 1)
    boxes = Boxes(torch.tensor([BOX]).repeat(len(classes), 1))
    proposals = Instances((64, 64), proposal_boxes=boxes, gt_boxes=boxes)
    proposals.gt_classes = torch.tensor(classes, dtype=torch.int64)
    deltas = torch.full((len(classes), 4 * predictor.num_classes), 0.1)
    with EventStorage():
        return predictor.losses((scores, deltas), [proposals])


@pytest.mark.parametrize("loss_weight", [1.0, 2.0])
@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        # A lesion scored 3/4 costs ln(4/3); two backgrounds scored 1/2 cost ln 2 each.
        (1.0, (math.log(4 / 3) + 2 * LN2) / 3),
        (3.0, (3 * math.log(4 / 3) + 2 * LN2) / (3 + 2)),
    ],
)
def test_hand_worked_weighted_mean(alpha, expected, loss_weight):
    scores = [[math.log(3), 0.0], [0.0, 0.0], [0.0, 0.0]]
    predictor = layers(alpha, loss_weight=loss_weight)
    losses = losses_of(predictor, scores, [0, 1, 1])
    assert losses["loss_cls"].item() == pytest.approx(loss_weight * expected, rel=1e-6)
    stock = losses_of(layers(1.0, loss_weight=loss_weight), scores, [0, 1, 1])
    assert torch.equal(losses["loss_box_reg"], stock["loss_box_reg"])


def test_every_type_weighs_alpha_and_background_one():
    # Scores 0 of three: ln 3 each. Wrong scores make the weights visible: type 1 at p = 1/2,
    # background at p = 1/4 of (ln 2, 0, 0).
    scores = [[0.0, LN2, 0.0], [LN2, 0.0, 0.0]]
    losses = losses_of(layers(3.0, num_classes=2), scores, [1, 2])
    expected = (3 * LN2 + math.log(4)) / (3 + 1)
    assert losses["loss_cls"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_no_proposal_is_a_loss_of_zero(alpha):
    assert losses_of(layers(alpha), [], [])["loss_cls"] == 0
    with EventStorage():
        losses = layers(alpha).losses((torch.zeros(0, 2), torch.zeros(0, 4)), [])
    assert losses["loss_cls"] == 0


@pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf])
def test_bad_alpha_is_an_error(alpha):
    message = f"MODEL.ROI_HEADS.COST.ALPHA must be a positive number, got {alpha}"
    with pytest.raises(ValueError, match=message):
        layers(alpha)


# ---- the vote ------------------------------------------------------------------------------------


def test_hand_worked_votes():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    # IoU with the first box: 1, 80 / 120 = 2/3, 50 / 150 = 1/3, 0.
    voters = torch.tensor(
        [BOX, [0.0, 2.0, 10.0, 12.0], [5.0, 0.0, 15.0, 10.0], [30.0, 0.0, 40.0, 9.0]]
    )
    scores = torch.tensor([0.6, 0.2, 0.2, 0.9])
    first = vote_boxes(boxes, voters, scores, iou_threshold=0.5)
    # (0.6 * 0 + 0.2 * 2) / 0.8 = 0.5; no voter of the second.
    torch.testing.assert_close(
        first, torch.tensor([[0.0, 0.5, 10.0, 10.5], [50.0, 50.0, 60.0, 60.0]])
    )
    first = vote_boxes(boxes, voters, scores, iou_threshold=0.3)
    torch.testing.assert_close(first[0], torch.tensor([1.0, 0.4, 11.0, 10.4]))
    assert vote_boxes(boxes[:0], voters, scores, iou_threshold=0.3).shape == (0, 4)


@pytest.mark.parametrize("agnostic", [False, True])
def test_boxes_vote_within_their_class_and_scores_stay(agnostic):
    def infer(thresh):
        predictor = layers(
            1.0, num_classes=2, cls_agnostic_bbox_reg=agnostic, test_score_thresh=0.05,
            test_nms_thresh=0.3, test_vote_thresh=thresh,
        )  # fmt: skip
        return predictor.inference((scores, torch.zeros(5, 4 if agnostic else 8)), [proposals])

    # Two of class 0 that overlap by 2/3, one of class 1 between them, one below the threshold
    # of scores, one that is not finite.
    boxes = [BOX, [0.0, 2.0, 10.0, 12.0], [0.0, 1.0, 10.0, 11.0], [0.0, 1.0, 10.0, 11.0], BOX]
    proposals = Instances((64, 64), proposal_boxes=Boxes(torch.tensor(boxes)))
    proposals.objectness_logits = torch.zeros(5)
    p = torch.tensor([[0.6, 0.01, 0.39], [0.2, 0.01, 0.79], [0.01, 0.8, 0.19], [0.04, 0.04, 0.92],
                      [0.9, 0.05, 0.05]])  # fmt: skip
    scores = p.log()
    scores[4] = math.nan
    (stock,), kept = infer(0.0)
    (voted,), kept_voted = infer(0.3)
    assert torch.equal(kept[0], kept_voted[0]) and kept[0].tolist() == [2, 0]
    assert torch.equal(stock.scores, voted.scores)
    assert stock.pred_boxes.tensor.tolist() == [[0, 1, 10, 11], BOX]
    expected = torch.tensor([[0.0, 1.0, 10.0, 11.0], [0.0, 0.5, 10.0, 10.5]])
    torch.testing.assert_close(voted.pred_boxes.tensor, expected)
    (outside,), _ = infer(1.0)
    assert torch.equal(outside.pred_boxes.tensor, stock.pred_boxes.tensor)


# ---- soft NMS ------------------------------------------------------------------------------------


def test_soft_nms_by_hand():
    # IoU of the first with the second 80 / 120 = 2/3, with the third 50 / 150 = 1/3, with the
    # fourth 0; of the second with the third 0.8 * 0.5 / (2 - 0.4) = 0.25.
    boxes = torch.tensor([BOX, [0, 2, 10, 12], [5, 0, 15, 10], [30, 0, 40, 9]]).float()
    scores, one = torch.tensor([0.8, 0.7, 0.6, 0.3]), torch.zeros(4)
    order, found = soft_nms(boxes, scores, one, sigma=0.5)
    second, third = 0.7 * math.exp(-8 / 9), 0.6 * math.exp(-2 / 9)
    assert order.tolist() == [0, 2, 3, 1]
    second *= math.exp(-2 * 0.25**2)
    torch.testing.assert_close(found, torch.tensor([0.8, third, 0.3, second]))
    order, found = soft_nms(boxes, scores, one, sigma=0.5, score_threshold=0.3, max_boxes=3)
    assert order.tolist() == [0, 2]  # a score is above the threshold, as Detectron2's
    assert soft_nms(boxes, scores, one, sigma=0.5, max_boxes=1)[0].tolist() == [0]
    order, found = soft_nms(boxes, scores, torch.arange(4), sigma=0.5)
    assert order.tolist() == [0, 1, 2, 3] and torch.equal(found, scores)


def test_soft_nms_of_nothing_and_of_boxes_without_area():
    for boxes, max_boxes in (([], 100), ([BOX], 0)):
        boxes = torch.tensor(boxes).reshape(-1, 4)
        one = torch.ones(len(boxes))
        order, scores = soft_nms(boxes, one, one, sigma=0.1, max_boxes=max_boxes)
        assert len(order) == len(scores) == 0
        assert boxes[order].shape == (0, 4)
    scores = torch.tensor([0.2, 0.4])
    order, found = soft_nms(torch.zeros(2, 4), scores, torch.zeros(2), sigma=0.1)
    assert order.tolist() == [1, 0] and torch.equal(found, scores.flip(0))


@given(st.integers(0, 2**31), st.integers(1, 30), st.floats(0.05, 2))
def test_soft_nms_lowers_scores_and_takes_the_first_box_of_nms(seed, number, sigma):
    generator = torch.Generator().manual_seed(seed)
    corner, side = (20 * torch.rand(2, number, 2, generator=generator)).unbind()
    boxes, scores = torch.cat([corner, corner + side], 1), torch.rand(number, generator=generator)
    classes = torch.randint(2, (number,), generator=generator)
    order, found = soft_nms(boxes, scores, classes, sigma=sigma)
    assert order.tolist() == [*dict.fromkeys(order.tolist())]  # none twice
    assert (found <= scores[order]).all() and (found.diff() <= 0).all()
    assert len(order) == number or (found > 0).all()
    # By a small sigma all that overlaps is lowered to nothing, as it is dropped by NMS at 0.
    iou = box_iou(boxes, boxes)
    if ((iou == 0) | (iou > 0.01)).all():
        order, _ = soft_nms(boxes, scores, classes, sigma=1e-9)
        assert torch.equal(order, batched_nms(boxes, scores, classes, 0.0))


def test_soft_nms_takes_the_place_of_nms_in_the_test():
    boxes = [BOX, [0.0, 2.0, 10.0, 12.0], [30.0, 0.0, 40.0, 9.0]]
    proposals = Instances((64, 64), proposal_boxes=Boxes(torch.tensor(boxes)))
    p = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.3, 0.7]])

    def infer(**kwargs):
        settings = {"test_score_thresh": 0.05, "test_nms_thresh": 0.3} | kwargs
        predictor = layers(1.0, num_classes=1, **settings)
        (found,), (kept,) = predictor.inference((p.log(), torch.zeros(3, 4)), [proposals])
        return found, kept.tolist()

    stock, kept = infer()
    assert kept == [1, 2]
    found, kept = infer(test_soft_nms_sigma=0.5)
    lowered = 0.6 * math.exp(-8 / 9)
    assert kept == [1, 2, 0]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.3, lowered]))
    assert found.pred_boxes.tensor.tolist() == [boxes[i] for i in kept]
    found, kept = infer(test_soft_nms_sigma=0.5, test_topk_per_image=1)
    assert kept == [1] and torch.equal(found.scores, stock.scores[:1])
    # All have a vote, by their own scores: (0.9 * 2 + 0.6 * 0) / 1.5 = 1.2.
    found, _ = infer(test_soft_nms_sigma=0.5, test_vote_thresh=0.5)
    voted = torch.tensor([[0.0, 1.2, 10.0, 11.2], boxes[2], [0.0, 1.2, 10.0, 11.2]])
    torch.testing.assert_close(found.pred_boxes.tensor, voted)


@pytest.mark.parametrize("sigma", [-0.1, math.inf, math.nan])
def test_bad_sigma_of_soft_nms_is_an_error(sigma):
    with pytest.raises(ValueError, match="SOFT_NMS_SIGMA_TEST is"):
        layers(1.0, test_soft_nms_sigma=sigma)


def test_no_proposal_has_no_vote():
    proposals = Instances((64, 64), proposal_boxes=Boxes(torch.zeros(0, 4)))
    predictor = layers(1.0, test_vote_thresh=0.5)
    (found,), _ = predictor.inference((torch.zeros(0, 2), torch.zeros(0, 4)), [proposals])
    assert len(found) == 0


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_bad_threshold_of_the_vote_is_an_error(threshold):
    with pytest.raises(ValueError, match="VOTE_THRESH_TEST is"):
        layers(1.0, test_vote_thresh=threshold)


# ---- refinement ----------------------------------------------------------------------------------


def refining(tiny_cfg, times, num_classes=1, thresh=0.0):
    """Heads that move each box by half of its width to the right; with two classes, that shift
    those of the second down instead. Its scores depend on where a box lies."""
    heads = build(
        tiny_cfg, "CostSensitiveROIHeads", "stride16",
        "MODEL.ROI_HEADS.REFINE_TEST", times, "MODEL.ROI_HEADS.REFINE_THRESH_TEST", thresh,
        "MODEL.ROI_HEADS.NUM_CLASSES", num_classes,
        "MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.05,
    ).eval()  # fmt: skip
    predictor = heads.box_predictor
    with torch.no_grad():
        predictor.bbox_pred.weight.zero_()
        predictor.bbox_pred.bias.zero_()
        predictor.bbox_pred.bias[0] = 5.0  # in tenths of the width
        if num_classes == 2:
            predictor.bbox_pred.bias[5] = 10.0  # in tenths of the height
    return heads


def found_by(heads, *boxes):
    torch.manual_seed(2)
    features = {"stride16": torch.randn(len(boxes), 16, 4, 4)}
    proposals = [
        Instances((64, 64), proposal_boxes=Boxes(torch.tensor(b).reshape(-1, 4))) for b in boxes
    ]
    for p in proposals:
        p.objectness_logits = torch.zeros(len(p))
    images = ImageList(torch.zeros(len(boxes), 3, 64, 64), [(64, 64)] * len(boxes))
    with torch.no_grad():
        return heads(images, features, proposals)[0]


def test_a_box_is_refined_that_often_and_keeps_its_score(tiny_cfg):
    boxes = [[[4.0, 4.0, 12.0, 20.0], [40.0, 8.0, 56.0, 24.0]], []]
    first, none = found_by(refining(tiny_cfg, 0), *boxes)
    assert len(none) == 0 and len(first) == 2
    assert first.scores[0] != first.scores[1]
    for times, shift, at_edge in ((1, 2, 56.0), (2, 3, 60.0)):
        found, none = found_by(refining(tiny_cfg, times), *boxes)
        assert len(none) == 0
        assert torch.equal(found.scores, first.scores)
        moved = {tuple(box) for box in found.pred_boxes.tensor.tolist()}
        # By half of 8 a time; the other is cut off at the edge, and half of what is left.
        assert (4.0 + 4 * shift, 4.0, 12.0 + 4 * shift, 20.0) in moved
        assert (at_edge, 8.0, 64.0, 24.0) in moved


def test_a_box_is_refined_as_its_likeliest_class(tiny_cfg):
    heads = refining(tiny_cfg, 1, num_classes=2)
    with torch.no_grad():
        heads.box_predictor.cls_score.weight.zero_()
        heads.box_predictor.cls_score.bias[:] = torch.tensor([1.0, 2.0, 0.0])
    (found,) = found_by(heads, [[4.0, 4.0, 12.0, 12.0]])
    boxes = dict(zip(found.pred_classes.tolist(), found.pred_boxes.tensor.tolist()))
    # Down by a height as the second; then each by its own class's.
    assert boxes == {0: [8.0, 12.0, 16.0, 20.0], 1: [4.0, 20.0, 12.0, 28.0]}


def test_what_is_scored_too_low_is_not_refined(tiny_cfg):
    heads, seen = refining(tiny_cfg, 2), []
    head = heads.box_head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with torch.no_grad():
        heads.box_predictor.cls_score.weight.zero_()
        heads.box_predictor.cls_score.bias[:] = torch.tensor([-9.0, 9.0])
    (found,) = found_by(heads, [[4.0, 4.0, 12.0, 12.0]])
    assert len(found) == 0 and seen == [1]
    head.remove()


def test_boxes_of_low_scores_stay_as_they_are(tiny_cfg):
    boxes = [[[4.0, 4.0, 12.0, 20.0], [40.0, 8.0, 56.0, 24.0]], [[4.0, 4.0, 12.0, 20.0]]]
    first = found_by(refining(tiny_cfg, 0), *boxes)
    all_scores = torch.cat([found.scores for found in first])
    between = (all_scores.min() + all_scores.max()).item() / 2
    for stock, found in zip(first, found_by(refining(tiny_cfg, 2, thresh=between), *boxes)):
        assert torch.equal(found.scores, stock.scores)
        low = found.scores < between
        assert torch.equal(found.pred_boxes.tensor[low], stock.pred_boxes.tensor[low])
        assert (found.pred_boxes.tensor[~low] != stock.pred_boxes.tensor[~low]).any(dim=1).all()


@pytest.mark.parametrize("thresh", [-0.1, 1.1, math.nan])
def test_numbers_of_the_refinement_out_of_range(tiny_cfg, thresh):
    with pytest.raises(ValueError, match="REFINE_TEST is -1 .*expected 0 or more"):
        refining(tiny_cfg, -1)
    with pytest.raises(ValueError, match="REFINE_THRESH_TEST"):
        refining(tiny_cfg, 1, thresh=thresh)
