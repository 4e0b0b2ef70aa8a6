"""An experiment: its cells from a Hydra config, and the tables and figures of the finished ones.

The config is that of ``configs/experiments``; ``base.yaml`` there says what each setting is.
"""

import difflib
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf
from tabulate import tabulate

from ..data.inspection import split_table
from ..data.mapper import IchDatasetMapper
from ..data.tree import LISTS
from ..engine.config import flatten
from ..evaluation.predictions import read_predictions
from ..evaluation.visualize import draw_predictions
from ..evaluation.yardstick import Yardstick
from ..files import write_atomically, write_csv, write_json
from . import figures
from .cells import Cell, check_cells
from .cost import read_cost
from .results import (
    SEED,
    differences_to,
    not_above_chance,
    patterns,
    select,
    spread_table,
    threshold_curves,
)

FORMATS = ("png", "svg")

# Detectron2 takes no 5 where it expects 5.0.
OmegaConf.register_new_resolver("float", float, replace=True)
OmegaConf.register_new_resolver(
    "num_cells", lambda grid: math.prod(len(_values(grid[axis])) for axis in grid), replace=True
)

# What a person adds to freely; all else has to be a key of the configs.
_FREE = ("opts", "opts_by", "metrics", "bars", "config_of", "grid", "hydra")
_KINDS = {int: "a whole number", bool: "true or false", dict: "a group of keys"}
_TYPES = {"jobs": int, "report_only": bool} | dict.fromkeys(
    ("data", "grid", "opts", "opts_by", "metrics"), dict
)


def check_settings(cfg: DictConfig, configs: Path) -> None:
    """Refuses settings of a wrong type, and those that nothing reads.

    Args:
        cfg: composed by Hydra.
        configs: folder of the experiments' configs.

    Raises:
        ValueError: naming the setting.
    """
    settings, known = _settings(cfg), _known_keys(configs)
    text = OmegaConf.to_yaml(cfg)
    for key, value in settings.items():
        names = [f"{key}.{name}" for name in value] if isinstance(value, dict) else []
        for name in () if key in _FREE else (key, *names):
            if name not in known and f"${{{name}}}" not in text:
                like = ", ".join(difflib.get_close_matches(name, known, 1))
                raise ValueError(
                    f"nothing reads the setting {name}" + (f"; like it is {like}." if like else ".")
                )
    for key, kind in _TYPES.items():
        if not isinstance(settings[key], kind) or isinstance(settings[key], bool) != (kind is bool):
            raise ValueError(f"{key} is {settings[key]!r}, expected {_KINDS[kind]}.")


def _known_keys(configs: Path) -> list[str]:
    known = {"cell", "hardware"}
    for path in sorted(configs.rglob("*.yaml")):
        prefix = "data." if path.parent.name == "data" else ""
        for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            nested = (f"{prefix}{key}.{name}" for name in value) if isinstance(value, dict) else ()
            known |= {prefix.rstrip("."), f"{prefix}{key}", *nested}
    return sorted(known - {""})


def _values(given) -> list:
    """Values of an axis, of which a person may give one alone."""
    return list(given) if isinstance(given, (list, ListConfig)) else [given]


def build_cells(cfg: DictConfig) -> list[Cell]:
    """The cells of an experiment: each choice of its grid's values.

    Args:
        cfg: composed by Hydra.

    Raises:
        ValueError: if an axis' values are none for a folder's name, or make no difference.
        omegaconf.errors.OmegaConfBaseException: if a setting is missing or names an unknown one.
    """
    axes = {
        axis: _values(given)
        for axis, given in OmegaConf.to_container(cfg.grid, resolve=True).items()
    }
    for axis, values in axes.items():
        names = [f"{value}" for value in values]
        plain = all(re.fullmatch(r"\w[\w.+-]*", name) for name in names)
        if not names or not plain or len(set(names)) < len(names):
            raise ValueError(
                f"grid.{axis} is {values}, expected different values, one or more, that are fit for"
                " a folder's name."
            )
    cells: list[Cell] = []
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
        for other in cells[:-1]:
            if (other.config, other.opts) == (config, opts):
                raise ValueError(
                    f"the cells {other.folder.name} and {name} are the same training: nothing reads"
                    " what tells them apart."
                )
    return cells


