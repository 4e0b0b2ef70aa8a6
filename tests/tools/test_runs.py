"""What the commands leave of a training run: its record is written once, and never lost."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from ich_det2.data import register_ich_voc
from ich_det2.engine.config import load_config
from ich_det2.engine.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/quick/csfrcnn_phantom.yaml")
SMALL = (
    *("MODEL.WEIGHTS", "", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32"),
    *("DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "4"),
    *("SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "2", "TEST.DIAGNOSIS.RESAMPLES", "10"),
)


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_net, diagnose, evaluate = load("train_net"), load("diagnose"), load("evaluate")


@pytest.fixture(autouse=True, scope="module")
def no_plots():
    """Drawing takes longer than all else here."""
    monkeypatch = pytest.MonkeyPatch()
    for name in ("evaluator.plot_roc", "evaluator.plot_thresholds", "report._svg"):
        monkeypatch.setattr(f"ich_det2.evaluation.{name}", lambda *args: "")
    monkeypatch.setattr("ich_det2.engine.hooks.plot_history", lambda *args: None)
    yield
    monkeypatch.undo()


def call(root, out, *argv, opts=(), config=CONFIG):
    """Exit code of ``train_net.py``; argv are flags, opts KEY VALUE pairs."""
    data = ("DATASETS.ICH_ROOT", root, "OUTPUT_DIR", out)
    return train_net.main(
        ["--config-file", str(config), *argv, *map(str, data), *SMALL, *map(str, opts)]
    )


@pytest.fixture(scope="module")
def tree(phantom_tree, tmp_path_factory):
    """The phantom with short lists: 12 slices to train on, 5 each to validate and test."""
    root = tmp_path_factory.mktemp("data") / "tree"
    shutil.copytree(phantom_tree, root)
    for name, number in (("train", 26), ("val", 9), ("test", 9)):
        path = root / f"ImageSets/Main/{name}.txt"
        path.write_text("\n".join(path.read_text().split()[:number]) + "\n")
    return root


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    """A finished training, to be copied."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert call(tree, out) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A finished training of this test's own."""
    return shutil.copytree(finished, tmp_path / "run")


