"""Networks that classify a slice, or a slice among its neighbours.

Shape glossary: N slices, T neighbouring slices in order, C channels, S the side of the network's
input in pixels, D features of a slice. All give logits sized (N, 1).
"""

import timm
import torch
from fvcore.common.registry import Registry
from timm.models.inception_resnet_v2 import InceptionResnetV2
from torch import nn
from torchvision import models

from .channels import set_input_channels

CLASSIFIER_REGISTRY = Registry("CLASSIFIER")
CLASSIFIER_REGISTRY.__doc__ = """
Registry of networks of :class:`ImageClassifier`. The object is called as ``obj(input_size)`` with
S, or as ``obj(cfg)`` where it has ``from_config``, and must give a module that maps (N, 3, S, S) to
logits (N, 1), or, where its attribute ``takes_sequence`` is true, (N, T, 3, S, S) to the logits of
the middle slices. For images of C channels other than 3 its first convolution is adapted.

Where its attribute ``takes_scan`` is true it maps scans (N, D, 3, S, S) to their logits.

In training it may give ``(logits, losses)``, losses by name, which are added, and where its
attribute ``takes_maps`` is true it then gets :meth:`ImageClassifier.lesion_maps` too.

One with ``embed``, from images to features (N, D), and ``fit(features, labels)`` is fitted to the
training set before each validation and checkpoint.
"""


def build_classifier_network(cfg) -> nn.Module:
    """Builds the network that ``MODEL.CLASSIFIER.NAME`` says, for as many channels as
    ``MODEL.PIXEL_MEAN`` has values.

    Raises:
        ValueError: if there is none of that name, the input is too small for it or of other
            channels, or it takes sequences or scans and ``INPUT.SEQUENCE_SLICES`` or
            ``INPUT.SCAN_SLICES`` gives none.
    """
    name = cfg.MODEL.CLASSIFIER.NAME
    if name not in CLASSIFIER_REGISTRY:
        known = sorted(name for name, _ in CLASSIFIER_REGISTRY)
        raise ValueError(
            f"MODEL.CLASSIFIER.NAME is '{name}', but the registered classifiers are {known}."
        )
    build = CLASSIFIER_REGISTRY.get(name)
    configured = hasattr(build, "from_config")
    network = build(cfg if configured else cfg.MODEL.CLASSIFIER.INPUT_SIZE)
    set_input_channels(network, len(cfg.MODEL.PIXEL_MEAN))
    if getattr(network, "takes_sequence", False) and cfg.INPUT.SEQUENCE_SLICES < 1:
        raise ValueError(
            f"MODEL.CLASSIFIER.NAME is '{name}', which reads neighbouring slices in order, but"
            f" INPUT.SEQUENCE_SLICES is {cfg.INPUT.SEQUENCE_SLICES}; expected 1 or more."
        )
    if getattr(network, "takes_scan", False) and cfg.INPUT.SCAN_SLICES < 1:
        raise ValueError(
            f"MODEL.CLASSIFIER.NAME is '{name}', which reads whole scans, but INPUT.SCAN_SLICES is"
            f" {cfg.INPUT.SCAN_SLICES}; expected 1 or more."
        )
    return network


def _check_size(name: str, input_size: int, least: int) -> None:
    if input_size < least:
        raise ValueError(
            f"MODEL.CLASSIFIER.INPUT_SIZE is {input_size}, expected at least {least} pixels for"
            f" {name}."
        )


