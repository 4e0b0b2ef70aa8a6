"""A real run on small slices: train, validate, keep the best, resume, test."""

import csv
import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from ich_det2.engine import IchTrainer
from ich_det2.engine.checks import check_config


@pytest.fixture
def cfg(tiny_cfg, full_tree, tmp_path):
    cfg = tiny_cfg(
        *("DATASETS.ICH_ROOT", str(full_tree("dicom")), "OUTPUT_DIR", str(tmp_path / "out")),
        *("SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(3,)", "SOLVER.IMS_PER_BATCH", "2"),
        *("TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "2", "DATALOADER.NUM_WORKERS", "0"),
    )
    check_config(cfg, eval_only=False, resume=False)
    return cfg


def train(cfg, resume=False):
    trainer = IchTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def test_a_run_leaves_every_file_that_the_design_names(cfg, tmp_path):
    results = train(cfg).test_best()
    out = tmp_path / "out"
    for name in ("model_best.pth", "model_best.json", "model_final.pth", "metrics.json"):
        assert (out / name).is_file(), name
    assert list(out.glob("events.out.tfevents.*"))
    for split, ids in (("val", ["e", "f"]), ("test", ["g", "h"])):
        folder = out / "inference" / f"ich_{split}"
        with open(folder / "image_scores.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["image_id"] for row in rows] == ids
        assert [row["label"] for row in rows] == ["1", "0"]
        assert [row["patient_id"] for row in rows] == [f"p-{i}" for i in ids]
        assert json.loads((folder / "diagnosis.json").read_text())["image"]["n"] == 2
        boxes = json.loads((folder / "coco_instances_results.json").read_text())
        for row in rows:
            scores = [b["score"] for b in boxes if b["image_id"] == row["image_id"]]
            assert float(row["score"]) == pytest.approx(max(scores, default=0.0))
    assert {"bbox", "diagnosis"} <= set(results)
    logged = (json.loads(line) for line in (out / "metrics.json").read_text().splitlines())
    scalars = {key for line in logged for key in line}
    for key in ("rpn/ratio_target", "rpn/num_pos_anchors", "diagnosis/image_auc"):
        assert key in scalars, key


def test_resume_goes_on_with_the_ratio_and_the_iteration(cfg, tmp_path):
    train(cfg)
    out = tmp_path / "out"
    first = torch.load(out / "model_0000001.pth", weights_only=True)
    first["model"]["proposal_generator.anchor_sampler._ratio"] = torch.tensor(
        1.2345678901234567, dtype=torch.float64
    )
    torch.save(first, out / "model_0000001.pth")
    (out / "last_checkpoint").write_text("model_0000001.pth")
    trainer = IchTrainer(cfg)
    trainer.resume_or_load(True)
    assert trainer.start_iter == 2
    sampler = trainer.model.proposal_generator.anchor_sampler
    assert sampler.ratio == 1.2345678901234567
    trainer.train()
    assert trainer.iter == 4


def test_the_expansion_multiplies_the_training_set(cfg):
    cfg.INPUT.AUG.EXPAND = 4
    loader = IchTrainer.build_train_loader(cfg)
    assert len(loader.dataset.dataset) == 4 * 4


@pytest.mark.parametrize(
    ("architecture", "names"), [("GeneralizedRCNN", ["a", "c", "d"]), ("DiagnosisRCNN", [*"abcd"])]
)
def test_a_slice_known_to_bleed_without_boxes_is_no_background(cfg, caplog, architecture, names):
    root = Path(cfg.DATASETS.ICH_ROOT)
    (root / "labels.csv").write_text("image,label\n" + "".join(f"{i},1\n" for i in "abcdefgh"))
    boxed = "<object><name>IPH</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>20</xmax>"
    boxed += "<ymax>20</ymax></bndbox></object></annotation>"
    for name in "acd":
        path = root / f"Annotations/{name}.xml"
        if "object" not in path.read_text():
            path.write_text(path.read_text().replace("</annotation>", boxed))
    path = root / "Annotations/b.xml"
    path.write_text(re.sub("<object>.*</object>", "", path.read_text()))
    cfg.MODEL.META_ARCHITECTURE = architecture
    loader = IchTrainer.build_train_loader(cfg)
    found = {d["image_id"] for batch in itertools.islice(loader, 8) for d in batch}
    assert sorted(found) == names
    said = "1 training slices have hemorrhage, but no boxes: they are left out."
    assert (said in caplog.text) == (len(names) == 3)


def test_several_windows_reach_the_network(cfg):
    cfg.INPUT.WINDOWS = [[40, 80], [80, 200], [600, 2800]]
    image = next(iter(IchTrainer.build_train_loader(cfg)))[0]["image"]
    assert not torch.equal(image[0], image[2])


def test_plain_training_runs_too(cfg):
    cfg.MODEL.PROPOSAL_GENERATOR.NAME, cfg.MODEL.RPN.HEAD_NAME = "RPN", "StandardRPNHead"
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    assert "diagnosis" in train(cfg).test_best()
