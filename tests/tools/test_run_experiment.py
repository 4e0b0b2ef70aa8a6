"""A tiny experiment from end to end: failed, killed, finished, not run twice, not mixed up."""

import csv
import fcntl
import importlib.util
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import hydra
import numpy as np
import pytest
from PIL import Image

from ich_det2.engine.config import load_config
from ich_det2.evaluation.analysis import Settings
from ich_det2.evaluation.boxes import voc_average_precision
from ich_det2.evaluation.diagnosis import roc_auc_score
from ich_det2.evaluation.evaluator import write_evaluation
from ich_det2.evaluation.predictions import Predictions, read_predictions
from ich_det2.experiments import cells as cells_module
from ich_det2.experiments.cells import Cell, run_cells
from ich_det2.experiments.experiment import build_cells

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
        finally:  # Hydra's "disabled" logging would keep the tree's findings from the terminal.
            assert not [n for n in loggers() if logging.getLogger(n).disabled]
        return 0

    def loggers():
        return [name for name in logging.root.manager.loggerDict if name.startswith("ich_det2")]

    return run


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def fake_cell(folder, scores, root):
    """Writes what a finished detector leaves: image id -> (label, score), a box of 10 x 10 each."""
    ids = list(scores)
    labels = np.array([label for label, _ in scores.values()])
    values = np.array([float(score) for _, score in scores.values()])
    boxes = [np.array([[value, 5, 5, 10, 10]]) for value in values]
    truth = [np.array([[5.0, 5, 10, 10]] * label).reshape(-1, 4) for label in labels]
    types = [["IPH"] * label for label in labels]
    found = Predictions(ids, ids, ids, labels, values, boxes, truth, types)
    settings = Settings(thresholds=[0.5], operating_threshold=0.5)
    for name in ("ich_val", "ich_test"):
        inference = folder / "inference" / name
        write_evaluation(inference, found, settings)
        (inference / "lesions.csv").unlink()  # as an evaluation's truth: COCO's JSON
        results = [
            {"image_id": i, "score": box[0, 0], "bbox": box[0, 1:].tolist()}
            for i, box in zip(ids, boxes)
        ]
        content = {
            "images": [{"id": i, "file_name": f"{root}/JPEGImages/{i}.png"} for i in ids],
            "annotations": [
                {"image_id": i, "category_id": 0, "bbox": box.tolist()}
                for i, rows in zip(ids, truth)
                for box in rows
            ],
        }
        (inference / "coco_instances_results.json").write_text(json.dumps(results))
        (inference / f"{name}_coco_format.json").write_text(json.dumps(content))
    config = load_config(ROOT / "configs/frcnn_effnet_lite0.yaml", ["MODEL.DEVICE", "cpu"])
    (folder / "config.yaml").write_text(config.dump())
    (folder / "done").touch()


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
    assert "Nope" in out
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
    assert len(started) == 1 and started[0].wait(70) == 128 + signal.SIGTERM
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
    for more in ((), ("report_only=true",)):
        assert run(*argv, "++opts.SOLVER.MAX_ITER=3", *more) == 2
        error = capsys.readouterr().err
        assert f"{one}: was trained with SOLVER.MAX_ITER 2, expected 3" in error
    assert len(started) == 2


