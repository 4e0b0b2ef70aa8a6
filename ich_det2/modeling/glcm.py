"""A classifier that reads grey-level co-occurrence images of regions beside the slice.

Shape glossary: N slices, C channels, S the side of the network's input in pixels, R regions of
interest of a slice, h x w the pixels of one, K offsets of the pixels of a pair (distances x
angles), L grey levels besides black, D features.
"""

import importlib.util
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import configurable
from torch import nn

from .classifier_networks import CLASSIFIER_REGISTRY, BHCNet

LEVELS = 32
DISTANCES = (1, 3)
ANGLES = (0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)


def grey_levels(grey: torch.Tensor, levels: int = LEVELS) -> torch.Tensor:
    """Grey values 0..255 as 0 for black, which is air and what is filled up, and 1..L in steps of
    255 / L, of the same size; black is below half a grey value."""
    steps = (grey - 0.5).clamp(0, 254.5) * levels / 255
    return steps.ceil().to(torch.uint8)


def cooccurrence(
    region: np.ndarray,
    distances: Sequence[int] = DISTANCES,
    angles: Sequence[float] = ANGLES,
    levels: int = LEVELS,
) -> np.ndarray:
    """How often two grey levels lie at an offset from each other (Haralick et al., 1973).

    Pairs count in both orders; those with black are left out.

    Args:
        region: uint8 (h, w), 0 for black and 1..L.
        distances: of the two pixels, in pixels.
        angles: of the second to the first, radians, as scikit-image's ``graycomatrix`` takes them.
        levels: L.

    Returns:
        float32 (K, L, L), symmetric, each of sum 1, or 0 without pairs; by distance, then by angle.
    """
    from skimage.feature import graycomatrix

    counts = graycomatrix(region, distances, angles, levels + 1, symmetric=True)[1:, 1:]
    counts = counts.reshape(levels, levels, -1).transpose(2, 0, 1).astype(np.float32)
    return counts / np.maximum(counts.sum(axis=(1, 2), keepdims=True), 1)


@CLASSIFIER_REGISTRY.register()
class GLCMNet(BHCNet):
    """A CNN on the slice, and another on co-occurrence images of its regions beside it.

    Hu et al. gave a network grey-level co-occurrence images of regions of interest beside the
    slice. Their text was not at hand, so all else is chosen here: the regions are the 4 x 4 tiles
    of the input; 32 grey levels besides black, 1 and 3 pixels at 0, 45, 90 and 135 degrees as 8
    channels; square roots of the shares, so that the few pairs of a small bleed are seen; three
    blocks of a 3 x 3 convolution, batch norm, ReLU and 2 x 2 maximum of 32, 64 and 64 filters for
    each tile, maximum and mean over all, 64 units; and :class:`BHCNet` on the slice. No gradient
    passes through the counts.
    """

    grid = 4

    @configurable
    def __init__(
        self,
        input_size: int = 128,
        *,
        pixel_mean: Sequence[float] = (127.5,) * 3,
        pixel_std: Sequence[float] = (127.5,) * 3,
    ):
        """
        Args:
            input_size: S, side of the square input, pixels, at least 16.
            pixel_mean, pixel_std: C grey values by which images were normalized.

        Raises:
            ValueError: if the input is too small, or scikit-image is not installed.
        """
        if importlib.util.find_spec("skimage") is None:
            raise ValueError(
                "MODEL.CLASSIFIER.NAME GLCMNet needs scikit-image, which is not installed;"
                " pip install 'ich_det2[systems]'."
            )
        super().__init__(input_size)
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            values = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        widths = (len(DISTANCES) * len(ANGLES), 32, 64, 64)
        self.texture_blocks = nn.Sequential(*map(self._block, widths, widths[1:]))
        self.texture_hidden = nn.Sequential(
            nn.Linear(2 * widths[-1], 64), nn.ReLU(), nn.Dropout(0.5)
        )
        self.output = nn.Linear(self.num_features + 64, 1)

    @classmethod
    def from_config(cls, cfg):
        return {
            "input_size": cfg.MODEL.CLASSIFIER.INPUT_SIZE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @torch.no_grad()
    def cooccurrence_images(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: normalized images, (N, C, S, S); what counts is the mean of their channels.

        Returns:
            Square roots of co-occurrence, (N, R, K, L, L), tiles row by row.

        Raises:
            ValueError: if the network is traced, as for ONNX.
        """
        if torch.jit.is_tracing():  # the counts of one slice would stand for those of all
            raise ValueError("GLCMNet counts with scikit-image, which no graph holds.")
        grey = (x.float() * self.pixel_std + self.pixel_mean).mean(dim=1)
        slices = grey_levels(grey).cpu().numpy()
        images = [
            cooccurrence(np.ascontiguousarray(tile))
            for picture in slices
            for rows in np.array_split(picture, self.grid)
            for tile in np.array_split(rows, self.grid, axis=1)
        ]
        images = torch.from_numpy(np.sqrt(np.stack(images)))
        return images.unflatten(0, (len(x), -1)).to(x.device)

    def texture_features(self, x: torch.Tensor) -> torch.Tensor:
        """As :meth:`features`, of the co-occurrence images of all regions."""
        images = self.cooccurrence_images(x)
        maps = self.texture_blocks(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        pooled = torch.cat([maps.amax((1, 3, 4)), maps.mean((1, 3, 4))], dim=1)
        return self.texture_hidden(pooled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(torch.cat([self.features(x), self.texture_features(x)], dim=1))
