#!/usr/bin/env python
"""Compares forms of a detector by cross-validation over patients.

    python tools/cross_validate.py DATA --output output/cv \\
        --form plain configs/frcnn_effnet_lite0.yaml \\
        --form cost configs/csfrcnn_effnet_lite0.yaml \\
        --form alpha-1 configs/csfrcnn_effnet_lite0.yaml MODEL.RPN.COST.ALPHA 1.0

Each form is trained on all folds but one and scored on that one, so that every patient is scored
once by a model that has not seen the patient. The last model of a training is taken, so nothing is
selected on the fold that is scored. A cell (form, fold) is a run of tools/train_net.py in
OUTPUT/<form>/fold<i>; a finished one is not run again, so a run that was stopped can be started
again, with further forms too. OUTPUT/table.csv and .md hold the pooled metrics, and the
differences to the first form with 95 % intervals by paired bootstrap over patients.
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path

from ich_det2.cli import guard, quiet_imports

with quiet_imports():
    import numpy as np
    from tabulate import tabulate

    from ich_det2.data.splits import make_folds
    from ich_det2.data.tree import VocTree
    from ich_det2.engine.config import load_config
    from ich_det2.engine.run_folder import RunFolder
    from ich_det2.evaluation.boxes import box_recall
    from ich_det2.evaluation.diagnosis import recall_at_specificity, roc_auc_score, summarize
    from ich_det2.evaluation.intervals import bootstrap_by_group
    from ich_det2.evaluation.predictions import Predictions, read_predictions
    from ich_det2.experiments.cells import Cell, run_cells
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
        "--jobs", type=int, default=1, help="trainings side by side, on GPUs each on the next"
    )
    return parser.parse_args(argv)


def link_folds(data: Path, output: Path, folds: int, seed: int) -> None:
    """Makes OUTPUT/folds/<i>: links to the data, and lists that leave out fold i.

    Raises:
        FileNotFoundError, ValueError: if the tree is not complete or has too few patients, or
            OUTPUT holds other folds.
    """
    tree = VocTree(data)
    images = list(tree.images)
    if unknown := [image for image in images if image not in tree.patients]:
        raise ValueError(
            f"{data}/patients.csv does not name '{unknown[0]}' and {len(unknown) - 1} more images;"
            f" `python datasets/make_splits.py {data}` writes it for DICOM."
        )
    groups = [tree.patients[image][0] for image in images]
    lists = make_folds(groups, list(tree.types.values()), folds, seed=seed)
    for fold in range(folds):
        train, test = ([images[i] for i in lists[f"fold{fold}_{s}"]] for s in ("train", "val"))
        tree.link(output / "folds" / str(fold)).write_lists({"train": train, "test": test})


def build_cell(args, form: list[str], fold: int) -> Cell:
    """One training: a form on all folds but one."""
    name, config, *opts = form
    folder = args.output / name / f"fold{fold}"
    keys = dict(zip(opts[::2], opts[1::2]))
    keys["DATASETS.ICH_ROOT"] = args.output / "folds" / str(fold)
    # The last model is scored, once: DATASETS.VAL is not used to select.
    keys |= {"DATASETS.VAL": "('ich_test',)", "TEST.EVAL_PERIOD": 0}
    return Cell(folder, Path(config), keys)


class Pooled:
    """The pooled predictions of the finished cells of a form."""

    def __init__(self, runs: list[RunFolder]):
        parts = [read_predictions(run.inference("ich_test")) for run in runs]
        joined = Predictions.joined(parts)
        self.found = joined.take(sorted(joined.image_ids))
        rows = [row for run in runs for row in run.read_metrics()]
        self.scalars = {
            name: np.mean([row[key] for row in rows if key in row] or np.nan)
            for name, key in SCALARS.items()
        }

    def metrics(self) -> dict[str, float]:
        found = self.found
        summary = summarize(found.labels, found.scores, THRESHOLD)
        metrics = {
            "images": summary["n"],
            "AUC": summary["auc"],
            "recall @ specificity 0.90": summary["recall_at_specificity_0.90"],
            **{key: summary[key] for key in ("accuracy", "recall", "specificity")},
        }
        if found.boxes is not None and found.true_boxes is not None:
            recall = partial(box_recall, found.boxes, found.true_boxes, iou_threshold=0.5)
            metrics |= {
                "box recall": recall(),
                "box recall, score >= 0.5": recall(score_threshold=THRESHOLD),
                "AP50": found.lesion_scores["coco_ap50"],
            }
        return metrics | self.scalars


def differences(cells: Pooled, reference: Pooled) -> dict[str, str]:
    """AUC and recall at specificity 0.90 against the reference, with paired 95 % intervals."""

    def difference(weights):
        return [
            metric(cells.found.labels, cells.found.scores, weights=weights)
            - metric(reference.found.labels, reference.found.scores, weights=weights)
            for metric in (roc_auc_score, partial(recall_at_specificity, specificity=0.90))
        ]

    if cells.found.patients != reference.found.patients:
        return {}
    point = difference(np.ones(len(cells.found.labels), dtype=int))
    bounds = bootstrap_by_group(difference, cells.found.patients)
    names = ("AUC difference", "recall @ specificity 0.90, difference")
    return {n: f"{p:+.3f} [{a:+.3f}, {b:+.3f}]" for n, p, (a, b) in zip(names, point, bounds)}


def write_table(args) -> None:
    rows, reference = [], None
    for name, *_ in args.forms:
        runs = [RunFolder(args.output / name / f"fold{fold}") for fold in range(args.folds)]
        runs = [run for run in runs if run.done.is_file()]
        if not runs:
            continue
        cells = Pooled(runs)
        row = {"form": name, "folds": len(runs), **cells.metrics()}
        if reference is not None:
            row |= differences(cells, reference)
        else:
            reference = cells
        rows.append(row)
    if not rows:
        return
    fields = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(args.output / "table.csv", fields, rows)
    table = tabulate([[r.get(f, "") for f in fields] for r in rows], fields, "github", ".3f")
    with write_atomically(args.output / "table.md") as file:
        file.write(table + "\n")
    print(table)


def run(args) -> int:
    """Runs the cells that are not finished and writes the table; 1 if one has failed."""
    folds = range(args.folds) if args.only is None else args.only
    names = [form[0] for form in args.forms]
    for name, *rest in args.forms:
        if not re.fullmatch(r"\w[\w.-]*", name) or name == "folds" or names.count(name) > 1:
            raise ValueError(f"--form '{name}': expected different names fit for a folder.")
        if len(rest) % 2 == 0:
            raise ValueError(f"--form {name}: expected a config file and KEY VALUE pairs.")
        load_config(rest[0], rest[1:])
    if unknown := [fold for fold in folds if not 0 <= fold < args.folds]:
        raise ValueError(f"--only is {unknown[0]}, expected folds from 0 to {args.folds - 1}.")
    link_folds(args.data, args.output, args.folds, args.seed)
    cells = [build_cell(args, form, fold) for form in args.forms for fold in folds]
    failures = run_cells(cells, ROOT / "tools/train_net.py", jobs=args.jobs)
    write_table(args)
    return 1 if failures else 0


def main(argv=None) -> int:
    args = parse_args(argv)
    again = "the same command goes on from here."
    return guard("cross_validate.py", lambda: run(args), interrupted=again)


if __name__ == "__main__":
    sys.exit(main())