def content(folder, *, but=()):
    """Everything in a folder, byte for byte."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in but
    }


def error_of(capsys):
    """The one sentence of an error."""
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train_net.py: error: ") and last.endswith(".")
    return last


def scores(folder):
    return (Path(folder) / "image_scores.csv").read_text()


# ---- the record --------------------------------------------------------------------------------


def test_a_training_records_what_it_is(finished, tree):
    record = json.loads((finished / "run.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert record["data_root"] == str(tree.resolve()) and record["resumed"] == []
    assert record["initial_weights"] == {"name": "", "sha256": None}
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["MODEL"]["ANCHOR_GENERATOR"]["SIZES"] != [[]]
    assert config["MODEL"]["TIMM"]["FREEZE_BN"] is False  # as there are no weights
    assert RunFolder(finished).weights() == finished / "model_best.pth"


@pytest.mark.parametrize("old", [False, True], ids=["", "of before there was run.json"])
def test_an_evaluation_as_recorded_takes_the_place_of_the_one_before(run, tree, old):
    before = content(run, but=("inference", "log.txt"))
    found = scores(run / "inference/ich_test")
    if old:
        (run / "run.json").unlink()
        del before["run.json"]
    shutil.rmtree(run / "inference")
    weights = ("MODEL.WEIGHTS", run / "model_best.pth")
    assert call(tree, run, "--eval-only", opts=weights) == 0
    assert content(run, but=("inference", "log.txt")) == before
    assert scores(run / "inference/ich_test") == found
    # So does the record as a config.
    argv = ["--config-file", str(run / "config.yaml"), "--eval-only", "OUTPUT_DIR", str(run)]
    assert train_net.main([*argv, *map(str, weights)]) == 0
    assert content(run, but=("inference", "log.txt")) == before


WHAT_IFS = [
    ("INPUT.WINDOWS", "[[40, 80]]"),
    ("INPUT.WINDOWS", "[[40, 81]]"),
    ("INPUT.MIN_SIZE_TEST", "96"),
    ("MODEL.RPN.POST_NMS_TOPK_TEST", "3"),
    ("TEST.DETECTIONS_PER_IMAGE", "1"),
]


def test_a_what_if_has_its_own_place_and_leaves_the_model_as_it_was(run, tree, tmp_path, capsys):
    answers = []
    image = next((tree / "DICOM").iterdir())

    def ask(name):
        assert diagnose.main([str(run), str(image), "--output", str(tmp_path / name)]) == 0
        answers.append((tmp_path / name / "slices.csv").read_text())

    ask("before")
    before = content(run)
    for option in WHAT_IFS:
        capsys.readouterr()
        opts = (*option, "MODEL.WEIGHTS", run / "model_best.pth")
        assert call(tree, run, "--eval-only", opts=opts) == 0
        assert f"A what-if: the model was trained with {option[0]}" in capsys.readouterr().err
    assert content(run, but=("what_if",)) == before
    ask("after")
    assert answers[0] == answers[1]

    places = sorted((run / "what_if").iterdir())
    assert len(places) == len(WHAT_IFS)
    keys = []
    for place in places:
        differs = json.loads((place / "evaluation.json").read_text())["differs"]
        report = json.loads((place / "inference/ich_test/report.json").read_text())["models"][0]
        assert report["differs"] == differs and len(differs) == 1
        page = (place / "inference/ich_test/report.html").read_text()
        assert "A what-if" in page and next(iter(differs)) in page
        keys += differs
    assert sorted(keys) == sorted(key for key, _ in WHAT_IFS)
    assert "A what-if" not in (run / "inference/ich_test/report.html").read_text()
    # The stored what-if is known as one later, too.
    again = ["--output", str(tmp_path / "again"), "--resamples", "10"]
    assert evaluate.main([str(places[0] / "inference/ich_test"), *again]) == 0
    later = json.loads((tmp_path / "again/report.json").read_text())["models"][0]
    assert later["differs"] and later["name"].startswith("run ")


@pytest.mark.parametrize(
    "option",
    [("INPUT.AUG.SHIFT", "0.3"), ("SOLVER.BASE_LR", "0.5"), ("MODEL.RPN.COST.ALPHA", "9.0"),
     ("MODEL.TIMM.FREEZE_BN", "True"), ("TEST.BATCH_SIZE", "2")],
)  # fmt: skip
def test_what_only_a_training_reads_makes_no_what_if(run, tree, option):
    opts = (*option, "MODEL.WEIGHTS", run / "model_best.pth")
    assert call(tree, run, "--eval-only", opts=opts) == 0
    assert not (run / "what_if").exists()
    # The report tells of the training that was, not of the command.
    text = (run / "inference/ich_test/report.json").read_text()
    assert "learning rate 0.01," in text and "shift 0.1" in text


def test_other_data_of_the_same_name_do_not_take_the_place(run, tree, tmp_path):
    other = shutil.copytree(tree, tmp_path / "elsewhere")
    listed = (other / "ImageSets/Main/test.txt").read_text().split()
    (other / "ImageSets/Main/test.txt").write_text("\n".join(listed[:3]) + "\n")
    before = content(run)
    weights = ("MODEL.WEIGHTS", run / "model_best.pth")
    assert call(other, run, "--eval-only", opts=weights) == 0
    assert content(run, but=("what_if",)) == before
    (place,) = (run / "what_if").iterdir()
    assert place.name.startswith("ich_test-")
    report = (place / "inference/ich_test/report.json").read_text()
    assert "Not checked: the model was trained on data of another folder" in report
    # The same folder by another name is the same.
    link = tmp_path / "link"
    link.symlink_to(tree)
    assert call(link, run, "--eval-only", opts=weights) == 0
    assert len(list((run / "what_if").iterdir())) == 1


def test_a_record_of_before_fingerprints_knows_data_by_their_folder(run, tree, tmp_path):
    record = json.loads((run / "run.json").read_text())
    del record["data"]
    (run / "run.json").write_text(json.dumps(record))
    other = shutil.copytree(tree, tmp_path / "elsewhere")
    opts = ("MODEL.WEIGHTS", run / "model_best.pth")
    assert call(other, run, "--eval-only", opts=opts) == 0
    (place,) = (run / "what_if").iterdir()
    assert place.name.startswith("ich_root-")
    assert call(tree, run, "--resume") == 0


def relabel(root, split):
    """Says that the first slice of a list bleeds if it has no box, and does not if it has one."""
    image = (root / f"ImageSets/Main/{split}.txt").read_text().split()[0]
    boxed = "<object>" in (root / f"Annotations/{image}.xml").read_text()
    (root / "labels.csv").write_text(f"image,label\n{image},{int(not boxed)}\n")


def test_data_changed_in_place_make_a_what_if_and_their_own_report(run, tree, tmp_path, capsys):
    own = shutil.copytree(tree, tmp_path / "own")
    weights = ("MODEL.WEIGHTS", run / "model_best.pth")
    before = content(run, but=("inference", "log.txt"))
    assert call(own, run, "--eval-only", opts=weights) == 0  # the same data, moved
    assert not (run / "what_if").exists()
    relabel(own, "train")  # which no answer depends on
    assert call(own, run, "--eval-only", opts=weights) == 0
    assert not (run / "what_if").exists()
    relabel(own, "test")
    kept = content(run / "inference")
    capsys.readouterr()
    assert call(own, run, "--eval-only", opts=weights) == 0
    assert "A what-if: the model was trained with data set ich_test 'images 9, boxes" in (
        capsys.readouterr().err
    )
    assert content(run / "inference") == kept
    assert content(run, but=("inference", "log.txt", "what_if")) == before
    (place,) = (run / "what_if").iterdir()
    note = json.loads((place / "evaluation.json").read_text())
    assert list(note["differs"]) == ["data set ich_test"] and list(note["data"]) == ["ich_test"]


def test_lists_that_were_drawn_anew_are_not_called_apart(run, tree, tmp_path):
    """A slice that was tested on is trained on now: who is apart is not known any more."""
    record = json.loads((run / "run.json").read_text())
    page = run / "inference/ich_test/report.json"
    assert "no patient is in two partitions" in page.read_text()
    lists = tree / "ImageSets/Main"
    texts = {name: (lists / f"{name}.txt").read_text() for name in ("train", "val")}
    try:
        for name, other in (("train", "val"), ("val", "train")):
            (lists / f"{name}.txt").write_text(texts[other])
        weights = ("MODEL.WEIGHTS", run / "model_best.pth")
        assert call(tree, run, "--eval-only", opts=weights) == 0
    finally:
        for name, text in texts.items():
            (lists / f"{name}.txt").write_text(text)
    text = page.read_text()
    assert "Not checked: data have changed since training" in text
    assert record["data"]["ich_train"]["sha256"][:12] in text


def test_an_evaluation_elsewhere_is_no_training_and_keeps_its_own_record(run, tree, tmp_path):
    before, place = content(run), tmp_path / "place"
    weights = ("MODEL.WEIGHTS", run / "model_best.pth")
    wide = ("INPUT.WINDOWS", "[[40, 200]]")
    assert call(tree, place, "--eval-only", opts=(*weights, *wide)) == 0
    assert content(run) == before
    first = content(place, but=("log.txt",))
    assert json.loads(first["evaluation.json"])["differs"]["INPUT.WINDOWS"]["here"] == [[40, 200]]
    # Others are put beside it, and other weights too.
    assert call(tree, place, "--eval-only", opts=weights) == 0
    opts = ("MODEL.WEIGHTS", run / "model_final.pth", *wide)
    assert call(tree, place, "--eval-only", opts=opts) == 0
    assert content(place, but=("log.txt", "what_if")) == first
    assert len(list((place / "what_if").iterdir())) == 2
    # No model lies there; a training may begin, and loses nothing.
    assert diagnose.main([str(place), str(tree), "--output", str(tmp_path / "none")]) == 2
    assert call(tree, place, opts=("SOLVER.MAX_ITER", 1)) == 0
    assert content(place / "earlier-1", but=("log.txt", "what_if")) == first
    assert not (place / "evaluation.json").exists()


def test_weights_of_one_run_are_not_evaluated_over_the_results_of_another(run, tree, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    before = content(other)
    assert call(tree, other, "--eval-only", opts=("MODEL.WEIGHTS", run / "model_best.pth")) == 0
    assert content(other, but=("what_if",)) == before


def test_a_moved_run_is_evaluated_and_goes_on(run, tree, tmp_path):
    moved = run.rename(tmp_path / "moved")
    found = scores(moved / "inference/ich_test")
    assert call(tree, moved, "--eval-only", "--resume") == 0
    weights = ("MODEL.WEIGHTS", moved / "model_best.pth")
    assert call(tree, moved, "--eval-only", opts=weights) == 0
    assert scores(moved / "inference/ich_test") == found
    assert call(tree, moved, "--resume", opts=("SOLVER.MAX_ITER", 5)) == 0


# ---- resuming ----------------------------------------------------------------------------------

FIVE = "['EDH', 'IPH', 'IVH', 'SAH', 'SDH']"


@pytest.mark.parametrize(
    ("opts", "word"),
    [
        (("DATASETS.ICH_CLASSES", FIVE), "DATASETS.ICH_CLASSES ['hemorrhage'], not ['EDH'"),
        (("INPUT.WINDOWS", "[[40, 80]]"), "INPUT.WINDOWS [[50, 100]], not [[40, 80]]"),
        (("INPUT.MIN_SIZE_TRAIN", "(96,)"), "INPUT.MIN_SIZE_TRAIN [64], not [96]"),
        (("MODEL.ROI_BOX_HEAD.FC_DIM", "32"), "MODEL.ROI_BOX_HEAD.FC_DIM 16, not 32"),
        (("MODEL.ANCHOR_GENERATOR.SIZES", "[[8.0, 16.0, 32.0]]"), "MODEL.ANCHOR_GENERATOR.SIZES"),
        (("MODEL.RPN.COST.ALPHA", "3.0"), "MODEL.RPN.COST.ALPHA"),
        (("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"), "SOLVER.LR_SCHEDULER_NAME"),
        (("SOLVER.WEIGHT_DECAY", "0.1"), "SOLVER.WEIGHT_DECAY"),
        (("SEED", "9"), "SEED 1, not 9"),
        (("INPUT.AUG.EXPAND", "2"), "INPUT.AUG.EXPAND 1, not 2"),
        (("DATASETS.TRAIN", "('ich_train', 'ich_val')"), "DATASETS.TRAIN"),
        (("TEST.DIAGNOSIS.OPERATING_THRESHOLD", "0.2"), "OPERATING_THRESHOLD 0.7, not 0.2"),
    ],
)
def test_a_resume_that_does_not_fit_is_one_sentence_and_leaves_the_run(
    run, tree, capsys, opts, word
):
    before = content(run)
    assert call(tree, run, "--resume", opts=("SOLVER.MAX_ITER", 6, *opts)) == 2
    error = error_of(capsys)
    assert word in error and str(run / "config.yaml") in error
    assert content(run) == before


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_training_does_not_go_on_with_data_that_have_changed(run, tree, tmp_path, capsys, split):
    own = shutil.copytree(tree, tmp_path / "own")
    before = content(run)
    relabel(own, split)
    assert call(own, run, "--resume", opts=("SOLVER.MAX_ITER", 6)) == 2
    error = error_of(capsys)
    assert f"data set ich_{split} 'images " in error and str(run / "run.json") in error
    assert "put them back" in error
    assert content(run) == before


def test_a_resume_may_have_another_schedule_batch_and_rate(run, tree):
    before = content(run)
    opts = ("SOLVER.MAX_ITER", 6, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.BASE_LR", 0.002)
    assert call(tree, run, "--resume", opts=opts) == 0
    after = content(run)
    assert after["config.yaml"] == before["config.yaml"]
    record, old = json.loads(after["run.json"]), json.loads(before["run.json"])
    (note,) = record.pop("resumed")
    assert record | {"resumed": []} == old
    assert note["iteration"] == 4
    assert note["changed"] == {
        "SOLVER.BASE_LR": [0.01, 0.002],
        "SOLVER.IMS_PER_BATCH": [2, 4],
        "SOLVER.MAX_ITER": [4, 6],
    }
    state = torch.load(run / "model_final.pth", weights_only=True)
    assert state["iteration"] == 5
    assert state["trainer"]["images"] == 4 * 2 + 2 * 4
    assert state["trainer"]["hooks"]["LRScheduler"]["base_lrs"][0] == 0.002


def test_a_finished_run_is_tested_again_and_not_trained(run, tree):
    before = content(run, but=("log.txt",))
    assert call(tree, run, "--resume") == 0
    after = content(run, but=("log.txt",))
    for name in ("model_final.pth", "model_best.pth", "config.yaml", "diagnosis_history.csv"):
        assert after[name] == before[name], name
    name = "inference/ich_test/image_scores.csv"
    assert after[name] == before[name]


def test_fine_tuning_keeps_its_own_anchors_when_it_goes_on(run, tree, tmp_path):
    """B starts from A's weights; its boxes are larger, and so are its anchors."""
    tuned = tmp_path / "tuned"
    opts = ("MODEL.WEIGHTS", run / "model_best.pth", "INPUT.MIN_SIZE_TRAIN", "(96,)")
    assert call(tree, tuned, opts=opts) == 0
    trained, own = (RunFolder(folder).read_config() for folder in (run, tuned))
    assert own.MODEL.ANCHOR_GENERATOR.SIZES != trained.MODEL.ANCHOR_GENERATOR.SIZES
    weights = json.loads((tuned / "run.json").read_text())["initial_weights"]
    assert weights["name"] == "model_best.pth" and len(weights["sha256"]) == 64
    before = content(tuned)
    assert call(tree, tuned, "--resume", opts=(*opts, "SOLVER.MAX_ITER", 6)) == 0
    assert content(tuned)["config.yaml"] == before["config.yaml"]
    # A without its record is no reason to stop.
    shutil.rmtree(run)
    assert call(tree, tuned, "--resume", opts=(*opts, "SOLVER.MAX_ITER", 7)) == 0


