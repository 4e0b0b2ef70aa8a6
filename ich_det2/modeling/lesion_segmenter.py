"""Lesions found without learning, as Detectron2 meta-architectures.

What there is to learn is how a lesion's measures become the probability that it is blood: five
numbers, by the same training as any model's. Shape glossary: Hi and Wi, rows and columns of slice
i; M lesions of a slice.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, detector_postprocess
from detectron2.structures import BitMasks, Instances
from torch import nn
from torch.nn import functional as F

from .fuzzy_c_means import fuzzy_c_means
from .level_set import edge_indicator, evolve, initial_level_set
from .segmentation import (
    BONE_HU,
    density_above_brain,
    find_brain,
    head_area,
    measure_lesions,
    split_lesions,
)

# Pixels around what the level set starts from, more than it moves; and the slope of an edge, HU a
# pixel, that halves its speed.
_ROOM, _EDGE_HU = 12, 3.0
# Logit of a lesion: share of the head (a decade), density (10 HU), compactness; and a constant.
_WEIGHTS, _BIAS, _NOTHING = (1.0, 1.0, -3.0), -3.0, -3.0


class LesionSegmenter(nn.Module, ABC):
    """Lesions of one slice by :meth:`find`, each scored by a logistic layer on its measures.

    The skull is stripped by :func:`find_brain`, densities are those beyond the brain's median, and
    the measures are those of :func:`measure_lesions`. A slice's score is that of its highest
    lesion, and at least that of a slice without any, which is learnt too. Before training, weights
    chosen by hand hold: the larger and denser a lesion is, and the less compact (calcifications
    are), the more likely it is blood.
    """

    @configurable
    def __init__(
        self,
        *,
        window: tuple[float, float],
        threshold_hu: float,
        min_share: float,
        pos_weight: float = 1.0,
    ):
        """
        Args:
            window: (level HU, width HU) of the slices; it has to show bone.
            threshold_hu: beyond the brain's median, from which on it may be blood.
            min_share: of the head; what is smaller is no lesion.
            pos_weight: weight of a slice with hemorrhage in the loss.

        Raises:
            ValueError: if the window does not reach bone, or a share is not in [0, 1).
        """
        super().__init__()
        level, width = map(float, window)
        if level + width / 2 <= BONE_HU:
            raise ValueError(
                f"INPUT.WINDOWS is {[[level, width]]}, which ends at {level + width / 2:g} HU;"
                f" expected one that ends above {BONE_HU:g} HU, such as [[40, 120]], to tell bone."
            )
        if not 0 <= min_share < 1:
            raise ValueError(f"MODEL.SEGMENTER.MIN_SHARE is {min_share}, expected 0 to below 1.")
        self.low_hu, self.hu_per_grey = level - width / 2, width / 255
        self.threshold_hu, self.min_share = threshold_hu, min_share
        self.score = nn.Linear(len(_WEIGHTS), 1)
        with torch.no_grad():
            self.score.weight[:] = torch.tensor(_WEIGHTS)
            self.score.bias.fill_(_BIAS)
        self.nothing = nn.Parameter(torch.tensor([_NOTHING]))
        self.register_buffer("pos_weight", torch.tensor(float(pos_weight)), persistent=False)

    @classmethod
    def from_config(cls, cfg):
        name = cfg.MODEL.META_ARCHITECTURE
        if len(cfg.INPUT.WINDOWS) != 1 or cfg.INPUT.CONTEXT_SLICES:
            raise ValueError(
                f"MODEL.META_ARCHITECTURE {name} takes a slice in one window, but INPUT.WINDOWS is"
                f" {cfg.INPUT.WINDOWS} and INPUT.CONTEXT_SLICES {cfg.INPUT.CONTEXT_SLICES};"
                " expected one, and 0."
            )
        if len(cfg.DATASETS.ICH_CLASSES) != 1:
            raise ValueError(
                f"MODEL.META_ARCHITECTURE {name} does not tell types, but DATASETS.ICH_CLASSES is"
                f" {cfg.DATASETS.ICH_CLASSES}; expected one name."
            )
        return {
            "window": cfg.INPUT.WINDOWS[0],
            "threshold_hu": cfg.MODEL.SEGMENTER.THRESHOLD_HU,
            "min_share": cfg.MODEL.SEGMENTER.MIN_SHARE,
            "pos_weight": cfg.MODEL.SEGMENTER.POS_WEIGHT,
        }

    @abstractmethod
    def find(self, density: np.ndarray, brain: np.ndarray, least_area: float) -> np.ndarray:
        """Where blood may be.

        Args:
            density: float32 (Hi, Wi), HU beyond the brain's median, 0 outside of it.
            brain: bool (Hi, Wi), not empty.
            least_area: pixels; smaller parts will be dropped.

        Returns:
            bool (Hi, Wi).
        """

    def forward(self, batched_inputs: list[dict]) -> dict | list[dict]:
        """
        Args:
            batched_inputs: N dicts with "image", (C, Hi, Wi) in 0..255, of which the first channel
                counts; perhaps "height" and "width" of the slice; in training "image_label".

        Returns:
            In training "loss_cls", the mean binary cross-entropy of the slices' scores. Else N
            dicts with "image_score", a tensor without dimensions, and "instances" in pixels of the
            slice: pred_boxes, scores, pred_classes (0) and pred_masks, bool (M, height, width).
        """
        found = [self._segment(x["image"]) for x in batched_inputs]
        logits = [self._logits(measures) for _, measures in found]
        slices = torch.stack([torch.cat([self.nothing, x]).max() for x in logits])
        if self.training:
            labels = slices.new_tensor([float(x["image_label"]) for x in batched_inputs])
            loss = F.binary_cross_entropy_with_logits(slices, labels, pos_weight=self.pos_weight)
            return {"loss_cls": loss}
        return [
            {"image_score": score, "instances": _instances(masks, lesions.sigmoid(), x)}
            for (masks, _), lesions, score, x in zip(
                found, logits, slices.sigmoid(), batched_inputs
            )
        ]

    def _segment(self, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The lesions of a slice, bool (M, Hi, Wi), and their measures."""
        if torch.jit.is_tracing():  # the lesions of one slice would stand for those of all
            raise ValueError("Lesions are found without PyTorch, which no graph holds.")
        hu = self.low_hu + self.hu_per_grey * image[0].cpu().numpy()
        brain, head = find_brain(hu), head_area(hu)
        density = density_above_brain(hu, brain)
        least = self.min_share * head
        mask = self.find(density, brain, least) & brain if brain.any() else brain
        masks = split_lesions(mask, least)
        return masks, measure_lesions(masks, density, head)

    def _logits(self, measures: np.ndarray) -> torch.Tensor:
        # Where there is no lesion the layer takes part too: all processes wait for its gradient.
        return self.score(torch.from_numpy(measures).to(self.nothing.device)).squeeze(1)


