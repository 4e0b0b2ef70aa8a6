"""Classifiers by the same code as detectors: train, resume, evaluate, report, diagnose."""

import csv
import json
import logging
from dataclasses import replace

import pytest
import torch
from detectron2.data import DatasetCatalog
from pydicom import dcmread
from torch import nn

from ich_det2.engine import IchTrainer
from ich_det2.engine.checkpoint import load_trained
from ich_det2.engine.checks import check_config
from ich_det2.engine.config import differences
from ich_det2.engine.run_folder import RunFolder
from ich_det2.engine.trainer import one_a_scan
from ich_det2.inference.diagnoser import Diagnoser
from ich_det2.inference.slices import find_slices
from ich_det2.modeling import CLASSIFIER_REGISTRY, SVM
from ich_det2.modeling.classifier_networks import LeNet

SMALL = {
    "AlexNet": 63,
    "AlexNetSVM": 63,
    "AutoencoderAlexNetSVM": 63,
    "InceptionV3": 75,
    "InceptionResNetV2": 75,
}
CONFIGS = (
    *("lenet", "alexnet", "googlenet", "densenet121", "inception_resnet_v2"),
    *("effnet_lite0", "bhcnet", "bhcnet_lstm", "bhcnet_gru"),
    *("inception_v3_windows", "densenet121_windows", "glcm"),
    *("alexnet_svm", "autoencoder_alexnet_svm", "radnet", "cnn3d"),
)


@pytest.fixture
def make_cfg(tiny_cfg, full_tree, tmp_path):
    """Factory of the config of a shipped classifier, small, on a tree of 4, 2 and 2 slices."""

    def make(name, *opts, kind="png"):
        root = full_tree(kind) if kind == "png" else series_tree(full_tree(kind))
        if kind == "png":
            # One series, named a1 to h8, whose position only the names tell.
            rename_to_numbers(root)
        cfg = tiny_cfg(
            *("DATASETS.ICH_ROOT", str(root), "OUTPUT_DIR", str(tmp_path / "out")),
            *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "TEST.EVAL_PERIOD", "2"),
            *("SOLVER.CHECKPOINT_PERIOD", "100", "DATALOADER.NUM_WORKERS", "0", *opts),
            config=f"classifier_{name}.yaml",
        )
        cfg.MODEL.CLASSIFIER.INPUT_SIZE = SMALL.get(cfg.MODEL.CLASSIFIER.NAME, 32)
        check_config(cfg, eval_only=False, resume=False)
        return cfg

    return make


def series_tree(root):
    """The slices of a tree as one patient's series, 5 mm from each other."""
    for i, path in enumerate(sorted((root / "DICOM").iterdir())):
        dataset = dcmread(path)
        dataset.SeriesInstanceUID, dataset.ImagePositionPatient = "1.2", [0, 0, 5 * i]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.save_as(path)
    names = [f"{path.stem},p" for path in (root / "DICOM").iterdir()]
    (root / "patients.csv").write_text("\n".join(["image,patient", *names]) + "\n")
    return root


def rename_to_numbers(root):
    rows = ["image,patient"]
    for split in sorted((root / "ImageSets/Main").iterdir()):
        names = split.read_text().split()
        numbered = {name: f"{name}{ord(name) - ord('a') + 1}" for name in names}
        split.write_text("\n".join(numbered.values()) + "\n")
        for name, new in numbered.items():
            (root / f"JPEGImages/{name}.png").rename(root / f"JPEGImages/{new}.png")
            xml = root / f"Annotations/{name}.xml"
            xml.with_name(f"{new}.xml").write_text(xml.read_text().replace(f"{name}.", f"{new}."))
            xml.unlink()
            rows.append(f"{new},{split.stem}")
    (root / "patients.csv").write_text("\n".join(rows) + "\n")


def train(cfg, resume=False):
    trainer = IchTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def scores_of(folder):
    with open(folder / "image_scores.csv", newline="") as file:
        return {row["image_id"]: float(row["score"]) for row in csv.DictReader(file)}


@pytest.fixture
def no_plots(monkeypatch):
    """Drawing takes longer than all else on slices as small as these."""
    for name in ("evaluation.evaluator.plot_roc", "evaluation.evaluator.plot_thresholds"):
        monkeypatch.setattr(f"ich_det2.{name}", lambda *args: None)
    monkeypatch.setattr("ich_det2.engine.hooks.plot_history", lambda *args: None)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_trains_resumes_evaluates_and_diagnoses(
    make_cfg, tmp_path, name, monkeypatch, no_plots
):
    cfg = make_cfg(name, "SOLVER.MOMENTUM", "0.0")  # half the checkpoint
    monkeypatch.setattr("ich_det2.engine.trainer.write_reports", lambda *args: None)
    train(cfg)
    cfg.SOLVER.MAX_ITER = 3
    trainer = IchTrainer(cfg)
    trainer.resume_or_load(True)
    assert trainer.start_iter == 2
    trainer.train()
    results = trainer.test_best()
    assert set(results) == {"diagnosis"}
    folder = tmp_path / "out/inference/ich_test"
    scores = scores_of(folder)
    assert list(scores) == ["g7", "h8"] and all(0 < score < 1 for score in scores.values())
    assert not (folder / "coco_instances_results.json").exists()
    (tmp_path / "out/config.yaml").write_text(cfg.dump())
    files = [tmp_path / f"tree/JPEGImages/{image}.png" for image in scores]
    found = diagnosed_by(Diagnoser.load(tmp_path / "out"), files)
    assert {image: d.score for image, d in found.items()} == pytest.approx(scores, rel=1e-4)


