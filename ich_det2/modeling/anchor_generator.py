"""Anchors whose sizes and aspect ratios were clustered from the training boxes."""

from detectron2.config import configurable
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator


@ANCHOR_GENERATOR_REGISTRY.register()
class ClusteredAnchorGenerator(DefaultAnchorGenerator):
    """Detectron2's anchor generator for sizes and ratios out of ``anchors.clustering``.

    It only takes numbers: RPN heads build an anchor generator just to count anchors, and anchors
    are not part of a checkpoint, so the clustering happens before and its numbers stand in the
    config.
    """

    @configurable
    def __init__(self, *, sizes, aspect_ratios, strides, offset=0.5):
        """
        Args:
            sizes: sqrt(area) of the anchors, network-input pixels, per level or for all.
            aspect_ratios: height / width, per level or for all.
            strides: stride of each feature map, network-input pixels.
            offset: of the first anchor's centre, in strides.

        Raises:
            ValueError: if sizes or aspect_ratios are not given.
        """
        for key, values in (("SIZES", sizes), ("ASPECT_RATIOS", aspect_ratios)):
            if not anchors_given(values):
                raise ValueError(
                    f"ClusteredAnchorGenerator: MODEL.ANCHOR_GENERATOR.{key} is {values}, expected"
                    " at least one number for each level. tools/train_net.py clusters the training"
                    " boxes by itself; elsewhere run tools/cluster_anchors.py and paste its output"
                    " into the config."
                )
        super().__init__(sizes=sizes, aspect_ratios=aspect_ratios, strides=strides, offset=offset)


def anchors_given(values) -> bool:
    """Whether SIZES or ASPECT_RATIOS hold numbers, for every level they name."""
    return len(values) > 0 and all(not isinstance(v, (list, tuple)) or len(v) > 0 for v in values)
