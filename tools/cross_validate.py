#!/usr/bin/env python
"""Compares forms of a detector by cross-validation over patients.

    python tools/cross_validate.py DATA --output output/cv \\
        --form plain configs/frcnn_effnet_lite0.yaml \\
        --form cost configs/csfrcnn_effnet_lite0.yaml \\
        --form alpha-1 configs/csfrcnn_effnet_lite0.yaml MODEL.RPN.COST.ALPHA 1.0

Each form is trained on all folds but one and scored on all slices of that one's patients, for each
seed, so that every patient is scored once a seed by a model that has not seen the patient. The last
model of a training is taken, so nothing is selected on the fold that is scored. Before anything is
trained, no patient and no identical file may be on both sides of a fold. A cell (form, seed, fold)
is a run of tools/train_net.py in OUTPUT/<form>/seed<s>/fold<i>; a finished one is not run again, so
a run that was stopped can be started again, with further forms and seeds too.

OUTPUT/table.md has all tables. table.csv holds the numbers pooled over the folds, mean and standard
deviation over seeds (seeds.csv: of each seed); differences.csv those to the first form, mean over
seeds, with 95 % intervals and p-values by paired bootstrap over patients; by_type.csv and
by_size.csv the recall of kinds and sizes of bleeds. OUTPUT/<form>/seed<s>/pooled holds the pooled
predictions, as an evaluation leaves them. Bleeding slices without boxes are left out of the numbers
of boxes.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ich_det2.cli import guard, quiet_imports

with quiet_imports():
    import numpy as np
    from tabulate import tabulate

    from ich_det2.data.audit import find_leaks
    from ich_det2.data.splits import make_folds
    from ich_det2.data.tree import VocTree
    from ich_det2.engine.config import load_config
    from ich_det2.engine.run_folder import RunFolder
    from ich_det2.evaluation.diagnosis import summarize
    from ich_det2.evaluation.predictions import (
        Predictions,
        read_predictions,
        write_boxes,
        write_predictions,
    )
    from ich_det2.evaluation.yardstick import Yardstick, paired_differences
    from ich_det2.experiments.cells import Cell, check_cells, run_cells
    from ich_det2.experiments.results import spread
    from ich_det2.files import write_atomically, write_csv

ROOT = Path(__file__).resolve().parents[1]
SCALARS = {"mean k": "rpn/ratio_target", "positives an image": "rpn/num_pos_anchors"}
THRESHOLD = 0.5


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="VOC tree with patients.csv")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--form",
        dest="forms",
        action="append",
        nargs="+",
        required=True,
        metavar=("NAME", "CONFIG"),
        help="a name, a config file, and KEY VALUE pairs; the first form is the reference",
    )
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="+", metavar="FOLD", help="run these folds alone")
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="of the trainings"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="trainings side by side, on GPUs each on the next"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="train nothing, only write the tables"
    )
    return parser.parse_args(argv)


def link_folds(data: Path, output: Path, folds: int, seed: int) -> None:
    """Makes OUTPUT/folds/<i>: links to the data, and lists that leave out fold i.

    Raises:
        FileNotFoundError, ValueError: if the tree is not complete or has too few patients, or
            OUTPUT holds other folds, or a fold leaks.
    """
    tree = VocTree(data)
    images = list(tree.images)
    if unknown := [image for image in images if image not in tree.patients]:
        raise ValueError(
            f"{data}/patients.csv does not name '{unknown[0]}' and {len(unknown) - 1} more images;"
            f" `python datasets/make_splits.py {data}` writes it for DICOM."
        )
    groups = [tree.patients[image][0] for image in images]
    lists = make_folds(groups, list(tree.findings.values()), folds, seed=seed)
    for fold in range(folds):
        train, test = ([images[i] for i in lists[f"fold{fold}_{s}"]] for s in ("train", "val"))
        linked = tree.link(output / "folds" / str(fold))
        if linked.lists:
            check_leaks(linked)
        linked.write_lists({"train": train, "test": test})
        check_leaks(linked)


def check_leaks(tree: VocTree) -> None:
    """Compares the lists train and test of a fold.

    Raises:
        ValueError: if they share a patient, a study or an identical file.
    """
    leaks = find_leaks(tree, ["train", "test"], pixels=False, files=True)
    if leaks:
        first, second = leaks[0].images
        raise ValueError(
            f"{tree.root}: '{first}' and '{second}' are of the same {leaks[0].kind} on two sides of"
            f" the fold ({len(leaks)} such leaks); {leaks[0].remedy}; and give another output."
        )


def build_cell(args, form: list[str], seed: int, fold: int) -> Cell:
    """One training: a form with a seed on all folds but one."""
    name, config, *opts = form
    keys = dict(zip(opts[::2], opts[1::2]))
    keys["DATASETS.ICH_ROOT"] = args.output / "folds" / str(fold)
    # The last model is scored, once: DATASETS.VAL is not used to select.
    keys |= {"DATASETS.VAL": "('ich_test',)", "TEST.EVAL_PERIOD": 0, "SEED": seed}
    return Cell(seed_folder(args, name, seed) / f"fold{fold}", Path(config), keys)


def seed_folder(args, form: str, seed: int) -> Path:
    """Where the folds of a form and seed are."""
    return args.output / form / f"seed{seed}"


@dataclass(frozen=True)
class Pooled:
    """The finished folds of a form and seed as one."""

    form: str
    seed: int
    runs: Sequence[RunFolder]

    @cached_property
    def yardstick(self) -> Yardstick:
        joined = Predictions.joined([read_predictions(r.inference("ich_test")) for r in self.runs])
        return Yardstick(joined.take(sorted(joined.image_ids)))

    @cached_property
    def metrics(self) -> dict[str, float]:
        found = self.yardstick.found
        summary = summarize(found.labels, found.scores, THRESHOLD)
        rows = [row for run in self.runs for row in run.read_metrics()]
        return {
            **{name: float(value) for name, value in self.yardstick.metrics().items()},
            **{f"{k} at {THRESHOLD}": summary[k] for k in ("accuracy", "recall", "specificity")},
            **{
                name: float(np.mean([row[key] for row in rows if key in row] or np.nan))
                for name, key in SCALARS.items()
            },
        }

    def write(self, folder: Path) -> None:
        """Writes the predictions as an evaluation leaves them."""
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(self.yardstick.found, folder)
        if self.yardstick.found.boxes is not None:
            write_boxes(self.yardstick.found, folder)


def pool(args) -> dict[str, list[Pooled]]:
    """The seeds of each form with finished folds, but for those that lack folds of others."""
    forms = {}
    for name, *_ in args.forms:
        seeds = []
        for seed in dict.fromkeys(args.seeds):
            folders = [seed_folder(args, name, seed) / f"fold{i}" for i in range(args.folds)]
            runs = [run for run in map(RunFolder, folders) if run.done.is_file()]
            seeds.append(Pooled(name, seed, runs))
        most = max(len(pooled.runs) for pooled in seeds)
        if most:
            forms[name] = [pooled for pooled in seeds if len(pooled.runs) == most]
    return forms


def differences(pooled: Sequence[Pooled], reference: Sequence[Pooled]) -> list[dict]:
    """Rows of ``paired_differences`` over the seeds that both have on the same images."""
    others = {other.seed: other.yardstick for other in reference}
    pairs = [
        (one.yardstick, others[one.seed])
        for one in pooled
        if one.seed in others and one.yardstick.found.image_ids == others[one.seed].found.image_ids
    ]
    # A seed that was scored on other folds than the first one cannot be drawn together with it.
    pairs = [p for p in pairs if p[0].found.image_ids == pairs[0][0].found.image_ids]
    rows = paired_differences(pairs) if pairs else []
    return [{"form": pooled[0].form, "seeds": len(pairs), **row} for row in rows]


def mean_rows(form: str, tables: Sequence[list[dict]]) -> list[dict]:
    """Tables of several seeds as one: the mean of each number that is no count."""
    return [
        {"form": form}
        | {
            key: spread([row[key] for row in same])["mean"] if isinstance(value, float) else value
            for key, value in same[0].items()
        }
        for same in zip(*tables)
    ]


def write_tables(args) -> None:
    forms = pool(args)
    if not forms:
        print(f"No cell of {args.output} is finished.")
        return
    reference = next(iter(forms.values()))
    tables: dict[str, list[dict]] = {
        name: [] for name in ("table", "seeds", "differences", "by_type", "by_size")
    }
    columns = {}
    for form, pooled in forms.items():
        images = len(pooled[0].yardstick.found.image_ids)
        size = {"seeds": len(pooled), "folds": len(pooled[0].runs), "images": images}
        for one in pooled:
            one.write(seed_folder(args, form, one.seed) / "pooled")
            tables["seeds"].append(
                {"form": form, "seed": one.seed, "folds": len(one.runs), **one.metrics}
            )
        found = {key: spread([one.metrics[key] for one in pooled]) for key in pooled[0].metrics}
        flat = {
            f"{key} {word}": value[part]
            for key, value in found.items()
            for word, part in (("mean", "mean"), ("sd", "std"))
        }
        tables["table"].append({"form": form, **size, **flat})
        columns[form] = {key: str(value) for key, value in size.items()} | {
            key: f"{value['mean']:.3f}" + (f" ± {value['std']:.3f}" if value["n"] > 1 else "")
            for key, value in found.items()
            if value["n"]
        }
        if pooled is not reference:
            tables["differences"] += differences(pooled, reference)
        tables["by_type"] += mean_rows(form, [p.yardstick.by_type() for p in pooled])
        tables["by_size"] += mean_rows(form, [p.yardstick.by_size() for p in pooled])
    for name, rows in tables.items():
        write_csv(args.output / f"{name}.csv", _fields(rows), rows)
    names = dict.fromkeys(key for column in columns.values() for key in column)
    parts = [
        tabulate(
            [[key, *(column.get(key, "") for column in columns.values())] for key in names],
            ["", *columns],
            "github",
            disable_numparse=True,
        )
    ]
    titles = {
        "differences": f"Differences to {reference[0].form}, 95 % intervals over patients",
        "by_type": "Slices and boxes by type of bleed",
        "by_size": "Boxes by size, thirds of the true boxes' areas in squared pixels",
    }
    for name, title in titles.items():
        if rows := tables[name]:
            fields = _fields(rows)
            cells = [[row.get(field, "") for field in fields] for row in rows]
            parts += [f"## {title}", tabulate(cells, fields, "github", ".3f")]
    text = "\n\n".join(parts)
    with write_atomically(args.output / "table.md") as file:
        file.write(text + "\n")
    print(text)


def _fields(rows: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def run(args) -> int:
    """Runs the cells that are not finished and writes the tables; 1 if one has failed."""
    folds = range(args.folds) if args.only is None else args.only
    names = [form[0] for form in args.forms]
    for name, *rest in args.forms:
        if not re.fullmatch(r"\w[\w.-]*", name) or name == "folds" or names.count(name) > 1:
            raise ValueError(f"--form '{name}': expected different names fit for a folder.")
        if len(rest) % 2 == 0:
            raise ValueError(f"--form {name}: expected a config file and KEY VALUE pairs.")
        if "SEED" in rest[1::2]:
            raise ValueError(f"--form {name}: SEED is given by --seeds, expected none here.")
        load_config(rest[0], rest[1:])
    if unknown := [fold for fold in folds if not 0 <= fold < args.folds]:
        raise ValueError(f"--only is {unknown[0]}, expected folds from 0 to {args.folds - 1}.")
    link_folds(args.data, args.output, args.folds, args.seed)
    seeds = dict.fromkeys(args.seeds)
    cells = [build_cell(args, f, seed, i) for seed in seeds for f in args.forms for i in folds]
    failures: list[str] = []
    if args.report_only:
        check_cells(cells)
    else:
        failures = run_cells(cells, ROOT / "tools/train_net.py", jobs=args.jobs)
    write_tables(args)
    return 1 if failures else 0


def main(argv=None) -> int:
    args = parse_args(argv)
    again = "the same command goes on from here."
    return guard("cross_validate.py", lambda: run(args), interrupted=again)


if __name__ == "__main__":
    sys.exit(main())
