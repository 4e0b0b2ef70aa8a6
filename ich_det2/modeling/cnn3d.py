"""A three-dimensional network that classifies whole scans.

Shape glossary: N scans, D slices of each in order, C channels, S the side of the network's input.
"""

import torch
from torch import nn

from .classifier_networks import CLASSIFIER_REGISTRY, _check_size


@CLASSIFIER_REGISTRY.register()
class CNN3D(nn.Module):
    """A 3D CNN on a scan, resampled to few slices, in the place of that of Arbabshirani et al.

    Arbabshirani et al., "Advanced machine learning in action: identification of intracranial
    hemorrhage on computed tomography scans of the head with clinical workflow integration", npj
    Digital Medicine 1:9, 2018. That it is a network of five convolutional and two fully connected
    layers on the whole study is generally known; the text was not at hand. Chosen here: 3 x 3 x 3
    convolutions of 16, 32, 64, 64 and 64 filters with batch norm and ReLU; 2 x 2 maxima after the
    first and 2 x 2 x 2 after the next three, since slices are thick; the maximum and the mean of
    each map, so that any number of slices fits; 128 units with ReLU and dropout 0.5; one logit. One
    network, where they combined several.
    """

    takes_scan = True

    def __init__(self, input_size: int = 128):
        """
        Args:
            input_size: S, pixels, at least 16: it is halved four times.

        Raises:
            ValueError: if the input is too small.
        """
        super().__init__()
        _check_size("CNN3D", input_size, 16)
        widths = (3, 16, 32, 64, 64, 64)
        pools = ((1, 2, 2), 2, 2, 2)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip(widths, widths[1:])):
            layers += [nn.Conv3d(before, after, 3, padding=1, bias=False), nn.BatchNorm3d(after)]
            layers.append(nn.ReLU())
            if i < len(pools):
                layers.append(nn.MaxPool3d(pools[i], ceil_mode=True))
        self.convolutions = nn.Sequential(*layers)
        self.hidden = nn.Sequential(nn.Linear(2 * widths[-1], 128), nn.ReLU(), nn.Dropout(0.5))
        self.output = nn.Linear(128, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: scans, (N, D, C, S, S).

        Returns:
            Logits, (N, 1).
        """
        maps = self.convolutions(x.transpose(1, 2))  # channels before slices
        pooled = torch.cat([maps.amax((2, 3, 4)), maps.mean((2, 3, 4))], dim=1)
        return self.output(self.hidden(pooled))
