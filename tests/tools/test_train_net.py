"""The command line: real runs, and one sentence with exit code 2 for what cannot run."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "csfrcnn_effnet_lite0.yaml")
SMALL = (
    *("MODEL.WEIGHTS", "", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"),
    *("SOLVER.STEPS", "(1,)", "TEST.EVAL_PERIOD", "2", "DATALOADER.NUM_WORKERS", "0"),
)


@pytest.fixture(scope="module")
def train_net():
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "tools" / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def args(root, out, *opts, config=CONFIG):
    data = ("DATASETS.ICH_ROOT", str(root), "OUTPUT_DIR", str(out))
    return ["--config-file", config, *data, *SMALL, *opts]


def no_root(root):
    shutil.rmtree(root)


def empty_split(root):
    (root / "ImageSets/Main/val.txt").write_text("\n")


def absent_image(root):
    (root / "DICOM/c.dcm").unlink()


def truncated_dicom(root):
    path = root / "DICOM/b.dcm"
    path.write_bytes(path.read_bytes()[:-500])


def dicom_without_pixels(root):
    import pydicom

    path = root / "DICOM/b.dcm"
    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.save_as(path)


@pytest.mark.parametrize(
    ("damage", "opts", "words"),
    [
        (no_root, (), ("tree", "DATASETS.ICH_ROOT", "prepare_phantom.py")),
        (empty_split, (), ("val.txt", "empty", "make_splits.py")),
        (absent_image, (), ("c.xml", "c.dcm")),
        (truncated_dicom, (), ("b.dcm",)),
        (dicom_without_pixels, (), ("b.dcm",)),
        (None, ("MODEL.RPN.SAMPLER.NAME", "Adaptive"), ("Adaptive", "AdaptiveRatioSampler")),
        (None, ("MODEL.WEIGHTS", "gone.pth"), ("gone.pth", "random weights", "MODEL.WEIGHTS ''")),
        (None, ("MODEL.NO_SUCH_KEY", "1"), ("MODEL.NO_SUCH_KEY",)),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    train_net, full_tree, tmp_path, capsys, damage, opts, words
):
    root, out = full_tree("dicom"), tmp_path / "out"
    if damage:
        damage(root)
    assert train_net.main(args(root, out, *opts)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train_net.py: error: ")
    assert "Traceback" not in last
    for word in words:
        assert word in last
    assert not out.exists()


def run(*argv):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools/train_net.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_two_processes_on_the_cpu_train_and_score_each_image_once(full_tree, tmp_path):
    out = tmp_path / "out"
    log = run("--num-gpus", "2", "--dist-url", "auto", *args(full_tree(), out))
    assert "World size: 2" in log
    assert (out / "log.txt.rank1").is_file()
    scores = (out / "inference/ich_test/image_scores.csv").read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in scores] == ["g", "h"]


def losses(out):
    rows = map(json.loads, (out / "metrics.json").read_text().splitlines())
    return [row["total_loss"] for row in rows if "total_loss" in row]


def test_torchrun_and_srun_train_as_num_gpus_does(full_tree, tmp_path):
    root, script = full_tree(), str(ROOT / "tools/train_net.py")
    run("--num-gpus", "2", "--dist-url", "auto", *args(root, tmp_path / "own"))
    expected = torch.load(tmp_path / "own/model_final.pth", weights_only=True)["model"]

    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", script, *args(root, tmp_path / "torchrun")]
    done = subprocess.run(torchrun, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    step = {
        **{"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"},
        **{"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)},
    }
    argv = [sys.executable, "-W", "ignore", script, *args(root, tmp_path / "srun")]
    tasks = [
        subprocess.Popen(
            argv,
            env={**env, **step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in "01"
    ]
    said = [task.communicate(timeout=600)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    for name in ("torchrun", "srun"):
        assert (tmp_path / name / "log.txt.rank1").is_file()
        assert losses(tmp_path / name) == losses(tmp_path / "own")
        found = torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_torchrun_starts_a_killed_rank_again_and_goes_on(full_tree, tmp_path):
    out = tmp_path / "out"
    opts = ("SOLVER.MAX_ITER", "40", "SOLVER.CHECKPOINT_PERIOD", "5", "TEST.EVAL_PERIOD", "0")
    argv = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    argv += ["--nproc-per-node", "2", "--max-restarts", "1", str(ROOT / "tools/train_net.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    base = args(full_tree(), out, *opts)
    with open(tmp_path / "stderr.txt", "w") as said:
        process = subprocess.Popen(
            [*argv, "--resume", *base], env=env, stderr=said, stdout=subprocess.DEVNULL
        )
        while not (out / "last_checkpoint").exists():
            assert process.poll() is None, (tmp_path / "stderr.txt").read_text()
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [pid for pid in children if "train_net.py" in command_of(pid)]
        assert len(ranks) == 2
        os.kill(int(ranks[1]), signal.SIGKILL)
        assert process.wait(timeout=600) == 0, (tmp_path / "stderr.txt").read_text()
    assert "Starting training from iteration" in (out / "log.txt").read_text().split("Rank of")[-1]
    whole = tmp_path / "whole"
    run("--num-gpus", "2", "--dist-url", "auto", *args(full_tree(), whole, *opts))
    a, b = (torch.load(f / "model_final.pth", weights_only=True)["model"] for f in (out, whole))
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_train_resume_evaluate_the_papers_config_on_dicom(full_tree, tmp_path):
    out = tmp_path / "out"
    config = str(ROOT / "configs" / "csfrcnn_r50.yaml")
    # Small where size is all that matters; the loop is the real one.
    opts = ("SOLVER.IMS_PER_BATCH", "1", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8")
    opts += ("MODEL.RPN.POST_NMS_TOPK_TEST", "20", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20")
    base = args(full_tree("dicom"), out, *opts, config=config)
    run(*base)
    assert torch.load(out / "model_final.pth", weights_only=True)["iteration"] == 1
    log = run("--resume", *base, "SOLVER.MAX_ITER", "3")
    assert "Starting training from iteration 2" in log
    trained = (out / "config.yaml").read_text()
    assert re.search(r"SIZES:\s+- - \d", trained)
    scores = (out / "inference/ich_test/image_scores.csv").read_text()
    shutil.rmtree(out / "inference")
    weights = ("MODEL.WEIGHTS", str(out / "model_best.pth"))
    run("--eval-only", *base, *weights)
    assert (out / "inference/ich_test/image_scores.csv").read_text() == scores


def test_help_says_what_it_writes(train_net, capsys):
    with pytest.raises(SystemExit) as stop:
        train_net.main(["--help"])
    assert stop.value.code == 0
    assert "image_scores.csv" in capsys.readouterr().out
