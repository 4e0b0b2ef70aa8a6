"""A classifier that sees where an autoencoder fails, beside the slice.

Shape glossary: N slices, C channels, S the side of the network's input in pixels, D features.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .classifier_networks import CLASSIFIER_REGISTRY
from .svm import AlexNetSVM


@CLASSIFIER_REGISTRY.register()
class AutoencoderAlexNetSVM(AlexNetSVM):
    """AlexNet on the slice and a heat map that an autoencoder gives, and an SVM on its features.

    Togacar et al. ("Brain Hemorrhage Detection based on Heat Maps, Autoencoder and CNN
    Architecture", 2019) combined an autoencoder, heat maps, AlexNet and an SVM. How these are put
    together was not at hand, so it is chosen here: an autoencoder of 3 x 3 convolutions of stride 2
    with ReLU, of 16, 32, 32 and 16 filters, and their mirror image, keeps a sixteenth of the values
    of the channels' mean and learns by mean squared error, from all slices and beside the
    classifier. The heat map is the absolute error, a mean over 5 x 5 pixels: what few slices have
    is what it cannot rebuild. AlexNet's first convolution sees the map as one more channel;
    no gradient passes through it.
    """

    widths = (1, 16, 32, 32, 16)

    def __init__(self, input_size: int = 224):
        super().__init__(input_size)
        first, widths = self.features[0], self.widths
        # Beside the convolution of the images, whose weights those of an AlexNet still fit.
        self.heat_conv = nn.Conv2d(
            *(1, first.out_channels, first.kernel_size, first.stride, first.padding), bias=False
        )
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU())
                for before, after in zip(widths, widths[1:])
            )
        )
        layers: list[nn.Module] = []
        for before, after in zip(widths[:0:-1], widths[-2::-1]):
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(*layers[:-1])

    def reconstruct(self, grey: torch.Tensor) -> torch.Tensor:
        """
        Args:
            grey: (N, 1, S, S).

        Returns:
            What the autoencoder makes of it, sized the same.
        """
        side = grey.shape[-1]
        return self.decoder(self.encoder(grey))[..., :side, :side]

    @staticmethod
    def heat_map(grey: torch.Tensor, rebuilt: torch.Tensor) -> torch.Tensor:
        """Absolute error, the mean over 5 x 5 pixels, (N, 1, S, S), without gradient."""
        error = (grey - rebuilt).abs().detach()
        return F.avg_pool2d(error, 5, stride=1, padding=2, count_include_pad=False)

    def _see(self, x: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
        return self._features_of(self.features[1:](self.features[0](x) + self.heat_conv(heat)))

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        grey = x.mean(dim=1, keepdim=True)
        return self._see(x, self.heat_map(grey, self.reconstruct(grey)))

    def forward(self, x: torch.Tensor):
        """
        Args:
            x: images, (N, C, S, S).

        Returns:
            Logits, (N, 1); in training with "loss_reconstruction".
        """
        if not self.training:
            return super().forward(x)
        grey = x.mean(dim=1, keepdim=True)
        rebuilt = self.reconstruct(grey)
        logits = self.classifier[-1](self._see(x, self.heat_map(grey, rebuilt)))
        return logits, {"loss_reconstruction": F.mse_loss(rebuilt, grey)}