@pytest.mark.parametrize("name", ["gone.pth", "../model.pth", ""])
def test_a_last_checkpoint_that_is_not_there_is_said(run, tree, capsys, name):
    (run / "last_checkpoint").write_text(name)
    before = content(run)
    assert call(tree, run, "--resume") == 2
    assert f"names '{name}', which is not in that folder" in error_of(capsys)
    assert content(run) == before


# ---- a folder that is in use -------------------------------------------------------------------


def test_a_new_training_does_not_begin_over_another(run, tree, capsys):
    before = content(run)
    assert call(tree, run) == 2
    assert "holds a training already; go on with it by --resume" in error_of(capsys)
    (run / "last_checkpoint").unlink()
    assert call(tree, run) == 2
    before.pop("last_checkpoint")
    assert content(run) == before


@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_what_never_reached_a_checkpoint_is_set_aside(run, tree, flags):
    for path in [*run.glob("*.pth"), run / "last_checkpoint"]:
        path.unlink()
    left = content(run)
    (run / "terminal.txt").write_text("of a cell")
    assert call(tree, run, *flags, opts=("SOLVER.MAX_ITER", 2)) == 0
    assert content(run / "earlier-1") == left
    assert [row["iteration"] for row in RunFolder(run).read_history()] == [2]
    assert all(row["iteration"] <= 2 for row in RunFolder(run).read_metrics())
    assert len(list(run.glob("events.*"))) == 1
    assert (run / "terminal.txt").is_file()


