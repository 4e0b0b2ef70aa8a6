"""An experiment: its cells from a Hydra config, and the tables and figures of the finished ones.

The config is that of ``configs/experiments``; ``base.yaml`` there says what each setting is.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from ..data.inspection import split_table
from ..data.mapper import IchDatasetMapper
from ..data.tree import LISTS
from ..engine.config import flatten
from ..evaluation.predictions import read_predictions
from ..evaluation.visualize import draw_predictions
from ..files import write_atomically, write_csv, write_json
from . import figures
from .cells import Cell
from .results import (
    SEED,
    patterns,
    select,
    spread_table,
    threshold_curves,
)

FORMATS = ("png", "svg")

# Detectron2 takes no 5 where it expects 5.0.
OmegaConf.register_new_resolver("float", float, replace=True)
OmegaConf.register_new_resolver(
    "num_cells", lambda grid: math.prod(len(values) for values in grid.values()), replace=True
)


def build_cells(cfg: DictConfig) -> list[Cell]:
    """The cells of an experiment: each choice of its grid's values.

    Args:
        cfg: composed by Hydra.

    Raises:
        omegaconf.errors.OmegaConfBaseException: if a setting is missing or names an unknown one.
    """
    axes = OmegaConf.to_container(cfg.grid, resolve=True)
    cells = []
    for values in itertools.product(*axes.values()) if axes else ():
        chosen = dict(zip(axes, values))
        one = OmegaConf.create({**_settings(cfg), **chosen})
        plain = OmegaConf.to_container(one, resolve=True, throw_on_missing=True)
        further = [
            # As text: a value of YAML may be a number or a truth value.
            {str(key): opts for key, opts in table.items()}.get(str(plain.get(axis)), {})
            for axis, table in plain["opts_by"].items()
        ]
        opts = OmegaConf.merge(plain["data"]["opts"], plain["opts"], *further)
        name = "_".join(f"{axis}-{value}" for axis, value in chosen.items())
        opts = flatten(OmegaConf.to_container(opts))
        config = Path(plain["configs"], plain["config"])
        cells.append(Cell(Path(plain["cells"], name), config, opts, chosen))
    return cells


def check_data(cfg: DictConfig) -> None:
    """Looks for the data before a cell is started.

    Raises:
        FileNotFoundError: if they are not there.
    """
    path = Path(cfg.data.root, LISTS, "train.txt")
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}; make the VOC tree '{cfg.data.root}' as datasets/README.md says,"
            " or give its place by data.root=PATH."
        )


def report(cfg: DictConfig, cells: Sequence[Cell]) -> str:
    """Writes the tables and figures of an experiment from its finished cells.

    Args:
        cfg: composed by Hydra.
        cells: all of the experiment.

    Returns:
        The table as Markdown, and which cells are missing.

    Raises:
        FileNotFoundError, ValueError: if a cell was trained with other settings, or its results
            are not whole.
    """
    folder = Path(cfg.folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = [cell for cell in cells if cell.finished]
    if cells and not done:
        return f"No cell of {folder} is finished."
    for cell in done:
        cell.check()
    # What has a cell's own values in it cannot be resolved for all.
    settings = {k: v for k, v in _settings(cfg).items() if k not in ("config", "opts", "opts_by")}
    settings = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
    text = REPORTS[cfg.report](settings, folder, done)
    if missing := [cell.folder.name for cell in cells if not cell.finished]:
        text += f"\n{len(missing)} of {len(cells)} cells are not finished: {', '.join(missing)}.\n"
    return text


def _settings(cfg: DictConfig) -> dict:
    return {key: value for key, value in OmegaConf.to_container(cfg).items() if key != "hydra"}


class ReportCallback(Callback):
    """Reports when Hydra's launcher has run all cells, and exits with 1 if one is not finished."""

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        try:
            cells = build_cells(config)
            print(report(config, cells))
        except (OSError, ValueError) as error:
            raise SystemExit(f"{config.experiment}: error: {error}") from error
        if not all(cell.finished for cell in cells):
            raise SystemExit(1)


# ---- reports of each kind ---------------------------------------------------------------------


def _tables(cfg: Mapping, folder: Path, cells: Sequence[Cell]) -> tuple[list[dict], str]:
    """Writes results.csv, table.csv and table.md; returns the rows of results and table.md."""
    axes = list(cfg["grid"])
    rows = [{**cell.values, **cell.run.read_results()} for cell in cells]
    write_csv(folder / "results.csv", list(dict.fromkeys(k for row in rows for k in row)), rows)
    table = spread_table(rows, axes, cfg["metrics"])
    write_csv(folder / "table.csv", list(table[0]), table)
    names = [axis for axis in axes if axis != SEED]
    lines = [
        [*(entry[name] for name in names), *(_spread(entry, c) for c in cfg["metrics"])]
        for entry in table
    ]
    text = tabulate(lines, [*names, *cfg["metrics"]], "github", disable_numparse=True)
    return rows, f"{text}\n\nMean ± standard deviation over seeds (number of seeds).\n"


