#!/usr/bin/env python
"""Makes a model to give away of a training: half precision, operating points, no path of yours.

    python tools/package_model.py output/all --out-of-fold output/cv/diagnosis/seed0/pooled \\
        --output ich_det2/zoo/ct-ich

--out-of-fold are predictions on the patients that the model was trained on by models of the same
form that had not seen them, as tools/cross_validate.py pools them. On them the operating point is
chosen, by --rule, with the others as its alternatives, and the calibration fitted;
out_of_fold.json has what they say of the form. A model card is yours to write, as README.md.
"""

import argparse
import sys
from pathlib import Path

from ich_det2.cli import guard, quiet_imports

with quiet_imports():
    import torch

    from ich_det2.engine.checkpoint import load_tensors
    from ich_det2.engine.operating_point import build_settings
    from ich_det2.engine.run_folder import RunFolder, hash_of, versions
    from ich_det2.evaluation.operating_point import RULES, OperatingPoint, Rule
    from ich_det2.evaluation.predictions import read_predictions
    from ich_det2.evaluation.yardstick import Yardstick
    from ich_det2.files import sha256, write_atomically, write_json
    from ich_det2.inference.diagnoser import load_run

LARGE = 1 << 14
"""Elements from which on a tensor is kept in half precision; norms need the whole one."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="OUTPUT_DIR of a training")
    parser.add_argument("--out-of-fold", type=Path, required=True, metavar="PREDICTIONS")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--rule", choices=RULES, default="recall", help="default: recall")
    parser.add_argument("--target-recall", type=float, default=0.95, help="of the rule recall")
    return parser.parse_args(argv)


def run(args) -> None:
    target = RunFolder(args.output)
    target.check_free()
    cfg, weights = load_run(args.run, device="cpu")
    found = read_predictions(args.out_of_fold)
    rule = Rule(args.rule, "image", args.target_recall)
    data = Path(cfg.DATASETS.ICH_ROOT).name
    cfg.OUTPUT_DIR, cfg.DATASETS.ICH_ROOT = args.output.name, data
    if "://" not in cfg.MODEL.WEIGHTS:
        cfg.MODEL.WEIGHTS = Path(cfg.MODEL.WEIGHTS).name
    args.output.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: value.half() if value.is_floating_point() and value.numel() >= LARGE else value
        for key, value in load_tensors(weights)["model"].items()
    }
    with write_atomically(target.final, "wb") as file:
        torch.save({"model": tensors}, file)
    point = OperatingPoint.choose(
        *(found, build_settings(cfg), rule),
        dataset=f"{data}, {len(set(found.patients))} patients out of fold",
        weights_sha256=sha256(target.final),
    )
    point.save(target.operating_point)
    with write_atomically(target.config) as file:
        file.write(cfg.dump())
    record = {"data_root": data, "versions": versions(), "trained_weights": hash_of(weights)}
    record["data"] = RunFolder(args.run).read_record().get("data", {})
    write_json(target.record, record)
    metrics = {name: float(value) for name, value in Yardstick(found).metrics().items()}
    write_json(args.output / "out_of_fold.json", metrics)
    print(
        f"{target.final}: {target.final.stat().st_size / 2**20:.1f} MiB; positive from"
        f" {point.threshold:.3f} on ({point.rule})"
    )


def main(argv=None) -> int:
    args = parse_args(argv)
    return guard("package_model.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