@pytest.mark.parametrize("flags", [(), ("--eval-only",)])
def test_a_folder_that_cannot_be_written_is_said(tree, run, tmp_path, capsys, flags, monkeypatch):
    file = tmp_path / "file"
    file.write_text("x")
    weights = ("MODEL.WEIGHTS", run / "model_best.pth")
    for out in (file, file / "below"):
        assert call(tree, out, *flags, opts=weights) == 2
        assert "is a file, expected a folder" in error_of(capsys)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert call(tree, tmp_path / "locked", *flags, opts=weights) == 2
    assert "cannot be written; give another OUTPUT_DIR" in error_of(capsys)


@pytest.mark.parametrize(
    ("flags", "opts", "code"),
    [
        ((), ("INPUT.CROP.ENABLED", "True"), 2),
        ((), ("TEST.AUG.ENABLED", "True"), 2),
        (("--eval-only",), ("TEST.AUG.ENABLED", "True"), 2),
        (("--resume",), ("INPUT.CROP.ENABLED", "True"), 2),
        # It was trained so before such keys were refused.
        (("--eval-only", "old"), ("INPUT.CROP.ENABLED", "True"), 0),
        (("--resume", "old"), ("INPUT.CROP.ENABLED", "True"), 0),
    ],
)
def test_keys_that_nothing_reads_are_refused_unless_a_model_was_trained_with_them(
    run, tree, tmp_path, capsys, flags, opts, code
):
    if "old" in flags:
        cfg = RunFolder(run).read_config()
        cfg.INPUT.CROP.ENABLED = True
        (run / "config.yaml").write_text(cfg.dump())
    before = content(run)
    out = run if flags else tmp_path / "out"
    argv = [flag for flag in flags if flag.startswith("--")]
    weights = ("MODEL.WEIGHTS", run / "model_best.pth") if "--eval-only" in argv else ()
    assert call(tree, out, *argv, opts=(*opts, *weights)) == code
    if code:
        words = "False, not True" if "--resume" in argv else "is True, but nothing reads it"
        assert f"{opts[0]} {words}" in error_of(capsys)
        assert content(run) == before and not (tmp_path / "out").exists()


