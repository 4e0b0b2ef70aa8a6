"""Runs ``tools/serve.py run`` with a model of no weights, and ends at a named point if told to.

    python driver.py node.yaml [POINT[:N]] [--early]

Of a point the N-th time that it is reached. ``--early`` acknowledges before anything is written,
which the tests have to find.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import torch
from detectron2.structures import Boxes, Instances

from ich_det2.data import IchDatasetMapper
from ich_det2.inference.diagnoser import Diagnoser


class Marked(torch.nn.Module):
    """A box on each slice, with a mask if asked for."""

    def __init__(self, masks=False):
        super().__init__()
        self.masks = masks

    def forward(self, inputs):
        outputs = []
        for x in inputs:
            found = Instances((x["height"], x["width"]))
            found.pred_boxes = Boxes(torch.tensor([[10.5, 20.25, 40.0, 55.0]]))
            found.scores, found.pred_classes = torch.tensor([0.875]), torch.zeros(1).long()
            if self.masks:
                found.pred_masks = torch.zeros(1, x["height"], x["width"], dtype=torch.bool)
                found.pred_masks[0, 21:55, 11:40] = True
            outputs.append({"instances": found})
        return outputs


def load_marked(cfg, masks=False):
    mapper = IchDatasetMapper(False, augmentations=[], windows=[[40, 120]])
    facts = {"run": "marked", "weights": "m.pth", "sha256": "ab" * 32, "patient_rule": "any"}
    return Diagnoser(Marked(masks), mapper, batch_size=4, facts=facts)


def main():
    from ich_det2.serve import node, receiver, sender, worker

    options = [x for x in sys.argv[2:] if not x.startswith("--")]
    if options:
        name, _, number = options[0].partition(":")
        left = [int(number or 1)]

        def reach(point):
            if point == name:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        for module in (receiver, sender, worker):
            module.reach = reach
    if "--early" in sys.argv:
        take, waiting = receiver.Receiver._take, []

        def later(self, event):
            waiting.append(event)
            if len(waiting) > 2:  # keeps two of them in memory
                take(self, waiting.pop(0))

        receiver.Receiver._take = later
    node.load_model = load_marked
    path = Path(__file__).parents[2] / "tools/serve.py"
    spec = importlib.util.spec_from_file_location("serve", path)
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    sys.exit(serve.main(["run", sys.argv[1]]))


if __name__ == "__main__":
    main()
