"""Two processes on the CPU: one ratio, one set of weights, no rank that waits for the other.

This file is also the program that the processes run, so that it can be killed when it hangs:

    python tests/engine/test_distributed.py FOLDER KEY VALUE ...

writes what each rank saw to FOLDER/rank0.pth and rank1.pth.
"""

import importlib.util
import os
import subprocess
import sys
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import create_ddp_model, hooks, launch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ich_det2.engine import IchTrainer
from ich_det2.engine.config import load_config
from ich_det2.engine.hooks import FitHook
from ich_det2.modeling.sampling import AdaptiveRatioSampler, SampledAnchors, next_ratio

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/quick/csfrcnn_phantom.yaml")
BOXES = [[4, 6, 30, 28]], [[36, 30, 58, 52], [6, 8, 24, 20]], [[20, 18, 44, 46]]

# Boxes of each image of the batch of (rank 0, rank 1), step by step.
STEPS = {
    "three to one": ([BOXES[0], BOXES[1]], [BOXES[2], []]),
    "rank 1 healthy": ([BOXES[1], []], [[], []]),
    "rank 0 healthy": ([[], []], [BOXES[0], BOXES[2]]),
    "all healthy": ([[], []], [[], []]),
    "again": ([BOXES[2], []], [BOXES[0], BOXES[1]]),
}


# ---- what the processes do ---------------------------------------------------------------------


def work(folder, opts):
    torch.set_num_threads(1)
    seen = {"sampler": sampler_by_hand(), "steps": train_on_steps(opts), "tool": run_tool(opts)}
    seen["fitted"] = fit_shares()
    seen["stopped"] = stop_early([*opts, "OUTPUT_DIR", str(Path(folder) / "early")])
    torch.save(seen, Path(folder) / f"rank{comm.get_rank()}.pth")


def sampler_by_hand():
    """k after one update with known scores of positives; four anchors an image."""
    images = [
        [([0.5], 1), ([0.25, 0.25], 2)],  # rank 0: p of the positives, their number
        [([0.75], 1), ([], 0)],
    ][comm.get_rank()]
    probs, samples = [], []
    for scores, num_pos in images:
        labels = torch.tensor([1] * num_pos + [0] * (4 - num_pos))
        probs.append(torch.tensor([*scores, *[0.5] * (4 - num_pos)]))
        samples.append(SampledAnchors(labels, 1.0, num_pos, 4 - num_pos))
    sampler = AdaptiveRatioSampler(num_samples=4, max_ratio=3)
    sampler.update(probs, samples)
    return sampler.ratio


def train_on_steps(opts):
    """k, and the sampled scores and labels of each image, after each of ``STEPS``."""
    cfg = load_config(CONFIG, opts)
    torch.manual_seed(0)
    model = create_ddp_model(build_model(cfg), broadcast_buffers=False, device_ids=None)
    sampler = model.module.proposal_generator.anchor_sampler
    images = []
    update = sampler.update

    def record(probs, samples):
        masks = [s.labels >= 0 for s in samples]
        images.append([(p[m], s.labels[m]) for p, s, m in zip(probs, samples, masks)])
        update(probs, samples)

    sampler.update = record
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(10 + comm.get_rank())
    ratios = [sampler.ratio]
    for batches in STEPS.values():
        with EventStorage():
            losses = model([make_input(boxes) for boxes in batches[comm.get_rank()]])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        ratios.append(sampler.ratio)
    return {"ratios": ratios, "images": images, "parameters": parameters(model.module)}


def make_input(boxes):
    image = 100 * torch.rand(3, 64, 64)
    for x0, y0, x1, y1 in boxes:
        image[:, y0:y1, x0:x1] += 100
    target = Instances((64, 64), gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4).float()))
    target.gt_classes = torch.zeros(len(boxes), dtype=torch.long)
    return {"image": image, "instances": target}


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


class RecordingTrainer(IchTrainer):
    """Notes k after each step, and the parameters after the last."""

    ratios: list[float] = []
    parameters: dict[str, torch.Tensor] = {}

    def build_hooks(self):
        def after_step(_):
            self.ratios.append(self.model.module.proposal_generator.anchor_sampler.ratio)

        def after_train(_):
            # Copies: the best model is loaded afterwards.
            self.parameters.update((k, v.clone()) for k, v in parameters(self.model.module).items())

        record = hooks.CallbackHook(after_step=after_step, after_train=after_train)
        return [record, *super().build_hooks()]


