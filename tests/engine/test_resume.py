"""A run that was interrupted and resumed equals one that was not, in every loss and in k."""

import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase
from detectron2.engine.hooks import CallbackHook
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from ich_det2.engine import IchCheckpointer, IchTrainer, signals
from ich_det2.engine.checks import check_config
from ich_det2.engine.signals import Interrupted

ROOT = Path(__file__).parents[2]
SAMPLERS = (
    "PositiveShareSampler",
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
)
SMALL = (
    *("SOLVER.MAX_ITER", "6", "SOLVER.STEPS", "(4,)", "SOLVER.WARMUP_ITERS", "2"),
    *("SOLVER.CHECKPOINT_PERIOD", "3", "TEST.EVAL_PERIOD", "2", "SOLVER.IMS_PER_BATCH", "2"),
    *("INPUT.AUG.SHIFT", "0.1", "INPUT.AUG.SCALE", "0.2"),
    *("INPUT.AUG.ROTATE", "10.0", "INPUT.AUG.JITTER", "0.2"),
)


@pytest.fixture
def cfg(tiny_cfg, full_tree, tmp_path, monkeypatch):
    """Every kind of random augmentation, validation each 2 iterations, checkpoints each 3."""
    # Drawing would take most of the time.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)
    root, out = str(full_tree()), str(tmp_path / "uninterrupted")
    opts = ("DATALOADER.NUM_WORKERS", "0", "DATASETS.ICH_ROOT", root, "OUTPUT_DIR", out)
    cfg = tiny_cfg(*SMALL, *opts)
    check_config(cfg, eval_only=False, resume=False)
    return cfg


class Record(HookBase):
    """Total loss and k of each iteration."""

    def __init__(self):
        self.values = []

    def after_step(self):
        latest = self.trainer.storage.latest()
        self.values.append((latest["total_loss"][0], latest["rpn/ratio_target"][0]))


def train(cfg, resume=False):
    """Returns the losses and k of the iterations, and the weights after the last."""
    seed_all_rng(cfg.SEED if cfg.SEED >= 0 else None)
    trainer, record = IchTrainer(cfg), Record()
    trainer.register_hooks([record])
    trainer.resume_or_load(resume)
    trainer.train()
    return record.values, trainer.model.state_dict()


def interrupt(cfg, checkpoint="model_0000002.pth"):
    """The config of a run that got no further than a checkpoint, in a folder of its own."""
    cfg, out = cfg.clone(), Path(cfg.OUTPUT_DIR)
    cfg.OUTPUT_DIR = str(out.with_name("interrupted"))
    Path(cfg.OUTPUT_DIR).mkdir()
    shutil.copy(out / checkpoint, cfg.OUTPUT_DIR)
    (Path(cfg.OUTPUT_DIR) / "last_checkpoint").write_text(checkpoint)
    return cfg


def assert_continues(whole, resumed):
    (values, weights), (resumed_values, resumed_weights) = whole, resumed
    assert len(values) == 6
    assert resumed_values == values[3:]
    assert [key for key in weights if not torch.equal(weights[key], resumed_weights[key])] == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_the_uninterrupted_one(cfg, workers):
    cfg.DATALOADER.NUM_WORKERS = workers
    whole = train(cfg)
    assert len({k for _, k in whole[0][3:]}) > 1  # k moves, so it is worth comparing
    assert_continues(whole, train(interrupt(cfg), resume=True))


def test_a_random_seed_is_taken_along(cfg):
    cfg.SEED = -1
    whole = train(cfg)
    assert_continues(whole, train(interrupt(cfg), resume=True))
    assert cfg.SEED == -1


def test_losses_depend_neither_on_workers_nor_on_validation(cfg, tmp_path):
    values, _ = train(cfg)
    cfg.OUTPUT_DIR, cfg.TEST.EVAL_PERIOD = str(tmp_path / "other"), 0
    cfg.DATALOADER.NUM_WORKERS = 1
    assert train(cfg)[0] == values


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_signal_ends_the_iteration_saves_and_goes_on(cfg, number, at):
    cfg.SOLVER.CHECKPOINT_PERIOD = 3  # iteration 2 is saved anyway
    whole = train(cfg)
    cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR).with_name("stopped"))
    before = signal.getsignal(number)
    seed_all_rng(cfg.SEED)
    trainer = IchTrainer(cfg)
    kill = CallbackHook(before_step=lambda t: t.iter == at and os.kill(os.getpid(), number))
    trainer.register_hooks([kill])
    trainer.resume_or_load(False)
    with pytest.raises(Interrupted) as stop:
        trainer.train()
    assert stop.value.number == number and isinstance(stop.value, KeyboardInterrupt)
    assert signal.getsignal(number) == before
    saved = sorted(path.name for path in Path(cfg.OUTPUT_DIR).glob("model_0*.pth"))
    assert saved == [f"model_{n:07d}.pth" for n in sorted({at, min(at, 2)})]
    values, weights = train(cfg, resume=True)
    assert values == whole[0][at + 1 :]
    assert [key for key in weights if not torch.equal(weights[key], whole[1][key])] == []


