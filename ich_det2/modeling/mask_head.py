"""Masks of the boxes: Mask R-CNN's head, for data of which some boxes have a mask.

Mask R-CNN is He et al. 2017 (arXiv:1703.06870). Layers, loss and inference are Detectron2's; that a
box whose mask is not known teaches no mask was chosen here.

Shape glossary: R foreground proposals of all images, C channels, S the side of a pooled proposal.
"""

import torch
from detectron2.modeling.roi_heads.mask_head import (
    ROI_MASK_HEAD_REGISTRY,
    MaskRCNNConvUpsampleHead,
)
from detectron2.structures import Instances


@ROI_MASK_HEAD_REGISTRY.register()
class KnownMaskHead(MaskRCNNConvUpsampleHead):
    """:class:`MaskRCNNConvUpsampleHead` that learns from the masks that are known.

    It goes with any ROI heads that have a mask head, by ``MODEL.ROI_MASK_HEAD.NAME``.
    """

    def forward(self, x: torch.Tensor, instances: list[Instances]):
        """
        Args:
            x: (R, C, S, S).
            instances: of each image; in training with "gt_has_mask", bool, of the box that each
                proposal is of. All masks are known without it.

        Returns:
            As :meth:`MaskRCNNConvUpsampleHead.forward`. Where no mask is known the loss is 0, and
            every layer takes part in it.
        """
        if self.training:
            known = [
                i.gt_has_mask if i.has("gt_has_mask") else torch.ones(len(i), dtype=torch.bool)
                for i in instances
            ]
            instances = [i[k] for i, k in zip(instances, known)]
            x = x[torch.cat([k.to(x.device) for k in known])]
        return super().forward(x, instances)