def test_figures_4_and_5_are_those_of_the_finished_cells(run, full_tree, tmp_path, capsys):
    root, out = full_tree(), tmp_path / "out"
    labels = {"g": 1, "h": 0, "e": 1, "f": 0}
    scores = {
        "frcnn": {"g": 0.9, "h": 0.6, "e": 0.2, "f": 0.1},
        "csfrcnn": {"g": 0.9, "h": 0.2, "e": 0.8, "f": 0.1},
    }
    for method, found in scores.items():
        pairs = {i: (labels[i], found[i]) for i in labels}
        fake_cell(out / f"own/figure4/method-{method}_seed-0", pairs, root)
    argv = ["data=own", f"data.root={root}", f"output={out}", "grid.method=[frcnn,csfrcnn]"]
    assert run("experiment=figure4", *argv, "report_only=true") == 0
    table = {row["method"]: row for row in rows_of(out / "own/figure4/table.csv")}
    # Plain at 0.5: one bleed of two, one false alarm: 2 of 4 right. Cost-sensitive: all.
    assert (table["frcnn"]["accuracy mean"], table["csfrcnn"]["accuracy mean"]) == ("0.5", "1.0")
    curves = rows_of(out / "own/figure4/curves.csv")
    assert len(curves) == 2 * 19
    recall = {(row["name"], row["threshold"]): row["recall mean"] for row in curves}
    assert (recall["frcnn", "0.2"], recall["frcnn", "0.25"]) == ("1.0", "0.5")
    assert recall["csfrcnn", "0.85"] == "0.5" and recall["csfrcnn", "0.95"] == "0.0"
    assert (out / "own/figure4/figure4.svg").is_file()

    # The cells are figure 4's: nothing is trained.
    assert run("experiment=figure5", *argv) == 0
    text = (out / "own/figure5/table.md").read_text()
    assert "| g | found by frcnn, csfrcnn |" in text
    assert "| e | found by csfrcnn; missed by frcnn |" in text and "| h |" not in text
    assert np.asarray(Image.open(out / "own/figure5/figure5.png")).std() > 0


def test_the_papers_protocol_says_that_patients_are_shared(run, full_tree, tmp_path, capsys):
    root, out = full_tree(), tmp_path / "out"
    argv = ["experiment=protocol", "data=own", f"data.root={root}", f"output={out}", "seeds=[0]"]
    argv += ["grid.method=[csfrcnn]", *SMALL]
    assert run(*argv) == 2
    splits = "--by image --bleeding-patients --names paper_train paper_val paper_test"
    assert f"`python datasets/make_splits.py {root} {splits}` writes it" in capsys.readouterr().err
    for split in ("train", "val", "test"):
        ids = (root / f"ImageSets/Main/{split}.txt").read_text()
        (root / f"ImageSets/Main/paper_{split}.txt").write_text(ids)
    assert run(*argv) == 0
    folder = out / "own/protocol"
    assert "Train, validation and test share patients" in (folder / "table.md").read_text()
    (row,), (result,) = rows_of(folder / "table.csv"), rows_of(folder / "results.csv")
    for name in ("accuracy", "recall", "precision"):
        assert row[f"{name} mean"] == result[f"paper_test/image/{name}"] != ""
    found = read_predictions(folder / "method-csfrcnn_seed-0/inference/ich_paper_test")
    assert found.image_ids == ["g", "h"]


def test_systems_are_compared_with_the_reference_and_their_cost_is_measured(
    run, full_tree, tmp_path
):
    root, out = full_tree(), tmp_path / "out"
    argv = ["experiment=systems", "data=own", f"data.root={root}", f"output={out}"]
    argv += ["grid.method=[lenet,csfrcnn]", "systems.reference=csfrcnn", *SMALL]
    assert run(*argv) == 0
    folder = out / "own/systems"
    rows = {row["method"]: row for row in rows_of(folder / "results.csv")}
    for name, row in rows.items():
        found = read_predictions(folder / f"method-{name}_seed-0/inference/ich_test")
        assert float(row["AUC"]) == roc_auc_score(found.labels, found.scores)
        assert float(row["CPU-seconds a slice"]) > 0 and float(row["peak memory, GB"]) > 0.1
    # LeNet at 32 px: 6 * (3 * 25 + 1) + 16 * (6 * 25 + 1) + 120 * (16 * 25 + 1) + 84 * 121 + 85.
    assert float(rows["lenet"]["million parameters"]) == 61241 / 1e6
    differences = rows_of(folder / "differences.csv")
    assert {row["method"] for row in differences} == {"lenet"}
    (auc,) = (row for row in differences if row["metric"] == "AUC")
    assert float(auc["difference"]) == float(rows["lenet"]["AUC"]) - float(rows["csfrcnn"]["AUC"])
    text = (folder / "table.md").read_text()
    assert "Differences to csfrcnn" in text
    # Two slices of two patients tell no AUC from chance.
    assert "Not told from chance by the AUC of slices: lenet, csfrcnn." in text
    table = {row["method"]: row for row in rows_of(folder / "table.csv")}
    assert [table[m]["recall of boxes at IoU 0.3 n"] for m in ("lenet", "csfrcnn")] == ["0", "1"]
    assert np.asarray(Image.open(folder / "systems.png")).std() > 0

    # The cost is measured once.
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/cost.json")}
    assert len(before) == 2 and run(*argv, "report_only=true") == 0
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("*/cost.json")}