def diagnosed_by(model, paths):
    slices = find_slices(paths, **model.context).slices
    return {s.path.stem: d for s, d in zip(slices, model(slices), strict=True)}


def test_the_report_does_without_boxes_but_shows_the_slices(make_cfg, tmp_path):
    cfg = make_cfg("lenet", "TEST.DIAGNOSIS.OPERATING_THRESHOLD", "0.99")
    train(cfg).test_best()
    folder = tmp_path / "out/inference/ich_test"
    report = json.loads((folder / "report.json").read_text())["models"][0]
    assert report["analysis"]["lesions"] is None and report["misses"]
    (size,) = report["analysis"]["sizes"]  # one bleeding slice, of 20 x 16 pixels
    assert (size["size"], size["n"], size["to"]) == ("small", 1, 320)
    (answer,) = {c["answer"] for c in report["checklist"] if "LeNet" in str(c["answer"])}
    assert "anchors" not in answer and "at 32 pixels" in answer
    assert "data:image/jpeg" in (folder / "report.html").read_text()


def test_each_window_is_a_channel(make_cfg):
    """Rectangles of 80 HU in brain of 30 HU, seen in the windows 40/80, 80/200 and 50/40."""
    cfg = make_cfg("inception_v3_windows", kind="dicom")
    batch = next(iter(IchTrainer.build_test_loader(cfg, "ich_test")))
    image = batch[0]["image"]
    # 30 HU is (30 - 0) / 80, (30 + 20) / 200 and (30 - 30) / 40 of 255; blood (80 + 20) / 200 in
    # the second window, and white in the others.
    assert image[:, 0, 0].tolist() == pytest.approx([255 * 30 / 80, 255 / 4, 0], abs=1)
    assert image.amax((1, 2)).tolist() == pytest.approx([255, 255 / 2, 255], abs=2)
    assert [len(values) for values in (cfg.INPUT.WINDOWS, cfg.MODEL.PIXEL_MEAN)] == [3, 3]


def test_pictures_have_one_window_for_all_channels(make_cfg):
    cfg = make_cfg("densenet121_windows")
    (image, _) = (x["image"] for x in next(iter(IchTrainer.build_test_loader(cfg, "ich_test"))))
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


def test_a_training_that_goes_on_or_is_tested_has_the_config_of_its_start(make_cfg, tmp_path):
    cfg = make_cfg("lenet")
    given = cfg.clone()
    RunFolder(cfg.OUTPUT_DIR).begin(cfg)
    train(cfg)
    for eval_only in (False, True):
        again = given.clone()
        check_config(again, eval_only=eval_only, resume=True)
        assert not differences(cfg, again).keys() - {"MODEL.WEIGHTS"}


class SmallSVM(nn.Module):
    """As AlexNetSVM, on a network whose checkpoints are small."""

    def __init__(self, input_size):
        super().__init__()
        *layers, self.last = LeNet(input_size)
        self.embed, self.svm = nn.Sequential(*layers), SVM(84)

    def fit(self, features, labels, groups):
        self.svm.fit(features, labels, groups)

    def forward(self, x):
        features = self.embed(x)
        return self.last(features) if self.training else self.svm.logits(features)[:, None]


def test_each_checkpoint_has_the_machine_of_its_own_features(
    make_cfg, tmp_path, no_plots, monkeypatch
):
    """Fitted to the training slices without augmentation, at each validation and checkpoint."""
    monkeypatch.setitem(CLASSIFIER_REGISTRY._obj_map, "AlexNetSVM", SmallSVM)
    opts = ("INPUT.AUG.JITTER", "0.5", "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.WARMUP_ITERS", "0")
    cfg = make_cfg("alexnet_svm", *opts)
    cfg.SOLVER.MAX_ITER = 3
    train(cfg)
    out, means = tmp_path / "out", []
    for name in ("model_0000000", "model_0000001", "model_final", "model_best"):
        model = load_trained(cfg, out / f"{name}.pth")
        with torch.no_grad():
            batches = list(IchTrainer.build_test_loader(cfg, "ich_train"))
            features = torch.cat([model.embed(batch) for batch in batches])
        slices = [x for batch in batches for x in batch]
        again, patients = SVM(84), [x["patient_id"] for x in slices]
        again.fit(features, torch.tensor([x["image_label"] for x in slices]), patients)
        svm = model.network.svm
        torch.testing.assert_close(svm(features), again(features), atol=1e-5, rtol=1e-4)
        for name in ("slope", "offset"):
            torch.testing.assert_close(getattr(svm, name), getattr(again, name))
        means.append(svm.mean.sum().item())
    assert len(set(means[:3])) == 3


