"""Cost-sensitive second stage: an extension beyond the paper, off by default."""

import math

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers


class CostSensitiveFastRCNNOutputLayers(FastRCNNOutputLayers):
    """:class:`FastRCNNOutputLayers` whose foreground proposals weigh alpha in the class loss."""

    @configurable
    def __init__(self, input_shape, *, alpha: float = 1.0, **kwargs):
        """
        Args:
            input_shape: shape of the box head's output.
            alpha: weight of a foreground proposal, > 0; the softmax loss is the weighted mean.
            kwargs: arguments of :class:`FastRCNNOutputLayers`.

        Raises:
            ValueError: if alpha is not a positive finite number, or weighs a sigmoid loss.
        """
        super().__init__(input_shape, **kwargs)
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
        }

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


@ROI_HEADS_REGISTRY.register()
class CostSensitiveROIHeads(StandardROIHeads):
    """:class:`StandardROIHeads` with ``MODEL.ROI_HEADS.COST.ALPHA``."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictor"] = CostSensitiveFastRCNNOutputLayers(cfg, ret["box_head"].output_shape)
        return ret


@ROI_HEADS_REGISTRY.register()
class CostSensitiveRes5ROIHeads(Res5ROIHeads):
    """:class:`Res5ROIHeads` with ``MODEL.ROI_HEADS.COST.ALPHA``."""

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        channels = ret["box_predictor"].cls_score.in_features
        ret["box_predictor"] = CostSensitiveFastRCNNOutputLayers(
            cfg, ShapeSpec(channels=channels, height=1, width=1)
        )
        return ret


@ROI_HEADS_REGISTRY.register()
class CostSensitiveCascadeROIHeads(CascadeROIHeads):
    """:class:`CascadeROIHeads` with ``MODEL.ROI_HEADS.COST.ALPHA`` in each of its stages."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        weights = cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS
        ret["box_predictors"] = [
            CostSensitiveFastRCNNOutputLayers(
                cfg, head.output_shape, box2box_transform=Box2BoxTransform(weights=stage)
            )
            for head, stage in zip(ret["box_heads"], weights)
        ]
        return ret
