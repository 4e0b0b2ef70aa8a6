#!/usr/bin/env python
"""Evaluates stored predictions of any detector: tables, curves and one page to open.

    python tools/evaluate.py output/cs/inference/ich_test
    python tools/evaluate.py output/cs/inference/ich_test output/plain/inference/ich_test \\
        --name cost-sensitive plain --compare --output output/comparison
    python tools/evaluate.py results.json --truth annotations.json --patients patients.csv \\
        --validation val_results.json --validation-truth val.json --rule recall --output DIR

PREDICTIONS is a folder with image_scores.csv (image_id,file_name,patient_id,label,score), as an
evaluation leaves it, such a file alone, or COCO results (JSON), which need --truth. The operating
threshold is, in this order: --threshold; chosen on --validation by --rule; the operating_point.json
of the training run that the folder is in. One set of predictions is written beside itself unless
--output says where; with --compare several models on the same images are set side by side in DIR:
report.html, report.json and comparison.csv with the differences, intervals and p-values.
--fit-smoothing TREE, where the images lie, prints TEST.DIAGNOSIS.SMOOTHING as it suits PREDICTIONS,
which have to be of validation or out of fold.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from ich_det2.cli import guard, quiet_imports

with quiet_imports():
    import numpy as np
    from tabulate import tabulate

    from ich_det2.data.context import find_places
    from ich_det2.data.mapper import IchDatasetMapper
    from ich_det2.data.tree import VocTree
    from ich_det2.engine.config import context_settings, load_config
    from ich_det2.engine.operating_point import build_settings
    from ich_det2.engine.report import training_facts
    from ich_det2.engine.run_folder import RunFolder
    from ich_det2.evaluation.analysis import LEVELS
    from ich_det2.evaluation.diagnosis import parse_rule, roc_auc_score
    from ich_det2.evaluation.evaluator import format_summary, write_evaluation
    from ich_det2.evaluation.operating_point import RULES, OperatingPoint, Rule
    from ich_det2.evaluation.predictions import Predictions, read_predictions
    from ich_det2.evaluation.report import Model, write_report
    from ich_det2.evaluation.smoothing import fit_smoothing, smooth_scores
    from ich_det2.files import write_csv

COMPARISON_FIELDS = ("first", "other", "level", "metric", "difference", "low", "high", "p", "test")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictions", type=Path, nargs="+", metavar="PREDICTIONS")
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--compare", action="store_true", help="on the same images, side by side")
    parser.add_argument("--name", nargs="+", metavar="NAME", help="of each model")
    parser.add_argument("--dataset", metavar="NAME", help="as the report calls it")
    parser.add_argument("--truth", type=Path, metavar="FILE", help="COCO ground truth (JSON)")
    parser.add_argument("--patients", type=Path, metavar="FILE", help="CSV with image,patient")
    parser.add_argument(
        "--threshold", type=float, nargs="+", metavar="T", help="one for all, or one each"
    )
    parser.add_argument(
        "--validation", type=Path, nargs="+", metavar="PREDICTIONS", help="of each model"
    )
    parser.add_argument("--validation-truth", type=Path, metavar="FILE")
    parser.add_argument("--rule", choices=RULES, default="youden", help="with --validation")
    parser.add_argument("--level", choices=LEVELS, default="image", help="of the rule")
    parser.add_argument("--target-recall", type=float, default=0.95, help="of the rule recall")
    parser.add_argument("--cost-ratio", type=float, help="of a missed bleed to a false alarm")
    parser.add_argument("--patient-rules", nargs="+", metavar="RULE", help="the first decides")
    parser.add_argument("--fit-smoothing", type=Path, metavar="TREE", help="VOC tree of the images")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where the images are")
    parser.add_argument("--resamples", type=int, help="draws of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser.parse_args(argv)


def default_name(path: Path) -> str:
    folder = RunFolder.of_inference(path)
    return folder.name if folder is not None else path.resolve().with_suffix("").name


def read_model(args, i: int, name: str) -> tuple[Model, object]:
    """One of PREDICTIONS with its operating point, and the config of its run (or the defaults).

    Raises:
        FileNotFoundError, ValueError: one sentence with the remedy.
    """
    path = args.predictions[i]
    predictions = read_predictions(path, truth=args.truth, patients=args.patients)
    folder = RunFolder.of_inference(path)
    # No model is run.
    cfg = load_config("", ["MODEL.DEVICE", "cpu"]) if folder is None else folder.read_config()
    changes = {"seed": args.seed}
    if args.cost_ratio is not None:
        changes["cost_ratio"] = args.cost_ratio
    if args.patient_rules is not None:
        changes["patient_rules"] = tuple(args.patient_rules)
    if args.resamples is not None:
        changes["n_resamples"] = args.resamples
    settings, point = replace(build_settings(cfg), **changes), None
    if args.threshold is not None:
        settings = replace(settings, operating_threshold=args.threshold[i])
    elif args.validation is not None:
        validation = read_predictions(
            args.validation[i], truth=args.validation_truth, patients=args.patients
        )
        point = OperatingPoint.choose(
            validation,
            settings,
            Rule(args.rule, args.level, args.target_recall),
            dataset=args.validation[i].resolve().with_suffix("").name,
        )
    elif folder is not None:
        point = folder.read_operating_point()
    if point is not None:
        settings = replace(settings, operating_threshold=point.threshold)
    elif args.threshold is None:
        raise ValueError(
            f"{path}: there is no {RunFolder(path).operating_point.name} of its training run; give"
            " --threshold, or --validation to choose it on."
        )
    model = Model(name=name, predictions=predictions, settings=settings, point=point)
    if folder is not None:
        model = replace(
            model,
            facts=training_facts(cfg, folder),
            history=folder.read_history(),
            training=folder.read_metrics(),
            differs=folder.read_differences(),
        )
    return model, cfg


def check(args) -> None:
    """Raises: ValueError: one sentence, if the options do not fit each other."""
    n = len(args.predictions)
    if args.threshold is not None and len(args.threshold) == 1:
        args.threshold = args.threshold * n
    for option in ("name", "threshold", "validation"):
        given = getattr(args, option)
        if given is not None and len(given) != n:
            raise ValueError(f"--{option} has {len(given)} values, expected {n}, one for each.")
    if args.threshold is not None and args.validation is not None:
        raise ValueError("--threshold and --validation exclude each other; give one of them.")
    if args.compare and (n < 2 or args.output is None):
        raise ValueError("--compare needs two or more PREDICTIONS and --output.")
    if n > 1 and not args.compare and args.output is not None:
        raise ValueError("--output is for one set of PREDICTIONS; add --compare for several.")
    for path in args.predictions:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder; expected PREDICTIONS.")
        if args.output is None and not path.is_dir():
            raise ValueError(f"{path} is a file, so --output has to say where results go.")
    for threshold in args.threshold or ():
        if not 0 <= threshold <= 1:
            raise ValueError(f"--threshold is {threshold}, expected a score from 0 to 1.")
    names = args.name or [default_name(path) for path in args.predictions]
    if len(set(names)) < n:
        raise ValueError(f"the models are all called {names}; give different names by --name.")
    args.name = names
    for rule in args.patient_rules or ():
        parse_rule(rule)
    for option in ("cost_ratio", "resamples"):
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise ValueError(f"--{option.replace('_', '-')} is {value}, expected above 0.")


def image_reader(cfg, images: Path | None):
    """Reads a slice where its file says, or by name in --images."""
    mapper = IchDatasetMapper(cfg, is_train=False)

    def read_image(file: str):
        path = Path(file) if images is None else images / Path(file).name
        if not path.is_file():
            raise FileNotFoundError(path)
        return mapper.read_image(path)

    return read_image


def comparison_rows(comparisons: list[dict]) -> list[dict]:
    rows = []
    for pair in comparisons:
        for level in LEVELS:
            tests = {"auc": ("DeLong", pair[level]["delong"])}
            tests |= {k: ("exact McNemar", v) for k, v in pair[level]["mcnemar"].items()}
            for metric, difference in pair[level]["bootstrap"].items():
                row = {"first": pair["first"], "other": pair["other"], "level": level}
                row |= {"metric": metric, **difference}
                if metric in tests:
                    row |= {"test": tests[metric][0], "p": tests[metric][1]["p_value"]}
                rows.append(row)
    return rows


def smoothing_for(predictions: Predictions, tree: VocTree, cfg) -> str:
    """The key and its learnt value, and the AUC of the images that they are fitted on.

    Raises:
        ValueError: if an image is not in the tree, or no image's place is known.
    """
    ids = predictions.image_ids
    if unknown := [image for image in ids if image not in tree.images]:
        raise ValueError(f"--fit-smoothing {tree.root}: has no image '{unknown[0]}'.")
    places = find_places(tree, ids, by_name=context_settings(cfg)["by_name"])
    if not places:
        raise ValueError(
            f"--fit-smoothing {tree.root}: it is not known where in its series an image lies;"
            " add the columns series and position_mm to its patients.csv."
        )
    series, positions = zip(*(places.get(image, ("", np.nan)) for image in ids))
    where = [*zip(predictions.patients, series)], positions
    labels, raw = predictions.labels, predictions.raw_scores
    raw = predictions.scores if raw is None else raw
    weights = fit_smoothing(labels, raw, *where)
    half = weights[: len(weights) // 2].round(3)
    rounded = [*half, round(1 - 2 * half.sum(), 3), *half[::-1]]
    before, after = (roc_auc_score(labels, s) for s in (raw, smooth_scores(raw, *where, rounded)))
    values = ", ".join(f"{weight:g}" for weight in rounded)
    return f"TEST.DIAGNOSIS.SMOOTHING '[{values}]', AUC of these images {before:.3f} -> {after:.3f}"


def run(args) -> None:
    """Raises: FileNotFoundError, ValueError: one sentence with the remedy."""
    check(args)
    read = [read_model(args, i, name) for i, name in enumerate(args.name)]
    if args.fit_smoothing is not None:
        tree = VocTree(args.fit_smoothing)
        for model, cfg in read:
            print(f"{model.name}: {smoothing_for(model.predictions, tree, cfg)}")
    dataset = args.dataset or args.predictions[0].resolve().with_suffix("").name
    groups = [read] if args.compare else [[entry] for entry in read]
    for group, path in zip(groups, args.predictions):
        folder = args.output or path
        models, reader = [model for model, _ in group], image_reader(group[0][1], args.images)
        if not args.compare:
            write_evaluation(folder, models[0].predictions, models[0].settings)
        content = write_report(folder, models, dataset=dataset, read_image=reader)
        for entry in content["models"]:
            analysis = entry["analysis"]
            print(f"{entry['name']}, operating threshold {analysis['operating_threshold']:.4g}:")
            print(format_summary(analysis["levels"]))
        if args.compare:
            rows = comparison_rows(content["comparisons"])
            write_csv(folder / "comparison.csv", COMPARISON_FIELDS, rows)
            table = [[row.get(field, "") for field in COMPARISON_FIELDS] for row in rows]
            print(tabulate(table, COMPARISON_FIELDS, floatfmt=".3f", tablefmt="github"))
        print(f"Report: {folder / 'report.html'}")


def main(argv=None) -> int:
    args = parse_args(argv)
    return guard("evaluate.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
