"""Lesions without learning: found on drawn heads, scored, trained, evaluated and diagnosed."""

import csv
import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

import ich_det2
from ich_det2.engine import IchTrainer
from ich_det2.engine.checks import check_config
from ich_det2.engine.config import flatten, load_config
from ich_det2.modeling.keys import check_read_keys
from ich_det2.modeling.segmentation import perimeter
from ich_det2.phantom import write_exam

CONFIGS = ("threshold.yaml", "fuzzy_level_set.yaml")


def head(*bleeds, side=160):
    """A slice as the mapper gives it; bleeds are (x0, y0, x1, y1), rows and columns from 0."""
    hu = np.full((side, side), -20.0, np.float32)
    cv2.circle(hu, (80, 80), 70, 100, -1)
    cv2.circle(hu, (80, 80), 62, 30, -1)
    for x0, y0, x1, y1 in bleeds:
        hu[y0:y1, x0:x1] = 65
    grey = torch.from_numpy((hu + 20) * (255 / 120))
    return {"image": grey.expand(3, -1, -1), "image_label": int(len(bleeds) > 0)}


@pytest.fixture
def make(tiny_cfg):
    """Factory of a segmenter by its config."""

    def make(config, *opts):
        return build_model(tiny_cfg(*opts, config=config))

    return make


@pytest.mark.parametrize("config", CONFIGS)
def test_bleeds_are_found_in_the_slices_own_pixels(make, config):
    model = make(config).eval()
    one = head((60, 90, 80, 100), (90, 50, 110, 70)) | {"height": 320, "width": 480}
    with torch.no_grad():
        bleeding, healthy = model([one, head()])
    found = bleeding["instances"]
    assert found.image_size == (320, 480)
    # From top to bottom; twice as high and three times as wide, as the slice is.
    expected = [[270.0, 100.0, 330.0, 140.0], [180.0, 180.0, 240.0, 200.0]]
    np.testing.assert_allclose(found.pred_boxes.tensor, expected, atol=6.1)
    for box, mask in zip(found.pred_boxes.tensor.int().tolist(), found.pred_masks):
        assert mask.shape == (320, 480) and mask.dtype == torch.bool
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        of_mask = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(box, of_mask, atol=3)
        assert mask.sum() > 0.6 * (box[2] - box[0]) * (box[3] - box[1])
    assert found.pred_classes.tolist() == [0, 0]
    assert bleeding["image_score"] == found.scores.max() > healthy["image_score"] > 0
    assert len(healthy["instances"]) == 0
    assert healthy["instances"].pred_masks.shape == (0, 160, 160)


def test_the_score_is_logistic_in_the_measures(make):
    model = make("threshold.yaml").eval()
    with torch.no_grad():
        model.score.weight[:] = torch.tensor([0.0, 2.0, 0.0])
        model.score.bias.fill_(-6.0)
        model.nothing.fill_(-1.0)
        bleeding, healthy = model([head((60, 60, 90, 90)), head()])
    # 35 HU beyond the brain, 3.5 times 10 HU, but for corners and a smooth edge.
    logits = [float(x["image_score"].logit()) for x in (bleeding, healthy)]
    assert logits == pytest.approx([2 * 3.5 - 6, -1], abs=0.3)
    assert logits[1] == pytest.approx(-1)


