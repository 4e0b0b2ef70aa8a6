"""A sequence of slices read with attention to where they bleed.

Shape glossary: N slices of a batch, T neighbouring slices in order, C channels, S the side of the
network's input in pixels, F channels of the feature maps, h x w their size, D features of a slice.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from .classifier_networks import CLASSIFIER_REGISTRY, _check_size

_PRIOR = 0.01  # the attention that a cell starts with


@CLASSIFIER_REGISTRY.register()
class RADNet(nn.Module):
    """DenseNet features of each slice, attention by a lesion map, LSTM over the slices.

    Grewal et al. ("RADnet: Radiologist Level Accuracy using Deep Learning for Hemorrhage Detection
    in CT Scans", arXiv:1710.04934) name these parts: DenseNet, attention to bleeding regions, a
    recurrent layer over neighbouring slices, and a verdict on the scan from its slices. The layers'
    sizes and how the parts are joined are chosen here: torchvision's DenseNet-121 without its last
    block, so that maps have stride 16; a convolution of 1 x 1 as the lesion map, which learns by
    binary cross-entropy from the boxes (or masks) of the middle slice, and from no slice that
    bleeds but has none; features weighted by the map's probabilities beside their mean; 128 units
    with ReLU and dropout 0.5; 64 units of an LSTM in each direction over 2
    ``INPUT.SEQUENCE_SLICES`` + 1 slices, of which the middle one is scored. The scan's verdict is
    the first of ``TEST.DIAGNOSIS.PATIENT_RULES``.
    """

    takes_sequence = True
    takes_maps = True
    num_features = 128

    def __init__(self, input_size: int = 128):
        """
        Args:
            input_size: S, side of the square input, pixels, at least 32.

        Raises:
            ValueError: if the input is too small.
        """
        super().__init__()
        _check_size("RADNet", input_size, 32)
        dense = models.DenseNet(block_config=(6, 12, 24), num_classes=1)
        channels, units = dense.classifier.in_features, self.num_features
        self.blocks = dense.features
        self.map_head = nn.Conv2d(channels, 1, 1)
        nn.init.normal_(self.map_head.weight, std=0.01)
        nn.init.constant_(self.map_head.bias, math.log(_PRIOR / (1 - _PRIOR)))
        self.hidden = nn.Sequential(nn.Linear(2 * channels, units), nn.ReLU(), nn.Dropout(0.5))
        self.recurrent = nn.LSTM(units, units // 2, batch_first=True, bidirectional=True)
        self.output = nn.Linear(units, 1)

    @staticmethod
    def attend(maps: torch.Tensor, map_logits: torch.Tensor) -> torch.Tensor:
        """The mean of the maps, and their mean weighted by the probabilities of a lesion.

        The sum of the weights is counted one cell larger, so that the second half is small where
        there is no lesion.

        Args:
            maps: (N, F, h, w).
            map_logits: (N, 1, h, w).

        Returns:
            (N, 2 F).
        """
        weights = map_logits.sigmoid()
        attended = (maps * weights).sum(dim=(2, 3)) / (weights.sum(dim=(2, 3)) + 1)
        return torch.cat([maps.mean(dim=(2, 3)), attended], dim=1)

    @staticmethod
    def map_loss(map_logits: torch.Tensor, lesion_maps: torch.Tensor) -> torch.Tensor:
        """Mean binary cross-entropy over the cells of the slices whose lesions are known.

        Args:
            map_logits: (N, 1, h, w).
            lesion_maps: (N, S, S), 1 in a lesion, 0 elsewhere, NaN where that is not known; a cell
                is what its most lesioned pixel is.
        """
        targets = F.adaptive_max_pool2d(lesion_maps[:, None], map_logits.shape[2:])
        known = ~targets.isnan()
        if not known.any():
            return 0 * map_logits.sum()  # every layer still takes part, see DiagnosisRCNN
        return F.binary_cross_entropy_with_logits(map_logits[known], targets[known])

    def forward(self, x: torch.Tensor, lesion_maps: torch.Tensor | None = None):
        """
        Args:
            x: images of neighbouring slices, (N, T, C, S, S), T odd, in their order.
            lesion_maps: in training, of the slices in the middle, as :meth:`map_loss` takes them.

        Returns:
            Logits of the slices in the middle, (N, 1); in training with "loss_map".
        """
        maps = F.relu(self.blocks(x.flatten(0, 1)))
        map_logits = self.map_head(maps)
        features = self.hidden(self.attend(maps, map_logits)).unflatten(0, x.shape[:2])
        states, _ = self.recurrent(features)
        middle = x.shape[1] // 2
        logits = self.output(states[:, middle])
        if not self.training:
            return logits
        of_middle = map_logits.unflatten(0, x.shape[:2])[:, middle]
        return logits, {"loss_map": self.map_loss(of_middle, lesion_maps)}
