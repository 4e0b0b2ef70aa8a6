"""VGG16 and Inception V3 of torchvision as Detectron2 backbones with one map of stride 16."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn

from ..channels import RGB, set_input_channels

# Last layers of the stages that MODEL.BACKBONE.FREEZE_AT counts; a stage has one stride.
VGG16_STAGES = ("4", "9", "16", "23", "29")  # conv1 .. conv5, each but the last with its pooling
INCEPTION_V3_STAGES = ("maxpool1", "maxpool2", "Mixed_5d", "Mixed_6e")


class TorchvisionBackbone(Backbone):
    """The first layers of a torchvision classifier, under its own names; one map of stride 16."""

    def __init__(
        self,
        layers: nn.Sequential,
        *,
        out_feature: str,
        out_channels: int,
        stages: Sequence[str],
        freeze_bn: bool = True,
        freeze_at: int = 0,
    ):
        """
        Args:
            layers: from the image to the map; weights are random, ``MODEL.WEIGHTS`` loads them.
            out_feature: name that Detectron2 finds the map by, as in ``MODEL.RPN.IN_FEATURES``.
            out_channels: number of channels of the map.
            stages: name of the last of ``layers`` in each stage, in order.
            freeze_bn: turn all batch norms into constant affine maps.
            freeze_at: keep the first ``freeze_at`` stages as loaded, their batch norms too; 0
                trains all.

        Raises:
            ValueError: if there are fewer stages than ``freeze_at``.
        """
        super().__init__()
        if not 0 <= freeze_at <= len(stages):
            raise ValueError(
                f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but the backbone has {len(stages)}"
                f" stages, which end at {', '.join(stages)}."
            )
        names = list(dict(layers.named_children()))
        frozen = layers[: names.index(stages[freeze_at - 1]) + 1] if freeze_at else nn.Sequential()
        for parameter in frozen.parameters():
            parameter.requires_grad_(False)
        # In place, but for a layer that is itself a batch norm; here they are all within layers.
        FrozenBatchNorm2d.convert_frozen_batchnorm(layers if freeze_bn else frozen)
        self.features = layers
        self._out_features = [out_feature]
        self._out_feature_strides = {out_feature: 16}
        self._out_feature_channels = {out_feature: out_channels}

    @property
    def size_divisibility(self) -> int:
        return 16

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: images, (N, C, H, W), H and W multiples of 16.

        Returns:
            Map from the feature's name to (N, out_channels, H / 16, W / 16).
        """
        return {self._out_features[0]: self.features(x)}


def vgg16_layers(in_channels: int = RGB) -> nn.Sequential:
    """torchvision's VGG16 up to the ReLU behind conv5_3, with the weights it starts from."""
    with torch.device("meta"):  # its classifier of 124 million weights is never made
        layers = torchvision.models.vgg16().features[:-1]
    set_input_channels(layers, in_channels)
    layers.to_empty(device="cpu")
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            c2_msra_fill(layer)  # He's initialization, as torchvision's
    return layers


def inception_v3_layers(first: str, last: str) -> nn.Sequential:
    """torchvision's Inception V3 from one of its layers to another, by their names."""
    network = torchvision.models.inception_v3(aux_logits=False, init_weights=True)
    layers = OrderedDict(network.named_children())  # in the order of the forward pass
    names = list(layers)
    chosen = names[names.index(first) : names.index(last) + 1]
    return nn.Sequential(OrderedDict((name, layers[name]) for name in chosen))


def pad_inception_v3(layers: nn.Sequential) -> nn.Sequential:
    """Inception V3 up to Mixed_6e with maps of exactly 1/2, 1/4, 1/8 and 1/16 of the input.

    A window of 3 with stride 2 on an even side needs one row of padding. On the left it moves the
    centres of the windows by half a pixel of its input to the left of the middle, on the right
    to the right. The stem's three are padded on the left, 0.5 + 1 + 2 px, and Mixed_6a on the
    right, 4 px: the centre of cell i lies at 16 (i + 0.5) + 0.5 px, where padding all alike would
    move it by 7.5 px.
    """
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_4a_3x3"):
        layers.get_submodule(name).conv.padding = (1, 1)
    # With stride 2 the row on the right of an even side is not reached.
    layers.maxpool1.padding = layers.maxpool2.padding = 1
    padded = OrderedDict()
    for name, layer in layers.named_children():
        if name == "Mixed_6a":
            padded["pad_6a"] = nn.ZeroPad2d((0, 1, 0, 1))
        padded[name] = layer
    return nn.Sequential(padded)


@BACKBONE_REGISTRY.register()
def build_vgg16_backbone(cfg, input_shape: ShapeSpec) -> TorchvisionBackbone:
    """VGG16 up to conv5_3: "conv5_3" with 512 channels; FREEZE_AT counts conv1 to conv5."""
    return TorchvisionBackbone(
        vgg16_layers(input_shape.channels),
        out_feature="conv5_3",
        out_channels=512,
        stages=VGG16_STAGES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


@BACKBONE_REGISTRY.register()
def build_inception_v3_backbone(cfg, input_shape: ShapeSpec) -> TorchvisionBackbone:
    """Inception V3, padded, up to Mixed_6e: "Mixed_6e" with 768 channels.

    FREEZE_AT counts the stem to its first and its second pooling, Mixed_5 and Mixed_6.
    """
    layers = inception_v3_layers("Conv2d_1a_3x3", "Mixed_6e")
    set_input_channels(layers, input_shape.channels)
    return TorchvisionBackbone(
        pad_inception_v3(layers),
        out_feature="Mixed_6e",
        out_channels=768,
        stages=INCEPTION_V3_STAGES,
        freeze_bn=cfg.MODEL.TORCHVISION.FREEZE_BN,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
