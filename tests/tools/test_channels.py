"""Neighbours or windows as channels, and smoothed scores: from training to tools/diagnose.py."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom import dcmread

from ich_det2.data import IchDatasetMapper, load_ich_voc
from ich_det2.engine import IchTrainer
from ich_det2.engine.checks import check_config
from ich_det2.inference.slices import find_slices

REPO = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("diagnose", REPO / "tools/diagnose.py")
diagnose = importlib.util.module_from_spec(spec)
spec.loader.exec_module(diagnose)

# A slice is missing between the third and the fourth; names of files are against the order.
HEIGHTS = (0, 5, 10, 25, 30)
SPLITS = {"train": "abcde", "val": "fghij", "test": "klmno"}
BLEED = [("IPH", (11, 13, 30, 28))]
OPTIONS = {
    "neighbours": ("INPUT.CONTEXT_SLICES", "1"),
    "hybrid": (
        *("INPUT.CONTEXT_SLICES", "2", "MODEL.BACKBONE.NAME", "build_hybrid3d_backbone"),
        *("MODEL.PIXEL_MEAN", str([127.5] * 5), "MODEL.PIXEL_STD", str([127.5] * 5)),
    ),
    "windows": ("INPUT.WINDOWS", "[[40, 80], [75, 215], [600, 2800]]"),
    "image head": (
        "MODEL.META_ARCHITECTURE",
        "DiagnosisRCNN",
        "MODEL.IMAGE_HEAD.BOX_WEIGHT",
        "0.5",
    ),
    "smoothing": ("TEST.DIAGNOSIS.SMOOTHING", "[0.2, 0.5, 0.3]"),
    "smoothed boxes": (
        *("TEST.DIAGNOSIS.SMOOTHING", "[0.2, 0.5, 0.3]", "TEST.DIAGNOSIS.SMOOTHING_IOU", "0.3"),
        *("INPUT.SKULL_MASK", "True", "INPUT.DENSITY", "True", "INPUT.ASYMMETRY", "True"),
    ),
}


@pytest.fixture
def tree(voc_tree, write_ct):
    """A series of DICOM for each split; every slice has a brightness of its own."""
    rng = np.random.default_rng(0)
    for split, ids in SPLITS.items():
        root = voc_tree({i: BLEED if n % 2 else [] for n, i in enumerate(ids)}, split=split)
        for image_id, place in zip(ids, rng.permutation(5)):
            hu = rng.integers(0, 20, (48, 64)) + 12.0 * place
            hu[12:28, 10:30] += 60
            hu[:4] = 900
            write_ct(
                root / "DICOM" / f"{image_id}.dcm", hu, PatientID=split,
                SeriesInstanceUID=f"1.2.{ord(split[1])}", PixelSpacing=[0.5, 0.5],
                ImagePositionPatient=[0, 0, HEIGHTS[place]],
                ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            )  # fmt: skip
    shutil.rmtree(root / "JPEGImages")
    for xml in root.glob("Annotations/*.xml"):
        xml.write_text(xml.read_text().replace(".png", ".dcm"))
    return root


@pytest.fixture
def fed(monkeypatch):
    """Images that mappers of evaluation gave, by SOP Instance UID."""
    images, call = {}, IchDatasetMapper.__call__

    def record(self, dataset_dict):
        output = call(self, dataset_dict)
        if not self.is_train:
            images[dcmread(dataset_dict["file_name"]).SOPInstanceUID] = output["image"]
        return output

    monkeypatch.setattr(IchDatasetMapper, "__call__", record)
    return images


def read_scores(path, key, column="score"):
    with open(path, newline="") as file:
        return {row[key]: float(row[column]) for row in csv.DictReader(file)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_diagnose_feeds_what_the_evaluation_fed(tree, fed, tiny_cfg, tmp_path, options):
    run = tmp_path / "run"
    cfg = tiny_cfg(
        *("DATASETS.ICH_ROOT", str(tree), "OUTPUT_DIR", str(run), "DATALOADER.NUM_WORKERS", "0"),
        *("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)", "SOLVER.IMS_PER_BATCH", "2"),
        *("TEST.EVAL_PERIOD", "2", *options),
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
    expected = {}
    for split in ("val", "test"):
        scores = read_scores(run / f"inference/ich_{split}/image_scores.csv", "image_id")
        expected |= {uid[i]: score for i, score in scores.items()}

    # The same series out of a PACS, in other files.
    exam = tmp_path / "exam"
    exam.mkdir()
    for i, image_id in enumerate("nfkihmgojl"):
        shutil.copy(tree / "DICOM" / f"{image_id}.dcm", exam / f"IM{i}")
    fed.clear()
    assert diagnose.main([str(run), str(exam), "--output", str(tmp_path / "o"), "--identify"]) == 0
    got = read_scores(tmp_path / "o/slices.csv", "sop_uid")
    assert len(set(got.values())) > 5 and min(got.values()) > 0
    assert got == pytest.approx(expected, abs=1e-6)
    assert fed.keys() == evaluated.keys() == expected.keys()
    for key, image in fed.items():
        assert torch.equal(image, evaluated[key])
    if "INPUT.CONTEXT_SLICES" in options:
        check_neighbours(exam, fed)
    if "TEST.DIAGNOSIS.SMOOTHING_IOU" in options:
        results = json.loads((tmp_path / "o/diagnosis.json").read_text())["patients"]
        boxes = [box for p in results for s in p["slices"] for box in s["boxes"]]
        assert any(box["raw_score"] != box["score"] for box in boxes)
    elif "TEST.DIAGNOSIS.SMOOTHING" in options:
        check_smoothing(tmp_path / "o/slices.csv", exam)


def check_neighbours(exam, fed):
    """The channels are the slices at other heights; ends and gaps repeat the slice itself."""
    middle = len(next(iter(fed.values()))) // 2
    places = {}
    for path in exam.iterdir():
        ds = dcmread(path)
        height = HEIGHTS.index(ds.ImagePositionPatient[2])
        places[ds.PatientID, height] = fed[ds.SOPInstanceUID]
    assert len(places) == 10
    for (patient, height), image in places.items():
        before, after = ((0, 1), (0, 2), (1, 2), (3, 4), (3, 4))[height]
        assert torch.equal(image[middle - 1], places[patient, before][middle])
        assert torch.equal(image[middle + 1], places[patient, after][middle])
        assert not torch.equal(image[middle - 1], image[middle + 1])


def check_smoothing(path, exam):
    """Scores are means of the neighbours' raw ones; ends and gaps leave weights out."""
    score, raw = read_scores(path, "sop_uid"), read_scores(path, "sop_uid", "raw_score")
    uids = {}
    for ds in map(dcmread, exam.iterdir()):
        uids[ds.PatientID, HEIGHTS.index(ds.ImagePositionPatient[2])] = ds.SOPInstanceUID
    for patient in ("val", "test"):
        a, b, c, d, e = (raw[uids[patient, i]] for i in range(5))
        expected = [
            *((0.5 * a + 0.3 * b) / 0.8, 0.2 * a + 0.5 * b + 0.3 * c, (0.2 * b + 0.5 * c) / 0.7),
            *((0.5 * d + 0.3 * e) / 0.8, (0.2 * d + 0.5 * e) / 0.7),
        ]
        assert [score[uids[patient, i]] for i in range(5)] == pytest.approx(expected, abs=1e-5)


