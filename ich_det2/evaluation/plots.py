"""Curves of the diagnosis, and how anchors fit boxes, written to PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..anchors.clustering import AnchorPairs, Anchors, best_iou
from ..files import write_atomically
from .diagnosis import confusion_at_thresholds, roc_auc_score

PLOTTED = ("accuracy", "recall", "precision", "specificity", "npv", "f1")


def plot_thresholds(table: Sequence[dict], operating_threshold: float, path: str | Path) -> None:
    """Metrics over thresholds at image and patient level, as the paper's figure 4.

    Args:
        table: rows of ``diagnosis_table`` of one or more levels.
        operating_threshold: drawn as a vertical line.
        path: PNG file.
    """
    levels = list(dict.fromkeys(row["level"] for row in table))
    figure, axes = _figure(len(levels))
    for ax, level in zip(axes, levels):
        rows = [row for row in table if row["level"] == level]
        for metric in PLOTTED:
            ax.plot([r["threshold"] for r in rows], [r[metric] for r in rows], label=metric)
        ax.axvline(operating_threshold, color="grey", linestyle=":", label="operating threshold")
        ax.set(title=f"{level} level", xlabel="threshold", ylim=(-0.02, 1.02), xlim=(0, 1))
        ax.grid(alpha=0.3)
    axes[-1].legend(fontsize="small", loc="lower left")
    _save(figure, path)


def plot_roc(levels: dict[str, tuple], operating_threshold: float, path: str | Path) -> None:
    """ROC curves with the operating point.

    Args:
        levels: name -> (y_true, y_score).
        operating_threshold: drawn as a dot on each curve.
        path: PNG file.
    """
    figure, (ax,) = _figure(1)
    for level, (y_true, y_score) in levels.items():
        thresholds = np.r_[np.inf, np.unique(y_score)[::-1], operating_threshold]
        counts = confusion_at_thresholds(y_true, y_score, thresholds)
        recall = counts["tp"] / max(int(np.sum(y_true)), 1)
        false_alarms = counts["fp"] / max(int(np.sum(np.equal(y_true, 0))), 1)
        label = f"{level}, AUC {roc_auc_score(y_true, y_score):.3f}"
        (line,) = ax.plot(false_alarms[:-1], recall[:-1], label=label)
        ax.plot(false_alarms[-1], recall[-1], "o", color=line.get_color())
    ax.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    ax.set(xlabel="1 - specificity", ylabel="recall", title="ROC; dots: operating threshold")
    ax.set_aspect("equal")
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")
    _save(figure, path)


def plot_history(history: Sequence[dict], path: str | Path) -> None:
    """The course of the validation's metrics over training.

    Args:
        history: rows with "iteration" and metrics in [0, 1] or, under "bbox/", in percent.
        path: PNG file.
    """
    figure, axes = _figure(2)
    diagnosis = ("image_auc", "patient_auc", "image_recall", "image_specificity")
    panels = ({f"diagnosis/{key}": 1 for key in diagnosis}, {"bbox/AP50": 100, "bbox/AP": 100})
    for ax, scales in zip(axes, panels):
        for key, scale in scales.items():
            points = [(r["iteration"], r[key] / scale) for r in history if key in r]
            if points:
                ax.plot(*zip(*points), marker=".", label=key)
        ax.set(xlabel="iteration", ylim=(-0.02, 1.02))
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize="small", loc="lower right")
    _save(figure, path)


def plot_anchors(
    boxes_wh: np.ndarray, candidates: dict[str, Anchors | AnchorPairs], path: str | Path
) -> None:
    """Boxes with each set of anchors, width against height, and recall over IoU of all sets.

    Args:
        boxes_wh: (M, 2), network-input pixels; at most 5000 of them are drawn, all are counted.
        candidates: name -> anchors.
        path: PNG file.
    """
    figure, axes = _figure(len(candidates) + 1, width=4.0)
    shown = boxes_wh[:: -(-len(boxes_wh) // 5000)]
    low, high = shown.min() / 1.5, shown.max() * 1.5
    ticks = [t for t in np.outer(10.0 ** np.arange(-2, 5), (1, 2, 5)).ravel() if low < t < high]
    for i, (ax, (name, anchors)) in enumerate(zip(axes, candidates.items())):
        ax.plot(*shown.T, ".", color="grey", alpha=0.5, markersize=4, label="boxes")
        wh = anchors.wh()
        inside = ((wh > low) & (wh < high)).all(axis=1).sum()
        label = "anchors" if inside == len(wh) else f"anchors, {inside} of {len(wh)} in view"
        ax.plot(*wh.T, "o", color=f"C{i}", markersize=6, label=label)
        ax.set(xscale="log", yscale="log", aspect="equal", title=name)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
            axis.set_ticks([], minor=True)
        ax.set(xlim=(low, high), ylim=(low, high))
        ax.set(xlabel="width, network-input pixels", ylabel="height, network-input pixels")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small", loc="upper left")
        # Best possible recall at a box's best IoU: the share of boxes that do no worse.
        iou = np.sort(best_iou(boxes_wh, anchors))
        recall = 1 - np.arange(len(iou)) / len(iou)
        axes[-1].step(np.r_[0, iou, 1], np.r_[1, recall, 0], where="pre", label=name)
    axes[-1].set(xlabel="IoU with the best anchor, at least", ylabel="share of boxes (recall)")
    axes[-1].set(xlim=(0, 1), ylim=(0, 1.02), title="best possible recall")
    axes[-1].grid(alpha=0.3)
    axes[-1].legend(fontsize="small", loc="lower left")
    _save(figure, path)


def _figure(columns: int, width: float = 6.0):
    # Without pyplot: no global state, no display.
    figure = Figure(figsize=(width * columns, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Figure, path: str | Path) -> None:
    with write_atomically(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