@pytest.mark.parametrize("config", CONFIGS)
def test_five_numbers_learn(make, config):
    model = make(config).train()
    assert sum(p.numel() for p in model.parameters()) == 3 + 1 + 1
    batch = [head((60, 60, 90, 90)), head()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        (loss,) = model(batch).values()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    model(batch[1:])["loss_cls"].backward()  # no lesion in the whole batch


@pytest.mark.parametrize("value", [0.0, 90.0, 255.0])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_constant_slice_has_nothing(make, config, value):
    model = make(config).eval()
    (found,) = model([{"image": torch.full((3, 48, 64), value)}])
    assert len(found["instances"]) == 0
    assert float(found["image_score"].detach()) == pytest.approx(1 / (1 + np.exp(3)))


def test_the_level_set_smooths_what_clusters_leave_ragged(make):
    density, brain = np.zeros((80, 80), np.float32), np.ones((80, 80), bool)
    density[30:60, 30:60] = 30
    density[np.random.default_rng(0).random((80, 80)) < 0.02] = 0  # holes
    rough, smooth = (
        make("fuzzy_level_set.yaml", "MODEL.SEGMENTER.ITERATIONS", n).find(density, brain, 20)
        for n in (0, 20)
    )
    assert 500 < rough.sum() < (density > 0).sum()
    assert perimeter(smooth) < 0.7 * perimeter(rough)
    assert smooth[32:58, 32:58].all() and not smooth[:26].any() and not smooth[:, 64:].any()


@pytest.mark.parametrize("config", CONFIGS)
def test_it_trains_is_saved_goes_on_is_evaluated_and_diagnoses(
    phantom_tree, tmp_path, config, monkeypatch
):
    monkeypatch.setattr("ich_det2.evaluation.plots.save_figure", lambda *args: None)
    out = tmp_path / "out"
    opts = (
        *("DATASETS.ICH_ROOT", str(phantom_tree), "OUTPUT_DIR", str(out), "MODEL.DEVICE", "cpu"),
        *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "4", "TEST.EVAL_PERIOD", "2"),
        *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
        *("TEST.DIAGNOSIS.OPERATING_THRESHOLD", "0.01", "TEST.DIAGNOSIS.RESAMPLES", "10"),
        *("DATALOADER.NUM_WORKERS", "0"),
    )
    cfg = load_config(f"configs/{config}", opts)
    check_config(cfg, eval_only=False, resume=False)
    trainer = IchTrainer(cfg)
    trainer.resume_or_load(False)
    trainer.train()
    cfg.SOLVER.MAX_ITER = 3
    trainer = IchTrainer(cfg)
    trainer.resume_or_load(True)
    assert trainer.start_iter == 2
    trainer.train()
    (out / "config.yaml").write_text(cfg.dump())
    assert {"bbox", "diagnosis"} <= set(trainer.test_best())
    folder = out / "inference/ich_test"
    with open(folder / "image_scores.csv", newline="") as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    boxes = json.loads((folder / "coco_instances_results.json").read_text())
    assert boxes and all("segmentation" in box for box in boxes)
    assert max(scores) == pytest.approx(max(box["score"] for box in boxes))
    masks = json.loads((folder / "masks.json").read_text())
    assert masks["dice"] > 0.3 and (folder / "volumes.csv").is_file(), masks
    report = json.loads((folder / "report.json").read_text())["models"][0]
    assert any("without learning" in str(c["answer"]) for c in report["checklist"])

    write_exam(tmp_path / "exam", seed=1, size=96)
    diagnosis = ich_det2.diagnose(tmp_path / "exam", out, threshold=0.0)
    assert any(len(s.boxes) for s in diagnosis.slices)
    assert all(0 < s.score < 1 for s in diagnosis.slices)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("INPUT.WINDOWS", "[[50, 80]]"), "ends at 90 HU; expected one that ends above 94 HU"),
        (("INPUT.CONTEXT_SLICES", 1), "takes a slice in one window"),
        (("DATASETS.ICH_CLASSES", ["IPH", "SDH"]), "does not tell types"),
        (("MODEL.SEGMENTER.MIN_SHARE", 1.0), "MIN_SHARE is 1.0, expected 0 to below 1"),
        (("MODEL.SEGMENTER.CENTERS", [5.0, 5.0]), "expected two or more, ascending"),
        (("MODEL.SEGMENTER.ITERATIONS", -1), "ITERATIONS is -1, expected 0 or more"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(make, opts, message):
    with pytest.raises(ValueError, match=message):
        make("fuzzy_level_set.yaml", *opts)


def test_each_key_is_read_and_others_are_refused():
    defaults = flatten(load_config(""))
    for config in CONFIGS:
        check_read_keys(flatten(load_config(f"configs/{config}")), defaults)
    opts = ("MODEL.SEGMENTER.AREA", "1.0")
    with pytest.raises(ValueError, match="LevelSetSegmenter does"):
        check_read_keys(flatten(load_config("configs/threshold.yaml", opts)), defaults)
