#!/usr/bin/env python
"""How much sooner bleeding exams are read if a model orders the worklist; a simulation.

    python tools/prioritize.py output/csfrcnn_effnet_lite0/inference/ich_test
    python tools/prioritize.py image_scores.csv --threshold 0.32 --per-hour 10 --prevalence 0.1

PREDICTIONS are an evaluation's folder, an image_scores.csv or a COCO results JSON. Exams are drawn
from their patients, come as a Poisson process and are read for exponential times. Those whose
patient is called positive are read before the others (--by score: the higher the score, the
earlier), against first come, first served with the same exams. After Arbabshirani et al. 2018, who
report the time to diagnosis.

Printed, and with --output written as CSV: the mean minutes from arrival to the end of the reading,
of bleeding exams and of the others, which wait longer; with --median each worklist's median, which
that publication reports. 95 % intervals over worklists, each with patients drawn anew.
"""

import argparse
import sys
from pathlib import Path

from ich_det2.cli import guard, quiet_imports

with quiet_imports():
    import numpy as np
    from tabulate import tabulate

    from ich_det2.engine.run_folder import RunFolder
    from ich_det2.evaluation.diagnosis import group_scores
    from ich_det2.evaluation.predictions import read_predictions
    from ich_det2.evaluation.worklist import Worklist, simulate
    from ich_det2.files import write_csv


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS")
    parser.add_argument("--output", type=Path, metavar="FILE.csv")
    parser.add_argument("--truth", type=Path, metavar="FILE", help="COCO ground truth (JSON)")
    parser.add_argument("--patients", type=Path, metavar="FILE", help="CSV with image,patient")
    parser.add_argument("--patient-rule", default="any", metavar="RULE", help="default: any")
    parser.add_argument(
        "--threshold", type=float, help="of the patient (default: the run's operating point)"
    )
    parser.add_argument("--by", choices=("verdict", "score"), default="verdict")
    parser.add_argument(
        "--median", action="store_true", help="minutes of a worklist's middle exam, not their mean"
    )
    parser.add_argument("--exams", type=int, default=200, help="of a worklist (default: 200)")
    parser.add_argument("--per-hour", type=float, default=10.0, help="that come (default: 10)")
    parser.add_argument("--minutes", type=float, default=5.0, help="of a reading (default: 5)")
    parser.add_argument("--readers", type=int, default=1, help="default: 1")
    parser.add_argument("--prevalence", type=float, help="default: that of PREDICTIONS")
    parser.add_argument("--worklists", type=int, default=1000, help="drawn (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def run(args) -> None:
    worklist = Worklist(args.exams, args.per_hour, args.minutes, args.readers)
    found = read_predictions(args.predictions, truth=args.truth, patients=args.patients)
    names, labels, scores = group_scores(
        found.patients, found.labels, found.scores, args.patient_rule
    )
    unscored = [name for name, score in zip(names, scores) if not np.isfinite(score)]
    if unscored and args.by == "score":
        raise ValueError(
            f"{args.predictions}: {len(unscored)} of {len(names)} patients, '{unscored[0]}' for"
            f" one, have too few slices for a score by the rule {args.patient_rule}; take another"
            " --patient-rule, or --by verdict."
        )
    if not 0 < labels.sum() < len(labels):
        raise ValueError(
            f"{args.predictions}: {int(labels.sum())} of {len(labels)} patients bleed, expected"
            " some that do and some that do not."
        )
    called = scores >= threshold_of(args) if args.by == "verdict" else None
    times = simulate(
        labels,
        scores if called is None else called,
        worklist,
        n_worklists=args.worklists,
        prevalence=args.prevalence,
        average=np.median if args.median else np.mean,
        seed=args.seed,
    )
    rows = []
    for group in ("bleeding", "others"):
        before, after = times[f"{group}, arrival"], times[f"{group}, model"]
        for name, values in (
            ("as they come", before),
            ("by the model", after),
            ("sooner", before - after),
        ):
            low, high = np.nanquantile(values, (0.025, 0.975))
            row = {"exams": group, "order": name, "minutes": float(np.nanmean(values))}
            rows.append(row | {"low": float(low), "high": float(high)})
    print(
        f"{len(names)} patients, {int(labels.sum())} bleed"
        + (f", {int(called.sum())} called positive" if called is not None else "")
        + f"; {args.worklists} worklists of {args.exams} exams, {worklist.load:.0%} load"
    )
    print(tabulate(rows, "keys", "github", ".1f"))
    if args.output is not None:
        write_csv(args.output, list(rows[0]), rows)


def threshold_of(args) -> float:
    """The threshold that is given, or the operating point of the run that PREDICTIONS are of.

    Raises:
        ValueError: if there is neither.
    """
    if args.threshold is not None:
        return args.threshold
    folder = RunFolder.of_inference(args.predictions)
    point = folder and folder.read_operating_point()
    if point is None:
        raise ValueError(
            f"{args.predictions} has no operating point; give --threshold, or --by score."
        )
    return point.threshold


def main(argv=None) -> int:
    args = parse_args(argv)
    return guard("prioritize.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
