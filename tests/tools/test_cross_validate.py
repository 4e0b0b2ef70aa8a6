"""Cross-validation over patients: real cells, pooled once, not run twice."""

import csv
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from ich_det2.evaluation.diagnosis import roc_auc_score
from ich_det2.evaluation.predictions import read_predictions
from ich_det2.experiments import cells

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/frcnn_effnet_lite0.yaml")
SMALL = (
    *("MODEL.WEIGHTS", "", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"),
    *("SOLVER.WARMUP_ITERS", "1", "DATALOADER.NUM_WORKERS", "0"),
)


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "cross_validate.py"
    spec = importlib.util.spec_from_file_location("cross_validate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(full_tree):
    """A full tree whose slices all differ."""
    root = full_tree()
    for n, image in enumerate("abcdefgh"):
        path = root / f"JPEGImages/{image}.png"
        with Image.open(path) as picture:
            picture = picture.copy()
        picture.putpixel((0, 0), n)
        picture.save(path)
    return root


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def fake_cell(folder, scores):
    """Writes what a finished cell leaves: image id -> (label, score); boxes of 10 x 10."""
    inference = folder / "inference/ich_test"
    inference.mkdir(parents=True)
    lines = [f"{i},{i}.png,p-{i},{label},{score}" for i, (label, score) in scores.items()]
    text = "\n".join(["image_id,file_name,patient_id,label,score", *lines]) + "\n"
    (inference / "image_scores.csv").write_text(text)
    box = {"category_id": 0, "bbox": [0, 0, 10, 10]}
    truth = [{"image_id": i, **box} for i, (label, _) in scores.items() if label]
    found = [{"image_id": i, "score": score, **box} for i, (_, score) in scores.items()]
    content = {"images": [{"id": i} for i in scores], "annotations": truth}
    (inference / "ich_test_coco_format.json").write_text(json.dumps(content))
    (inference / "coco_instances_results.json").write_text(json.dumps(found))
    metrics = [{"iteration": i, "rpn/ratio_target": k} for i, k in enumerate((1.0, 2.0))]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, metrics)))
    (folder / "done").touch()


def test_cells_are_trained_pooled_and_not_run_again(tool, tree, tmp_path, monkeypatch):
    root, out = tree, tmp_path / "cv"
    form = ["--form", "plain", CONFIG, *SMALL]
    argv = [str(root), "--output", str(out), "--folds", "2", *form]
    assert tool.main(argv) == 0
    scores = [
        rows_of(out / f"plain/seed0/fold{i}/inference/ich_test/image_scores.csv") for i in (0, 1)
    ]
    # Every image is scored once, by a model that has not seen its patient.
    assert sorted(row["image_id"] for rows in scores for row in rows) == list("abcdefgh")
    for i, rows in enumerate(scores):
        held = {row["image_id"] for row in rows}
        trained = set((out / f"folds/{i}/ImageSets/Main/train.txt").read_text().split())
        assert held | trained == set("abcdefgh") and not held & trained
        assert sum(row["label"] == "1" for row in rows) == 2
        assert (out / f"plain/seed0/fold{i}/model_final.pth").is_file()
    (row,) = rows_of(out / "table.csv")
    pooled = [(int(r["label"]), float(r["score"])) for rows in scores for r in rows]
    assert float(row["AUC mean"]) == roc_auc_score(*zip(*pooled))
    assert (row["images"], row["folds"], row["seeds"]) == ("8", "2", "1")
    found = read_predictions(out / "plain/seed0/pooled")
    assert found.image_ids == list("abcdefgh") and found.boxes is not None
    assert sum(map(len, found.true_boxes)) == 4

    def refuse(*args, **kwargs):
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(cells.subprocess, "Popen", refuse)
    assert tool.main(argv) == 0
    assert tool.main([*argv, "--report-only"]) == 0


