"""Anchors from data."""

from ..lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".clustering": [
            "AnchorPairs",
            "Anchors",
            "anchor_recall",
            "best_iou",
            "cluster_anchors",
            "cluster_pairs",
        ]
    },
)
