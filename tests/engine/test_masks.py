"""Mask R-CNN by the same code as detectors: train, resume, evaluate, report, diagnose."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image

from ich_det2 import diagnose
from ich_det2.data.dicom import read_spacing
from ich_det2.data.masks import decode_mask
from ich_det2.engine import IchTrainer
from ich_det2.engine.checks import check_config
from ich_det2.evaluation.evaluator import metric_names
from ich_det2.evaluation.volumes import slice_widths
from ich_det2.modeling import CostSensitiveROIHeads

SMALL = (
    *("SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"),
    *("SOLVER.CHECKPOINT_PERIOD", "100", "TEST.EVAL_PERIOD", "100"),
    *("TEST.DIAGNOSIS.RESAMPLES", "10", "TEST.DETECTIONS_PER_IMAGE", "5"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "10", "TEST.DIAGNOSIS.OPERATING_THRESHOLD", "0.01"),
    *("DATALOADER.SAMPLER_TRAIN", "PositiveShareSampler"),
)


@pytest.fixture
def train(tiny_cfg, phantom_tree, tmp_path):
    """Function: trains to an iteration; gives the trainer and its last weights."""

    def run(max_iter, *opts, config="mask_rcnn_effnet_lite0.yaml", resume=False):
        cfg = tiny_cfg(
            *("DATASETS.ICH_ROOT", str(phantom_tree), "OUTPUT_DIR", str(tmp_path / "out")),
            *(*SMALL, "SOLVER.MAX_ITER", str(max_iter), *opts),
            config=config,
        )
        check_config(cfg, eval_only=False, resume=False)
        trainer = IchTrainer(cfg)
        trainer.resume_or_load(resume)
        trainer.train()
        return trainer, torch.load(tmp_path / "out/model_final.pth", weights_only=True)["model"]

    return run


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "config", ["csmask_rcnn_effnet_lite0.yaml", "hybrid3d_mask_rcnn_effnet_lite0.yaml"]
)
def test_it_trains_goes_on_and_is_evaluated(train, phantom_tree, tmp_path, config):
    best = ("TEST.DIAGNOSIS.BEST_METRIC", "masks/dice")
    _, first = train(2, *best, config=config)
    trainer, last = train(4, *best, config=config, resume=True)
    assert trainer.start_iter == 2 and type(trainer.model.roi_heads) is CostSensitiveROIHeads
    moved = [k for k, v in last.items() if not torch.equal(v, first[k])]
    assert any(key.startswith("roi_heads.mask_head.predictor") for key in moved)
    lines = (tmp_path / "out/metrics.json").read_text().splitlines()
    assert all(0 < line["loss_mask"] < 10 for line in map(json.loads, lines) if "loss_mask" in line)

    results = flatten_results_dict(trainer.test_best())
    assert set(results) == set(metric_names(["hemorrhage"], masks=True, segm=True))
    folder = tmp_path / "out/inference/ich_test"
    test = (phantom_tree / "ImageSets/Main/test.txt").read_text().split()
    rows = {row["image_id"]: row for row in read(folder / "masks.csv")}
    assert set(rows) == set(test)  # the phantom's masks are all known
    true = [float(row["true_ml"]) for row in read(folder / "volumes.csv") if row["type"] == "all"]
    assert len(true) == 2 and max(true) > 0.1  # of a patient who bleeds and one who does not
    boxes = json.loads((folder / "coco_instances_results.json").read_text())
    assert boxes and all(decode_mask(box["segmentation"]).shape == (64, 64) for box in boxes)
    (model,) = json.loads((folder / "report.json").read_text())["models"]
    assert model["masks"] == json.loads((folder / "masks.json").read_text())
    page = (folder / "report.html").read_text()
    assert "<h2>Masks</h2>" in page and f"{model['masks']['types']['all']['true_ml']:.2f}" in page


def test_a_box_without_a_mask_is_trained_on_by_the_head_that_knows(train, phantom_tree, tmp_path):
    tree = tmp_path / "some"
    for name in ("DICOM", "Annotations", "ImageSets", "patients.csv"):
        tree.mkdir(exist_ok=True)
        (tree / name).symlink_to(phantom_tree / name)
    masks = sorted((phantom_tree / "SegmentationObject").iterdir())
    train_ids = (phantom_tree / "ImageSets/Main/train.txt").read_text().split()
    (tree / "SegmentationObject").mkdir()
    mask = next(path for path in masks if path.stem in train_ids)
    (tree / "SegmentationObject" / mask.name).symlink_to(mask)
    root = ("DATASETS.ICH_ROOT", str(tree))
    with pytest.raises(ValueError, match="MaskRCNNConvUpsampleHead would take for empty ones"):
        train(2, *root, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")
    with pytest.raises(ValueError, match="BEST_METRIC is 'segm/AP', which validation"):
        train(2, *root, "TEST.DIAGNOSIS.BEST_METRIC", "segm/AP")
    trainer, _ = train(2, *root)
    # No mask of validation or test is known.
    assert set(flatten_results_dict(trainer.test_best())) == set(metric_names(["hemorrhage"]))


def test_the_pyramid_takes_masks_where_bleeds_have_cells(tiny_cfg):
    opts = (
        "MODEL.ANCHOR_GENERATOR.SIZES",
        "[[8.0], [16.0], [32.0]]",
        "MODEL.FPN.OUT_CHANNELS",
        "32",
    )
    model = build_model(tiny_cfg(*opts, config="mask_rcnn_effnet_lite0_fpn.yaml")).eval()
    poolers = model.roi_heads.mask_pooler.level_poolers
    assert [round(1 / p.spatial_scale) for p in poolers] == [8, 16, 32]
    with torch.no_grad():
        (found,) = model([{"image": torch.rand(3, 64, 64) * 255, "height": 96, "width": 96}])
    assert found["instances"].pred_masks.shape[1:] == (96, 96) and len(found["instances"])


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "DiagnosisRCNN"])
def test_masks_are_of_the_boxes_after_votes_and_refinement(tiny_cfg, architecture):
    opts = ("MODEL.ROI_HEADS.VOTE_THRESH_TEST", "0.3", "MODEL.ROI_HEADS.REFINE_TEST", "2")
    opts += ("MODEL.META_ARCHITECTURE", architecture, "TEST.DETECTIONS_PER_IMAGE", "5")
    torch.manual_seed(0)
    model = build_model(tiny_cfg(*opts, config="csmask_rcnn_effnet_lite0.yaml")).eval()
    inputs = [{"image": torch.rand(3, 64, 64) * 255, "height": 96, "width": 96}]
    with torch.no_grad():
        found = model(inputs)[0]["instances"]
        again = Instances((64, 64), pred_boxes=found.pred_boxes.clone())
        again.pred_boxes.scale(64 / 96, 64 / 96)
        again.pred_classes, again.scores = found.pred_classes, found.scores
        given = model.inference(inputs, [again])[0]["instances"]
    assert len(found) and found.pred_masks.any()
    # The mask of the same box, up to what scaling it there and back rounds.
    assert (found.pred_masks != given.pred_masks).float().mean() < 1e-3


def test_slices_without_boxes_teach_no_mask(tiny_cfg):
    """DiagnosisRCNN: a bleeding slice without boxes trains the image head alone."""
    cfg = tiny_cfg(
        "MODEL.META_ARCHITECTURE", "DiagnosisRCNN", config="csmask_rcnn_effnet_lite0.yaml"
    )
    model = build_model(cfg).train()
    gt = Instances((64, 64), gt_boxes=Boxes(torch.zeros(0, 4)))
    gt.gt_classes = torch.zeros(0, dtype=torch.int64)
    inputs = {"image": torch.rand(3, 64, 64) * 255, "image_label": 1, "instances": gt}
    with EventStorage():
        losses = model([inputs, inputs])
        assert losses["loss_mask"] == 0 < losses["loss_image"]
        sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.roi_heads.mask_head.parameters())


@pytest.mark.parametrize(
    "config", ["mask_rcnn_effnet_lite0.yaml", "hybrid3d_mask_rcnn_effnet_lite0.yaml"]
)
def test_its_diagnosis_has_masks_and_volumes(write_run, phantom_tree, tmp_path, config):
    run = write_run(*SMALL, config=config)
    files = sorted((phantom_tree / "DICOM").glob("P0001_*.dcm"))
    found = diagnose(files, run, threshold=0.01)
    (patient,) = found.patients
    # By hand: union of the masks of each slice, area of a pixel, distance of slices.
    area = math.prod(read_spacing(files[0]))
    pixels = [
        np.any([decode_mask(m) for m, x in zip(s.masks, s.scores) if x >= 0.01], axis=0).sum()
        for s in found.slices
    ]
    widths, _ = slice_widths([s.source.position_mm for s in found.slices])
    expected = sum(p * area * w for p, w in zip(pixels, widths)) / 1000
    assert max(pixels) > 0 and widths == pytest.approx(7.5)
    assert patient.volume_ml == {"hemorrhage": pytest.approx(expected)}

    found.write(tmp_path / "results", overlays="all", viewer=True)
    (row,) = read(tmp_path / "results/patients.csv")
    assert float(row["volume_ml_hemorrhage"]) == pytest.approx(expected, abs=1e-3)
    areas = [float(row["area_mm2_hemorrhage"]) for row in read(tmp_path / "results/slices.csv")]
    assert areas == pytest.approx([n * area for n in pixels], abs=1e-3)
    content = json.loads((tmp_path / "results/diagnosis.json").read_text())
    assert content["patients"][0]["volume_ml"] == {"hemorrhage": pytest.approx(expected)}
    boxes = [box for s in content["patients"][0]["slices"] for box in s["boxes"]]
    assert boxes and all(decode_mask(box["mask"]).shape == (64, 64) for box in boxes)
    # One file alone: no distance of slices, so no volume.
    (patient,) = diagnose(files[0], run, threshold=0.01).patients
    assert patient.volume_ml is None


def test_of_a_picture_no_area_is_known_whether_or_not_something_is_found(write_run, tmp_path):
    run = write_run(*SMALL, config="mask_rcnn_effnet_lite0.yaml")
    picture = tmp_path / "slice.png"
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(picture)
    (s,) = diagnose(picture, run, threshold=0.01).slices
    assert s.masks is not None and s.area_mm2 is None


def test_masks_are_smoothed_with_their_boxes(write_run, phantom_tree):
    smoothing = ("TEST.DIAGNOSIS.SMOOTHING", "[0.25, 0.5, 0.25]")
    run = write_run(
        *(*SMALL, *smoothing, "TEST.DIAGNOSIS.SMOOTHING_IOU", "0.1"),
        config="mask_rcnn_effnet_lite0.yaml",
    )
    files = sorted((phantom_tree / "DICOM").glob("P0001_*.dcm"))
    for s in diagnose(files, run, threshold=0.01).slices:
        assert len(s.masks) == len(s.boxes) > 0
        for mask, (x0, y0, x1, y1) in zip(map(decode_mask, s.masks), s.boxes):
            rows, columns = np.nonzero(mask)
            if len(rows):  # a mask lies in its box
                assert x0 - 1 <= columns.min() and columns.max() <= x1
                assert y0 - 1 <= rows.min() and rows.max() <= y1