@pytest.mark.parametrize("report", [[], ["--report-only"]], ids=["", "report-only"])
def test_cells_whose_data_have_changed_are_not_taken_for_finished(
    tool, tree, tmp_path, capsys, report
):
    out = tmp_path / "cv"
    argv = [str(tree), "--output", str(out), "--folds", "2", "--form", "plain", CONFIG, *SMALL]
    assert tool.main(argv) == 0
    # Another box: findings, and so the folds, are as before.
    path = tree / "Annotations/a.xml"
    before = path.read_text()
    path.write_text(re.sub(r"<xmax>\d+<", "<xmax>33<", before))
    assert path.read_text() != before
    capsys.readouterr()
    assert tool.main([*argv, *report]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{out}/plain/seed0/fold0: was trained with data set ich_t" in error
    assert "remove that folder to train it again" in error


def test_cells_of_initial_weights_that_are_others_now_are_not_taken_for_finished(
    tool, tree, tmp_path, capsys
):
    weights = tmp_path / "start.pth"
    torch.save({"model": {"backbone": torch.zeros(1)}}, weights)
    small = ["MODEL.WEIGHTS", str(weights), *SMALL[2:]]
    argv = [str(tree), "--output", str(tmp_path / "cv"), "--folds", "2", "--only", "0"]
    argv += ["--form", "plain", CONFIG, *small]
    assert tool.main(argv) == tool.main(argv) == 0
    torch.save({"model": {"backbone": torch.ones(1)}}, weights)
    capsys.readouterr()
    assert tool.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "fold0: was trained with MODEL.WEIGHTS" in error
    assert "remove that folder to train it again" in error


def test_the_tables_compare_with_the_first_form(tool, tree, tmp_path):
    out = tmp_path / "cv"
    labels = dict(zip("abcdefgh", (1, 0) * 4))
    for name, good in (("one", (0.5, 0.5)), ("two", (1.0, 0.5))):
        for seed in (0, 1):
            for fold, ids in enumerate(("abcd", "efgh")):
                # In "two", seed 0 tells all apart; elsewhere all slices score the same.
                scores = {i: (labels[i], good[seed] if labels[i] else 0.5) for i in ids}
                fake_cell(out / f"{name}/seed{seed}/fold{fold}", scores)
    forms = [x for name in ("one", "two") for x in ("--form", name, CONFIG)]
    argv = [str(tree), "--output", str(out), "--folds", "2", "--seeds", "0", "1", *forms]
    assert tool.main([*argv, "--report-only"]) == 0
    one, two = rows_of(out / "table.csv")
    assert (one["seeds"], one["folds"], one["images"]) == ("2", "2", "8")
    # AUC 1 and 0.5: their mean, and 0.5 / sqrt(2).
    assert (float(one["AUC mean"]), float(two["AUC mean"])) == (0.5, 0.75)
    assert float(two["AUC sd"]) == pytest.approx(0.5 / 2**0.5)
    assert float(two["mean k mean"]) == 1.5
    assert [row["AUC"] for row in rows_of(out / "seeds.csv")] == ["0.5", "0.5", "1.0", "0.5"]
    row = rows_of(out / "differences.csv")[0]
    assert (row["form"], row["seeds"], row["metric"]) == ("two", "2", "AUC")
    # Each seed is drawn with the same patients: +0.5 and 0, whoever is drawn.
    assert [float(row[key]) for key in ("difference", "low", "high")] == [0.25] * 3
    types, sizes = rows_of(out / "by_type.csv"), rows_of(out / "by_size.csv")
    assert [row["form"] for row in types] == ["one", "two"] and types[0]["boxes"] == "4"
    # Four boxes of 10 x 10: all in the lowest third.
    assert [(row["size"], row["boxes"]) for row in sizes[:2]] == [
        ("small", "4"),
        ("medium", "0"),
    ]
    text = (out / "table.md").read_text()
    assert "0.750 ± 0.354" in text and "## Differences to one" in text


def test_seeds_are_trainings_of_their_own(tool, tree, tmp_path, monkeypatch):
    ran = []

    def run(command, **kwargs):
        ran.append((command[command.index("SEED") + 1], command[command.index("OUTPUT_DIR") + 1]))
        return type("Process", (), {"wait": lambda self: 0})()

    monkeypatch.setattr(cells.subprocess, "Popen", run)
    monkeypatch.setattr(tool, "write_tables", lambda args: None)
    out = tmp_path / "cv"
    argv = [str(tree), "--output", str(out), "--folds", "2", "--seeds", "3", "5", "--only", "1"]
    assert tool.main([*argv, "--form", "a", CONFIG, "--report-only"]) == 0 and not ran
    assert tool.main([*argv, "--form", "a", CONFIG]) == 0
    assert ran == [(str(s), str(out / f"a/seed{s}/fold1")) for s in (3, 5)]


def test_a_planted_leak_is_found_before_anything_is_trained(
    tool, tree, tmp_path, capsys, monkeypatch
):
    def refuse(*args, **kwargs):
        raise AssertionError("a fold that leaks was trained on")

    monkeypatch.setattr(tool, "run_cells", refuse)

    def error(output):
        argv = [str(tree), "--output", str(tmp_path / output), "--folds", "2"]
        assert tool.main([*argv, "--form", "a", CONFIG]) == 2
        return capsys.readouterr().err

    clean = [str(tree), "--output", str(tmp_path / "list"), "--folds", "2", "--report-only"]
    assert tool.main([*clean, "--form", "a", CONFIG]) == 0
    # An image of the fold that is scored is trained on.
    lists = tmp_path / "list/folds/0/ImageSets/Main"
    image = (lists / "test.txt").read_text().split()[0]
    with open(lists / "train.txt", "a") as file:
        file.write(f"{image}\n")
    assert f"'{image}' and '{image}' are of the same patient on two sides" in error("list")
    # A patient under two names, given away by the identical picture.
    other = (lists / "train.txt").read_text().split()[0]
    pictures = tree / "JPEGImages"
    (pictures / f"{image}.png").write_bytes((pictures / f"{other}.png").read_bytes())
    message = error("picture")
    assert "are of the same file on two sides" in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        (["--form", "a/b", CONFIG], "expected different names fit for a folder"),
        (["--form", "a", CONFIG, "--form", "a", CONFIG], "expected different names"),
        (["--form", "a", CONFIG, "SOLVER.MAX_ITER"], "expected a config file and KEY VALUE pairs"),
        (["--form", "a", "no_such.yaml"], "no_such.yaml' is no file"),
        (["--form", "a", CONFIG, "NO.SUCH", "1"], "NO.SUCH"),
        (["--form", "a", CONFIG, "SEED", "1"], "SEED is given by --seeds"),
    ],
)
def test_wrong_forms_are_one_sentence(tool, full_tree, tmp_path, capsys, forms, message):
    assert tool.main([str(full_tree()), "--output", str(tmp_path / "cv"), *forms]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cv").exists()


def test_images_without_patient_are_an_error(tool, voc_tree, tmp_path, capsys):
    root = voc_tree({"a": [], "b": []})
    assert tool.main([str(root), "--output", str(tmp_path / "cv"), "--form", "a", CONFIG]) == 2
    assert "does not name 'a' and 1 more images" in capsys.readouterr().err


def test_a_failed_cell_is_reported_and_does_not_stop_the_others(
    tool, tree, tmp_path, capsys, monkeypatch
):
    ran = []

    def run(command, stdout, **kwargs):
        folder = Path(command[command.index("OUTPUT_DIR") + 1])
        ran.append(folder.name)
        return type("Process", (), {"wait": lambda self: int(folder.name == "fold0")})()

    monkeypatch.setattr(cells.subprocess, "Popen", run)
    monkeypatch.setattr(tool, "write_tables", lambda args: None)
    argv = [str(tree), "--output", str(tmp_path / "cv"), "--folds", "2"]
    assert tool.main([*argv, "--form", "a", CONFIG]) == 1
    assert ran == ["fold0", "fold1"]
    assert "fold0: exit code 1" in "".join(capsys.readouterr().out.split("\n"))
    done = [(tmp_path / f"cv/a/seed0/fold{i}/done").exists() for i in (0, 1)]
    assert done == [False, True]
