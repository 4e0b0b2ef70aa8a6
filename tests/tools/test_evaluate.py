"""tools/evaluate.py: stored predictions in, tables, report and comparison out."""

import csv
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from ich_det2.evaluation.smoothing import check_weights

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


def test_a_classifier_is_compared_with_a_detector(tool, stored, tmp_path):
    classifier, detector = stored("classifier"), stored("detector", seed=1)
    rows = [line.split(",") for line in (detector / "image_scores.csv").read_text().splitlines()]
    boxes = [
        {"image_id": r[0], "category_id": 0, "bbox": [8, 8, 9, 9], "score": float(r[4])}
        for r in rows[1:]
    ]
    (detector / "coco_instances_results.json").write_text(json.dumps(boxes))
    lesions = [f"{r[0]},{r[2]},IPH,8,8,9,9" for r in rows[1:] if r[3] == "1"]
    for folder in (classifier, detector):
        header = "image_id,patient_id,type,x,y,width,height"
        (folder / "lesions.csv").write_text("\n".join([header, *lesions]) + "\n")
    output = tmp_path / "out"
    args = [str(classifier), str(detector), "--compare", "--threshold", "0.5"]
    assert tool.main([*args, "--output", str(output), "--resamples", "20"]) == 0
    content = json.loads((output / "report.json").read_text())
    without, with_boxes = (model["analysis"]["lesions"] for model in content["models"])
    assert without is None and with_boxes["box_recall"] > 0.5
    levels = (model["analysis"]["levels"]["image"]["auc"] for model in content["models"])
    (pair,) = content["comparisons"]
    difference = pair["image"]["bootstrap"]["auc"]["difference"]
    first, other = levels
    assert difference == pytest.approx(first - other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no operating_point.json of its training run; give --threshold, or --validation"),
        (["--threshold", "0.5", "0.6"], "--threshold has 2 values, expected 1"),
        (["--compare", "--threshold", "0.5"], "--compare needs two or more PREDICTIONS"),
        (["--threshold", "0.5", "--patient-rules", "most"], "the patient rule is 'most'"),
        (["--threshold", "0.5", "--cost-ratio", "0"], "--cost-ratio is 0.0, expected above 0"),
        (["--threshold", "0.5", "--validation", "x"], "exclude each other"),
        (["--threshold", "4"], "--threshold is 4.0, expected a score from 0 to 1"),
        (["nowhere", "--threshold", "0.5"], "nowhere: no such file or folder"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_2(tool, stored, capsys, options, message):
    assert tool.main([str(stored("test")), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("evaluate.py: error: ")
    assert len(error.splitlines()) == 1


def rewrite(folder, change):
    path = folder / "image_scores.csv"
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *change([row.split(",") for row in rows])]) + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [",".join([*r[:4], "nan"]) for r in rows], "score of image 'i00' is NaN"),
        (lambda rows: [",".join(["i00", *r[1:]]) for r in rows], "'i00' is there 24 times"),
        (lambda rows: [], "hold no image"),
        (lambda rows: [",".join([*r[:3], "2", r[4]]) for r in rows], "label is 2, expected 0 or 1"),
    ],
)
def test_unusable_scores_are_named_with_their_file(tool, stored, capsys, change, message):
    folder = stored("test")
    rewrite(folder, change)
    assert tool.main([str(folder), "--threshold", "0.5"]) == 2
    error = capsys.readouterr().err
    assert message in error and "image_scores.csv" in error and len(error.splitlines()) == 1
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "undefined"),
    [
        (lambda rows: [",".join([*r[:3], "0", r[4]]) for r in rows], ("auc", "recall")),
        (lambda rows: [",".join([*r[:3], "1", r[4]]) for r in rows], ("auc", "specificity")),
        (lambda rows: [",".join([*r[:4], "0"]) for r in rows], ("precision",)),
        (lambda rows: [",".join([*r[:2], "p", *r[3:]]) for r in rows], ()),
    ],
)
def test_what_is_undefined_is_null(tool, stored, change, undefined):
    folder = stored("test")
    rewrite(folder, change)
    assert tool.main([str(folder), "--threshold", "0.5", "--resamples", "20"]) == 0
    text = (folder / "report.json").read_text()
    assert "NaN" not in text
    image = json.loads(text)["models"][0]["analysis"]["levels"]["image"]
    names = ("auc", "recall", "specificity", "precision")
    assert tuple(name for name in names if image[name] is None) == undefined


def test_results_of_another_toolkit_need_only_coco_files(tool, tmp_path):
    truth = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "patient_id": f"p{i // 2}"} for i in range(8)
        ],
        "categories": [{"id": 1, "name": "hemorrhage"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 10, 10]} for i in (0, 1, 4)
        ],
    }
    found = [{"image_id": i, "category_id": 1, "score": 0.9 - 0.1 * i, "bbox": [5, 5, 10, 10]}
             for i in range(6)]  # fmt: skip
    for name, content in (("truth", truth), ("results", found), ("empty", [])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    args = ["--truth", str(tmp_path / "truth.json"), "--threshold", "0.65", "--resamples", "20"]
    for name, tp in (("results", 2), ("empty", 0)):
        output = tmp_path / name
        assert tool.main([str(tmp_path / f"{name}.json"), *args, "--output", str(output)]) == 0
        analysis = json.loads((output / "report.json").read_text())["models"][0]["analysis"]
        image = analysis["levels"]["image"]
        # Bleeding images score 0.9, 0.8 and 0.5; image 2, without a bleed, scores 0.7.
        assert (image["n"], image["tp"], image["fn"], image["fp"]) == (8, tp, 3 - tp, tp // 2)
        assert analysis["n_patients"] == 4 and analysis["lesions"]["n_lesions"] == 3
        assert (image["precision"] is None) == (name == "empty")


def test_smoothing_is_fitted_on_what_is_given(tool, stored, voc_tree, capsys):
    folder = stored("val", shift=0.2)
    args = [str(folder), "--threshold", "0.5", "--resamples", "10", "--fit-smoothing"]
    images = {f"i{i:02}": [] for i in range(24)}
    root = voc_tree(images, patients=["image,patient", *(f"{i},p" for i in images)])
    assert tool.main([*args, str(root)]) == 2
    assert "not known where in its series an image lies" in capsys.readouterr().err
    places = [f"i{i:02},p{i // 3},{5 * (i % 3)}" for i in range(24)]
    (root / "patients.csv").write_text("\n".join(["image,patient,position_mm", *places]) + "\n")
    assert tool.main([*args, str(root)]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    match = re.fullmatch(
        r"val: TEST.DIAGNOSIS.SMOOTHING '(\[.*\])', AUC of these images 0.\d+ -> 0.\d+", line
    )
    assert check_weights(json.loads(match[1])).shape == (5,)
    (root / "JPEGImages/i03.png").unlink()
    assert tool.main([*args, str(root)]) == 2
    assert "has no image 'i03'" in capsys.readouterr().err
