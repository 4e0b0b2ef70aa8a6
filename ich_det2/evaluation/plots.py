"""Curves of the diagnosis, and how anchors fit boxes: files, or SVG in a page.

A ``target`` is the path of a PNG or SVG file, or a binary buffer, which gets SVG.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..anchors.clustering import AnchorPairs, Anchors, best_iou
from ..files import write_atomically
from .diagnosis import (
    average_precision_score,
    confusion_at_thresholds,
    diagnosis_metrics,
    pr_curve,
    roc_auc_score,
    roc_curve,
)

Target = str | Path | BinaryIO
PLOTTED = ("accuracy", "recall", "precision", "specificity", "npv", "f1")


def plot_thresholds(table: Sequence[dict], operating_threshold: float, target: Target) -> None:
    """Metrics over thresholds at image and patient level, as the paper's figure 4.

    Args:
        table: rows of ``diagnosis_table`` of one or more levels.
        operating_threshold: drawn as a vertical line.
        target: path of a PNG or SVG file, or an open binary file that takes an SVG.
    """
    levels = list(dict.fromkeys(row["level"] for row in table))
    figure, axes = new_figure(len(levels))
    for ax, level in zip(axes, levels):
        rows = [row for row in table if row["level"] == level]
        for metric in PLOTTED:
            ax.plot([r["threshold"] for r in rows], [r[metric] for r in rows], label=metric)
        ax.axvline(operating_threshold, color="grey", linestyle=":", label="operating threshold")
        ax.set(title=f"{level} level", xlabel="threshold", ylim=(-0.02, 1.02), xlim=(0, 1))
        ax.grid(alpha=0.3)
    axes[-1].legend(fontsize="small", loc="lower left")
    save_figure(figure, target)


def plot_roc(
    levels: dict[str, tuple], operating_threshold: float | Mapping[str, float], target: Target
) -> None:
    """ROC curves with the operating point.

    Args:
        levels: name -> (y_true, y_score).
        operating_threshold: drawn as a dot on each curve; one for all, or by name.
        target: path of a PNG or SVG file, or an open binary file that takes an SVG.
    """
    figure, (ax,) = new_figure(1)
    for level, (y_true, y_score) in levels.items():
        false_alarms, recall, _ = roc_curve(y_true, y_score)
        label = f"{level}, AUC {roc_auc_score(y_true, y_score):.3f}"
        (line,) = ax.plot(false_alarms, recall, label=label)
        metrics = _at(y_true, y_score, operating_threshold, level)
        ax.plot(1 - metrics["specificity"], metrics["recall"], "o", color=line.get_color())
    ax.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    ax.set(xlabel="1 - specificity", ylabel="recall", title="ROC; dots: operating threshold")
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")
    save_figure(figure, target)


def plot_pr(
    levels: dict[str, tuple], operating_threshold: float | Mapping[str, float], target: Target
) -> None:
    """Precision-recall curves with the operating point; arguments as :func:`plot_roc`."""
    figure, (ax,) = new_figure(1)
    for level, (y_true, y_score) in levels.items():
        precision, recall, _ = pr_curve(y_true, y_score)
        label = f"{level}, AP {average_precision_score(y_true, y_score):.3f}"
        # Between two thresholds precision is not a line; recall falls, precision stays.
        (line,) = ax.step(recall, precision, where="pre", label=label)
        metrics = _at(y_true, y_score, operating_threshold, level)
        ax.plot(metrics["recall"], metrics["precision"], "o", color=line.get_color())
    ax.set(xlabel="recall", ylabel="precision", title="Precision and recall")
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    ax.grid(alpha=0.3)
    ax.legend(loc="lower left")
    save_figure(figure, target)


def _at(y_true, y_score, operating_threshold, name: str) -> dict[str, float]:
    if isinstance(operating_threshold, Mapping):
        operating_threshold = operating_threshold[name]
    counts = confusion_at_thresholds(y_true, y_score, [operating_threshold])
    return {key: value[0] for key, value in diagnosis_metrics(**counts).items()}


def plot_froc(curves: dict[str, tuple], target: Target) -> None:
    """FROC curves: sensitivity for lesions against false positives a scan, from 1/16 to 16.

    Args:
        curves: name -> (false positives a scan, sensitivity).
        target: path of a PNG or SVG file, or an open binary file that takes an SVG.
    """
    figure, (ax,) = new_figure(1)
    for name, (false_positives, sensitivity) in curves.items():
        ax.step(np.maximum(false_positives, 1 / 32), sensitivity, where="post", label=name)
    rates = [2.0**i for i in range(-4, 5)]
    ax.set_xscale("log", base=2)
    ax.set_xticks(rates, [f"1/{round(1 / r)}" if r < 1 else f"{r:g}" for r in rates])
    ax.set(xlim=(rates[0], rates[-1]), ylim=(-0.02, 1.02), title="FROC of the boxes")
    ax.set(xlabel="false positives a scan", ylabel="sensitivity for lesions")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", loc="upper left")
    save_figure(figure, target)


def plot_calibration(forms: dict[str, dict], target: Target) -> None:
    """Reliability diagram: observed share of hemorrhage against the score, with Wilson intervals.

    Args:
        forms: name -> bins of ``reliability``.
        target: path of a PNG or SVG file, or an open binary file that takes an SVG.
    """
    figure, (ax,) = new_figure(1)
    ax.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    for name, bins in forms.items():
        score, observed = np.array(bins["score"]), np.array(bins["observed"])
        filled = ~np.isnan(score)
        interval = np.array(bins["interval"]).reshape(-1, 2)[filled]
        error = np.abs(interval.T - observed[filled])
        ax.errorbar(
            score[filled], observed[filled], error, marker="o", capsize=2, label=name, alpha=0.8
        )
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    ax.set(xlabel="score", ylabel="share with hemorrhage", title="Calibration of images")
    ax.grid(alpha=0.3)
    if forms:
        ax.legend(fontsize="small", loc="upper left")
    save_figure(figure, target)


def plot_training(rows: Sequence[dict], target: Target) -> None:
    """The sampler's ratio k and the positives' scores over training.

    Args:
        rows: of metrics.json, with "iteration" and "rpn/..." scalars.
        target: path of a PNG or SVG file, or an open binary file that takes an SVG.
    """
    figure, axes = new_figure(2)
    panels = (
        ("ratio k of positives to negatives", ("rpn/ratio_target", "rpn/ratio_actual")),
        ("objectness of positive anchors", ("rpn/pos_score_mean",)),
    )
    for ax, (title, keys) in zip(axes, panels):
        for key in keys:
            points = [(r["iteration"], r[key]) for r in rows if key in r]
            if points:
                ax.plot(*zip(*points), label=key)
        ax.set(title=title, xlabel="iteration")
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize="small")
    save_figure(figure, target)


def plot_history(history: Sequence[dict], target: Target) -> None:
    """The course of the validation's metrics over training.

    Args:
        history: rows with "iteration" and metrics in [0, 1] or, under "bbox/", in percent.
        target: path of a PNG or SVG file, or an open binary file that takes an SVG.
    """
    figure, axes = new_figure(2)
    diagnosis = ("image_auc", "patient_auc", "image_recall", "image_specificity")
    panels = ({f"diagnosis/{key}": 1 for key in diagnosis}, {"bbox/AP50": 100, "bbox/AP": 100})
    for ax, scales in zip(axes, panels):
        for key, scale in scales.items():
            # Of several data sets each has its name in front.
            names = dict.fromkeys(n for r in history for n in r if f"/{n}".endswith(f"/{key}"))
            for name in names:
                points = [(r["iteration"], r[name] / scale) for r in history if name in r]
                ax.plot(*zip(*points), marker=".", label=name)
        ax.set(xlabel="iteration", ylim=(-0.02, 1.02))
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize="small", loc="lower right")
    save_figure(figure, target)


def plot_anchors(
    boxes_wh: np.ndarray, candidates: dict[str, Anchors | AnchorPairs], path: str | Path
) -> None:
    """Boxes with each set of anchors, width against height, and recall over IoU of all sets.

    Args:
        boxes_wh: (M, 2), network-input pixels; at most 5000 of them are drawn, all are counted.
        candidates: name -> anchors.
        path: PNG file.
    """
    figure, axes = new_figure(len(candidates) + 1, width=4.0)
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
    save_figure(figure, path)


def new_figure(columns: int, width: float = 6.0):
    # Not for a diagnosis, which draws none: it takes a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no global state, no display.
    figure = Figure(figsize=(width * columns, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def save_figure(figure, target: Target) -> None:
    import matplotlib

    if hasattr(target, "write"):
        # Without date and random names, the same numbers give the same bytes.
        with matplotlib.rc_context({"svg.hashsalt": "ich_det2"}):
            figure.savefig(target, format="svg", metadata={"Date": None})
        return
    if Path(target).suffix == ".svg":
        with write_atomically(target, "wb") as file:
            save_figure(figure, file)
        return
    with write_atomically(target, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
