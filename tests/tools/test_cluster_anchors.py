"""Anchors by themselves: the table and the fragment to paste."""

import importlib.util
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "csfrcnn_effnet_lite0.yaml")


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "cluster_anchors.py"
    spec = importlib.util.spec_from_file_location("cluster_anchors", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_fragment_is_a_config_with_the_anchors_of_the_boxes(tool, voc_tree, tmp_path, capsys):
    # At 48 px, the short edge of the slices, nothing is resized: the boxes stay 8 x 8 and 16 x 16.
    boxes = [("SDH", (1, 1, 8, 8)), ("IPH", (20, 20, 35, 35))]
    root, out = voc_tree({"a": boxes, "b": []}), tmp_path / "anchors.yaml"
    argv = ["--config-file", CONFIG, "--output", str(out), "DATASETS.ICH_ROOT", str(root)]
    assert tool.main([*argv, "INPUT.MIN_SIZE_TRAIN", "(48,)"]) == 0
    generator = yaml.safe_load(out.read_text())["MODEL"]["ANCHOR_GENERATOR"]
    assert generator == {
        "NAME": "ClusteredAnchorGenerator",
        "SIZES": [[8.0, 16.0]],
        "ASPECT_RATIOS": [[1.0]],
    }
    rows = {
        cells[1].strip(): [float(cell) for cell in cells[2:6]]
        for line in capsys.readouterr().out.splitlines()
        if len(cells := line.split("|")) == 7 and cells[1].strip() in ("clustered", tool.STOCK)
    }
    assert rows["clustered"] == [2, 1, 1, 1]
    # Detectron2's smallest anchors, 32 x 32, meet 16 x 16 with IoU 0.25 and 8 x 8 with 0.0625; the
    # 22.6 x 45.3 ones with 256/1024 too.
    assert rows[tool.STOCK] == [15, 0, 0, pytest.approx(0.156, abs=0.001)]


def test_no_boxes_is_one_sentence(tool, voc_tree, capsys):
    root = voc_tree({"a": []})
    assert tool.main(["--config-file", CONFIG, "DATASETS.ICH_ROOT", str(root)]) == 2
    assert "has no box" in capsys.readouterr().err
