"""Anchors from data."""

from .clustering import Anchors, anchor_recall, best_iou, cluster_anchors

__all__ = ["Anchors", "anchor_recall", "best_iou", "cluster_anchors"]