# ---- checkpoints and classes -------------------------------------------------------------------


def test_an_evaluation_with_other_classes_than_the_checkpoint_is_one_sentence(
    run, tree, tmp_path, capsys
):
    opts = ("DATASETS.ICH_CLASSES", FIVE, "MODEL.WEIGHTS", run / "model_best.pth")
    for out in (run, tmp_path / "out"):
        before = content(run)
        assert call(tree, out, "--eval-only", opts=opts) == 2
        error = error_of(capsys)
        assert "'roi_heads.box_predictor.cls_score.weight' is sized (2, 16)" in error
        assert "(6, 16)" in error and "classes" in error
        assert content(run) == before and not (tmp_path / "out").exists()


def test_fine_tuning_to_other_classes_is_warned_of(run, tree, tmp_path, capsys):
    opts = ("DATASETS.ICH_CLASSES", FIVE, "MODEL.WEIGHTS", run / "model_best.pth")
    assert call(tree, tmp_path / "out", opts=(*opts, "SOLVER.MAX_ITER", 1)) == 0
    assert "tensors are of another shape ('roi_heads." in capsys.readouterr().err


def test_damaged_weights_are_one_sentence(run, tree, tmp_path, capsys):
    path = run / "model_best.pth"
    path.write_bytes(path.read_bytes()[:1000])
    for flags in ((), ("--eval-only",)):
        assert call(tree, tmp_path / "out", *flags, opts=("MODEL.WEIGHTS", path)) == 2
        assert str(path) in error_of(capsys)


