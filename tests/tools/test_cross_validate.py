"""Cross-validation over patients: real cells, pooled once, not run twice."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from ich_det2.evaluation.diagnosis import roc_auc_score
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


def test_cells_are_trained_pooled_and_not_run_again(tool, full_tree, tmp_path, monkeypatch):
    root, out = full_tree(), tmp_path / "cv"
    form = ["--form", "plain", CONFIG, *SMALL]
    argv = [str(root), "--output", str(out), "--folds", "2", *form]
    assert tool.main(argv) == 0
    scores = [rows_of(out / f"plain/fold{i}/inference/ich_test/image_scores.csv") for i in (0, 1)]
    # Every image is scored once, by a model that has not seen its patient.
    assert sorted(row["image_id"] for rows in scores for row in rows) == list("abcdefgh")
    for i, rows in enumerate(scores):
        held = {row["image_id"] for row in rows}
        trained = set((out / f"folds/{i}/ImageSets/Main/train.txt").read_text().split())
        assert held | trained == set("abcdefgh") and not held & trained
        assert sum(row["label"] == "1" for row in rows) == 2
        assert (out / f"plain/fold{i}/model_final.pth").is_file()
    (row,) = rows_of(out / "table.csv")
    pooled = [(int(r["label"]), float(r["score"])) for rows in scores for r in rows]
    assert float(row["AUC"]) == roc_auc_score(*zip(*pooled))
    assert (row["images"], row["folds"]) == ("8", "2")

    def refuse(*args, **kwargs):
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(cells.subprocess, "Popen", refuse)
    assert tool.main(argv) == 0


def test_the_table_compares_with_the_first_form(tool, full_tree, tmp_path):
    root, out = full_tree(), tmp_path / "cv"
    labels = dict(zip("abcdefgh", (1, 0) * 4))
    for name, good in (("one", 0.5), ("two", 1.0)):
        for fold, ids in enumerate(("abcd", "efgh")):
            # In "one" bleeding and healthy slices score the same, in "two" all are told apart.
            scores = {i: (labels[i], good if labels[i] else 0.5) for i in ids}
            fake_cell(out / name / f"fold{fold}", scores)
    forms = [x for name in ("one", "two") for x in ("--form", name, CONFIG)]
    assert tool.main([str(root), "--output", str(out), "--folds", "2", *forms]) == 0
    one, two = rows_of(out / "table.csv")
    assert (float(one["AUC"]), float(two["AUC"])) == (0.5, 1.0)
    assert (float(one["recall @ specificity 0.90"]), float(two["specificity"])) == (0.0, 0.0)
    assert one["AUC difference"] == "" and two["AUC difference"] == "+0.500 [+0.500, +0.500]"
    assert float(two["mean k"]) == 1.5
    # Four true boxes, all found; false ones of healthy slices are ranked below those of "two".
    assert float(two["AP50"]) == 1.0 and float(two["box recall"]) == 1.0
    assert float(one["AP50"]) < 1.0


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        (["--form", "a/b", CONFIG], "expected different names fit for a folder"),
        (["--form", "a", CONFIG, "--form", "a", CONFIG], "expected different names"),
        (["--form", "a", CONFIG, "SOLVER.MAX_ITER"], "expected a config file and KEY VALUE pairs"),
        (["--form", "a", "no_such.yaml"], "no_such.yaml' is no file"),
        (["--form", "a", CONFIG, "NO.SUCH", "1"], "NO.SUCH"),
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
    tool, full_tree, tmp_path, capsys, monkeypatch
):
    ran = []

    def run(command, stdout, **kwargs):
        folder = Path(command[command.index("OUTPUT_DIR") + 1])
        ran.append(folder.name)
        return type("Process", (), {"wait": lambda self: int(folder.name == "fold0")})()

    monkeypatch.setattr(cells.subprocess, "Popen", run)
    monkeypatch.setattr(tool, "write_table", lambda args: None)
    argv = [str(full_tree()), "--output", str(tmp_path / "cv"), "--folds", "2"]
    assert tool.main([*argv, "--form", "a", CONFIG]) == 1
    assert ran == ["fold0", "fold1"]
    assert "fold0: exit code 1" in "".join(capsys.readouterr().out.split("\n"))
    done = [(tmp_path / f"cv/a/fold{i}/done").exists() for i in (0, 1)]
    assert done == [False, True]