def test_hydra_carries_each_cell_and_reports_at_the_end(
    run, full_tree, tmp_path, monkeypatch, capsys
):
    root, out = full_tree(), tmp_path / "out"
    argv = ["experiment=figure3", "data=own", f"data.root={root}", f"output={out}"]
    argv += ["grid.alpha=[1,5]", "seeds=[0]"]
    ran = []

    class Training:
        """Leaves results for alpha 1, and fails for alpha 5."""

        pid = 0

        def __init__(self, command, **kwargs):
            self.folder = Path(command[command.index("OUTPUT_DIR") + 1])
            ran.append(self.folder.name)

        def wait(self):
            if self.folder.name == "alpha-5_seed-0":
                return 1
            fake_cell(self.folder, {"g": (1, 0.9), "h": (0, 0.1)}, root)
            return 0

    monkeypatch.setattr(cells_module.subprocess, "Popen", Training)
    assert run("--multirun", *argv) == 1
    assert ran == ["alpha-1_seed-0", "alpha-5_seed-0"]
    assert [row["alpha"] for row in rows_of(out / "own/figure3/table.csv")] == ["1"]
    assert "1 of 2 cells are not finished: alpha-5_seed-0." in capsys.readouterr().out
    assert run("--multirun", *argv, "cell=1") == 1
    assert ran[2:] == ["alpha-5_seed-0"]


