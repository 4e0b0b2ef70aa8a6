"""Segmentation networks: planned, trained, resumed, evaluated and diagnosed as detectors are."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ich_det2
from ich_det2.engine import IchTrainer
from ich_det2.engine.checks import check_config
from ich_det2.engine.config import load_config
from ich_det2.engine.report import training_facts
from ich_det2.engine.run_folder import RunFolder
from ich_det2.evaluation import plots
from ich_det2.inference.ensemble import combine_runs
from ich_det2.modeling.dynunet import plan_network

CONFIG = Path(__file__).parents[2] / "configs/dynunet.yaml"
BLEED = [("IPH", (11, 13, 30, 28))]
SMALL = (
    *("INPUT.MIN_SIZE_TRAIN", "(32,)", "INPUT.MIN_SIZE_TEST", "32", "SOLVER.MAX_ITER", "4"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "4"),
    *("MODEL.DYNUNET.BASE_FILTERS", "4", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"),
    *("TEST.DIAGNOSIS.RESAMPLES", "10", "SOLVER.WARMUP_ITERS", "0"),
)


@pytest.fixture
def masked_tree(full_tree):
    """Factory of a VOC tree of 4, 2 and 2 slices, whose boxes have masks but for some images."""

    def make(*, without=(), kind="png"):
        root = full_tree(kind)
        (root / "SegmentationObject").mkdir()
        for name in sorted({"a", "c", "e", "g"} - set(without)):
            mask = np.zeros((48, 64), np.uint8)
            mask[12:28, 10:30] = 1
            Image.fromarray(mask).save(root / f"SegmentationObject/{name}.png")
        return root

    return make


@pytest.fixture
def cfg_on(tmp_path):
    """Factory of the shipped config, small, on a tree."""

    def make(root, *opts):
        data = ("DATASETS.ICH_ROOT", str(root), "OUTPUT_DIR", str(tmp_path / "out"))
        return load_config(CONFIG, [*data, *SMALL, *opts])

    return make


def check(cfg, **kwargs):
    check_config(cfg, **({"eval_only": False, "resume": False} | kwargs))
    return cfg


def train(cfg, resume=False):
    trainer = IchTrainer(cfg)
    trainer.resume_or_load(resume)
    if not resume:
        RunFolder(cfg.OUTPUT_DIR).begin(cfg)
    trainer.train()
    return trainer


def test_the_network_is_planned_for_the_training_slices_at_its_input(masked_tree, cfg_on):
    """64 x 48 pixels become 43 x 32: 43 x 32, 22 x 16, 11 x 8, 6 x 4."""
    settings = check(cfg_on(masked_tree())).MODEL.DYNUNET
    assert settings.STRIDES == [[1, 1]] + 3 * [[2, 2]] and settings.KERNELS == [[3, 3]] * 4
    assert settings.FILTERS == [4, 8, 16, 32]


def test_pixels_that_are_not_square_are_made_so_first(masked_tree, cfg_on, write_ct):
    root = masked_tree(kind="dicom")
    for path in (root / "DICOM").iterdir():
        write_ct(path, np.zeros((48, 64)), PixelSpacing=[2.0, 0.5])
    # 64 x 48 of 2 x 0.5 mm are 64 x 192 of 0.5 mm, 32 x 96 at the input: 96 x 32, 48 x 16, 24 x 8,
    # 12 x 4, and the longer axis alone 6.
    strides = check(cfg_on(root)).MODEL.DYNUNET.STRIDES
    assert strides == [[1, 1]] + 3 * [[2, 2]] + [[2, 1]]


def test_a_plan_that_is_given_is_used(masked_tree, cfg_on):
    plan = plan_network((64, 64), (1, 1), base_filters=2)
    given = [
        x
        for key, value in zip(("KERNELS", "STRIDES", "FILTERS"), plan)
        for x in (f"MODEL.DYNUNET.{key}", str(value))
    ]
    root = masked_tree()
    settings = check(cfg_on(root, *given)).MODEL.DYNUNET
    assert (settings.KERNELS, settings.STRIDES, settings.FILTERS) == tuple(plan)
    with pytest.raises(ValueError, match="expected as many of each"):
        check(cfg_on(root, *given[:4]))


def test_it_trains_goes_on_and_is_evaluated_and_diagnosed(
    masked_tree, cfg_on, tmp_path, monkeypatch
):
    monkeypatch.setattr(plots, "save_figure", lambda figure, target: None)
    root = masked_tree(kind="dicom")
    train(check(cfg_on(root)))
    out = tmp_path / "out"
    # The command line leaves the plan open again.
    cfg = check(cfg_on(root, "SOLVER.MAX_ITER", "6"), resume=True)
    assert cfg.MODEL.DYNUNET.FILTERS == [4, 8, 16, 32]
    trainer = train(cfg, resume=True)
    assert trainer.start_iter == 4
    assert {"bbox", "diagnosis"} <= set(trainer.test_best())
    folder = out / "inference/ich_test"
    with open(folder / "image_scores.csv", newline="") as file:
        rows = {row["image_id"]: row for row in csv.DictReader(file)}
    assert {i: row["label"] for i, row in rows.items()} == {"g": "1", "h": "0"}
    assert all(0 < float(row["score"]) < 1 for row in rows.values())
    found = json.loads((folder / "coco_instances_results.json").read_text())
    assert all(box["segmentation"]["size"] == [48, 64] for box in found)
    assert (
        "DynUNetSegmenter, filters [4, 8, 16, 32]" in training_facts(cfg, RunFolder(out))["model"]
    )

    weights = ("MODEL.WEIGHTS", str(out / "model_best.pth"))
    again = check(cfg_on(root, *weights), eval_only=True)
    assert again.MODEL.DYNUNET == cfg.MODEL.DYNUNET and again.OUTPUT_DIR == str(out)
    lower = check(cfg_on(root, *weights, "MODEL.DYNUNET.MASK_THRESH_TEST", "0.2"), eval_only=True)
    assert "what_if" in lower.OUTPUT_DIR

    with pytest.raises(ValueError, match="is of a DynUNetSegmenter, expected a detector's run"):
        combine_runs([out, out], tmp_path / "ensemble")
    diagnosis = ich_det2.diagnose(root / "DICOM", out)
    assert len(diagnosis.slices) == 8
    scores = {Path(s.file).stem: s.score for s in diagnosis.slices}
    assert scores["g"] == pytest.approx(float(rows["g"]["score"]), abs=1e-5)


def test_bleeds_are_learnt(masked_tree, cfg_on, monkeypatch):
    """In some steps the bright rectangles are told from the brain around them."""
    monkeypatch.setattr(plots, "save_figure", lambda figure, target: None)
    cfg = cfg_on(masked_tree(), "SOLVER.MAX_ITER", "60", "SOLVER.BASE_LR", "0.05")
    for name in ("SHIFT", "SCALE", "ROTATE", "JITTER"):
        cfg.INPUT.AUG[name] = 0.0
    results = train(check(cfg)).test_best()
    assert results["diagnosis"]["image_auc"] == 1 and results["bbox"]["AP50"] > 99, results


def test_a_data_set_without_masks_is_refused(full_tree, cfg_on, tmp_path):
    cfg = cfg_on(full_tree())
    with pytest.raises(ValueError, match="DynUNetSegmenter, but no box of ich_train has a mask"):
        check(cfg)
    cfg.INPUT.MASK_FORMAT = "polygon"
    with pytest.raises(ValueError, match="DynUNetSegmenter with INPUT.MASK_FORMAT 'polygon'"):
        check(cfg)
    assert not (tmp_path / "out").exists()


def test_slices_that_bleed_without_masks_are_left_out(masked_tree, cfg_on, caplog):
    root = masked_tree(without=["c"])
    (root / "labels.csv").write_text("image,label\n" + "".join(f"{i},1\n" for i in "ab"))
    cfg = check(cfg_on(root))
    loader = IchTrainer.build_train_loader(cfg)
    found = {d["image_id"] for batch, _ in zip(loader, range(8)) for d in batch}
    assert found == {"a", "d"}  # b bleeds, but has no box, and c has one without mask
    assert "2 training slices have hemorrhage, but not all of it has masks" in caplog.text


def test_small_slices_and_keys_of_others_are_refused(masked_tree, cfg_on):
    root = masked_tree()
    with pytest.raises(ValueError, match="images of 8 x 11 pixels give a U-Net of"):
        check(cfg_on(root, "INPUT.MIN_SIZE_TRAIN", "(8,)"))
    with pytest.raises(ValueError, match="DynUNetSegmenter does not read it"):
        check(cfg_on(root, "MODEL.RPN.COST.ALPHA", "3.0"))
    with pytest.raises(ValueError, match="MODEL.DYNUNET.BASE_FILTERS is 0"):
        check(cfg_on(root, "MODEL.DYNUNET.BASE_FILTERS", "0"))
