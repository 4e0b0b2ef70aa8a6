"""Cost-sensitive region proposal network.

Shape glossary, as in ``detectron2.modeling.proposal_generator.rpn``:
    N: images in the batch
    L: feature maps
    A: cell anchors of a position
    Hi, Wi: height, width of the i-th feature map
"""

import math

import torch
from detectron2.config import configurable
from detectron2.layers import cat
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from torch import nn

from .cost import cost_sensitive_bce, positive_weight
from .sampling import AnchorSampler, SampledAnchors, build_anchor_sampler, screen_by_nms

NORMALIZERS = ("num_samples", "sum_weights")


@RPN_HEAD_REGISTRY.register()
class CostSensitiveRPNHead(StandardRPNHead):
    """:class:`StandardRPNHead` whose objectness starts at a prior probability."""

    @configurable
    def __init__(self, *, prior_prob: float = 0.0, **kwargs):
        """
        Args:
            prior_prob: initial objectness of every anchor, in (0, 1); 0 leaves the bias at 0.
            kwargs: arguments of :class:`StandardRPNHead`.

        Raises:
            ValueError: if prior_prob is out of its range.
        """
        super().__init__(**kwargs)
        if not 0 <= prior_prob < 1:
            raise ValueError(f"MODEL.RPN.PRIOR_PROB must be in [0, 1), got {prior_prob}.")
        if prior_prob > 0:
            # sigmoid(bias) = prior (focal loss paper, arXiv:1708.02002, section 4.1)
            nn.init.constant_(self.objectness_logits.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "prior_prob": cfg.MODEL.RPN.PRIOR_PROB,
        }


@PROPOSAL_GENERATOR_REGISTRY.register()
class CostSensitiveRPN(RPN):
    """:class:`RPN` with a sampler of its own and positives that weigh alpha in the loss.

    With ``alpha=1``, a sampler at ratio 1 that fills up, and no screening, losses and gradients
    equal those of :class:`RPN` to the last bit.
    """

    @configurable
    def __init__(
        self,
        *,
        anchor_sampler: AnchorSampler,
        alpha: float = 1.0,
        normalizer: str = "num_samples",
        screen_nms_thresh: float = 0.0,
        **kwargs,
    ):
        """
        Args:
            anchor_sampler: decides which anchors enter the loss.
            alpha: weight of a positive anchor in the objectness loss, > 0.
            normalizer: divisor of the objectness loss, "num_samples" or "sum_weights".
            screen_nms_thresh: IoU of the NMS on candidates before sampling; 0 is off.
            kwargs: arguments of :class:`RPN`.

        Raises:
            ValueError: if an argument is out of its range.
        """
        super().__init__(**kwargs)
        if not 0 < alpha < math.inf:
            raise ValueError(f"MODEL.RPN.COST.ALPHA must be a positive number, got {alpha}.")
        if normalizer not in NORMALIZERS:
            raise ValueError(
                f"MODEL.RPN.COST.NORMALIZER is '{normalizer}', expected one of {NORMALIZERS}."
            )
        if not 0 <= screen_nms_thresh <= 1:
            raise ValueError(
                f"MODEL.RPN.SAMPLER.NMS_THRESH must be in [0, 1], got {screen_nms_thresh}."
            )
        self.anchor_sampler = anchor_sampler
        self.alpha = float(alpha)
        self.normalizer = normalizer
        self.screen_nms_thresh = screen_nms_thresh

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "anchor_sampler": build_anchor_sampler(cfg),
            "alpha": cfg.MODEL.RPN.COST.ALPHA,
            "normalizer": cfg.MODEL.RPN.COST.NORMALIZER,
            "screen_nms_thresh": cfg.MODEL.RPN.SAMPLER.NMS_THRESH,
        }

    def _subsample_labels(self, label: torch.Tensor) -> torch.Tensor:
        # Sampling needs the predictions, which RPN.label_and_sample_anchors does not have: it
        # happens in `losses`, and labels pass through here as the matcher gave them.
        return label

    @torch.no_grad()
    def sample_anchors(
        self, anchors: Boxes, logits: torch.Tensor, gt_labels: list[torch.Tensor]
    ) -> list[SampledAnchors]:
        """Screens and samples each image's anchors, then lets the sampler learn from the batch.

        Args:
            anchors: sum(Hi*Wi*A) boxes, the same for all images.
            logits: objectness, sized (N, sum(Hi*Wi*A)).
            gt_labels: the matcher's labels of each of N images, sized (sum(Hi*Wi*A),).

        Returns:
            The sampled anchors of each of N images.
        """
        ratio = self.anchor_sampler.ratio
        samples = []
        for labels, image_logits in zip(gt_labels, logits):
            if self.screen_nms_thresh > 0:
                labels = screen_by_nms(
                    labels,
                    image_logits,
                    anchors.tensor,
                    self.screen_nms_thresh,
                    topk=2 * self.batch_size_per_image,
                )
            samples.append(self.anchor_sampler.sample(labels, ratio))
        probs = logits.float().sigmoid()
        self.anchor_sampler.update(list(probs), samples)

        storage = get_event_storage()
        storage.put_scalar("rpn/ratio_target", ratio)
        positives = sum(s.num_pos for s in samples)
        if positives:
            # Counts as weighed, over the images that have positives.
            weighed = [(s.num_pos * s.pos_weight, s.num_neg) for s in samples if s.num_pos]
            num_pos, num_neg = (sum(x) for x in zip(*weighed))
            storage.put_scalar("rpn/ratio_actual", num_pos / max(num_neg, 1))
            # What a sampled positive weighs in the loss, a negative being 1.
            storage.put_scalar("rpn/pos_weight", self.alpha * num_pos / positives)
            pos_probs = [p[s.labels == 1].sum() for p, s in zip(probs, samples)]
            storage.put_scalar("rpn/pos_score_mean", (sum(pos_probs) / positives).item())
        return samples

    @torch.jit.unused
    def losses(self, anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes):
        """As :meth:`RPN.losses`; ``gt_labels`` are the matcher's, before sampling."""
        logits = cat(pred_objectness_logits, dim=1)
        samples = self.sample_anchors(Boxes.cat(anchors), logits.detach(), gt_labels)
        gt_labels = [s.labels for s in samples]
        losses = super().losses(
            anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )

        labels = torch.stack(gt_labels)
        valid_mask = labels >= 0
        # (N, 1): "repeat" weighs the positives of each image by its own factor.
        repeat = torch.tensor([[s.pos_weight] for s in samples], device=labels.device)
        weight = torch.where(labels == 1, repeat, 1.0)[valid_mask]
        labels = labels[valid_mask]
        objectness_loss = cost_sensitive_bce(
            logits[valid_mask], labels, self.alpha, "sum", weight=weight
        )
        if self.normalizer == "sum_weights":
            normalizer = (positive_weight(labels, self.alpha) * weight).sum().clamp(min=1)
        else:
            normalizer = self.batch_size_per_image * len(gt_labels)
        losses["loss_rpn_cls"] = (
            objectness_loss / normalizer * self.loss_weight.get("loss_rpn_cls", 1.0)
        )
        return losses
