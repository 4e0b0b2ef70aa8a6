#!/usr/bin/env python
"""Clusters anchors from the training boxes, and compares them with Detectron2's defaults.

    python tools/cluster_anchors.py --config-file configs/csfrcnn_r50.yaml \\
        --output anchors.yaml --plot anchors.png DATASETS.ICH_ROOT my/data

The tables show every method, on the training boxes and on the validation boxes, which were not
clustered: with few patients, anchors that fit the former need not fit the latter. The fragment,
which goes into a config, is of the config's method or --method. Sizes are those at the network's
input, so the config's INPUT.MIN_SIZE_TRAIN matters. With several levels (FPN), give --num-sizes as
a multiple of their number. tools/train_net.py does the clustering by itself when anchors are open.
"""

import argparse
import sys
from pathlib import Path

from ich_det2.cli import guard, quiet_imports

with quiet_imports():
    import numpy as np
    import yaml
    from detectron2.config import get_cfg
    from tabulate import tabulate

    from ich_det2.anchors import AnchorPairs, Anchors, best_iou
    from ich_det2.data import register_ich_datasets
    from ich_det2.engine.anchors import (
        anchor_levels,
        anchor_settings,
        boxes_wh_of,
        clustered_anchors,
        training_boxes_wh,
    )
    from ich_det2.engine.config import load_config
    from ich_det2.evaluation.plots import plot_anchors
    from ich_det2.files import write_atomically

IOU_THRESHOLDS = (0.5, 0.7)
STOCK = "Detectron2's default"
METHODS = {
    "separate, linear ratios": ("separate", "linear"),
    "separate, log ratios": ("separate", "log"),
    "joint IoU": ("joint", None),
}
"""Name in the table -> CLUSTERS.METHOD and CLUSTERS.RATIO_SPACE, None for any."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="a config of configs/")
    parser.add_argument("--output", metavar="FILE", help="write the config fragment there too")
    parser.add_argument("--plot", metavar="FILE.png", help="draw boxes, anchors and recall there")
    parser.add_argument(
        "--method",
        choices=("separate", "joint"),
        help="of the fragment; default: the config's, separate (paper)",
    )
    parser.add_argument("--num-sizes", type=int, help="default: the config's, 3")
    parser.add_argument("--num-ratios", type=int, help="default: the config's, 3")
    parser.add_argument(
        "--ratio-space", choices=("linear", "log"), help="default: the config's, linear (paper)"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    return parser.parse_args(argv)


def cluster_all(cfg, boxes_wh: np.ndarray) -> dict[str, Anchors | AnchorPairs]:
    """Anchors of every method, for the config's numbers of sizes and ratios."""
    candidates = {}
    for name, (method, ratio_space) in METHODS.items():
        own = cfg.clone()
        clusters = own.MODEL.ANCHOR_GENERATOR.CLUSTERS
        clusters.METHOD, clusters.RATIO_SPACE = method, ratio_space or clusters.RATIO_SPACE
        candidates[name] = clustered_anchors(own, boxes_wh)
    return candidates


def compare(
    boxes_wh: np.ndarray, candidates: dict[str, Anchors | AnchorPairs], num_levels: int
) -> str:
    """A table of how well sets of anchors fit boxes."""
    rows = []
    for name, anchors in candidates.items():
        iou = best_iou(boxes_wh, anchors)
        recalls = [(iou >= threshold).mean() for threshold in IOU_THRESHOLDS]
        # Detectron2's 5 sizes are dealt to 5 levels, and all stand on each of another number.
        count, dealt = len(anchors.wh()), len(anchors[0]) % num_levels == 0
        rows.append([name, count // num_levels if dealt else count, *recalls, iou.mean()])
    headers = ["anchors", "per position", *(f"BPR @{t}" for t in IOU_THRESHOLDS), "mean best IoU"]
    return tabulate(rows, headers, floatfmt=".3f", tablefmt="github")


def compare_on_validation(cfg, candidates: dict[str, Anchors | AnchorPairs]) -> str:
    """The table on DATASETS.VAL, or why there is none."""
    try:
        boxes_wh = boxes_wh_of(cfg, cfg.DATASETS.VAL)
    except (FileNotFoundError, KeyError, ValueError) as error:
        return f"No comparison on DATASETS.VAL {list(cfg.DATASETS.VAL)}: {error}"
    if len(boxes_wh) == 0:
        return f"No comparison on DATASETS.VAL {list(cfg.DATASETS.VAL)}: it has no box."
    table = compare(boxes_wh, candidates, len(anchor_levels(cfg)))
    return f"{len(boxes_wh)} validation boxes, which were not clustered:\n{table}"


def run(args) -> None:
    """Prints the tables and the fragment, and writes what is asked for.

    Raises:
        FileNotFoundError, ValueError: one sentence with the remedy.
    """
    for option, file in (("--output", args.output), ("--plot", args.plot)):
        if file and not Path(file).parent.is_dir():
            raise FileNotFoundError(
                f"{option} '{file}': there is no folder '{Path(file).parent}'; create it first."
            )
    cfg = load_config(args.config_file, args.opts)
    clusters = cfg.MODEL.ANCHOR_GENERATOR.CLUSTERS
    for key in ("METHOD", "NUM_SIZES", "NUM_RATIOS", "RATIO_SPACE"):
        value = getattr(args, key.lower())
        clusters[key] = clusters[key] if value is None else value
    register_ich_datasets(
        cfg.DATASETS.ICH_ROOT, cfg.DATASETS.ICH_CLASSES, head_crop=cfg.INPUT.HEAD_CROP
    )
    boxes_wh = training_boxes_wh(cfg)
    candidates = cluster_all(cfg, boxes_wh)
    settings = anchor_settings(cfg, clustered_anchors(cfg, boxes_wh))
    default = get_cfg().MODEL.ANCHOR_GENERATOR
    candidates[STOCK] = Anchors(default.SIZES[0], default.ASPECT_RATIOS[0])
    print(f"{len(boxes_wh)} training boxes; best possible recall (BPR):")
    print(compare(boxes_wh, candidates, len(anchor_levels(cfg))))
    print(f"\n{compare_on_validation(cfg, candidates)}")
    generator = {
        "NAME": "ClusteredAnchorGenerator",
        "CLUSTERS": {"METHOD": clusters.METHOD},
        **settings,
    }
    fragment = yaml.safe_dump({"MODEL": {"ANCHOR_GENERATOR": generator}}, default_flow_style=None)
    print("\n# sizes: sqrt(area), pairs: [width, height], in network-input pixels, per level;")
    print(f"# ratios: height / width\n{fragment}")
    if args.output:
        with write_atomically(args.output) as file:
            file.write(fragment)
        print(f"Written to {args.output}.")
    if args.plot:
        plot_anchors(boxes_wh, candidates, args.plot)
        print(f"Drawn to {args.plot}.")


def main(argv=None) -> int:
    args = parse_args(argv)
    return guard("cluster_anchors.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