@META_ARCH_REGISTRY.register()
class ThresholdSegmenter(LesionSegmenter):
    """Skull stripping and one threshold, as Hidayatullah et al. find and measure hemorrhage.

    Their text was not at hand, beyond that the skull is stripped, the brain thresholded and the
    volume computed. Chosen here: how the skull is stripped, the threshold (HU beyond the median of
    the slice's brain, smoothed, so that a scanner's calibration does not matter), the least size,
    and the score. Volumes are those of the masks, by whatever sums them over slices.
    """

    def find(self, density, brain, least_area):
        return density >= self.threshold_hu


@META_ARCH_REGISTRY.register()
class LevelSetSegmenter(LesionSegmenter):
    """Fuzzy c-means, then a distance-regularized level set, as Singh et al. delineate hemorrhage.

    Their text was not at hand, beyond that fuzzy c-means begins what a level set outlines. Chosen
    here: densities of the brain in four clusters (fluid, white matter, gray matter, what is
    denser); what belongs to the densest by one half or more, is beyond the threshold and large
    enough is where the level set of Li et al. (:mod:`ich_det2.modeling.level_set`) starts, which is
    drawn to the edges of the densities. Its settings were tried at 320 pixels.
    """

    @configurable
    def __init__(self, *, centers: Sequence[float], iterations: int, area: float, **kwargs):
        """
        Args:
            centers: HU beyond the brain's median at which the clusters start, ascending.
            iterations: of the level set; 0 leaves the clusters' outlines.
            area: alpha; below 0 outlines grow where there is no edge, above 0 they shrink.
            kwargs: arguments of :class:`LesionSegmenter`.

        Raises:
            ValueError: if centres do not ascend, there are not two, or iterations are below 0.
        """
        super().__init__(**kwargs)
        if len(centers) < 2 or any(b <= a for a, b in zip(centers, centers[1:])):
            raise ValueError(
                f"MODEL.SEGMENTER.CENTERS is {list(centers)}, expected two or more, ascending."
            )
        if iterations < 0:
            raise ValueError(f"MODEL.SEGMENTER.ITERATIONS is {iterations}, expected 0 or more.")
        self.centers, self.iterations, self.area = list(centers), iterations, area

    @classmethod
    def from_config(cls, cfg):
        return {
            **super().from_config(cfg),
            "centers": cfg.MODEL.SEGMENTER.CENTERS,
            "iterations": cfg.MODEL.SEGMENTER.ITERATIONS,
            "area": cfg.MODEL.SEGMENTER.AREA,
        }

    def find(self, density, brain, least_area):
        whole = np.rint(density)  # so that each HU is clustered once, by how often it occurs
        values, counts = np.unique(whole[brain], return_counts=True)
        centers, members = fuzzy_c_means(values, self.centers, weights=counts)
        # Far beyond all centres a value belongs to none by more than to the others.
        dense = values[(members[-1] >= 0.5) | (values > centers[-1])]
        seeds = np.isin(whole, dense) & (density >= self.threshold_hu) & brain
        seeds = split_lesions(seeds, least_area).any(axis=0)
        if not self.iterations or not seeds.any():
            return seeds
        rows, columns = (np.flatnonzero(seeds.any(axis=axis)) for axis in (1, 0))
        around = tuple(slice(max(0, i[0] - _ROOM), i[-1] + _ROOM + 1) for i in (rows, columns))
        edges = edge_indicator(density[around], sigma=1.0, contrast=_EDGE_HU)
        phi = evolve(initial_level_set(seeds[around]), edges, self.iterations, area=self.area)
        seeds[around] = phi < 0
        return seeds


def _instances(masks: np.ndarray, scores: torch.Tensor, inputs: dict) -> Instances:
    """Lesions in pixels of the slice.

    Args:
        masks: bool (M, Hi, Wi).
        scores: (M,).
        inputs: with "height" and "width", if other than the image's.
    """
    bits = BitMasks(torch.from_numpy(masks))
    found = Instances(masks.shape[1:], pred_boxes=bits.get_bounding_boxes().to(scores.device))
    found.scores = scores
    found.pred_classes = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    size = [inputs.get(key, side) for key, side in zip(("height", "width"), masks.shape[1:])]
    found = detector_postprocess(found, *size)
    scaled = F.interpolate(bits.tensor[:, None].float(), size, mode="bilinear", align_corners=False)
    found.pred_masks = (scaled[:, 0] >= 0.5).to(scores.device)
    return found