def test_table_1_counts_slices_and_patients(run, full_tree, tmp_path, capsys):
    argv = ["data=own", "data.name=tree", f"data.root={full_tree()}", f"output={tmp_path}"]
    assert run("experiment=table1", *argv) == 0
    rows = {row["split"]: row for row in rows_of(tmp_path / "tree/table1/table.csv")}
    # Every other slice bleeds, each of a patient of its own.
    assert [rows[s]["slices"] for s in ("train", "val", "test", "all")] == ["4", "2", "2", "8"]
    for name in ("positive slices", "negative slices", "positive patients", "negative patients"):
        assert [rows[s][name] for s in ("train", "val", "test", "all")] == ["2", "1", "1", "4"]
    assert rows["all"]["IPH"] == "4"
    assert "| train   |        4 |" in capsys.readouterr().out
    # One more bleeds, without a box.
    ids = "abcdefgh"
    text = "".join(f"{i},{int(i in 'acegb')}\n" for i in ids)
    Path(argv[2].removeprefix("data.root="), "labels.csv").write_text("image,label\n" + text)
    assert run("experiment=table1", *argv) == 0
    rows = {row["split"]: row for row in rows_of(tmp_path / "tree/table1/table.csv")}
    for name in ("positive slices", "positive patients"):
        assert [rows[s][name] for s in ("train", "val", "test", "all")] == ["3", "1", "1", "5"]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--help"], 0, "experiment=figure3 data=ct_ich"),
        ([], 2, "experiment: figure2, figure3, figure4, figure5, protocol, systems, table1"),
        (["experiment=figure9"], 2, "experiment is 'figure9', expected one of figure2"),
        (["experiment=figure3", "data=own"], 2, "data.root is not given, expected data.root=VALUE"),
        (["experiment=figure3"], 2, "You must specify 'data'"),
        (["experiment=figure3", "data=mars"], 2, "Could not find 'data/mars'"),
        (["experiment=figure3", "data=tree", "jbs=2"], 2, "Could not override 'jbs'"),
        (["experiment=figure3", "data=tree", "+jbs=2"], 2, "nothing reads the setting jbs"),
        (["experiment=figure3", "data=tree", "+foo.bar=1"], 2, "nothing reads the setting foo"),
        (["experiment=figure3", "data=tree", "+data.rot=x"], 2, "like it is data.root"),
        (["experiment=figure3", "data=tree", "+search.metrik=x"], 2, "like it is search.metric"),
        (["experiment=figure3", "data=tree", "+hardwar=gpu"], 2, "like it is hardware"),
        (
            ["experiment=figure3", "data=tree", "jobs=two"],
            2,
            "jobs is 'two', expected a whole number",
        ),
        (["experiment=figure3", "data=tree", "report_only=maybe"], 2, "report_only is 'maybe'"),
        (["experiment=figure3", "data=tree", "grid=5"], 2, "grid is 5, expected a group of keys"),
        (["experiment=figure3", "data=tree", "grid.alpha=[]"], 2, "grid.alpha is []"),
        (["experiment=figure3", "data=tree", "grid.alpha=[1,1]"], 2, "expected different values"),
        (["experiment=figure3", "data=tree", "grid.alpha=[a/b]"], 2, "fit for a folder's name"),
        (["experiment=figure3", "data=tree", "grid.alpha=[[1]]"], 2, "fit for a folder's name"),
        (["experiment=figure3", "data=tree", "grid.alpha=big"], 2, "could not convert"),
        (["experiment=figure3", "data=tree", "+grid.foo=[1,2]"], 2, "are the same training"),
        (
            ["experiment=figure3", "data=tree", "seeds=[x]"],
            2,
            "SEED is 'x', expected int, such as",
        ),
        (["experiment=figure3", "data=tree", "cell=99"], 2, "cell is 99, expected a number from"),
        (["experiment=figure3", "data=tree", "++opts=5"], 2, "opts"),
        (["experiment=figure3", "data=tree", "seeds=[0"], 2, "seeds=[0"),
        (["experiment=figure3", "data=nowhere"], 2, "there is no nowhere/ImageSets/Main/train.txt"),
        (["experiment=table1", "data=nowhere"], 2, "give its place by data.root=PATH"),
        (["experiment=figure3", "data=tree", "jobs=0"], 2, "jobs is 0, expected at least 1"),
        (["experiment=figure3", "data=tree", "++opts.NO.SUCH=1"], 2, "NO.SUCH"),
    ],
)
def test_what_is_wrong_is_said(run, full_tree, tmp_path, capsys, argv, code, message):
    roots = {"data=tree": full_tree(), "data=nowhere": "nowhere"}
    places = [f"data.root={roots[arg]}" for arg in argv if arg in roots]
    argv = ["data=own" if arg in roots else arg for arg in argv]
    assert run(*argv, *places, *([f"output={tmp_path}"] if len(argv) > 1 else [])) == code
    output = capsys.readouterr()
    assert message in output.out + output.err
    if code == 2 and argv:
        assert len(output.err.splitlines()) == 1 and "Traceback" not in output.err
        assert output.err.startswith("run_experiment.py: error: ")


def test_one_value_alone_is_an_axis_of_one(tool, tmp_path):
    with hydra.initialize_config_dir(str(tool.EXPERIMENTS), version_base="1.3"):
        for given in ("grid.alpha=5", "grid.alpha=[5]"):
            cells = build_cells(hydra.compose("figure3", ["data=phantom", given, "seeds=3"]))
            assert [cell.folder.name for cell in cells] == ["alpha-5_seed-3"]


