"""The second stage of Inception V3: its last blocks on each proposal."""

from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY

from .backbone.torchvision_backbone import inception_v3_layers
from .roi_heads import CostSensitiveRes5ROIHeads


@ROI_HEADS_REGISTRY.register()
class InceptionV3ROIHeads(CostSensitiveRes5ROIHeads):
    """:class:`CostSensitiveRes5ROIHeads` whose fifth stage is torchvision's Mixed_7a to Mixed_7c.

    Mixed_7a halves the side without padding. The network's own map there is 17 x 17, which makes
    ``MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION`` 17 and the last map 8 x 8.
    """

    @classmethod
    def _build_res5_block(cls, cfg):
        blocks = inception_v3_layers("Mixed_7a", "Mixed_7c")
        if cfg.MODEL.TORCHVISION.FREEZE_BN:
            blocks = FrozenBatchNorm2d.convert_frozen_batchnorm(blocks)
        return blocks, 2048
