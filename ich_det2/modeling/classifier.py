"""Classification of whole slices, as a Detectron2 meta-architecture.

Shape glossary: N slices of a batch, T neighbouring slices in order, C channels; in pixels, Hi and
Wi the size of slice i, S the side of the network's input.
"""

import math
from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BitMasks, ImageList, Instances, PolygonMasks
from torch import nn
from torch.nn import functional as F

from .classifier_networks import build_classifier_network
from .diagnosis_rcnn import has_known_boxes


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """Tells whether a slice has hemorrhage, by any network of ``CLASSIFIER_REGISTRY``."""

    @configurable
    def __init__(
        self,
        *,
        network: nn.Module,
        input_size: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        pos_weight: float = 1.0,
    ):
        """
        Args:
            network: from images, or sequences of them, to logits, as ``CLASSIFIER_REGISTRY`` says.
            input_size: S, pixels; slices are scaled to it along their longer side, the other side
                is filled up with air.
            pixel_mean: C grey values that are subtracted from the channels.
            pixel_std: C grey values that the channels are divided by after that.
            pos_weight: weight of a slice with hemorrhage in the loss.
        """
        super().__init__()
        self.takes_scan = getattr(network, "takes_scan", False)
        # Convolutions on the CPU, and mixed precision on a GPU, are faster that way.
        last = torch.channels_last_3d if self.takes_scan else torch.channels_last
        self.network = network.to(memory_format=last)
        self._last_scan = (None, None)  # of which the score is known, and that
        self.input_size = input_size
        self.takes_sequence = getattr(network, "takes_sequence", False)
        self.takes_maps = getattr(network, "takes_maps", False)
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.register_buffer("pos_weight", torch.tensor(float(pos_weight)), persistent=False)

    @classmethod
    def from_config(cls, cfg):
        return {
            "network": build_classifier_network(cfg),
            "input_size": cfg.MODEL.CLASSIFIER.INPUT_SIZE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "pos_weight": cfg.MODEL.CLASSIFIER.POS_WEIGHT,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict | list[dict]:
        """
        Args:
            batched_inputs: N dicts with "image", (C, Hi, Wi) in 0..255, or, for a network that
                takes sequences, "sequence", (T, C, Hi, Wi), or one that takes scans, "scan",
                (D, C, Hi, Wi); in training "image_label", 0 or 1,
                and, for a network that takes lesion maps, "instances".

        Returns:
            In training "loss_cls", the mean binary cross-entropy, and losses that the network
            itself gives; else N dicts with "image_score",
            the probability of hemorrhage, a tensor without dimensions.
        """
        if self.takes_scan and not self.training:
            return [{"image_score": self._score_scan(x)} for x in batched_inputs]
        given = [self.preprocess_image(batched_inputs)]
        if self.training and self.takes_maps:
            given.append(self.lesion_maps(batched_inputs))
        found = self.network(*given)
        logits, losses = found if isinstance(found, tuple) else (found, {})
        logits = logits.squeeze(1)
        if not self.training:
            return [{"image_score": score} for score in logits.float().sigmoid()]
        labels = logits.new_tensor([x["image_label"] for x in batched_inputs])
        loss = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=self.pos_weight)
        return {"loss_cls": loss, **losses}

    def _score_scan(self, x: dict) -> torch.Tensor:
        # The slices of a scan bring it one after another.
        scan, score = self._last_scan
        if scan is None or not torch.equal(scan, x["scan"]):
            score = self.network(self.preprocess_image([x])).float().sigmoid()[0, 0]
            self._last_scan = (x["scan"], score)
        return score

    def train(self, mode: bool = True) -> "ImageClassifier":
        self._last_scan = (None, None)  # weights may have changed
        return super().train(mode)

    @property
    def needs_fit(self) -> bool:
        """Whether a part of the network is fitted to the training set in place of being trained."""
        return hasattr(self.network, "fit")

    def embed(self, batched_inputs: list[dict]) -> torch.Tensor:
        """What :meth:`fit` takes of each slice, (N, D); for a network that needs it."""
        return self.network.embed(self.preprocess_image(batched_inputs))

    def fit(
        self, features: torch.Tensor, labels: torch.Tensor, groups: Sequence | None = None
    ) -> None:
        """Fits the network to the features (N, D), labels (N,) and patients (N,) of whole training
        slices; without patients each is of another."""
        self.network.fit(features, labels, groups)

    def preprocess_image(self, batched_inputs: list[dict]) -> torch.Tensor:
        """Scales, pads and normalizes; a slice comes out the same whatever is beside it.

        Returns:
            (N, C, S, S), (N, T, C, S, S) or (N, D, C, S, S).
        """
        key = "scan" if self.takes_scan else "sequence" if self.takes_sequence else "image"
        images = [self._resize(x[key].to(self.device)) for x in batched_inputs]
        square = {"square_size": self.input_size}
        batch = ImageList.from_tensors(images, padding_constraints=square).tensor
        return (batch - self.pixel_mean) / self.pixel_std

    def lesion_maps(self, batched_inputs: list[dict]) -> torch.Tensor:
        """Where the slices bleed, by their masks or else boxes, scaled and padded as images are.

        Returns:
            (N, S, S), 1 in a lesion, 0 elsewhere, between them at edges; NaN all over a slice that
            bleeds, but where is not known.
        """
        maps = torch.zeros(len(batched_inputs), self.input_size, self.input_size)
        for lesion_map, x in zip(maps, batched_inputs):
            if "instances" not in x and not x["image_label"]:
                continue
            if "instances" not in x or not has_known_boxes(x):
                lesion_map[:] = torch.nan
                continue
            mask = _lesion_mask(x["instances"])
            height, width = self._scaled(mask.shape)
            mask = F.interpolate(mask[None, None], (height, width), mode="area")
            lesion_map[:height, :width] = mask
        return maps.to(self.device)

    def _scaled(self, sides: Sequence[int]) -> list[int]:
        scale = self.input_size / max(sides)
        return [max(1, round(side * scale)) for side in sides]

    def _resize(self, image: torch.Tensor) -> torch.Tensor:
        """From (..., C, Hi, Wi) to S pixels along the longer side."""
        sides = [int(side) for side in image.shape[-2:]]
        size = self._scaled(sides)
        if size == sides:
            return image
        slices = image.reshape(-1, *image.shape[-3:])
        slices = F.interpolate(slices, size, mode="bilinear", align_corners=False, antialias=True)
        return slices.reshape(*image.shape[:-2], *size)


def _lesion_mask(instances: Instances) -> torch.Tensor:
    """Of a slice's lesions, (Hi, Wi), 1 in one of them, else 0; of one without mask its box."""
    size, boxes = instances.image_size, instances.gt_boxes
    mask = torch.zeros(size)
    if instances.has("gt_masks"):
        masks = instances.gt_masks
        if isinstance(masks, PolygonMasks):
            masks = BitMasks.from_polygon_masks(masks, *size)
        mask += masks.tensor.any(dim=0).cpu()
        boxes = boxes[~masks.nonempty()]
    for x0, y0, x1, y1 in boxes.tensor.tolist():
        mask[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)] = 1
    return mask