def test_a_machine_needs_slices_of_both_kinds_to_be_fitted_to(make_cfg, tmp_path):
    cfg = make_cfg("alexnet_svm")
    split = tmp_path / "tree/ImageSets/Main/train.txt"
    split.write_text("a1\nc3\n")  # which bleed
    with pytest.raises(ValueError, match="the 2 slices are all of label 1, but AlexNetSVM is"):
        check_config(cfg, eval_only=False, resume=False)


def test_no_anchors_are_clustered_and_nothing_is_thawed(make_cfg, caplog):
    with caplog.at_level(logging.WARNING, "ich_det2"):
        cfg = make_cfg("lenet", "MODEL.ANCHOR_GENERATOR.SIZES", "[[]]")
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[]]
    assert "frozen" not in caplog.text


def test_sequences_of_pictures_are_ordered_by_name(make_cfg, caplog):
    with caplog.at_level(logging.WARNING, "ich_det2"):
        cfg = make_cfg("bhcnet_gru", "INPUT.SEQUENCE_SLICES", "1")
    assert "no position_mm for 8 images" in caplog.text
    batch = [x for batch in IchTrainer.build_test_loader(cfg, "ich_train") for x in batch]
    images = [x["image"] for x in batch]
    for i, x in enumerate(batch):
        # a1, b2, c3 and d4 are one patient; at the ends the slice itself stands in.
        window = [images[max(i - 1, 0)], images[i], images[min(i + 1, 3)]]
        assert torch.equal(x["sequence"], torch.stack(window))


@pytest.mark.parametrize("name", ["bhcnet_lstm", "inception_v3_windows", "radnet"])
def test_diagnosis_of_a_series_gives_the_scores_of_the_evaluation(
    make_cfg, tmp_path, name, monkeypatch, no_plots
):
    cfg = make_cfg(name, kind="dicom")
    monkeypatch.setattr("ich_det2.engine.trainer.write_reports", lambda *args: None)
    trainer = train(cfg)
    out = tmp_path / "out"
    (out / "config.yaml").write_text(cfg.dump())
    trainer.test_best()
    found = diagnosed_by(Diagnoser.load(out), [tmp_path / "tree/DICOM"])
    expected = scores_of(out / "inference/ich_test")
    assert {image: found[image].score for image in expected} == pytest.approx(expected, rel=1e-4)
    assert all(len(d.boxes) == 0 and d.size == (48, 64) for d in found.values())


def test_a_scan_gets_one_score_in_evaluation_and_diagnosis(
    make_cfg, tmp_path, monkeypatch, no_plots
):
    cfg = make_cfg("cnn3d", "INPUT.SCAN_SLICES", "3", kind="dicom")
    monkeypatch.setattr("ich_det2.engine.trainer.write_reports", lambda *args: None)
    trainer = train(cfg)
    out = tmp_path / "out"
    (out / "config.yaml").write_text(cfg.dump())
    trainer.test_best()
    expected = scores_of(out / "inference/ich_test")
    assert len(expected) == 2 and len({*expected.values()}) == 1
    model = Diagnoser.load(out)
    files = [tmp_path / f"tree/DICOM/{image}.dcm" for image in expected]
    slices = find_slices(files, **model.context).slices
    found = [d.score for d in model(slices)]
    assert found == pytest.approx([*expected.values()], rel=1e-4)
    lost = [replace(s, scan_files=()) for s in slices]  # as of slices whose place is not known
    assert all("not known of which scan it is" in str(error) for error in model(lost))


def test_a_scan_is_drawn_once_an_epoch_and_bleeds_if_any_slice_does(make_cfg):
    cfg = make_cfg("cnn3d", "SOLVER.IMS_PER_BATCH", "1")
    dataset = DatasetCatalog.get("ich_train")
    assert [d["image_label"] for d in dataset] == [1, 0, 1, 0]
    healthy = [{**d, "image_label": 0, "scan_files": [("x", None)]} for d in dataset[1::2]]
    scans = one_a_scan(cfg, [*dataset[1:], *healthy])
    assert [(d["image_id"], d["image_label"]) for d in scans] == [("b2", 1), ("b2", 0)]
    (batch,) = next(iter(IchTrainer.build_train_loader(cfg)))
    assert batch["image_label"] == 1 and batch["scan"].shape == (24, 3, 64, 85)
    cfg.INPUT.SCAN_SLICES = 0
    assert one_a_scan(cfg, dataset) is dataset