def test_no_worker_outlives_the_training(cfg):
    cfg.DATALOADER.NUM_WORKERS = 1
    cfg.TEST.EVAL_PERIOD = 0
    trainer, alive = IchTrainer(cfg), []
    trainer.register_hooks(
        [CallbackHook(after_step=lambda _: alive.append(len(multiprocessing.active_children())))]
    )
    trainer.train()  # which the trainer, with its loader, survives
    assert min(alive) == 1 and multiprocessing.active_children() == []
    # And where an error keeps all frames that refer to the loader.
    broken = IchTrainer(cfg)
    broken.register_hooks([CallbackHook(after_step=lambda _: 1 / 0)])
    with pytest.raises(ZeroDivisionError):
        broken.train()
    assert multiprocessing.active_children() == []


class _Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        time.sleep(0.01 if i < 2 else 20)
        return i


@pytest.fixture
def worker(monkeypatch):
    """A loader's worker that is shielded, and the iterator that it works for."""
    monkeypatch.setattr(signals, "_OUTLIVE_SECONDS", 2)
    loader = signals.shield_workers(torch.utils.data.DataLoader(_Slow(), num_workers=1))
    batches = iter(loader)
    next(batches)  # it knows what to do with signals
    (process,) = multiprocessing.active_children()
    return process, batches


def send(pid, number):
    """From another process."""
    subprocess.run(["kill", f"-{number}", str(pid)], check=True)


def test_a_worker_outlives_the_signals_of_others_for_a_while(worker):
    process, _ = worker
    os.kill(process.pid, signal.SIGSTOP)
    for _ in range(2):
        send(process.pid, signal.SIGTERM)  # two that come as one
    os.kill(process.pid, signal.SIGCONT)
    process.join(0.5)
    assert process.exitcode is None
    # PyTorch tells the main process of a worker's end.
    with pytest.raises(RuntimeError, match="worker .* is killed by signal"):
        time.sleep(10)
    assert process.exitcode == -signal.SIGALRM


def test_a_worker_ends_by_its_own_process(worker):
    process, _ = worker
    process.terminate()  # as Python does at its end, and then waits
    with pytest.raises(RuntimeError, match="worker .* is killed by signal"):
        time.sleep(10)
    assert process.exitcode == -signal.SIGKILL


def test_python_ends_though_an_error_keeps_a_loader(tmp_path):
    program = tmp_path / "evaluate.py"
    program.write_text(
        "import time, torch\n"
        "from ich_det2.engine.signals import shield_workers\n"
        "loader = shield_workers(torch.utils.data.DataLoader([0, 1, 2, 3], num_workers=2))\n"
        "def evaluate():\n"
        "    for batch in iter(loader):\n"
        "        raise RuntimeError\n"
        "try:\n"
        "    evaluate()\n"
        "except RuntimeError as error:\n"
        "    kept = error\n"
        "print(time.monotonic())\n"
    )
    argv = [sys.executable, program]
    told = subprocess.run(
        argv, check=True, timeout=300, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert time.monotonic() - float(told.stdout) < 40  # it was for ever, and a minute


def test_a_signal_in_the_last_iteration_lets_the_training_end(cfg):
    trainer = IchTrainer(cfg)
    kill = CallbackHook(before_step=lambda t: t.iter == 5 and os.kill(os.getpid(), signal.SIGINT))
    trainer.register_hooks([kill])
    trainer.resume_or_load(False)
    with pytest.raises(Interrupted):
        trainer.train()
    out = Path(cfg.OUTPUT_DIR)
    assert (out / "model_final.pth").is_file() and (out / "model_best.pth").is_file()
    resumed = IchTrainer(cfg)
    resumed.resume_or_load(True)
    assert resumed.train() is None and resumed.start_iter == 6


def test_another_batch_goes_on_behind_the_last_image(cfg):
    images = [name for batch in batches(cfg, 12) for name in batch]
    trainer = IchTrainer(cfg)
    trainer.iter = 2
    trainer.checkpointer.save("model_0000002")
    cfg.SOLVER.IMS_PER_BATCH = 4
    trainer = IchTrainer(cfg)
    trainer.resume_or_load(True)
    stream = iter(trainer.data_loader)
    # Three batches of two are done; what follows is of four.
    names = [Path(d["file_name"]).stem for batch in (next(stream), next(stream)) for d in batch]
    assert names == [name for name, _ in images[6:14]]
    trainer.iter = 4
    assert trainer.state_dict()["images"] == 6 + 2 * 4


def test_a_checkpoint_that_counts_no_images_goes_by_the_recorded_batch(resumable, cfg):
    file = Path(cfg.OUTPUT_DIR) / "model_0000002.pth"
    older = torch.load(file, weights_only=True)
    del older["trainer"]["images"]
    torch.save(older, file)
    (Path(cfg.OUTPUT_DIR) / "config.yaml").write_text(cfg.dump())
    expected = batches(cfg, 1, start_iter=3)
    cfg.SOLVER.IMS_PER_BATCH = 1
    trainer = IchTrainer(cfg)
    trainer.resume_or_load(True)
    ((first,),) = (next(iter(trainer.data_loader)),)
    assert Path(first["file_name"]).stem == expected[0][0][0]


def test_another_number_of_ranks_goes_on_behind_the_last_image(cfg, monkeypatch):
    stream = [name for batch in batches(cfg, 6) for name in batch]
    cfg.SOLVER.IMS_PER_BATCH = 3
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: 3)
    monkeypatch.setattr(comm, "all_gather", lambda data: [data])
    ranks = []
    for rank in range(3):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        loader = IchTrainer.build_train_loader(cfg, 2, 4)
        ranks.append([Path(batch[0]["file_name"]).stem for batch in itertools.islice(loader, 2)])
    together = sorted(name for names in ranks for name in names)
    assert together == sorted(name for name, _ in stream[4:10])


