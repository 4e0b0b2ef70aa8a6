"""tools/evaluate.py: stored predictions in, tables, report and comparison out."""

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "tools" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stored(tmp_path):
    """Factory of a folder with the image_scores.csv of eight patients of three images."""

    def make(name, shift=0.5, seed=0):
        rng = np.random.default_rng(seed)
        folder = tmp_path / name
        folder.mkdir()
        rows = ["image_id,file_name,patient_id,label,score"]
        for i in range(24):
            label = int(i % 6 == 0)
            score = min(1.0, shift * label + 0.5 * rng.random())
            rows.append(f"i{i:02},i{i:02}.png,p{i // 3},{label},{score}")
        (folder / "image_scores.csv").write_text("\n".join(rows) + "\n")
        return folder

    return make


def test_one_set_is_written_beside_itself_at_a_threshold_chosen_on_validation(tool, stored):
    folder, validation = stored("test"), stored("val", seed=1)
    args = [str(folder), "--validation", str(validation), "--rule", "recall"]
    assert tool.main([*args, "--resamples", "20"]) == 0
    content = json.loads((folder / "report.json").read_text())
    point = content["models"][0]["operating_point"]
    assert (point["rule"], point["dataset"]) == ("recall", "val")
    diagnosis = json.loads((folder / "diagnosis.json").read_text())
    assert diagnosis["operating_threshold"] == point["threshold"]
    assert point["validation"]["image"]["recall"] == 1
    for name in ("report.html", "diagnosis_thresholds.csv", "roc.png"):
        assert (folder / name).is_file()


def test_models_are_compared(tool, stored, tmp_path, capsys):
    good, bad = stored("good"), stored("bad", shift=0.0, seed=2)
    output = tmp_path / "out"
    args = [str(good), str(bad), "--compare", "--threshold", "0.5", "--output", str(output)]
    assert tool.main([*args, "--resamples", "50", "--name", "A", "B"]) == 0
    with open(output / "comparison.csv", newline="") as file:
        rows = {(r["level"], r["metric"]): r for r in csv.DictReader(file)}
    auc = rows["image", "auc"]
    assert (auc["first"], auc["other"], auc["test"]) == ("A", "B", "DeLong")
    assert float(auc["difference"]) > 0.2 and float(auc["p"]) < 0.05
    assert rows["patient", "recall"]["test"] == "exact McNemar"
    assert "| A" in capsys.readouterr().out
    assert not (good / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no operating_point.json of its training run; give --threshold, or --validation"),
        (["--threshold", "0.5", "0.6"], "--threshold has 2 values, expected 1"),
        (["--compare", "--threshold", "0.5"], "--compare needs two or more PREDICTIONS"),
        (["--threshold", "0.5", "--patient-rules", "most"], "the patient rule is 'most'"),
        (["--threshold", "0.5", "--cost-ratio", "0"], "--cost-ratio is 0.0, expected above 0"),
        (["--threshold", "0.5", "--validation", "x"], "exclude each other"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_2(tool, stored, capsys, options, message):
    assert tool.main([str(stored("test")), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("evaluate.py: error: ")
    assert len(error.splitlines()) == 1
