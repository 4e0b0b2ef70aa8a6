#!/usr/bin/env python
"""Clusters anchors from the training boxes, and compares them with Detectron2's defaults.

    python tools/cluster_anchors.py --config-file configs/csfrcnn_r50.yaml \\
        --output anchors.yaml DATASETS.ICH_ROOT my/data

Sizes are those at the network's input, so the config's INPUT.MIN_SIZE_TRAIN matters. The fragment
goes into a config under MODEL; tools/train_net.py does all this by itself when anchors are open.
"""

import argparse
import sys

import numpy as np
import yaml
from detectron2.config import get_cfg
from tabulate import tabulate

from ich_det2.anchors import Anchors, best_iou, cluster_anchors
from ich_det2.data import register_ich_datasets
from ich_det2.engine.setup import load_config, training_boxes_wh
from ich_det2.files import write_atomically

IOU_THRESHOLDS = (0.5, 0.7)
STOCK = "Detectron2's default"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="a config of configs/")
    parser.add_argument("--output", metavar="FILE", help="write the config fragment there too")
    parser.add_argument("--num-sizes", type=int, help="default: the config's, 3")
    parser.add_argument("--num-ratios", type=int, help="default: the config's, 3")
    parser.add_argument(
        "--ratio-space", choices=("linear", "log"), help="default: the config's, linear (paper)"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    return parser.parse_args(argv)


def compare(boxes_wh: np.ndarray, candidates: dict[str, Anchors]) -> str:
    """A table of how well sets of anchors fit boxes."""
    rows = []
    for name, anchors in candidates.items():
        iou = best_iou(boxes_wh, anchors)
        recalls = [(iou >= threshold).mean() for threshold in IOU_THRESHOLDS]
        count = len(anchors.sizes) * len(anchors.aspect_ratios)
        rows.append([name, count, *recalls, iou.mean()])
    headers = ["anchors", "per position", *(f"BPR @{t}" for t in IOU_THRESHOLDS), "mean best IoU"]
    return tabulate(rows, headers, floatfmt=".3f", tablefmt="github")


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        cfg = load_config(args.config_file, args.opts)
        register_ich_datasets(cfg.DATASETS.ICH_ROOT, cfg.DATASETS.ICH_CLASSES)
        boxes_wh = training_boxes_wh(cfg)
        clusters = cfg.MODEL.ANCHOR_GENERATOR.CLUSTERS
        anchors = cluster_anchors(
            boxes_wh,
            args.num_sizes or clusters.NUM_SIZES,
            args.num_ratios or clusters.NUM_RATIOS,
            ratio_space=args.ratio_space or clusters.RATIO_SPACE,
        )
    except (FileNotFoundError, ValueError) as error:
        print(f"cluster_anchors.py: error: {error}", file=sys.stderr)
        return 2
    default = get_cfg().MODEL.ANCHOR_GENERATOR
    print(f"{len(boxes_wh)} training boxes; best possible recall (BPR):")
    print(
        compare(
            boxes_wh,
            {
                "clustered": anchors,
                STOCK: Anchors(default.SIZES[0], default.ASPECT_RATIOS[0]),
            },
        )
    )
    fragment = yaml.safe_dump(
        {
            "MODEL": {
                "ANCHOR_GENERATOR": {
                    "NAME": "ClusteredAnchorGenerator",
                    "SIZES": [[round(size, 2) for size in anchors.sizes]],
                    "ASPECT_RATIOS": [[round(ratio, 3) for ratio in anchors.aspect_ratios]],
                }
            }
        },
        default_flow_style=None,
    )
    print(f"\n# sizes: sqrt(area) in network-input pixels; ratios: height / width\n{fragment}")
    if args.output:
        with write_atomically(args.output) as file:
            file.write(fragment)
        print(f"Written to {args.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
