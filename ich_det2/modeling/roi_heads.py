"""Cost-sensitive second stage, and boxes refined and voted on: beyond the paper, off by default."""

import math

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from torchvision.ops import box_iou


class CostSensitiveFastRCNNOutputLayers(FastRCNNOutputLayers):
    """:class:`FastRCNNOutputLayers` whose foreground proposals weigh alpha in the class loss.

    In the test :func:`soft_nms` may take the place of NMS, and the boxes that are left may be moved
    by all others, see :func:`vote_boxes`.
    """

    @configurable
    def __init__(
        self,
        input_shape,
        *,
        alpha: float = 1.0,
        test_soft_nms_sigma: float = 0.0,
        test_vote_thresh: float = 0.0,
        **kwargs,
    ):
        """
        Args:
            input_shape: shape of the box head's output.
            alpha: weight of a foreground proposal, > 0; the softmax loss is the weighted mean.
            test_soft_nms_sigma: of :func:`soft_nms`, > 0; 0: NMS as stock.
            test_vote_thresh: IoU from which on a box has a vote, in (0, 1]; 0: no vote.
            kwargs: arguments of :class:`FastRCNNOutputLayers`.

        Raises:
            ValueError: if alpha is not a positive finite number, or weighs a sigmoid loss, or sigma
                or the threshold is out of its range.
        """
        super().__init__(input_shape, **kwargs)
        if not 0 <= test_vote_thresh <= 1:
            raise ValueError(
                f"MODEL.ROI_HEADS.VOTE_THRESH_TEST is {test_vote_thresh}, expected 0 to 1."
            )
        if not 0 <= test_soft_nms_sigma < math.inf:
            raise ValueError(
                f"MODEL.ROI_HEADS.SOFT_NMS_SIGMA_TEST is {test_soft_nms_sigma}, expected a finite"
                " number, 0 or more."
            )
        self.test_soft_nms_sigma = test_soft_nms_sigma
        self.test_vote_thresh = test_vote_thresh
        if not 0 < alpha < math.inf:
            raise ValueError(f"MODEL.ROI_HEADS.COST.ALPHA must be a positive number, got {alpha}.")
        if alpha != 1 and self.use_sigmoid_ce:
            raise ValueError(
                "MODEL.ROI_HEADS.COST.ALPHA weighs the softmax loss; it does not go with"
                " MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE."
            )
        self.alpha = float(alpha)

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "alpha": cfg.MODEL.ROI_HEADS.COST.ALPHA,
            "test_soft_nms_sigma": cfg.MODEL.ROI_HEADS.SOFT_NMS_SIGMA_TEST,
            "test_vote_thresh": cfg.MODEL.ROI_HEADS.VOTE_THRESH_TEST,
        }

    def inference(self, predictions, proposals):
        """As :meth:`FastRCNNOutputLayers.inference`."""
        if self.test_soft_nms_sigma == self.test_vote_thresh == 0:
            return super().inference(predictions, proposals)
        boxes = self.predict_boxes(predictions, proposals)
        probs = self.predict_probs(predictions, proposals)
        soft = self.test_soft_nms_sigma > 0
        most = self.test_topk_per_image
        found, kept = fast_rcnn_inference(
            boxes,
            probs,
            [x.image_size for x in proposals],
            self.test_score_thresh,
            1.0 if soft else self.test_nms_thresh,  # 1 drops none
            -1 if soft else most,
        )
        if soft:
            for i, instances in enumerate(found):
                order, scores = soft_nms(
                    instances.pred_boxes.tensor,
                    instances.scores,
                    instances.pred_classes,
                    sigma=self.test_soft_nms_sigma,
                    score_threshold=self.test_score_thresh,
                    max_boxes=most if most >= 0 else len(instances),
                )
                found[i], kept[i] = instances[order], kept[i][order]
                found[i].scores = scores
        if self.test_vote_thresh == 0:
            return found, kept
        for instances, every, scores in zip(found, boxes, probs):
            every = every.view(-1, every.shape[1] // 4, 4)
            every = every.expand(-1, self.num_classes, 4)
            for k in range(self.num_classes):
                voting = every[:, k].isfinite().all(dim=1) & (scores[:, k] > self.test_score_thresh)
                kept_k = instances.pred_classes == k
                instances.pred_boxes.tensor[kept_k] = vote_boxes(
                    instances.pred_boxes.tensor[kept_k],
                    every[voting, k],
                    scores[voting, k],
                    iou_threshold=self.test_vote_thresh,
                )
            instances.pred_boxes.clip(instances.image_size)
        return found, kept

    def losses(self, predictions, proposals):
        """As :meth:`FastRCNNOutputLayers.losses`."""
        losses = super().losses(predictions, proposals)
        if self.alpha == 1 or not proposals:
            return losses
        scores = predictions[0]
        gt_classes = cat([p.gt_classes for p in proposals], dim=0)
        if gt_classes.numel() == 0:
            return losses
        # The last class is background.
        weight = torch.full((self.num_classes + 1,), self.alpha, device=scores.device)
        weight[-1] = 1.0
        loss_cls = F.cross_entropy(scores.float(), gt_classes, weight=weight)
        losses["loss_cls"] = loss_cls * self.loss_weight.get("loss_cls", 1.0)
        return losses


def soft_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    *,
    sigma: float,
    score_threshold: float = 0.0,
    max_boxes: int = 100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft-NMS with a Gaussian (Bodla et al. 2017, arXiv:1704.04503, section 3).

    Each box that is taken, the highest scored that is left, lowers the scores of the others of its
    class by exp(-IoU^2 / sigma) in place of dropping them: a bleed that is met by a box that lies
    ill has others left.

    Args:
        boxes: (D, 4), XYXY.
        scores: (D,), >= 0.
        classes: (D,).
        sigma: > 0; the larger, the less overlapping boxes are lowered.
        score_threshold: >= 0; boxes whose scores do not stay above it are dropped.
        max_boxes: taken at most.

    Returns:
        Indices of the boxes taken, by falling score, and their scores.
    """
    # One of score 0 for the end, so that there always is a highest.
    boxes, scores = torch.cat([boxes, boxes.new_zeros(1, 4)]), F.pad(scores, (0, 1))
    classes = F.pad(classes, (0, 1), value=-1)
    iou = box_iou(boxes, boxes).nan_to_num(0.0)  # of boxes without area
    keeps = (-iou.square() / sigma).exp()
    keeps = torch.where(classes[:, None] == classes, keeps, torch.ones_like(keeps))
    number = torch.ones_like(scores).cumsum(0)  # not eye: a graph is for any number of boxes
    keeps = keeps * (number[:, None] != number)
    steps = max_boxes if torch.jit.is_tracing() else min(max_boxes, len(boxes))
    order, taken = [], []
    for _ in range(steps):
        best = scores.argmax()
        order.append(best)
        taken.append(scores[best])
        scores = scores * keeps[best]
    if not order:
        return torch.zeros_like(scores[:0], dtype=torch.long), scores[:0]
    order, taken = torch.stack(order), torch.stack(taken)
    good = taken > score_threshold
    return order[good], taken[good]


def vote_boxes(
    boxes: torch.Tensor, voters: torch.Tensor, scores: torch.Tensor, *, iou_threshold: float
) -> torch.Tensor:
    """Box voting (Gidaris and Komodakis 2015, arXiv:1505.01749, section 5).

    Args:
        boxes: (D, 4), XYXY, each of them also among the voters.
        voters: (R, 4), XYXY.
        scores: (R,), > 0, of the voters.
        iou_threshold: the least IoU with a box to have a vote on it.

    Returns:
        (D, 4): of each box the mean of its voters, by their scores; the box where there is none.
    """
    voters, scores = voters.to(boxes.dtype), scores.to(boxes.dtype)
    weights = scores * (box_iou(boxes, voters) >= iou_threshold)
    total = weights.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weights @ voters / total.clamp(min=1e-12), boxes)


def build_cost_sensitive_predictor(cfg, stock: FastRCNNOutputLayers):
    """A stock predictor with the weights it starts from, its class loss weighed by alpha.

    Args:
        cfg: config; ``MODEL.ROI_HEADS.COST.ALPHA`` is read, and what the stock predictor reads.
        stock: predictor of Detectron2's; one of a user's own class is given back as it is.
    """
    if type(stock) is not FastRCNNOutputLayers:
        return stock
    with torch.random.fork_rng(devices=[]):  # what is drawn after it stays as with stock heads
        predictor = CostSensitiveFastRCNNOutputLayers(
            cfg,
            ShapeSpec(channels=stock.cls_score.in_features),
            box2box_transform=stock.box2box_transform,
        )
    predictor.load_state_dict(stock.state_dict())
    return predictor


class CostSensitiveMixin:
    """Lets ROI heads of Detectron2 weigh their class loss by ``MODEL.ROI_HEADS.COST.ALPHA``.

    It stands before the heads' class, as in ``class Mine(CostSensitiveMixin, StandardROIHeads)``.
    """

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        if "box_predictors" in ret:  # of the stages of a cascade
            predictors = ret["box_predictors"]
            ret["box_predictors"] = [build_cost_sensitive_predictor(cfg, p) for p in predictors]
        else:
            ret["box_predictor"] = build_cost_sensitive_predictor(cfg, ret["box_predictor"])
        return ret


@ROI_HEADS_REGISTRY.register()
class CostSensitiveROIHeads(CostSensitiveMixin, StandardROIHeads):
    """:class:`StandardROIHeads`, also on an FPN, with ``MODEL.ROI_HEADS.COST.ALPHA``.

    In the test boxes may be refined: what the second stage makes of a proposal is shown to it again
    as a proposal (iterative localization, Gidaris and Komodakis 2015, arXiv:1505.01749, section 4).
    The scores remain those of the RPN's proposals, which it has learnt to score.
    """

    @configurable
    def __init__(self, *, test_refinements: int = 0, test_refine_thresh: float = 0.0, **kwargs):
        """
        Args:
            test_refinements: how often a box is refined in the test, >= 0; 0 is stock.
            test_refine_thresh: the least score of a box that is refined, in [0, 1].
            kwargs: arguments of :class:`StandardROIHeads`.

        Raises:
            ValueError: if one of the numbers is out of its range.
        """
        super().__init__(**kwargs)
        if test_refinements < 0 or not 0 <= test_refine_thresh <= 1:
            raise ValueError(
                f"MODEL.ROI_HEADS.REFINE_TEST is {test_refinements} and REFINE_THRESH_TEST"
                f" {test_refine_thresh}, expected 0 or more, and 0 to 1."
            )
        self.test_refinements, self.test_refine_thresh = test_refinements, test_refine_thresh

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "test_refinements": cfg.MODEL.ROI_HEADS.REFINE_TEST,
            "test_refine_thresh": cfg.MODEL.ROI_HEADS.REFINE_THRESH_TEST,
        }

    def _forward_box(self, features, proposals):
        """As :meth:`StandardROIHeads._forward_box`."""
        if self.training or self.test_refinements == 0:
            return super()._forward_box(features, proposals)
        maps = [features[name] for name in self.box_in_features]

        def predict(proposals):
            pooled = self.box_pooler(maps, [x.proposal_boxes for x in proposals])
            return self.box_predictor(self.box_head(pooled))

        predictions = predict(proposals)
        for _ in range(self.test_refinements):
            predictions, proposals = self._refine(predict, predictions, proposals)
        return self.box_predictor.inference(predictions, proposals)[0]

    def _refine(self, predict, predictions, proposals) -> tuple[tuple, list[Instances]]:
        """Shows the predicted boxes, each of its likeliest class, to the second stage again.

        Returns:
            Scores as they were and the deltas of what is refined, and the proposals that these
            belong to.
        """
        (scores, deltas), predictor = predictions, self.box_predictor
        boxes = predictor.predict_boxes(predictions, proposals)
        probs = predictor.predict_probs(predictions, proposals)
        least = max(self.test_refine_thresh, predictor.test_score_thresh)
        whole = torch.jit.is_tracing()  # a graph refines all, since its norms need a box at least
        chosen, seen, after = [], [], []
        for every, prob, before in zip(boxes, probs, proposals):
            every = every.view(-1, every.shape[1] // 4, 4).expand(-1, self.num_classes, 4)
            score, k = prob[:, : self.num_classes].max(dim=1)
            own = every.gather(1, k[:, None, None].expand(-1, 1, 4)).squeeze(1)
            good = own.isfinite().all(dim=1) & (score > least)
            own = torch.where(good[:, None], own, before.proposal_boxes.tensor)
            after.append(Instances(before.image_size, proposal_boxes=Boxes(own)))
            after[-1].proposal_boxes.clip(before.image_size)
            chosen.append(good)
            seen.append(after[-1] if whole else after[-1][good])
        good = torch.cat(chosen)
        if whole:
            deltas = torch.where(good[:, None], predict(seen)[1], deltas)
        elif good.any():
            deltas = deltas.index_put((good,), predict(seen)[1])
        return (scores, deltas), after


@ROI_HEADS_REGISTRY.register()
class CostSensitiveRes5ROIHeads(CostSensitiveMixin, Res5ROIHeads):
    """:class:`Res5ROIHeads` with ``MODEL.ROI_HEADS.COST.ALPHA``."""


@ROI_HEADS_REGISTRY.register()
class CostSensitiveCascadeROIHeads(CostSensitiveMixin, CascadeROIHeads):
    """:class:`CascadeROIHeads` with ``MODEL.ROI_HEADS.COST.ALPHA`` in each of its stages."""
