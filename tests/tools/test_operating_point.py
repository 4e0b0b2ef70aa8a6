"""The operating point of a real run: chosen on validation, locked, and used by every tool."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ich_det2.evaluation.operating_point import choose_threshold
from ich_det2.evaluation.predictions import read_predictions
from ich_det2.files import sha256

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/quick/csfrcnn_phantom.yaml")
SMALL = (
    *("MODEL.WEIGHTS", "", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[12.0, 24.0]]", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
    *("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.5, 1.0, 2.0]]", "DATALOADER.NUM_WORKERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0"),
    *("TEST.DIAGNOSIS.RESAMPLES", "20", "SEED", "1"),
)
RULE = "TEST.DIAGNOSIS.OPERATING_POINT.RULE"
THRESHOLD = "TEST.DIAGNOSIS.OPERATING_THRESHOLD"


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_net, diagnose, evaluate = load("train_net"), load("diagnose"), load("evaluate")


@pytest.fixture
def run(full_tree, tmp_path):
    """Runs ``train_net.py`` in this process; returns OUTPUT_DIR."""
    root, out = full_tree(), tmp_path / "out"

    def make(*opts, flags=()):
        data = ("DATASETS.ICH_ROOT", str(root), "OUTPUT_DIR", str(out))
        argv = ["--config-file", CONFIG, *flags, *data, *SMALL, *opts]
        assert train_net.main(argv) == 0
        return out

    return make


def locked(out):
    return json.loads((out / "operating_point.json").read_text())


def used(out):
    """Threshold of the evaluation of the test set."""
    return json.loads((out / "inference/ich_test/diagnosis.json").read_text())[
        "operating_threshold"
    ]


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("rule", ["cost", "recall"])
def test_a_training_locks_what_validation_chose(run, rule):
    out = run(RULE, rule)
    point = locked(out)
    validation = read_predictions(out / "inference/ich_val")
    chosen = choose_threshold(validation.labels, validation.scores, rule)
    assert (point["rule"], point["dataset"]) == (rule, "ich_val")
    assert point["threshold"] == chosen != 0.5
    assert point["weights_sha256"] == sha256(out / "model_best.pth")
    assert used(out) == chosen
    content = json.loads((out / "inference/ich_test/report.json").read_text())["models"][0]
    assert content["operating_point"]["validation"]["image"]["n"] == len(validation.labels)
    assert content["analysis"]["operating_threshold"] == chosen
    page = (out / "inference/ich_test/report.html").read_text()
    for words in (f"rule <b>{rule}</b>", "Chosen on ich_val", "images, validation", "images, here"):
        assert words in page


def test_every_later_use_of_the_weights_keeps_the_locked_point(run, tmp_path):
    out = run(RULE, "cost")
    point, weights = locked(out), out / "model_best.pth"
    assert point["rule"] == "cost" and point["threshold"] != 0.9
    before = (out / "operating_point.json").read_bytes()

    # A threshold given later does not win, and that is said.
    run("MODEL.WEIGHTS", str(weights), THRESHOLD, "0.9", flags=("--eval-only",))
    assert used(out) == point["threshold"]
    assert "OPERATING_THRESHOLD 0.9 is not used" in (out / "log.txt").read_text()
    assert (out / "operating_point.json").read_bytes() == before
    page = (out / "inference/ich_test/report.html").read_text()
    assert "rule <b>cost</b>" in page and "images, validation" in page

    image = next((tmp_path / "tree/JPEGImages").glob("g.*"))
    assert diagnose.main([str(out), str(image), "--output", str(tmp_path / "answer")]) == 0
    answer = json.loads((tmp_path / "answer/diagnosis.json").read_text())
    assert answer["threshold"] == point["threshold"]
    assert answer["model"]["operating_point"] == {"rule": "cost", "dataset": "ich_val"}

    args = [str(out / "inference/ich_test"), "--output", str(tmp_path / "again")]
    assert evaluate.main([*args, "--resamples", "20"]) == 0
    again = json.loads((tmp_path / "again/report.json").read_text())["models"][0]
    assert again["analysis"]["operating_threshold"] == point["threshold"]

    # Other weights in the folder do not get it.
    other = out / "other.pth"
    shutil.copy(weights, other)
    content = torch.load(other, weights_only=True)
    torch.save({"model": content["model"], "iteration": -1}, other)
    run("MODEL.WEIGHTS", str(other), THRESHOLD, "0.9", flags=("--eval-only",))
    assert used(out) == 0.9
    assert "belongs to other weights than other.pth" in (out / "log.txt").read_text()
    page = (out / "inference/ich_test/report.html").read_text()
    assert "The threshold was given, not chosen on validation." in page


@pytest.mark.parametrize("patient_rule", ["at_least_2", "top_3_mean"])
def test_the_answer_follows_the_patient_rule_of_the_locked_point(
    run, tmp_path, write_ct, patient_rule
):
    rules = ("TEST.DIAGNOSIS.PATIENT_RULES", f"['{patient_rule}', 'any']")
    out = run(RULE, "recall", "TEST.DIAGNOSIS.OPERATING_POINT.LEVEL", "image", *rules)
    point = locked(out)
    assert (point["rule"], point["patient_rule"]) == ("recall", patient_rule)
    exam, rng = tmp_path / "exam", np.random.default_rng(0)
    exam.mkdir()
    for i in range(4):
        header = {"PatientID": "1", "StudyInstanceUID": "1.1", "SeriesInstanceUID": "1.2"}
        header["ImagePositionPatient"] = [0, 0, 5 * i]
        header["ImageOrientationPatient"] = [1, 0, 0, 0, 1, 0]
        write_ct(exam / f"{i}.dcm", rng.integers(0, 90, (64, 64)).astype(float), **header)
    assert diagnose.main([str(out), str(exam), "--output", str(tmp_path / "answer")]) == 0
    scores = sorted((float(r["score"]) for r in rows(tmp_path / "answer/slices.csv")), reverse=True)
    (patient,) = rows(tmp_path / "answer/patients.csv")
    expected = scores[1] if patient_rule == "at_least_2" else sum(scores[:3]) / 3
    assert len(scores) == 4 and len(set(scores)) > 1
    assert float(patient["score"]) == pytest.approx(expected, abs=1e-6)
    positive = expected >= point["threshold"]
    assert patient["verdict"] == ("positive" if positive else "negative")
    answer = json.loads((tmp_path / "answer/diagnosis.json").read_text())
    assert answer["model"]["patient_rule"] == patient_rule
    assert answer["threshold"] == point["threshold"]