def batches(cfg, number, start_iter=0):
    """File name and checksum of the augmented images, of ``number`` batches."""
    loader = IchTrainer.build_train_loader(cfg, start_iter)
    return [
        [(Path(d["file_name"]).stem, d["image"].double().sum().item()) for d in batch]
        for batch in itertools.islice(loader, number)
    ]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_continues_where_it_was(cfg, sampler):
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    # An image with a box stands sqrt(1.5 / 0.5) = 1.7 times in an epoch: rounded at random.
    cfg.DATALOADER.REPEAT_THRESHOLD, cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.5, 0.75
    cfg.INPUT.AUG.EXPAND = 2
    stream = batches(cfg, 12)
    assert batches(cfg, 5, start_iter=7) == stream[7:]
    sums = [image for batch in stream for _, image in batch]
    assert len(set(sums)) == len(sums)  # no augmentation is drawn twice


@pytest.mark.parametrize("workers", [1, 2])
def test_the_stream_does_not_depend_on_the_number_of_workers(cfg, workers):
    stream = batches(cfg, 6)
    cfg.DATALOADER.NUM_WORKERS = workers
    assert batches(cfg, 6) == stream
    assert batches(cfg, 4, start_iter=2) == stream[2:]


def test_ranks_share_the_images_of_an_iteration(cfg, monkeypatch):
    stream = batches(cfg, 6)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather", lambda data: [data])
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        ranks.append(batches(cfg, 4, start_iter=2))
    assert [a + b for a, b in zip(*ranks)] == stream[2:]


def test_another_seed_gives_another_order_and_other_draws(cfg):
    stream = batches(cfg, 6)
    cfg.SEED += 1
    other = batches(cfg, 6)
    assert [[name for name, _ in b] for b in other] != [[name for name, _ in b] for b in stream]
    assert not {image for b in other for image in b} & {image for b in stream for image in b}


@pytest.fixture
def resumable(cfg):
    """A trainer on a folder with a checkpoint of 3 iterations."""
    trainer = IchTrainer(cfg)
    trainer.iter = 2
    trainer.checkpointer.save("model_0000002")
    return trainer


def test_a_checkpoint_without_a_seed_resumes_with_one_warning(resumable, cfg, caplog):
    file = Path(cfg.OUTPUT_DIR) / "model_0000002.pth"
    older = torch.load(file, weights_only=True)
    del older["trainer"]["seed"]
    torch.save(older, file)
    caplog.clear()
    resumable.resume_or_load(True)
    assert resumable.start_iter == 3
    (warning,) = warnings(caplog)
    assert "holds no seed" in warning


