"""Anchors whose sizes and aspect ratios, or shapes, were clustered from the training boxes."""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator


@ANCHOR_GENERATOR_REGISTRY.register()
class ClusteredAnchorGenerator(DefaultAnchorGenerator):
    """Detectron2's anchor generator for what ``anchors.clustering`` finds.

    Sizes times ratios give stock anchors; pairs give anchors of any shape. It only takes numbers:
    RPN heads build an anchor generator just to count anchors, and anchors are not part of a
    checkpoint, so the clustering happens before and its numbers stand in the config.
    """

    @configurable
    def __init__(self, *, sizes=(), aspect_ratios=(), pairs=None, strides, offset=0.5):
        """
        Args:
            sizes: sqrt(area) of the anchors, network-input pixels, per level or for all.
            aspect_ratios: height / width, per level or for all.
            pairs: [width, height] of each anchor, network-input pixels, in a list per level or in
                one list for all; instead of sizes and aspect_ratios.
            strides: stride of each feature map, network-input pixels.
            offset: of the first anchor's centre, in strides.

        Raises:
            ValueError: if no anchors are given, or pairs that are none.
        """
        separate = {"SIZES": sizes, "ASPECT_RATIOS": aspect_ratios}
        for key, values in (separate if pairs is None else {"PAIRS": pairs}).items():
            if not anchors_given(values):
                raise ValueError(
                    f"ClusteredAnchorGenerator: MODEL.ANCHOR_GENERATOR.{key} is {values}, expected"
                    " at least one for each level. tools/train_net.py clusters the training"
                    " boxes by itself; elsewhere run tools/cluster_anchors.py and paste its output"
                    " into the config."
                )
        if pairs is not None:
            if not all(_is_pair(pair) for level in pairs for pair in level):
                raise ValueError(
                    f"ClusteredAnchorGenerator: MODEL.ANCHOR_GENERATOR.PAIRS is {pairs}, expected"
                    " for each level a list of [width, height], each > 0, as in"
                    " [[[12.0, 24.0], [40.0, 30.0]]]."
                )
            # A pair takes the place of a size and its ratios: see generate_cell_anchors.
            sizes, aspect_ratios = pairs, [[1.0]]
        super().__init__(sizes=sizes, aspect_ratios=aspect_ratios, strides=strides, offset=offset)

    @classmethod
    def from_config(cls, cfg, input_shape):
        generator = cfg.MODEL.ANCHOR_GENERATOR
        ret = super().from_config(cfg, input_shape)
        if anchors_given(generator.PAIRS):
            ret.update(sizes=(), aspect_ratios=(), pairs=generator.PAIRS)
        return ret

    def generate_cell_anchors(self, sizes, aspect_ratios):
        """Anchors of one level around (0, 0), as stock, or those of pairs in place of sizes.

        Returns:
            (A, 4) XYXY.
        """
        if not isinstance(sizes[0], Sequence):
            return super().generate_cell_anchors(sizes, aspect_ratios)
        half = torch.tensor([[float(side) for side in pair] for pair in sizes]) / 2
        return torch.cat([-half, half], dim=1)


def anchors_given(values) -> bool:
    """Whether SIZES, ASPECT_RATIOS or PAIRS hold numbers, for every level they name."""
    return len(values) > 0 and all(not isinstance(v, Sequence) or len(v) > 0 for v in values)


def _is_pair(pair) -> bool:
    return (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(isinstance(side, (int, float)) and side > 0 for side in pair)
    )
