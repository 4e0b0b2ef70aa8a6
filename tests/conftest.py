"""Small things that several tests need: a config, a CT slice on disk, a VOC tree."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from hypothesis import HealthCheck, settings
from PIL import Image
from pydicom.uid import generate_uid

from ich_det2 import add_ich_config
from ich_det2.data.dicom.writing import make_ct
from ich_det2.phantom import write_dataset

CONFIGS = Path(__file__).parents[1] / "configs"
BLEED = [("IPH", (11, 13, 30, 28))]
SPLITS = {"train": ("a", "b", "c", "d"), "val": ("e", "f"), "test": ("g", "h")}

torch.set_num_threads(1)
settings.register_profile(
    "ich",
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("ich")


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz-examples", type=int, default=60, help="mutated files of each kind in test_fuzz.py"
    )
    parser.addoption(
        "--studies", type=int, default=40, help="that a node is sent in a row in test_crashes.py"
    )


@pytest.fixture(autouse=True)
def loggers():
    """Takes back what a training in this process does to the loggers, which print to its stdout."""
    changed = [logging.getLogger(name) for name in ("detectron2", "fvcore", "ich_det2")]
    before = [(logger, logger.level, logger.propagate, logger.handlers[:]) for logger in changed]
    yield
    for logger, level, propagate, handlers in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture
def tiny_cfg():
    """Factory of a config: EfficientNet-Lite0, 64 pixels, random weights, no augmentation."""

    def make(*opts, config="csfrcnn_effnet_lite0.yaml"):
        cfg = get_cfg()
        add_ich_config(cfg)
        cfg.merge_from_file(str(CONFIGS / config))
        cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
        cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[12.0, 24.0]]
        cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
        for name in ("SHIFT", "SCALE", "ROTATE", "JITTER"):
            cfg.INPUT.AUG[name] = 0.0
        cfg.merge_from_list(list(opts))
        return cfg

    return make


@pytest.fixture
def write_ct():
    """Function that writes HU, sized (H, W), as an uncompressed DICOM CT slice."""

    def write(path, hu, **attributes):
        stored = (np.rint(hu) + 1024).astype("<u2")
        ds = make_ct(stored, generate_uid(), intercept=-1024, **attributes)
        ds.save_as(path, enforce_file_format=True)
        return path

    return write


@pytest.fixture
def voc_tree(tmp_path, write_ct):
    """Factory of a VOC tree whose objects are bright rectangles (80 HU) in brain (30 HU)."""

    def make(images, *, split="train", size=(64, 48), kind="png", patients=None, header=None):
        """
        Args:
            images: image id -> objects (name, (xmin, ymin, xmax, ymax)), 1-based inclusive.
            split: name of the list.
            size: (width, height) in pixels.
            kind: "png" (window 50/100) or "dicom".
            patients: lines of patients.csv.
            header: image id -> DICOM attributes.
        """
        root = tmp_path / "tree"
        for folder in ("Annotations", "DICOM", "JPEGImages", "ImageSets/Main"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        width, height = size
        for image_id, objects in images.items():
            hu = np.full((height, width), 30.0)
            xml = f"<size><width>{width}</width><height>{height}</height></size>"
            for name, (xmin, ymin, xmax, ymax) in objects:
                hu[ymin - 1 : ymax, xmin - 1 : xmax] = 80
                corners = zip(("xmin", "ymin", "xmax", "ymax"), (xmin, ymin, xmax, ymax))
                box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners)
                xml += f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"
            if kind == "dicom":
                file = root / "DICOM" / f"{image_id}.dcm"
                write_ct(file, hu, **(header or {}).get(image_id, {}))
            else:
                file = root / "JPEGImages" / f"{image_id}.png"
                # Level 50, width 100 is 0..100 HU.
                Image.fromarray(np.rint(hu / 100 * 255).astype(np.uint8)).save(file)
            xml = f"<annotation><filename>{file.name}</filename>{xml}</annotation>"
            (root / "Annotations" / f"{image_id}.xml").write_text(xml)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(images) + "\n")
        if patients is not None:
            (root / "patients.csv").write_text("\n".join(patients) + "\n")
        return root

    return make


@pytest.fixture
def full_tree(voc_tree):
    """Factory of a VOC tree: 4 training, 2 validation and 2 test slices, every other bleeds."""

    def make(kind="png"):
        for split, ids in SPLITS.items():
            images = {i: BLEED if n % 2 == 0 else [] for n, i in enumerate(ids)}
            root = voc_tree(images, split=split, kind=kind)
        patients = [f"{i},p-{i}" for ids in SPLITS.values() for i in ids]
        (root / "patients.csv").write_text("\n".join(["image,patient", *patients]) + "\n")
        return root

    return make


@pytest.fixture(scope="session")
def phantom_tree(tmp_path_factory):
    """A VOC tree of six synthetic patients, 64 x 64 pixels; to be read only."""
    root = tmp_path_factory.mktemp("phantom")
    write_dataset(root, patients=6, size=64)
    return root


@pytest.fixture
def write_run(tmp_path, tiny_cfg):
    """Function that writes OUTPUT_DIR of a model of random weights, whose scores differ from slice
    to slice; it takes what tiny_cfg takes."""

    def write(*opts, folder="run", **kwargs):
        run = tmp_path / folder
        run.mkdir()
        torch.manual_seed(3)
        cfg = tiny_cfg(*opts, "OUTPUT_DIR", str(run), **kwargs)
        model = build_model(cfg)
        heads = getattr(model, "roi_heads", None)
        if heads is not None:
            with torch.no_grad():
                heads.box_predictor.cls_score.weight *= 100
        (run / "config.yaml").write_text(cfg.dump())
        torch.save({"model": model.state_dict()}, run / "model_best.pth")
        return run

    return write


@pytest.fixture
def run_dir(write_run):
    return write_run()