def test_the_grids_are_the_papers(tool, full_tree, tmp_path):
    with hydra.initialize_config_dir(str(tool.EXPERIMENTS), version_base="1.3"):

        def cells_of(name, *overrides):
            return build_cells(hydra.compose(name, ["data=phantom", *overrides]))

        assert len(cells_of("figure2", "hardware=gpu")) == 3 * 2 * 2
        for cell in cells_of("figure2"):  # on a CPU the network that has weights and is small
            assert cell.config.name == "csfrcnn_effnet_lite0.yaml"
            settings = cell.settings()
            assert settings["MODEL.WEIGHTS"].startswith("timm://")
            assert settings["INPUT.AUG.SHIFT"] == settings["INPUT.AUG.ROTATE"] == 0
        assert len(cells_of("figure3")) == 5 * 3
        assert len(cells_of("figure4")) == 6 * 3
        assert cells_of("table1") == []
        assert len(cells_of("protocol")) == 2 * 3
        (cell,) = cells_of(
            *("figure2", "hardware=gpu", "grid.network=[r50]", "grid.augmentation=[expanded]"),
            "grid.anchors=[default]",
        )
        settings = cell.settings()
        assert settings["INPUT.AUG.EXPAND"] == 4
        assert settings["MODEL.ANCHOR_GENERATOR.NAME"] == "DefaultAnchorGenerator"
        assert settings["SOLVER.MAX_ITER"] == 30000 and settings["MODEL.RPN.COST.ALPHA"] == 100.0
        assert settings["MODEL.WEIGHTS"].endswith("R-50.pkl")
        (cell,) = cells_of(
            *("figure2", "hardware=tiny", "grid.network=[r50]", "grid.augmentation=[plain]"),
            *("grid.anchors=[clustered]", "++opts.SOLVER.MAX_ITER=7"),
        )
        settings = cell.settings()
        assert settings["SOLVER.MAX_ITER"] == 7 and settings["INPUT.MIN_SIZE_TEST"] == 160
        assert settings["INPUT.AUG.EXPAND"] == 1 and settings["MODEL.WEIGHTS"] == ""
        assert settings["MODEL.ANCHOR_GENERATOR.NAME"] == "ClusteredAnchorGenerator"
        assert settings["DATASETS.ICH_ROOT"] == "datasets/phantom"


def test_cells_side_by_side_share_cores_and_gpus(tmp_path, monkeypatch):
    seen = []

    class Training:
        pid = 0

        def __init__(self, command, env, **kwargs):
            seen.append((env["CUDA_VISIBLE_DEVICES"], env["OMP_NUM_THREADS"]))

        def wait(self):
            barrier.wait(10)  # both run at the same time
            return 0

    barrier = threading.Barrier(2)
    monkeypatch.setattr(cells_module.subprocess, "Popen", Training)
    monkeypatch.setattr(cells_module.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cells_module.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    config = ROOT / "configs/frcnn_effnet_lite0.yaml"
    cells = [Cell(tmp_path / name, config, {"MODEL.DEVICE": "cpu"}) for name in "abcd"]
    assert run_cells(cells, Path("train_net.py"), jobs=2) == []
    assert sorted(seen) == [("4", "4"), ("4", "4"), ("6", "4"), ("6", "4")]
    assert all(cell.finished for cell in cells)


def test_a_cell_that_another_process_trains_is_left_alone(tmp_path):
    config = ROOT / "configs/frcnn_effnet_lite0.yaml"
    cell = Cell(tmp_path, config, {"MODEL.DEVICE": "cpu"})
    with open(tmp_path / "terminal.txt", "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        (message,) = run_cells([cell], Path("train_net.py"))
    assert message == f"{tmp_path}: is being trained by another process; left alone."
    assert not cell.finished
