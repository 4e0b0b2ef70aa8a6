#!/usr/bin/env python
"""Turns a classifier's weights in torchvision's format into what MODEL.WEIGHTS takes.

    python tools/convert_weights.py vgg16-397923af.pth vgg16.pth --network vgg16

What a classifier of the network fills:

    vgg16         the backbone, and fc6 and fc7 of the box head, of configs/*_vgg16.yaml
    inception_v3  the backbone and Mixed_7 of the ROI heads, of configs/*_inception_v3.yaml
    resnet50      the backbone and res5, of configs/*_r50.yaml and configs/*_r50_fpn.yaml

Any number of classes will do; the classifying layer is left out. ImageNet weights that can be
downloaded need no conversion: MODEL.WEIGHTS torchvision://NAME. The keys that have to go with the
weights are printed; a ResNet50 of torchvision has its stride in the 3x3 convolutions, other than
Detectron2's R-50.pkl, and takes images by other statistics.
"""

import argparse
import sys
from pathlib import Path

from ich_det2.cli import guard, quiet_imports

with quiet_imports():
    import torch

    from ich_det2.engine.checkpoint import load_tensors
    from ich_det2.files import write_atomically
    from ich_det2.modeling.backbone.torchvision_weights import NETWORKS, PIXEL_STATISTICS, convert


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE.pth", help="a state dict, or in 'model'"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT.pth", help="the file to write")
    parser.add_argument("--network", required=True, choices=NETWORKS)
    return parser.parse_args(argv)


def run(args) -> None:
    if args.output.suffix != ".pth":  # Detectron2 reads the others as other formats
        raise ValueError(f"the output is '{args.output}', expected a name that ends in .pth.")
    if args.output.resolve() == args.source.resolve():
        raise ValueError(f"'{args.output}' is the source too; give another file for the output.")
    if not args.output.parent.is_dir():
        raise ValueError(
            f"there is no folder '{args.output.parent}' for the output; make it first."
        )
    state = load_tensors(args.source)
    state = state.get("model", state) if isinstance(state, dict) else {}
    try:
        checkpoint = convert(args.network, state)
    except ValueError as error:
        raise ValueError(f"{args.source}: {error}") from error
    with write_atomically(args.output, "wb") as file:
        torch.save(checkpoint, file)
    mean, std = PIXEL_STATISTICS[args.network]
    print(
        f"{args.output}: {len(checkpoint['model'])} tensors. Train with"
        f' MODEL.WEIGHTS {args.output} MODEL.PIXEL_MEAN "{mean}" MODEL.PIXEL_STD "{std}"'
        + (" MODEL.RESNETS.STRIDE_IN_1X1 False" if args.network == "resnet50" else "")
    )


def main(argv=None) -> int:
    args = parse_args(argv)
    return guard("convert_weights.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
