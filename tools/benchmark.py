#!/usr/bin/env python
"""Measures this project against stock Detectron2, both in one run.

    python tools/benchmark.py train-step --size 320 --batch 4 --steps 30

The two are timed in turn, step by step, on the same weights and images, so that a machine whose
speed wanders slows both; quote the ratio, not the seconds.
"""

import argparse
import platform
import statistics
import time

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from ich_det2.engine.setup import load_config

SIZES, RATIOS = [[32.0, 64.0, 128.0]], [[0.5, 1.0, 2.0]]
STOCK = ["MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.RPN.HEAD_NAME", "StandardRPNHead"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("train-step", help="forward, backward and update of one batch")
    step.add_argument("--config-file", default="configs/csfrcnn_effnet_lite0.yaml", metavar="FILE")
    step.add_argument("--size", type=int, default=320, help="square input, pixels")
    step.add_argument("--batch", type=int, default=4, help="images per step")
    step.add_argument("--steps", type=int, default=30, help="timed steps of each")
    step.add_argument("--warmup", type=int, default=3, help="steps before, not timed")
    step.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    step.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    step.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    return parser.parse_args(argv)


def synthetic_batch(size: int, batch: int, seed: int = 0) -> list[dict]:
    """Images of noise, every other one with two boxes, as half of the slices bleed."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for i in range(batch):
        instances = Instances((size, size))
        boxes = torch.tensor([[0.2, 0.3, 0.45, 0.5], [0.6, 0.55, 0.7, 0.75]]) * size
        boxes = boxes if i % 2 == 0 else boxes[:0]
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
        image = torch.rand(3, size, size, generator=generator) * 255
        inputs.append({"image": image, "instances": instances, "height": size, "width": size})
    return inputs


class TrainStep:
    """One model and its optimizer, as a callable that does one step."""

    def __init__(self, cfg, inputs: list[dict]):
        torch.manual_seed(0)
        self.model = build_model(cfg).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9)
        self.inputs = inputs

    def __call__(self) -> None:
        losses = sum(self.model(self.inputs).values())
        self.optimizer.zero_grad()
        losses.backward()
        self.optimizer.step()


def interleave(steps: dict, rounds: int, warmup: int, device: str) -> dict[str, list[float]]:
    """Times callables in turn; the one that goes first alternates.

    Returns:
        Seconds of each call by name.
    """
    seconds = {name: [] for name in steps}
    for i in range(warmup + rounds):
        order = list(steps) if i % 2 == 0 else list(steps)[::-1]
        for name in order:
            if device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            steps[name]()
            if device != "cpu":
                torch.cuda.synchronize()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def train_step(args) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    common = ["MODEL.DEVICE", args.device, "MODEL.WEIGHTS", ""]
    common += ["MODEL.ANCHOR_GENERATOR.SIZES", str(SIZES)]
    common += ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", str(RATIOS), *args.opts]
    cost_sensitive = load_config(args.config_file, common)
    plain_heads = cost_sensitive.MODEL.ROI_HEADS.NAME.replace("CostSensitiveROI", "StandardROI")
    plain_heads = plain_heads.replace("CostSensitiveRes5", "Res5")
    stock = load_config(args.config_file, [*common, *STOCK, "MODEL.ROI_HEADS.NAME", plain_heads])
    screened = cost_sensitive.clone()
    screened.MODEL.RPN.SAMPLER.NMS_THRESH = 0.7
    inputs = synthetic_batch(args.size, args.batch)
    with EventStorage():
        steps = {
            "stock Detectron2": TrainStep(stock, inputs),
            "cost-sensitive": TrainStep(cost_sensitive, inputs),
            "cost-sensitive, NMS screening": TrainStep(screened, inputs),
        }
        seconds = interleave(steps, args.steps, args.warmup, args.device)
    base = seconds["stock Detectron2"]
    rows = [
        [
            name,
            statistics.median(times),
            min(times),
            statistics.median(a / b for a, b in zip(times, base)),
            min(times) / min(base),
        ]
        for name, times in seconds.items()
    ]
    print(
        f"{platform.processor() or platform.machine()}, {args.device}, {torch.get_num_threads()}"
        f" threads, torch {torch.__version__}; {args.config_file}, {args.batch} x {args.size} px,"
        f" {args.steps} steps each in turn"
    )
    headers = ["", "median s", "min s", "ratio, median of pairs", "ratio of minima"]
    print(tabulate(rows, headers, floatfmt=".4f", tablefmt="github"))


if __name__ == "__main__":
    train_step(parse_args())
