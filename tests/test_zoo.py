"""Models that come with the package: whole, small, described, nobody's paths, and they answer."""

from pathlib import Path

import pytest
import torch
import yaml
from detectron2.utils.file_io import PathManager

import ich_det2
from ich_det2 import modeling as _  # noqa: F401  only registration
from ich_det2 import zoo
from ich_det2.engine.checks import check_config
from ich_det2.engine.config import load_config
from ich_det2.engine.operating_point import find_operating_point
from ich_det2.engine.run_folder import RunFolder
from ich_det2.files import sha256
from ich_det2.phantom import write_exam

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", zoo.names())
def test_a_model_is_whole_small_and_described(name):
    run = RunFolder(zoo.model_folder(zoo.PREFIX + name))
    size = sum(path.stat().st_size for path in run.path.iterdir())
    assert size < 12e6
    config = yaml.safe_load(run.config.read_text())
    assert not config["OUTPUT_DIR"].startswith("/")
    assert "/" not in config["DATASETS"]["ICH_ROOT"] + run.read_record()["data_root"]
    assert run.read_operating_point().weights_sha256 == sha256(run.final)
    card = (run.path / "README.md").read_text()
    for words in ("not for clinical use", "CC BY 4.0", "bad at", "window"):
        assert words in card, words
    path = PathManager.get_local_path(zoo.PREFIX + name)
    assert set(torch.load(path, weights_only=True)) == {"model"}


def test_the_default_is_there_and_others_are_not():
    assert zoo.DEFAULT.removeprefix(zoo.PREFIX) in zoo.names()
    with pytest.raises(ValueError, match="no model 'zoo://x'; expected zoo://ct-ich, or a train"):
        ich_det2.diagnose("exam", "zoo://x")
    assert zoo.model_folder("output/run").name == "run"


def test_an_exam_is_diagnosed_without_a_training(tmp_path):
    files = write_exam(tmp_path / "exam", size=64)
    diagnosis = ich_det2.diagnose(tmp_path / "exam")
    assert len(diagnosis.slices) == len(files) and diagnosis.model["run"] == "ct-ich"
    (patient,) = diagnosis.patients
    point = RunFolder(zoo.model_folder(zoo.DEFAULT)).read_operating_point()
    assert 0 < patient.score < 1 and diagnosis.threshold == point.threshold


def test_an_evaluation_takes_anchors_and_operating_point_from_it(phantom_tree, tmp_path):
    data = ("DATASETS.ICH_ROOT", str(phantom_tree), "OUTPUT_DIR", str(tmp_path / "out"))
    opts = (*data, "MODEL.WEIGHTS", zoo.DEFAULT, "MODEL.DEVICE", "cpu")
    cfg = load_config(ROOT / "configs/diagnosis_effnet_lite0.yaml", opts)
    check_config(cfg, eval_only=True, resume=False)
    run = RunFolder(zoo.model_folder(zoo.DEFAULT))
    trained = run.read_config().MODEL.ANCHOR_GENERATOR
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == trained.SIZES != [[]]
    point = find_operating_point(cfg, Path(cfg.MODEL.WEIGHTS))
    assert point == run.read_operating_point()
