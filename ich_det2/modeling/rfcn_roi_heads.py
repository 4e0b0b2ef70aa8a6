"""The second stage of R-FCN: maps that are scored before they are pooled.

R-FCN is Dai et al. 2016 (arXiv:1605.06409); Le et al. used it beside Faster R-CNN to find
hemorrhages of four types on windowed DICOM. What their text leaves open is as in R-FCN's, but for
its online hard example mining, in whose place Detectron2's sampling of proposals stands.

Shape glossary: N images, C channels, H x W a map, R proposals of all images, K classes of
foreground, k x k the parts that a proposal is cut into.
"""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, ROIHeads
from torch import nn
from torch.nn import functional as F
from torchvision.ops import ps_roi_pool

from .roi_heads import CostSensitiveFastRCNNOutputLayers


class PositionSensitiveOutputLayers(CostSensitiveFastRCNNOutputLayers):
    """Scores and deltas of each part of a proposal out of maps of its own, and their mean.

    Equation (1) of R-FCN, with the softmax over the means as its equation (2); losses, NMS and the
    vote on boxes are the superclass's.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, side: int, **kwargs):
        """
        Args:
            input_shape: of the map, with its stride.
            side: k.
            kwargs: arguments of :class:`CostSensitiveFastRCNNOutputLayers`.
        """
        super().__init__(ShapeSpec(channels=input_shape.channels), **kwargs)
        self.side, self.scale = side, 1 / input_shape.stride
        # In the order that ps_roi_pool reads: for each output, k x k maps row by row.
        for name, std in (("cls_score", 0.01), ("bbox_pred", 0.001)):
            maps = side**2 * getattr(self, name).out_features
            layer = nn.Conv2d(input_shape.channels, maps, 1)
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
            setattr(self, name, layer)

    @classmethod
    def from_config(cls, cfg, input_shape):
        side = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        return {**super().from_config(cfg, input_shape), "side": side}

    def forward(
        self, features: torch.Tensor, boxes: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            features: (N, C, H, W).
            boxes: N tensors (R_i, 4), XYXY, pixels of the input.

        Returns:
            Logits (R, K + 1), background last, and deltas (R, 4 K), or (R, 4) if they are class
            agnostic.
        """
        boxes = [b.to(features) for b in boxes]

        def vote(maps: torch.Tensor) -> torch.Tensor:
            return ps_roi_pool(maps, boxes, self.side, self.scale).mean(dim=(2, 3))

        return vote(self.cls_score(features)), vote(self.bbox_pred(features))


@ROI_HEADS_REGISTRY.register()
class RFCNROIHeads(ROIHeads):
    """Position-sensitive ROI heads on one map, with ``MODEL.ROI_HEADS.COST.ALPHA``.

    A convolution of 1 x 1 brings the map to ``MODEL.ROI_BOX_HEAD.CONV_DIM`` channels, those of the
    paper's 1024; ``MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION`` is k.
    """

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        conv: nn.Module,
        box_predictor: PositionSensitiveOutputLayers,
        **kwargs,
    ):
        """
        Args:
            in_feature: name of the backbone's map.
            conv: what the map goes through first.
            box_predictor: scores and deltas out of its output.
            kwargs: arguments of :class:`ROIHeads`.
        """
        super().__init__(**kwargs)
        self.in_feature, self.conv, self.box_predictor = in_feature, conv, box_predictor

    @classmethod
    def from_config(cls, cfg, input_shape):
        names, head = cfg.MODEL.ROI_HEADS.IN_FEATURES, cfg.MODEL.ROI_BOX_HEAD
        if len(names) != 1:
            raise ValueError(
                f"MODEL.ROI_HEADS.IN_FEATURES is {list(names)}, but {cls.__name__} take one map."
            )
        shape, norm = input_shape[names[0]], get_norm(head.NORM, head.CONV_DIM)
        conv = Conv2d(
            shape.channels, head.CONV_DIM, 1, bias=norm is None, norm=norm, activation=F.relu
        )
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        out = ShapeSpec(channels=head.CONV_DIM, stride=shape.stride)
        return {
            **super().from_config(cfg),
            "in_feature": names[0],
            "conv": conv,
            "box_predictor": PositionSensitiveOutputLayers(cfg, out),
        }

    def forward(self, images, features, proposals, targets=None):
        """As :meth:`ROIHeads.forward`."""
        if self.training:
            proposals = self.label_and_sample_proposals(proposals, targets)
        boxes = [p.proposal_boxes.tensor for p in proposals]
        predictions = self.box_predictor(self.conv(features[self.in_feature]).float(), boxes)
        if self.training:
            return proposals, self.box_predictor.losses(predictions, proposals)
        return self.box_predictor.inference(predictions, proposals)[0], {}
