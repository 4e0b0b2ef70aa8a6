"""A backbone that sees a slice among its neighbours by 3D convolutions.

Shape glossary: N slices of a batch, T = 2 r + 1 neighbouring slices of which the middle one is the
slice itself, C features, H and W pixels.
"""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn
from torch.nn import functional as F

from .timm_backbone import build_timm_backbone


class Hybrid3DBackbone(Backbone):
    """3D convolutions that collapse T slices to one, before a 2D network.

    Chang et al., "Hybrid 3D/2D Convolutional Neural Network for Hemorrhage Evaluation on Head CT",
    AJNR 2018: five slices enter a mask R-CNN whose 3D convolutions collapse them to the slice in
    the middle, where boxes and masks are found in 2D. The layers of its network were not at hand.
    Chosen here: r convolutions of 3 x 3 x 3, each of which leaves off a slice at either end, and a
    convolution of 1 x 1 to the channels of the 2D network, whose result is added to the slice in
    the middle. The last begins at 0: the network starts as the 2D one on the slice alone, and may
    start from its ImageNet weights.
    """

    network_channels = 3
    """What the 2D network takes, whatever the image has; weights are loaded for that."""

    def __init__(self, bottom_up: Backbone, *, num_slices: int, conv_dim: int = 8):
        """
        Args:
            bottom_up: the 2D network, for images of 3 channels.
            num_slices: T, odd, 3 or more.
            conv_dim: C, features of the 3D convolutions.

        Raises:
            ValueError: if the number of slices is none of these.
        """
        super().__init__()
        if num_slices < 3 or num_slices % 2 == 0:
            raise ValueError(
                f"build_hybrid3d_backbone takes images of 3, 5, ... slices as channels, got"
                f" {num_slices} values of MODEL.PIXEL_MEAN; set INPUT.CONTEXT_SLICES r and give"
                " 2 r + 1."
            )
        self.num_slices = num_slices
        widths = [1] + [conv_dim] * (num_slices // 2)
        self.collapse = nn.ModuleList(
            nn.Conv3d(before, after, 3, padding=(0, 1, 1))
            for before, after in zip(widths, widths[1:])
        )
        self.project = nn.Conv2d(conv_dim, self.network_channels, 1)
        for conv in self.collapse:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.bottom_up = bottom_up
        shapes = bottom_up.output_shape()
        self._out_features = list(shapes)
        self._out_feature_strides = {name: shape.stride for name, shape in shapes.items()}
        self._out_feature_channels = {name: shape.channels for name, shape in shapes.items()}

    @property
    def size_divisibility(self) -> int:
        return self.bottom_up.size_divisibility

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: slices in order, (N, T, H, W).

        Returns:
            Those of the 2D network.
        """
        middle = x[:, self.num_slices // 2, None]
        volume = x[:, None]
        for conv in self.collapse:
            volume = F.relu(conv(volume))
        return self.bottom_up(middle + self.project(volume.squeeze(2)))


@BACKBONE_REGISTRY.register()
def build_hybrid3d_backbone(cfg, input_shape: ShapeSpec) -> Hybrid3DBackbone:
    """Builds the :class:`Hybrid3DBackbone` over the network that ``cfg.MODEL.TIMM`` describes."""
    network = build_timm_backbone(cfg, ShapeSpec(channels=Hybrid3DBackbone.network_channels))
    return Hybrid3DBackbone(network, num_slices=input_shape.channels)
