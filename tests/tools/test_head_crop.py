"""INPUT.HEAD_CROP from training to evaluation and tools/diagnose.py."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pydicom import dcmread

from ich_det2.data import IchDatasetMapper, load_ich_voc
from ich_det2.engine import IchTrainer
from ich_det2.engine.checks import check_config
from ich_det2.inference.diagnoser import Diagnoser
from ich_det2.inference.slices import find_slices

REPO = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("diagnose", REPO / "tools/diagnose.py")
diagnose = importlib.util.module_from_spec(spec)
spec.loader.exec_module(diagnose)

SPLITS = {"train": "abc", "val": "def", "test": "ghi"}
WIDTH, HEIGHT = 96, 64
PIXEL_MM = (0.6, 0.5)


@pytest.fixture
def tree(voc_tree, write_ct):
    """A series for each split: a head in the lower right corner that grows towards the last slice,
    in pixels that are not square."""
    for n, (split, ids) in enumerate(SPLITS.items()):
        boxes = [("IPH", (56, 31, 70, 42))], []
        root = voc_tree({i: boxes[k % 2] for k, i in enumerate(ids)}, split=split,
                        size=(WIDTH, HEIGHT), kind="dicom")  # fmt: skip
        for k, image in enumerate(ids):
            grey = np.zeros((HEIGHT, WIDTH), np.uint8)
            cv2.ellipse(grey, (62 + n, 38), (16 + 4 * k, 14 + 3 * k), 0, 0, 360, 1, -1)
            noise = np.random.default_rng([n, k]).integers(20, 45, grey.shape)
            hu = np.where(grey, noise, -1000)
            if k % 2 == 0:
                hu[30:42, 55:70] = 75
            write_ct(
                root / f"DICOM/{image}.dcm", hu, PatientID=split, StudyInstanceUID=f"1.2.{n}",
                SeriesInstanceUID=f"1.2.{n}.1", PixelSpacing=list(PIXEL_MM),
                ImagePositionPatient=[0, 0, 5 * k], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            )  # fmt: skip
    return root


@pytest.fixture
def fed(monkeypatch):
    """What mappers of evaluation gave, by SOP Instance UID."""
    given, call = {}, IchDatasetMapper.__call__

    def record(self, dataset_dict):
        output = call(self, dataset_dict)
        if not self.is_train:
            given[dcmread(dataset_dict["file_name"]).SOPInstanceUID] = output
        return output

    monkeypatch.setattr(IchDatasetMapper, "__call__", record)
    return given


def read_scores(path, key):
    with open(path, newline="") as file:
        return {row[key]: float(row["score"]) for row in csv.DictReader(file)}


def highest(entries):
    """The box of the highest score."""
    return max(entries, key=lambda entry: entry["score"])


@pytest.mark.parametrize("context", ["0", "1"])
def test_training_evaluation_and_diagnosis_crop_alike(tree, fed, tiny_cfg, tmp_path, context):
    run = tmp_path / "run"
    cfg = tiny_cfg(
        *("DATASETS.ICH_ROOT", str(tree), "OUTPUT_DIR", str(run), "DATALOADER.NUM_WORKERS", "0"),
        *("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)", "SOLVER.IMS_PER_BATCH", "2"),
        *("TEST.EVAL_PERIOD", "2", "INPUT.HEAD_CROP", "True", "INPUT.CONTEXT_SLICES", context),
    )
    check_config(cfg, eval_only=False, resume=False)
    trainer = IchTrainer(cfg)
    with torch.no_grad():
        trainer.model.roi_heads.box_predictor.cls_score.weight *= 30  # scores that differ
    trainer.train()
    trainer.test_best()
    (run / "config.yaml").write_text(cfg.dump())
    evaluated = dict(fed)
    uid = {p.stem: dcmread(p).SOPInstanceUID for p in tree.glob("DICOM/*")}
    scores, boxes = {}, {}
    for split in ("val", "test"):
        folder = run / f"inference/ich_{split}"
        own = read_scores(folder / "image_scores.csv", "image_id")
        scores |= {uid[i]: score for i, score in own.items()}
        found = json.loads((folder / "coco_instances_results.json").read_text())
        for i in own:
            x, y, w, h = highest([b for b in found if b["image_id"] == i])["bbox"]
            boxes[uid[i]] = [x, y, x + w, y + h]

    exam = tmp_path / "exam"
    exam.mkdir()
    for i, image in enumerate("fgdhei"):
        shutil.copy(tree / f"DICOM/{image}.dcm", exam / f"IM{i}")
    fed.clear()
    out = tmp_path / "o"
    assert diagnose.main([str(run), str(exam), "--output", str(out), "--identify"]) == 0
    got = read_scores(out / "slices.csv", "sop_uid")
    assert len(set(got.values())) > 3 and min(got.values()) > 0
    assert got == pytest.approx(scores, abs=1e-6)
    assert fed.keys() == evaluated.keys()
    for key, given in fed.items():
        assert torch.equal(given["image"], evaluated[key]["image"])
        assert given["crop"] == evaluated[key]["crop"]
        check_crop(given)
    diagnosed = json.loads((out / "diagnosis.json").read_text())
    for entry in (s for patient in diagnosed["patients"] for s in patient["slices"]):
        box = highest(entry["boxes"])["box"]
        assert box == pytest.approx(boxes[entry["sop_uid"]], abs=0.01)
        x0, y0, x1, y1 = fed[entry["sop_uid"]]["crop"]
        assert x0 - 0.01 <= box[0] < box[2] <= x1 + 0.01
        assert y0 - 0.01 <= box[1] < box[3] <= y1 + 0.01


@pytest.mark.parametrize(
    "columns, rows, n_series",
    [
        ("image,patient,series,position_mm", ["a,p,1,0", "b,p,1,5", "c,p,2,0"], 2),
        ("image,patient,series,position_mm", ["a,p,1,0", "b,p,1,", "c,p,1,5"], 2),
        ("image,patient,series", ["a,p,1", "b,p,1", "c,p,2"], 2),
        ("image,patient", ["a,p", "b,q", "c,p"], 2),
        ("", [], 3),
    ],
)
def test_pictures_are_of_the_same_series_in_training_and_in_diagnosis(
    voc_tree, columns, rows, n_series
):
    root = voc_tree({i: [] for i in "abc"}, size=(96, 96), patients=[columns, *rows])
    if not rows:
        (root / "patients.csv").unlink()
    for axis, image in zip((20, 30, 40), "abc"):
        grey = np.zeros((96, 96), np.uint8)
        cv2.circle(grey, (48, 48), axis, 128, -1)
        Image.fromarray(grey).save(root / f"JPEGImages/{image}.png")
    trained = {d["file_name"]: d["crop"] for d in load_ich_voc(root, "train", head_crop=True)}
    model = Diagnoser(torch.nn.Identity(), None, batch_size=1, head_crop=True)
    slices = find_slices([root / "JPEGImages"]).slices
    given = {str(s.path): crop for s, crop in model._with_crops(iter(slices))}
    assert given == trained
    assert len({*given.values()}) == n_series


def check_crop(given):
    """That of the last slice: 49 columns and 41 rows of 1.2 columns, 53 columns with its margin."""
    x0, y0, x1, y1 = given["crop"]
    assert (x1 - x0, y1 - y0) == (pytest.approx(53, abs=3), pytest.approx(53 / 1.2, abs=3))
    height, width = given["image"].shape[1:]
    assert height == pytest.approx(width, abs=3)
    assert (given["height"], given["width"]) == (HEIGHT, WIDTH)