def test_grouping_by_aspect_ratio_warns_that_it_is_not_exact(resumable, caplog):
    resumable.cfg.DATALOADER.ASPECT_RATIO_GROUPING = True
    caplog.clear()
    resumable.resume_or_load(True)
    (warning,) = warnings(caplog)
    assert "ASPECT_RATIO_GROUPING" in warning
    assert len(next(iter(resumable.data_loader))) == 2


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_stock_checkpoint_loads_without_a_warning(tiny_cfg, tmp_path, caplog):
    stock = tiny_cfg(
        *("MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.RPN.HEAD_NAME", "StandardRPNHead"),
        *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    )
    DetectionCheckpointer(build_model(stock), str(tmp_path)).save("stock")
    checkpointer = IchCheckpointer(build_model(tiny_cfg()))
    caplog.clear()
    checkpointer.load(str(tmp_path / "stock.pth"))
    assert warnings(caplog) == []
    # What is really missing is still said.
    state = torch.load(tmp_path / "stock.pth", weights_only=True)
    del state["model"]["proposal_generator.rpn_head.conv.bias"]
    torch.save(state, tmp_path / "stock.pth")
    checkpointer.load(str(tmp_path / "stock.pth"))
    (warning,) = warnings(caplog)
    assert "rpn_head.conv" in warning and "_ratio" not in warning


def test_a_kill_while_the_last_checkpoint_is_noted_leaves_the_one_before(tmp_path, monkeypatch):
    checkpointer = IchCheckpointer(torch.nn.Linear(2, 1), str(tmp_path))
    checkpointer.save("model_0000002")
    rename = os.replace

    def killed(source, target):
        if Path(target).name == "last_checkpoint":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_0000005")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000002.pth")


def start(cfg, out, *argv):
    """Starts tools/train_net.py, in a process group of its own, with the config from a file."""
    file = Path(cfg.OUTPUT_DIR).with_name("config.yaml")
    file.write_text(cfg.dump())
    command = [sys.executable, str(ROOT / "tools/train_net.py")]
    command += ["--config-file", str(file), *argv, "OUTPUT_DIR", str(out)]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def start_until(cfg, out, condition, *argv):
    process = start(cfg, out, *argv)
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process


def test_the_command_line_survives_kill_9(cfg, tmp_path):
    cfg.DATALOADER.NUM_WORKERS, cfg.TEST.EVAL_PERIOD = 1, 4
    out = tmp_path / "killed"
    process = start_until(cfg, out, (out / "last_checkpoint").exists)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (out / "model_final.pth").exists()
    finish_and_compare(cfg, out)


def finish_and_compare(cfg, out):
    process = start(cfg, out, "--resume")
    assert process.wait(timeout=300) == 0, process.stderr.read()
    assert "Starting training from iteration" in (out / "log.txt").read_text()
    _, weights = train(cfg)
    resumed = torch.load(out / "model_final.pth", weights_only=True)["model"]
    assert resumed["proposal_generator.anchor_sampler._ratio"] > 1
    assert [key for key in weights if not torch.equal(weights[key], resumed[key])] == []


def test_ctrl_c_at_the_command_line_saves_and_says_how_to_go_on(cfg, tmp_path):
    """To the whole process group, workers of the loader among it, as a terminal sends it."""
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 1, 20, 100
    cfg.SOLVER.CHECKPOINT_PERIOD = 1000
    out = tmp_path / "stopped"

    def trains():
        return (out / "log.txt").is_file() and "Starting train" in (out / "log.txt").read_text()

    process = start_until(cfg, out, trains)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    last = error.strip().splitlines()[-1]
    assert last == (
        f"train_net.py: stopped by SIGINT; {out} holds a checkpoint, and the same command with"
        " --resume goes on from it."
    )
    assert "Traceback" not in error
    finish_and_compare(cfg, out)


def test_sigterm_to_their_parent_stops_two_processes_behind_the_same_iteration(cfg, tmp_path):
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD = 300, 1000, 1000
    out = tmp_path / "stopped"

    def trains():
        return (out / "log.txt").is_file() and "Starting train" in (out / "log.txt").read_text()

    argv = ("--num-gpus", "2", "--dist-url", "auto")
    process = start_until(cfg, out, trains, *argv)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, error
    assert "stopped by SIGTERM" in error.strip().splitlines()[-1] and "Traceback" not in error
    saved = torch.load(out / (out / "last_checkpoint").read_text(), weights_only=True)
    assert saved["iteration"] < 299 and saved["trainer"]["images"] == 2 * (saved["iteration"] + 1)


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_training_is_set_up_is_told_from_one_in_it(
    cfg, tmp_path, processes, number
):
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD = 300, 1000, 1000
    out = tmp_path / "stopped"
    argv = ("--num-gpus", processes, "--dist-url", "auto")
    process = start_until(cfg, out, (out / "log.txt").is_file, *argv)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    if processes == "1" and process.returncode == -number:
        return  # as the shell expects of a process that has nothing to save
    assert process.returncode == 128 + number, error
    left = "holds a checkpoint" if (out / "last_checkpoint").exists() else "nothing was trained yet"
    last = error.strip().splitlines()[-1]
    assert f"stopped by {signal.Signals(number).name}" in last and left in last
    assert "Traceback" not in error
