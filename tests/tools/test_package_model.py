"""A training becomes a model to give away: half the size, equal verdicts, nobody's paths."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from ich_det2.evaluation.operating_point import OperatingPoint
from ich_det2.files import sha256

ROOT = Path(__file__).parents[2]


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_net, diagnose, package_model = map(tool, ("train_net", "diagnose", "package_model"))


@pytest.fixture(scope="module")
def run(phantom_tree, tmp_path_factory):
    root, out = tmp_path_factory.mktemp("data") / "tree", tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(phantom_tree, root)
    for name, number in (("train", 26), ("val", 9), ("test", 9)):
        path = root / f"ImageSets/Main/{name}.txt"
        path.write_text("\n".join(path.read_text().split()[:number]) + "\n")
    argv = ["--config-file", str(ROOT / "configs/diagnosis_effnet_lite0.yaml")]
    argv += ["OUTPUT_DIR", str(out), "DATASETS.ICH_ROOT", str(root), "MODEL.WEIGHTS", ""]
    argv += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.MAX_ITER", "2"]
    argv += ["SOLVER.WARMUP_ITERS", "1", "DATALOADER.NUM_WORKERS", "0", "TEST.EVAL_PERIOD", "0"]
    assert train_net.main([*argv, "TEST.DIAGNOSIS.RESAMPLES", "20"]) == 0
    return out


def answers(model, images, out, *options):
    argv = [str(model), *map(str, images), "--output", str(out), "--identify", *options]
    assert diagnose.main(argv) == 0
    with open(out / "slices.csv", newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def test_a_packaged_model_answers_as_its_training(run, tmp_path, capsys):
    out, found = tmp_path / "zoo-model", run / "inference/ich_test"
    argv = [str(run), "--out-of-fold", str(found), "--output", str(out), "--rule", "youden"]
    assert package_model.main(argv) == 0
    assert (out / "model_final.pth").stat().st_size < 0.3 * (run / "model_final.pth").stat().st_size
    text = "".join((out / n).read_text() for n in ("config.yaml", "run.json", "out_of_fold.json"))
    assert str(run.parent) not in text and "/tmp" not in text
    point = OperatingPoint.load(out / "operating_point.json")
    assert point.weights_sha256 == sha256(out / "model_final.pth") and point.rule == "youden"
    assert point.dataset.startswith("tree, ") and "out of fold" in point.dataset
    assert "AP30" in json.loads((out / "out_of_fold.json").read_text())

    images = sorted(Path(run / "../../").resolve().glob("data*/tree/DICOM/*"))[:9]
    capsys.readouterr()
    packaged = answers(out, images, tmp_path / "a")
    whole = answers(run, images, tmp_path / "b", "--threshold", str(point.threshold))
    assert packaged.keys() == whole.keys() and len(whole) == len(images)
    for name, row in whole.items():
        score = float(row["score"])
        assert float(packaged[name]["score"]) == pytest.approx(score, abs=2e-3)
        if abs(score - point.threshold) > 2e-3:
            assert packaged[name]["verdict"] == row["verdict"]

    assert package_model.main(argv) == 2
    assert "holds a training already" in capsys.readouterr().err
