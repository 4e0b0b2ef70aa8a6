#!/usr/bin/env python
"""Makes one model of several trained runs: a folder that is evaluated and diagnosed as one.

    python tools/ensemble.py output/seed0 output/seed1 output/seed2 --output output/ensemble --flip
    python tools/diagnose.py output/ensemble exam --output diagnosis

The slice's score is the mean of the members' by their logits; boxes that overlap are fused. The
runs have to take the same input (windows, size, neighbours) and know the same classes; networks and
anchors may differ. With --flip each also sees the slice mirrored, which takes twice the time; a
single run with --flip is that model with test-time augmentation.

An operating point is not taken over: choose one on validation by tools/evaluate.py, or give
--threshold.
"""

import argparse
import sys
from pathlib import Path

from ich_det2.cli import guard, quiet_imports

with quiet_imports():
    from ich_det2.inference.ensemble import combine_runs


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="OUTPUT_DIR of a training, or zoo://NAME"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--flip", action="store_true", help="each sees the mirrored slice too")
    parser.add_argument(
        "--iou",
        type=float,
        help="from which on boxes are fused (default: the first run's NMS_THRESH_TEST)",
    )
    parser.add_argument(
        "--threshold", type=float, help="operating threshold (default: that of the first run)"
    )
    return parser.parse_args(argv)


def run(args) -> None:
    weights = combine_runs(
        args.runs, args.output, flip=args.flip, iou_threshold=args.iou, threshold=args.threshold
    )
    print(f"{weights}: {len(args.runs)} members, {weights.stat().st_size / 2**20:.1f} MiB")


def main(argv=None) -> int:
    args = parse_args(argv)
    return guard("ensemble.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