def check_data(cfg: DictConfig) -> None:
    """Looks for the data before a cell is started.

    Raises:
        FileNotFoundError: if they are not there.
    """
    root, splits = cfg.data.root, cfg.get("splits")
    name = OmegaConf.select(cfg, "opts.DATASETS.TRAIN[0]", default="ich_train")
    path = Path(root, LISTS, f"{name.removeprefix('ich_')}.txt")
    if path.is_file():
        return
    if splits and path.parents[1].is_dir():
        raise FileNotFoundError(
            f"there is no {path}; `python datasets/make_splits.py {root} {splits}` writes it."
        )
    raise FileNotFoundError(
        f"there is no {path}; make the VOC tree '{root}' as datasets/README.md says, or give its"
        " place by data.root=PATH."
    )


def report(cfg: DictConfig, cells: Sequence[Cell]) -> str:
    """Writes the tables and figures of an experiment from its finished cells.

    Args:
        cfg: composed by Hydra.
        cells: all of the experiment.

    Returns:
        The table as Markdown, and which cells are missing.

    Raises:
        FileNotFoundError, ValueError: of :func:`check_cells`, or if results are not whole.
    """
    folder = Path(cfg.folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = [cell for cell in cells if cell.finished]
    if cells and not done:
        return f"No cell of {folder} is finished."
    check_cells(done)
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
        cells = build_cells(config)
        print(report(config, cells))
        if not all(cell.finished for cell in cells):
            raise SystemExit(1)


# ---- reports of each kind ---------------------------------------------------------------------


def _tables(
    cfg: Mapping, folder: Path, cells: Sequence[Cell], further: Sequence[Mapping] = ()
) -> tuple[list[dict], str]:
    """Writes results.csv and table.csv; returns the rows of results and the table as Markdown.

    Args:
        cfg, folder, cells: of the report.
        further: numbers of each cell beside those of its evaluations.
    """
    axes = list(cfg["grid"])
    rows = [
        {**cell.values, **cell.run.read_results(), **more}
        for cell, more in itertools.zip_longest(cells, further, fillvalue={})
    ]
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


def _table(cfg: Mapping, folder: Path, cells: Sequence[Cell]) -> str:
    _, text = _tables(cfg, folder, cells)
    return _write(folder, f"{text}\n{cfg['note'].strip()}\n")


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


def _systems(cfg: Mapping, folder: Path, cells: Sequence[Cell]) -> str:
    wanted = cfg["systems"]
    by, dataset = wanted["by"], wanted["dataset"]
    found: dict[str, dict] = {}
    further = []
    for cell in cells:
        yardstick = Yardstick(read_predictions(cell.run.inference(dataset)))
        found.setdefault(str(cell.values[by]), {})[cell.values.get(SEED)] = yardstick
        cost = read_cost(cell.run, dataset, wanted["num_slices"])
        further.append({**yardstick.metrics(), **cost})
    rows, text = _tables(cfg, folder, cells, further)
    differences = differences_to(found, wanted["reference"], by)
    if weak := [name for name, seeds in found.items() if not_above_chance(seeds.values())]:
        text += f"\nNot told from chance by the AUC of slices: {', '.join(weak)}.\n"
    if differences:
        write_csv(folder / "differences.csv", list(differences[0]), differences)
        text += f"\nDifferences to {wanted['reference']} (95 % interval over patients, p):\n\n"
        text += _difference_table(differences, by) + "\n"
    _draw(folder, cfg, figures.plot_systems, rows, differences, by)
    return _write(folder, text)


def _difference_table(differences: Sequence[Mapping], by: str) -> str:
    columns: dict[str, dict[str, str]] = {}
    for row in differences:
        words = "{difference:+.3f} ({low:+.3f} to {high:+.3f}), {p_value:.3f}".format(**row)
        columns.setdefault(str(row[by]), {by: str(row[by])})[str(row["metric"])] = words
    names = dict.fromkeys(name for column in columns.values() for name in column)
    lines = [[column.get(name, "–") for name in names] for column in columns.values()]
    return tabulate(lines, list(names), "github", disable_numparse=True)


def _data(cfg: Mapping, folder: Path, cells: Sequence[Cell]) -> str:
    rows = split_table(Path(cfg["data"]["root"]))
    write_csv(folder / "table.csv", list(rows[0]), rows)
    return _write(folder, tabulate(rows, "keys", "github") + "\n")


REPORTS: dict[str, Callable[[Mapping, Path, Sequence[Cell]], str]] = {
    "table": _table,
    "bars": _bars,
    "search": _search,
    "thresholds": _thresholds,
    "pictures": _pictures,
    "systems": _systems,
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