def test_neighbours_of_pictures_are_those_of_the_training(voc_tree):
    root = voc_tree({i: [] for i in "abcd"}, patients=["image,patient,series,position_mm"])
    with open(root / "patients.csv", "a") as file:
        file.writelines(f"{i},p,s,{z}\n" for i, z in zip("abcd", (10, 0, 15, 5)))
    slices, *_ = find_slices([root / "JPEGImages"])
    assert [(s.path.stem, s.index) for s in slices] == [("b", 0), ("d", 1), ("a", 2), ("c", 3)]
    trained = {d["file_name"]: d["context_files"] for d in load_ich_voc(root, "train", context=1)}
    assert {str(s.path): list(s.context_files) for s in slices} == trained


@pytest.mark.parametrize("kind", ["picture", "dicom"])
def test_slices_at_unknown_places_are_not_diagnosed_without_their_neighbours(
    tiny_cfg, tmp_path, write_ct, kind
):
    path = tmp_path / "a.png"
    if kind == "picture":
        Image.new("L", (32, 32)).save(path)
    else:
        path = write_ct(tmp_path / "a.dcm", np.zeros((32, 32)))
    (entry,), *_ = find_slices([path])
    mapper = IchDatasetMapper(tiny_cfg("INPUT.CONTEXT_SLICES", "1"), is_train=False)
    with pytest.raises(ValueError, match="a.*not known which slices are its neighbours.*position"):
        mapper({"file_name": str(path), "frame": None, "context_files": entry.context_files})
