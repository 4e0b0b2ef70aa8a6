"""Anchors from data."""

from .clustering import (
    AnchorPairs,
    Anchors,
    anchor_recall,
    best_iou,
    cluster_anchors,
    cluster_pairs,
)

__all__ = [
    "AnchorPairs",
    "Anchors",
    "anchor_recall",
    "best_iou",
    "cluster_anchors",
    "cluster_pairs",
]