def _bars(cfg: Mapping, folder: Path, cells: Sequence[Cell]) -> str:
    rows, text = _tables(cfg, folder, cells)
    _draw(folder, cfg, figures.plot_bars, rows, list(cfg["grid"]), cfg["bars"])
    return _write(folder, text)


def _search(cfg: Mapping, folder: Path, cells: Sequence[Cell]) -> str:
    rows, text = _tables(cfg, folder, cells)
    axis, metric, test = (cfg["search"][key] for key in ("axis", "metric", "test"))
    picked = select(rows, axis, metric)
    picked["of"] = len(cfg["grid"][axis])
    chosen = [row for row in rows if row[axis] == picked[axis]]
    (tested,) = spread_table(chosen, [axis], test)
    values = {key: value for key, value in tested.items() if key != axis}
    write_json(folder / "selected.json", {**picked, "test": values})
    _draw(folder, cfg, figures.plot_search, rows, axis, cfg["metrics"], picked[axis])
    found = ", ".join(f"{column} {_spread(tested, column)}" for column in test)
    words = f"By {metric}, {axis} {picked[axis]:g} is picked of {picked['candidates']} values"
    return _write(folder, f"{text}\n{words}. There: {found}.\n")


def _thresholds(cfg: Mapping, folder: Path, cells: Sequence[Cell]) -> str:
    _, text = _tables(cfg, folder, cells)
    wanted, runs = cfg["thresholds"], {}
    for cell in cells:
        predictions = read_predictions(cell.run.inference(wanted["dataset"]))
        runs.setdefault(str(cell.values[wanted["by"]]), []).append(predictions)
    rows = threshold_curves(runs, wanted["values"], wanted["metrics"])
    write_csv(folder / "curves.csv", list(rows[0]), rows)
    _draw(folder, cfg, figures.plot_curves, rows, wanted["panels"])
    return _write(folder, text)


def _pictures(cfg: Mapping, folder: Path, cells: Sequence[Cell]) -> str:
    dataset, each = cfg["pictures"]["dataset"], cfg["pictures"]["each"]
    runs, thresholds, text = {}, {}, "| slice | at each detector's own threshold |\n|---|---|\n"
    axes = [axis for axis in cfg["grid"] if len({cell.values[axis] for cell in cells}) > 1]
    for cell in cells:
        name = ", ".join(str(cell.values[axis]) for axis in axes or cfg["grid"])
        runs[name] = read_predictions(cell.run.inference(dataset))
        if runs[name].boxes is None:
            raise ValueError(f"{cell.folder}: has no boxes on {dataset}; only detectors are drawn.")
        split = dataset.removeprefix("ich_")
        thresholds[name] = cell.run.read_results()[f"{split}/operating_threshold"]
    # The window is the same for all; the first cell's config is as good as any.
    mapper = IchDatasetMapper(cells[0].run.read_config(), is_train=False)
    rows = []
    for title, images in patterns(runs, thresholds, each=each).items():
        for image in images:
            overlays = []
            for name, predictions in runs.items():
                i = predictions.image_ids.index(image)
                grey = mapper.read_image(predictions.files[i])
                overlays.append(draw_predictions(grey, predictions, i, thresholds[name]))
            rows.append((title, overlays))
            text += f"| {image} | {title} |\n"
    if not rows:
        raise ValueError(f"{dataset} has no positive slice to show.")
    _draw(folder, cfg, figures.plot_pictures, rows, list(runs))
    return _write(folder, text)


def _data(cfg: Mapping, folder: Path, cells: Sequence[Cell]) -> str:
    rows = split_table(Path(cfg["data"]["root"]))
    write_csv(folder / "table.csv", list(rows[0]), rows)
    return _write(folder, tabulate(rows, "keys", "github") + "\n")


REPORTS: dict[str, Callable[[Mapping, Path, Sequence[Cell]], str]] = {
    "bars": _bars,
    "search": _search,
    "thresholds": _thresholds,
    "pictures": _pictures,
    "data": _data,
}


def _spread(entry: Mapping, column: str) -> str:
    mean, std, n = (entry[f"{column} {key}"] for key in ("mean", "std", "n"))
    if not n:
        return "–"
    return f"{mean:.3f}" + ("" if math.isnan(std) else f" ± {std:.3f}") + f" ({n})"


def _draw(folder: Path, cfg: Mapping, plot: Callable, *args) -> None:
    for suffix in FORMATS:
        plot(*args, folder / f"{cfg['experiment']}.{suffix}")


def _write(folder: Path, text: str) -> str:
    with write_atomically(folder / "table.md") as file:
        file.write(text)
    return text