def run_tool(opts):
    """What each process of ``tools/train_net.py --num-gpus 2`` does."""
    path = ROOT / "tools/train_net.py"
    spec = importlib.util.spec_from_file_location("train_net", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.IchTrainer = RecordingTrainer
    tool.train(Namespace(eval_only=False, resume=False), load_config(CONFIG, opts))
    return {"ratios": RecordingTrainer.ratios, "parameters": RecordingTrainer.parameters}


class ValidatedTrainer(IchTrainer):
    """Its validations are given: rank 0 alone has results, as in Detectron2."""

    values = iter([0.6, 0.8, 0.7, 0.75, 0.9, 0.9, 0.9])

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        if not comm.is_main_process():
            return {}
        return {"diagnosis": {"image_auc": next(cls.values)}}


def stop_early(opts):
    """The iterations that each rank began, at one validation an iteration."""
    opts += ["TEST.EVAL_PERIOD", "1", "TEST.DIAGNOSIS.PATIENCE", "2", "SOLVER.MAX_ITER", "7"]
    cfg = load_config(CONFIG, opts)
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    trainer = ValidatedTrainer(cfg)
    trainer.train()
    comm.synchronize()  # both came here: neither waits for the other
    return trainer.iter + 1


class Fitted(torch.nn.Module):
    """Notes what it is fitted to."""

    def embed(self, batch):
        return torch.stack([x["image"].flatten(1).mean(dim=1) for x in batch])

    def fit(self, features, labels, groups):
        self.seen = features[:, 0].tolist(), labels.tolist(), groups


def fit_shares():
    """What a model is fitted to out of shares of three slices, in two batches, and of none."""
    slices = [
        {"image": torch.full((1, 2, 2), float(i)), "image_label": i % 2, "file_name": f"{i}.png"}
        for i in range(3)
    ]
    batches = [[slices[:2], slices[2:]], []][comm.get_rank()]
    hook = FitHook(Fitted(), (), lambda: batches)
    hook.trainer = SimpleNamespace(iter=0, max_iter=1)
    hook.after_step()
    return hook._model.seen


if __name__ == "__main__":
    timeout = timedelta(seconds=60)  # a rank that waits in vain
    launch(work, 2, dist_url="auto", args=(sys.argv[1], sys.argv[2:]), timeout=timeout)


# ---- what is true of them ----------------------------------------------------------------------


SMALL = (
    *("MODEL.WEIGHTS", "", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[12.0, 24.0]]", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
    *("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.5, 1.0, 2.0]]", "DATALOADER.NUM_WORKERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "6", "TEST.EVAL_PERIOD", "0"),
)
RANKS = []


@pytest.fixture
def ranks(full_tree, tmp_path):
    """What each of the two ranks saw; they run once for all tests here."""
    if not RANKS:
        RANKS.extend([None, None])  # so that a failure is not tried again
        opts = ("DATASETS.ICH_ROOT", full_tree(), "OUTPUT_DIR", tmp_path / "out", *SMALL)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *map(str, (__file__, tmp_path, *opts))],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        RANKS[:] = [torch.load(tmp_path / f"rank{i}.pth", weights_only=True) for i in (0, 1)]
    return RANKS


def test_every_rank_is_fitted_to_the_slices_of_all_in_order(ranks):
    for rank in ranks:
        assert rank["fitted"] == ([0.0, 1.0, 2.0], [0, 1, 0], ("0.png", "1.png", "2.png"))


def test_every_image_with_positives_counts_the_same_whatever_its_rank(ranks):
    # R = 3 and 4 anchors: k = 1 + 2 / 4 * sum(1 - p).
    # Rank 0: 1 + 0.5 * 0.5 = 1.25 and 1 + 0.5 * (0.75 + 0.75) = 1.75.
    # Rank 1: 1 + 0.5 * 0.25 = 1.125 and a healthy image, which does not count.
    # (1.25 + 1.75 + 1.125) / 3 = 1.375; the mean of the ranks' means would be 1.3125.
    assert [rank["sampler"] for rank in ranks] == [1.375, 1.375]


@pytest.mark.parametrize("step", STEPS)
def test_ratio_after_a_step_is_the_mean_over_images_with_positives(ranks, step):
    number = list(STEPS).index(step)
    before, after = ranks[0]["steps"]["ratios"][number : number + 2]
    assert ranks[1]["steps"]["ratios"][number + 1] == after  # to the last bit
    expected = [
        next_ratio(probs, labels, num_samples=len(labels), max_ratio=3).item()
        for rank in ranks
        for probs, labels in rank["steps"]["images"][number]
        if (labels == 1).any()
    ]
    assert len(expected) == sum(bool(boxes) for batch in STEPS[step] for boxes in batch)
    if expected:
        assert after == pytest.approx(sum(expected) / len(expected), rel=1e-12)
        assert after != before
    else:
        assert after == before > 1


@pytest.mark.parametrize("run", ["steps", "tool"])
def test_ranks_end_with_the_same_weights(ranks, run):
    one, other = (rank[run]["parameters"] for rank in ranks)
    assert one.keys() == other.keys() and len(one) > 50
    for name, parameter in one.items():
        assert torch.equal(parameter, other[name]), name


def test_the_tool_keeps_one_ratio_after_every_step(ranks):
    one, other = (rank["tool"]["ratios"] for rank in ranks)
    assert one == other and len(one) == 6 and len(set(one)) >= 3


def test_ranks_stop_early_at_the_same_iteration(ranks):
    # The second validation is the best; the two after it are no better, so four are done of seven.
    assert [rank["stopped"] for rank in ranks] == [4, 4]