def test_retinanet_has_as_many_classes_as_the_data(tree, tmp_path, capsys):
    base = tmp_path / "retinanet.yaml"
    base.write_text(
        f'_BASE_: "{ROOT}/configs/frcnn_effnet_lite0.yaml"\n'
        'MODEL: {META_ARCHITECTURE: "RetinaNet", RETINANET: {IN_FEATURES: ["stride16"]},'
        " ANCHOR_GENERATOR: {SIZES: [[8.0, 16.0]], ASPECT_RATIOS: [[1.0]]}}\n"
    )
    cfg = load_config(base)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 1
    assert load_config(base, ["DATASETS.ICH_CLASSES", FIVE]).MODEL.RETINANET.NUM_CLASSES == 5
    out, opts = tmp_path / "out", ("MODEL.RETINANET.NUM_CLASSES", 80)
    assert call(tree, out, opts=opts, config=base) == 2
    assert "MODEL.RETINANET.NUM_CLASSES is 80, but data set 'ich_train' has 1" in error_of(capsys)


def test_an_own_data_set_of_two_classes_is_trained_with_two(tree, tmp_path, capsys):
    """Registered by a user, in COCO's way: no patients, no labels."""
    from detectron2.data.datasets import load_coco_json, register_coco_instances

    from ich_det2.data import load_ich_voc

    for split in ("train", "val", "test"):
        images, boxes = [], []
        for i, d in enumerate(load_ich_voc(tree, split)):
            images.append({"id": i, **{k: d[k] for k in ("file_name", "height", "width")}})
            for a in d["annotations"]:
                x0, y0, x1, y1 = a["bbox"]
                entry = {"id": len(boxes) + 1, "image_id": i, "iscrowd": 0}
                entry |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
                boxes.append({**entry, "category_id": 1 + len(boxes) % 2})
        names = [{"id": 1, "name": "EDH"}, {"id": 2, "name": "other"}]
        file = tmp_path / f"{split}.json"
        file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": names}))
        register_coco_instances(f"own_{split}", {}, str(file), "/")
        load_coco_json(str(file), "/", f"own_{split}")
    sets = [x for s in ("train", "val", "test") for x in (f"DATASETS.{s.upper()}", f"('own_{s}',)")]
    out = tmp_path / "out"
    for number, flags in ((["MODEL.ROI_HEADS.NUM_CLASSES", 2], 0), ([], 1)):
        cfg = load_config(CONFIG, [*sets, *map(str, number)])
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2, flags
    assert call(tree, out, opts=(*sets, "MODEL.ROI_HEADS.NUM_CLASSES", 1)) == 2
    assert "NUM_CLASSES is 1, but data set 'own_train' has 2 classes" in error_of(capsys)
    two = ("MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.ANCHOR_GENERATOR.SIZES", "[[8.0, 16.0]]")
    two += ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0]]", "SOLVER.MAX_ITER", 2)
    assert call(tree, out, opts=(*sets, *two)) == 0
    weight = torch.load(out / "model_best.pth", weights_only=True)["model"]
    assert len(weight["roi_heads.box_predictor.cls_score.weight"]) == 3
    labels = [row.split(",")[3] for row in scores(out / "inference/own_test").split()[1:]]
    assert set(labels) == {"0", "1"}