@CLASSIFIER_REGISTRY.register()
class LeNet(nn.Sequential):
    """LeNet-5 (LeCun et al., "Gradient-based learning applied to document recognition", 1998).

    Published for 32 pixels: 6 and 16 filters of 5 x 5, 2 x 2 pooling, 120 and 84 units, tanh. As in
    most later forms, the pooling has no weights, each of the 16 filters sees all 6 maps, and the
    output is linear. At another input size the 120 units still see the whole of the last maps.
    """

    def __init__(self, input_size: int = 32, *, in_channels: int = 3, num_outputs: int = 1):
        """
        Args:
            input_size: S, side of the square input, pixels, at least 16.
            in_channels: C, number of channels of the images; the publication has 1.
            num_outputs: number of logits; the publication has 10, one for each digit.

        Raises:
            ValueError: if the input is too small.
        """
        _check_size("LeNet", input_size, 16)
        side = ((input_size - 4) // 2 - 4) // 2
        super().__init__(
            *(nn.Conv2d(in_channels, 6, 5), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
            *(nn.Linear(16 * side**2, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh()),
            nn.Linear(84, num_outputs),
        )


@CLASSIFIER_REGISTRY.register()
class AlexNet(models.AlexNet):
    """torchvision's AlexNet, which is that of Krizhevsky, 2014 (arXiv:1404.5997).

    Unlike that of 2012 it has no local response normalization and no groups.
    """

    def __init__(self, input_size: int = 224):
        _check_size("AlexNet", input_size, 63)
        super().__init__(num_classes=1)


@CLASSIFIER_REGISTRY.register()
class GoogLeNet(models.GoogLeNet):
    """torchvision's GoogLeNet (Szegedy et al., "Going deeper with convolutions", 2015).

    The auxiliary classifiers are left out: batch norm, which torchvision's has and the publication
    has not, carries the gradients, and the loss stays that of the other networks.
    """

    def __init__(self, input_size: int = 224):
        _check_size("GoogLeNet", input_size, 32)
        super().__init__(num_classes=1, aux_logits=False, init_weights=True, dropout=0.4)


@CLASSIFIER_REGISTRY.register()
class DenseNet121(models.DenseNet):
    """torchvision's DenseNet-121 (Huang et al., "Densely connected convolutional networks")."""

    def __init__(self, input_size: int = 224):
        _check_size("DenseNet121", input_size, 32)
        super().__init__(block_config=(6, 12, 24, 16), num_classes=1)


@CLASSIFIER_REGISTRY.register()
class InceptionV3(models.Inception3):
    """torchvision's Inception V3 (Szegedy et al., arXiv:1512.00567), without auxiliary classifier.

    It is left out as :class:`GoogLeNet`'s are. Weights start as PyTorch's layers do: torchvision's
    own, of one spread for all, start with logits far from 0.

    Menon et al. had Inception V3 and DenseNet see windows made for small bleeds. Their windows,
    training and weights were not at hand: those of ``configs/classifier_*_windows.yaml`` are chosen
    here.
    """

    def __init__(self, input_size: int = 299):
        _check_size("InceptionV3", input_size, 75)
        super().__init__(num_classes=1, aux_logits=False, init_weights=False)


@CLASSIFIER_REGISTRY.register()
class InceptionResNetV2(InceptionResnetV2):
    """timm's Inception-ResNet v2 (Szegedy et al., arXiv:1602.07261); it has no auxiliary head."""

    def __init__(self, input_size: int = 299):
        _check_size("InceptionResNetV2", input_size, 75)
        super().__init__(num_classes=1, drop_rate=0.2)


@CLASSIFIER_REGISTRY.register()
class EfficientNetLite0(nn.Module):
    """timm's EfficientNet-Lite0, which is the CPU detectors' backbone, as a whole.

    Beyond the paper: with ``MODEL.WEIGHTS timm://tf_efficientnet_lite0`` a classifier starts from
    the weights that a detector starts from.
    """

    def __init__(self, input_size: int = 320):
        super().__init__()
        _check_size("EfficientNetLite0", input_size, 32)
        self.model = timm.create_model("tf_efficientnet_lite0", num_classes=1, drop_rate=0.2)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # its own 0.01 lags behind in some hundred steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


@CLASSIFIER_REGISTRY.register()
class BHCNet(nn.Module):
    """A small CNN in the place of BHCNet.

    Mushtaq et al., "BHCNet: Neural Network-Based Brain Hemorrhage Classification Using Head CT
    Scan", IEEE Access 9:113901, 2021. Its abstract and highlights say: a CNN, compared with
    CNN + LSTM and CNN + GRU; 200 head CT images, of which 180 training images were augmented to
    1000; the CNN with an imbalanced set was best. The layers, filters, input size and settings of
    the training were not at hand, so those here are chosen and not the publication's: four blocks
    of a 3 x 3 convolution, batch norm, ReLU and 2 x 2 maximum, of 32, 64, 128 and 128 filters; the
    maximum and the mean of each map; 128 units with ReLU and dropout 0.5; one logit.
    """

    num_features = 128

    def __init__(self, input_size: int = 128):
        """
        Args:
            input_size: S, side of the square input, pixels, at least 16: it is halved four times.

        Raises:
            ValueError: if the input is too small.
        """
        super().__init__()
        _check_size(type(self).__name__, input_size, 16)
        widths = (3, 32, 64, 128, 128)
        self.blocks = nn.Sequential(*map(self._block, widths, widths[1:]))
        self.hidden = nn.Sequential(
            nn.Linear(2 * widths[-1], self.num_features), nn.ReLU(), nn.Dropout(0.5)
        )
        self.output = nn.Linear(self.num_features, 1)

    @staticmethod
    def _block(before: int, after: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            *(nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)),
        )

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: images, (N, C, S, S).

        Returns:
            Features of each image, (N, D).
        """
        maps = self.blocks(x)
        return self.hidden(torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.features(x))


class _RecurrentBHCNet(BHCNet):
    takes_sequence = True
    recurrent_layer: type[nn.RNNBase]

    def __init__(self, input_size: int = 128):
        super().__init__(input_size)
        self.recurrent = self.recurrent_layer(
            self.num_features, self.num_features // 2, batch_first=True, bidirectional=True
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: images of neighbouring slices, (N, T, C, S, S), T odd, in their order.

        Returns:
            Logits of the slices in the middle, (N, 1).
        """
        features = self.features(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        states, _ = self.recurrent(features)
        return self.output(states[:, x.shape[1] // 2])


@CLASSIFIER_REGISTRY.register()
class BHCNetLSTM(_RecurrentBHCNet):
    """BHCNet with an LSTM over the slice and its neighbours, which tells about the middle slice.

    That there was a CNN + LSTM is published (see :class:`BHCNet`); what its LSTM ran over was not
    at hand. Chosen here: the features of 2 ``INPUT.SEQUENCE_SLICES`` + 1 slices in anatomical
    order, in both directions, 64 units each. A window around each slice, in place of whole series,
    keeps one prediction an image, which compares with the other networks'.
    """

    recurrent_layer = nn.LSTM


@CLASSIFIER_REGISTRY.register()
class BHCNetGRU(_RecurrentBHCNet):
    """As :class:`BHCNetLSTM` with a GRU."""

    recurrent_layer = nn.GRU
