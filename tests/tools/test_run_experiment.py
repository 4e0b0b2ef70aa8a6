"""A tiny experiment from end to end: failed, killed, finished, not run twice, not mixed up."""

import csv
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ich_det2.engine import cells as cells_module
from ich_det2.evaluation.boxes import voc_average_precision
from ich_det2.evaluation.diagnosis import roc_auc_score
from ich_det2.evaluation.predictions import read_predictions

ROOT = Path(__file__).parents[2]
SMALL = (
    *("++opts.MODEL.WEIGHTS=''", "++opts.MODEL.ROI_BOX_HEAD.FC_DIM=16"),
    *("++opts.INPUT.MIN_SIZE_TRAIN=[64]", "++opts.INPUT.MIN_SIZE_TEST=64"),
    *("++opts.SOLVER.IMS_PER_BATCH=2", "++opts.SOLVER.MAX_ITER=2", "++opts.SOLVER.WARMUP_ITERS=1"),
    *("++opts.SOLVER.CHECKPOINT_PERIOD=1", "++opts.DATALOADER.NUM_WORKERS=0"),
    "++opts.TEST.DIAGNOSIS.RESAMPLES=20",
)


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "run_experiment.py"
    spec = importlib.util.spec_from_file_location("run_experiment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, monkeypatch):
    """Function that runs the command and returns the exit code."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["run_experiment.py", *map(str, argv)])
        try:
            tool.main()
        except SystemExit as end:
            return end.code
        return 0

    return run


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def fake_cell(folder, scores, *, boxes=True):
    """Writes what a finished cell leaves, with hand-made scores: image id -> (label, score)."""
    for name in ("ich_val", "ich_test"):
        inference = folder / "inference" / name
        inference.mkdir(parents=True)


def kill_when(condition, pid):
    """Sends SIGTERM to a process as soon as the condition holds."""

    def watch():
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(pid, signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def test_an_experiment_fails_is_killed_is_finished(run, full_tree, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out/own/figure3"
    one, five = folder / "alpha-1_seed-3", folder / "alpha-5_seed-3"
    argv = ["experiment=figure3", "data=own", f"data.root={full_tree()}"]
    argv += [f"output={tmp_path / 'out'}", "grid.alpha=[1,5]", "seeds=[3]", *SMALL]
    # A sampler of no such name: the other cell is trained, its tables are written.
    assert run(*argv, "++opts_by.alpha={5:{MODEL:{RPN:{SAMPLER:{NAME:Nope}}}}}") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert f"{five}: exit code 2; terminal.txt there ends with 'train_net.py: error:" in out
    assert "'Nope'" in out or "Nope" in out
    assert (one / "done").is_file() and not (five / "done").exists()
    assert [row["alpha"] for row in rows_of(folder / "results.csv")] == ["1"]

    # Put right, it is trained; killed after its first checkpoint, its process ends too.
    started = []
    popen = cells_module.subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(cells_module.subprocess, "Popen", start)
    kill_when((five / "last_checkpoint").is_file, os.getpid())
    assert run(*argv) == 128 + signal.SIGTERM
    assert len(started) == 1 and started[0].wait(10) == -signal.SIGTERM
    assert not (five / "done").exists()

    # Again: the first goes on from the checkpoint, nothing else is started.
    assert run(*argv) == 0
    assert len(started) == 2 and (five / "done").is_file()
    assert (
        "Resume training from" in (five / "terminal.txt").read_text()
        or "iteration 1" in (five / "terminal.txt").read_text()
    )

    # The tables are what the cells' own files say.
    rows = {row["alpha"]: row for row in rows_of(folder / "results.csv")}
    for alpha, cell in (("1", one), ("5", five)):
        config = (cell / "config.yaml").read_text()
        assert f"ALPHA: {float(alpha)}" in config and "SEED: 3" in config
        for split in ("val", "test"):
            found = read_predictions(cell / f"inference/ich_{split}")
            auc = float(rows[alpha][f"{split}/image/auc"])
            assert auc == roc_auc_score(found.labels, found.scores)
            ap = voc_average_precision(found.boxes, found.true_boxes)
            assert float(rows[alpha][f"{split}/lesion/voc_ap50"]) == ap
    table = {row["alpha"]: row for row in rows_of(folder / "table.csv")}
    assert table["5"]["image AUC, validation mean"] == rows["5"]["val/image/auc"]
    assert table["5"]["image AUC, validation n"] == "1"
    picked = json.loads((folder / "selected.json").read_text())
    best = min("15", key=lambda a: (-float(rows[a]["val/lesion/voc_ap50"]), a))
    assert picked["alpha"] == int(best) and picked["candidates"] == picked["of"] == 2
    assert picked["test"]["mAP, test mean"] == float(rows[best]["test/lesion/voc_ap50"])
    assert np.asarray(Image.open(folder / "figure3.png")).std() > 0
    assert "<svg" in (folder / "figure3.svg").read_text()

    # Finished cells are not run again, and the report alone is the same.
    before = (folder / "table.md").read_bytes()
    assert run(*argv) == 0 and run(*argv, "report_only=true") == 0
    assert len(started) == 2 and (folder / "table.md").read_bytes() == before

    # Other settings are not taken for these.
    capsys.readouterr()
    assert run(*argv, "++opts.SOLVER.MAX_ITER=3") == 2
    error = capsys.readouterr().err
    assert f"{one}: was trained with SOLVER.MAX_ITER 2, expected 3" in error
    assert len(started) == 2