# ---- who is tested on --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        ((), "By patient: checked, no patient is in two partitions."),
        (("DATASETS.TEST", "('ich_train',)"), r"\d patients are both trained on and tested on"),
        (("DATASETS.TEST", "('ich_val',)"), r"\d patients are both selected on and tested on"),
        (("DATASETS.TEST", "('by_another_name',)"), "both trained on and tested on"),
    ],
)
def test_the_report_says_who_was_trained_and_selected_on(run, tree, opts, words):
    register_ich_voc("by_another_name", tree, "train")
    name = re.search(r"'(\w+)'", opts[1])[1] if opts else "ich_test"
    opts = (*opts, "MODEL.WEIGHTS", run / "model_best.pth")
    assert call(tree, run, "--eval-only", opts=opts) == 0
    report = json.loads((run / f"inference/{name}/report.json").read_text())["models"][0]
    answers = {(i["standard"], i["number"]): i["answer"] for i in report["checklist"]}
    assert re.search(words, answers["CLAIM", "21"])
    if opts[0] == "DATASETS.TEST":
        assert answers["CLAIM", "21"].startswith("Not by patient: ")


def test_no_threshold_is_chosen_on_what_is_tested_on(tree, tmp_path, capsys):
    register_ich_voc("by_another_name", tree, "val")
    opts = ("DATASETS.TEST", "('by_another_name',)", "SOLVER.MAX_ITER", 2)
    opts += ("TEST.DIAGNOSIS.OPERATING_POINT.RULE", "youden")
    assert call(tree, tmp_path / "out", opts=opts) == 0
    assert "DATASETS.VAL and DATASETS.TEST share patients" in capsys.readouterr().err
    assert not (tmp_path / "out/operating_point.json").exists()


def test_several_validation_sets_are_selected_on_by_name(tree, tmp_path):
    opts = ("DATASETS.VAL", "('ich_val', 'ich_train')", "SOLVER.MAX_ITER", 2)
    opts += ("TEST.DIAGNOSIS.BEST_METRIC", "ich_train/diagnosis/image_auc")
    assert call(tree, tmp_path / "out", opts=opts) == 0
    best = json.loads((tmp_path / "out/model_best.json").read_text())
    assert best["metric"] == "ich_train/diagnosis/image_auc"
    point = json.loads((tmp_path / "out/operating_point.json").read_text())
    assert point["dataset"] == "ich_val, ich_train"
