"""Trained runs as one model: evaluated and diagnosed alike, by the mean of their logits."""

import csv
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[2]
SMALL = (
    *("MODEL.WEIGHTS", "", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "1"),
    *("SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0", "TEST.EVAL_PERIOD", "0"),
    *("TEST.DIAGNOSIS.RESAMPLES", "20", "TEST.DIAGNOSIS.SMOOTHING", "[]"),
    *("INPUT.SKULL_MASK", "False", "INPUT.DENSITY", "False"),  # alike for all members
    *("INPUT.ASYMMETRY", "False"),
)


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_net, diagnose, ensemble = map(tool, ("train_net", "diagnose", "ensemble"))
MEMBERS = {"plain": "frcnn_effnet_lite0", "image-head": "diagnosis_effnet_lite0"}


def train(tree, out, config, *opts):
    argv = ["--config-file", str(ROOT / f"configs/{config}.yaml"), "OUTPUT_DIR", str(out)]
    return train_net.main([*argv, "DATASETS.ICH_ROOT", str(tree), *SMALL, *opts])


@pytest.fixture(scope="module")
def tree(phantom_tree, tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "tree"
    shutil.copytree(phantom_tree, root)
    for name, number in (("train", 26), ("val", 9), ("test", 9)):
        path = root / f"ImageSets/Main/{name}.txt"
        path.write_text("\n".join(path.read_text().split()[:number]) + "\n")
    return root


@pytest.fixture(scope="module")
def runs(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    for seed, (name, config) in enumerate(MEMBERS.items()):
        assert train(tree, out / name, config, "SEED", str(seed)) == 0
    return [out / name for name in MEMBERS]


def scores(path, key):
    with open(path, newline="") as file:
        return {row[key]: float(row["score"]) for row in csv.DictReader(file)}


def test_it_is_evaluated_and_diagnosed_as_one(runs, tree, tmp_path):
    out = tmp_path / "both"
    argv = [*map(str, runs), "--output", str(out), "--threshold", "0.3", "--iou", "0.6"]
    assert ensemble.main(argv) == 0
    record = yaml.safe_load((out / "config.yaml").read_text())
    assert record["MODEL"]["ENSEMBLE"]["IOU_THRESHOLD"] == 0.6
    assert record["TEST"]["DIAGNOSIS"]["OPERATING_THRESHOLD"] == 0.3

    argv = ["--config-file", str(out / "config.yaml"), "--eval-only", "OUTPUT_DIR", str(out)]
    assert train_net.main([*argv, "MODEL.WEIGHTS", str(out / "model_final.pth")]) == 0
    assert not (out / "what_if").exists()
    found = scores(out / "inference/ich_test/image_scores.csv", "image_id")
    members = [scores(run / "inference/ich_test/image_scores.csv", "image_id") for run in runs]
    for image, score in found.items():
        p = np.clip([m[image] for m in members], 1e-4, 1 - 1e-4)
        wanted = 1 / (1 + np.exp(-np.log(p / (1 - p)).mean()))
        assert score == pytest.approx(wanted, abs=1e-5)

    images = [str(tree / f"DICOM/{image}.dcm") for image in found]
    assert diagnose.main([str(out), *images, "--output", str(tmp_path / "o"), "--identify"]) == 0
    diagnosed = scores(tmp_path / "o/slices.csv", "file")
    assert {Path(k).stem: v for k, v in diagnosed.items()} == pytest.approx(found, abs=1e-5)


def test_boxes_are_fused_from_where_the_members_nms_leaves_none(runs, tmp_path):
    out = tmp_path / "both"
    assert ensemble.main([*map(str, runs), "--output", str(out)]) == 0
    record = yaml.safe_load((out / "config.yaml").read_text())
    wanted = record["MODEL"]["ROI_HEADS"]["NMS_THRESH_TEST"]
    assert record["MODEL"]["ENSEMBLE"]["IOU_THRESHOLD"] == wanted != 0.5


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["--output", "{run}"], "holds a training already"),
        (["{ensemble}", "--output", "{new}"], "is of a EnsembleRCNN, expected a detector's run"),
        (["{other}", "--output", "{new}"], "INPUT.WINDOWS is [[40.0, 80.0]], but [[50, 100]]"),
        (["nowhere", "--output", "{new}"], "nowhere"),
        (["--output", "{new}", "--iou", "1.5"], "IOU_THRESHOLD is 1.5"),
    ],
)
def test_what_does_not_fit_is_one_sentence(runs, tmp_path, capsys, opts, message):
    places = {name: tmp_path / name for name in ("new", "other", "ensemble")} | {"run": runs[0]}
    shutil.copytree(runs[0], places["other"])
    config = yaml.safe_load((places["other"] / "config.yaml").read_text())
    config["INPUT"]["WINDOWS"] = [[40.0, 80.0]]
    (places["other"] / "config.yaml").write_text(yaml.safe_dump(config))
    argv = [str(runs[0]), "--output", str(places["ensemble"])]
    assert ensemble.main(argv) == 0
    capsys.readouterr()
    assert ensemble.main([str(runs[0]), *(opt.format(**places) for opt in opts)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("ensemble.py: error: ")
    assert not places["new"].exists()
