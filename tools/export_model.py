#!/usr/bin/env python
"""Writes a trained model as one ONNX graph, for runtimes without PyTorch.

    python tools/export_model.py zoo://ct-ich --output ct-ich.onnx
    python tools/export_model.py output/csfrcnn_effnet_lite0 --output model.onnx --exam my/exam

The graph takes one slice, "image", float32 (3, S, S): its channels from 0 to 255 as this package
makes them, S being INPUT.MIN_SIZE_TEST. It gives "boxes" in pixels of that input, "scores",
"classes" and, where the model has one, "image_score". What makes a diagnosis of it is not in the
graph: reading DICOM, windows and masks, smoothing along the series, thresholds, verdicts.

Before it is written, the graph answers on a phantom's slices, or on those of --exam, as PyTorch
does: scores within 1e-5 (networks of bottleneck blocks 1e-3), the same boxes. Needs the extra fast.
"""

import argparse
import sys
from pathlib import Path

from ich_det2.cli import guard, log_to_terminal, quiet_imports

with quiet_imports():
    from ich_det2.inference.export import export_onnx


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="OUTPUT_DIR of a training, or zoo://NAME")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.onnx")
    parser.add_argument("--exam", type=Path, help="slices to compare on (default: a phantom's)")
    return parser.parse_args(argv)


def run(args) -> None:
    if args.output.exists():
        raise FileExistsError(f"{args.output} is there already; give another --output.")
    if not args.output.parent.is_dir():
        raise FileNotFoundError(f"{args.output.parent}: no such folder; make it first.")
    with log_to_terminal():
        slices = export_onnx(args.model, args.output, args.exam)
    size = args.output.stat().st_size / 2**20
    print(f"{args.output}: {size:.1f} MiB, equal to PyTorch on {slices} slices")


def main(argv=None) -> int:
    args = parse_args(argv)
    return guard("export_model.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
