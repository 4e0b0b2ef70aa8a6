"""The figures of an experiment, as PNG or SVG files."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ..evaluation.plots import Target, new_figure, save_figure
from .results import SEED, groups_of, spread


def plot_bars(
    rows: Sequence[dict], axes: Sequence[str], panels: Mapping[str, str], target: Target
) -> None:
    """Grouped bars of the mean over seeds, as the paper's figure 2; lines: standard deviation.

    Args:
        rows: of trainings, see ``experiments.results``.
        axes: the first makes the groups, the others the bars within.
        panels: title -> name of a metric.
        target: path of a PNG or SVG file.
    """
    figure, panels_axes = new_figure(len(panels))
    first, *others = (axis for axis in axes if axis != SEED)
    groups = list(dict.fromkeys(row[first] for row in rows))
    bars = list(groups_of(rows, others))
    width = 0.8 / max(len(bars), 1)
    for ax, (title, metric) in zip(panels_axes, panels.items()):
        for b, bar in enumerate(bars):
            found = [
                spread([float(r.get(metric, math.nan)) for r in same])
                for group in groups
                for same in [groups_of(rows, axes).get((group, *bar), [])]
            ]
            x = np.arange(len(groups)) + (b + 0.5) * width - 0.4
            ax.bar(
                x,
                [f["mean"] for f in found],
                0.92 * width,
                yerr=[0 if math.isnan(f["std"]) else f["std"] for f in found],
                error_kw={"elinewidth": 0.8},
                label=", ".join(f"{k} {v}" for k, v in zip(others, bar)) or None,
            )
        ax.set_xticks(range(len(groups)), groups)
        ax.set(title=title, xlabel=first)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3, axis="y")
    if bars and others:
        figure.legend(
            *panels_axes[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=min(len(bars), 4),
            fontsize="small",
        )
    save_figure(figure, target)


def plot_search(
    rows: Sequence[dict], axis: str, panels: Mapping[str, str], picked, target: Target
) -> None:
    """Metrics over a searched value, as the paper's figure 3: a dot a seed, a line of the means.

    Args:
        rows: of trainings, see ``experiments.results``.
        axis: name of the value, above 0.
        panels: title -> name of a metric.
        picked: the value to mark; None marks none.
        target: path of a PNG or SVG file.
    """
    figure, panels_axes = new_figure(len(panels))
    of_value = {value: same for (value,), same in sorted(groups_of(rows, [axis]).items())}
    for ax, (title, metric) in zip(panels_axes, panels.items()):
        scores = {v: [float(r.get(metric, math.nan)) for r in of_value[v]] for v in of_value}
        points = [(v, score) for v in scores for score in scores[v]]
        ax.plot(*zip(*points), "o", color="C0", alpha=0.5, markersize=4, label="seeds")
        ax.plot(
            list(scores), [spread(s)["mean"] for s in scores.values()], color="C0", label="mean"
        )
        if picked is not None:
            ax.axvline(picked, color="C1", linestyle="--", label=f"picked: {picked:g}")
        ax.set_xscale("log")
        ax.set_xticks(list(of_value), [f"{value:g}" for value in of_value])
        ax.set_xticks([], minor=True)
        ax.set(title=title, xlabel=axis)
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    save_figure(figure, target)


def plot_curves(rows: Sequence[dict], panels: Sequence[str], target: Target) -> None:
    """Metrics over thresholds of several methods, as the paper's figure 4.

    A line of the means, in a band of one standard deviation over seeds to either side.

    Args:
        rows: of ``threshold_curves``.
        panels: metrics.
        target: path of a PNG or SVG file.
    """
    figure, panels_axes = new_figure(len(panels), width=5.0)
    for ax, metric in zip(panels_axes, panels):
        for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
            same = [row for row in rows if row["name"] == name]
            x, mean, std = (
                np.array([row[key] for row in same])
                for key in ("threshold", f"{metric} mean", f"{metric} std")
            )
            # Matplotlib has ten colours and begins again.
            (line,) = ax.plot(x, mean, "-" if i % 20 < 10 else "--", label=name)
            low, high = np.clip([mean - std, mean + std], 0, 1)
            ax.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        ax.set(xlabel="threshold", ylabel=metric, xlim=(0, 1), ylim=(-0.02, 1.02))
        ax.grid(alpha=0.3)
    panels_axes[0].legend(fontsize="small")
    save_figure(figure, target)


def plot_systems(
    rows: Sequence[dict], differences: Sequence[dict], axis: str, target: Target
) -> None:
    """Systems below each other: AUC of slices, a dot a seed, beside the CPU time of a slice; and
    how the AUC differs from the reference's, with its 95 % interval.

    Args:
        rows: of trainings, with "AUC" and "CPU-seconds a slice".
        differences: of ``differences_to``.
        axis: what tells the systems apart.
        target: path of a PNG or SVG file.
    """
    names = list(dict.fromkeys(str(row[axis]) for row in rows))
    place = {name: y for y, name in enumerate(reversed(names))}
    figure = Figure(figsize=(15.0, 1.5 + 0.3 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    area, cost, against = figure.subplots(1, 3, sharey=True)
    heights = [place[str(row[axis])] for row in rows]
    area.plot([row["AUC"] for row in rows], heights, "o", color="C0", alpha=0.6)
    area.axvline(0.5, color="grey", linestyle=":")
    area.set(title="AUC of slices")
    area.set_yticks(list(place.values()), list(place))
    cost.plot([row["CPU-seconds a slice"] for row in rows], heights, "o", color="C2", alpha=0.6)
    cost.set(title="CPU-seconds a slice", xscale="log")
    cost.xaxis.set_minor_formatter(NullFormatter())
    for row in differences:
        if row["metric"] == "AUC":
            y, ends = place[str(row[axis])], [row["low"], row["high"]]
            against.plot(ends, [y, y], color="C1")
            against.plot(row["difference"], y, "o", color="C1")
    against.axvline(0, color="grey", linestyle=":")
    against.set(title="difference in AUC to the reference, 95 %")
    for ax in (area, cost, against):
        ax.grid(alpha=0.3)
    save_figure(figure, target)


def plot_pictures(rows: Sequence[tuple[str, Sequence[np.ndarray]]], names, target: Target) -> None:
    """Pictures of the same slices side by side, as the paper's figure 5.

    Args:
        rows: title and one RGB picture for each name.
        names: of the columns.
        target: path of a PNG or SVG file.
    """
    flat = [
        (f"{name}\n{title}", picture)
        for title, pictures in rows
        for name, picture in zip(names, pictures)
    ]
    columns = len(names) * min(2, len(rows))  # two slices in a row
    lines = math.ceil(len(flat) / columns)
    figure = Figure(figsize=(4.0 * columns, 4.5 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, (title, picture) in zip(axes, flat):
        ax.imshow(picture)
        ax.set_title(title, fontsize="small")
    save_figure(figure, target)
