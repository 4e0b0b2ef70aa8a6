"""Anchors by themselves: the table, the fragment to paste and the plot."""

import importlib.util
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from ich_det2.data import register_ich_datasets
from ich_det2.engine.anchors import fill_anchors, needs_anchors
from ich_det2.engine.config import load_config

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "csfrcnn_r50.yaml")


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "cluster_anchors.py"
    spec = importlib.util.spec_from_file_location("cluster_anchors", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(voc_tree):
    """Boxes of 8 x 8 and 16 x 16 at 48 px, the short edge of the slices: nothing is resized."""
    return voc_tree({"a": [("SDH", (1, 1, 8, 8)), ("IPH", (20, 20, 35, 35))], "b": []})


def arguments(tree, *options, opts=()):
    size = ("INPUT.MIN_SIZE_TRAIN", "(48,)")
    return ["--config-file", CONFIG, *options, "DATASETS.ICH_ROOT", str(tree), *size, *opts]


def table(out):
    """Name of the anchors -> per position, recalls, mean best IoU."""
    lines = [line.split("|") for line in out.splitlines()]
    numbers = {cells[1].strip(): cells[2:6] for cells in lines if len(cells) == 7}
    return {
        name: [float(cell) for cell in cells]
        for name, cells in numbers.items()
        if cells[0].strip().isdigit()
    }


def generator_of(path):
    return yaml.safe_load(path.read_text())["MODEL"]["ANCHOR_GENERATOR"]


def test_the_fragment_is_a_config_with_the_anchors_of_the_boxes(tool, tree, tmp_path, capsys):
    out = tmp_path / "anchors.yaml"
    assert tool.main(arguments(tree, "--output", str(out))) == 0
    assert generator_of(out) == {
        "NAME": "ClusteredAnchorGenerator",
        "CLUSTERS": {"METHOD": "separate"},
        "SIZES": [[8.0, 16.0]],
        "ASPECT_RATIOS": [[1.0]],
    }
    rows = table(capsys.readouterr().out)
    assert list(rows) == [*tool.METHODS, tool.STOCK]
    for name in tool.METHODS:
        assert rows[name] == [2, 1, 1, 1]
    # Detectron2's smallest anchors, 32 x 32, meet 16 x 16 with IoU 0.25 and 8 x 8 with 0.0625; the
    # 22.6 x 45.3 ones with 256/1024 too.
    assert rows[tool.STOCK] == [15, 0, 0, pytest.approx(0.156, abs=0.001)]


def test_validation_boxes_judge_what_training_boxes_gave(tool, tree, voc_tree, capsys):
    assert tool.main(arguments(tree)) == 0
    assert "No comparison on DATASETS.VAL ['ich_val']" in capsys.readouterr().out
    voc_tree({"c": []}, split="val")
    assert tool.main(arguments(tree)) == 0
    assert "it has no box" in capsys.readouterr().out
    # 8 x 16, which 8 x 8 and 16 x 16 both meet with IoU 1/2, and 16 x 16 itself.
    voc_tree({"c": [("SDH", (1, 1, 8, 16))], "d": [("SDH", (9, 9, 24, 24))]}, split="val")
    assert tool.main(arguments(tree)) == 0
    training, validation = capsys.readouterr().out.split("2 validation boxes")
    assert table(training)["joint IoU"] == [2, 1, 1, 1]
    assert table(validation)["joint IoU"] == [2, 1, 0.5, 0.75]
    assert list(table(validation)) == [*tool.METHODS, tool.STOCK]


def test_each_row_is_of_its_method(tool, voc_tree, capsys):
    # 16 x 8, 8 x 32 and 12 x 12, two sizes and two ratios: four pairs hold all three boxes.
    boxes = [("SDH", (1, 1, 16, 8)), ("SDH", (1, 1, 8, 32)), ("SDH", (1, 1, 12, 12))]
    tree = voc_tree({"a": boxes})
    assert tool.main(arguments(tree, "--num-sizes", "2", "--num-ratios", "2")) == 0
    linear, log, joint, _ = table(capsys.readouterr().out).values()
    assert joint == [3, 1, 1, 1]
    # Ratios 1/2, 1 | 4, centres 0.75, 4; in log space 0.71, 4.
    assert linear[0] == log[0] == 4 and linear != log and max(linear[3], log[3]) < 1


@pytest.mark.parametrize("by", ["option", "config"])
def test_the_joint_fragment_holds_pairs(tool, tree, tmp_path, by):
    out = tmp_path / "anchors.yaml"
    config = ("MODEL.ANCHOR_GENERATOR.CLUSTERS.METHOD", "joint") if by == "config" else ()
    option = ("--method", "joint") if by == "option" else ()
    assert tool.main(arguments(tree, "--output", str(out), *option, opts=config)) == 0
    assert generator_of(out) == {
        "NAME": "ClusteredAnchorGenerator",
        "CLUSTERS": {"METHOD": "joint"},
        "PAIRS": [[[8.0, 8.0], [16.0, 16.0]]],
    }


@pytest.mark.parametrize("method", ["separate", "joint"])
def test_the_fragment_gives_the_anchors_that_training_finds(tool, tree, tmp_path, method):
    out = tmp_path / "anchors.yaml"
    assert tool.main(arguments(tree, "--output", str(out), "--method", method)) == 0
    opts = ("DATASETS.ICH_ROOT", str(tree), "INPUT.MIN_SIZE_TRAIN", "(48,)")
    pasted, trained = load_config(CONFIG, opts), load_config(CONFIG, opts)
    pasted.merge_from_file(str(out))
    assert not needs_anchors(pasted)
    trained.MODEL.ANCHOR_GENERATOR.CLUSTERS.METHOD = method
    register_ich_datasets(tree, trained.DATASETS.ICH_CLASSES)
    fill_anchors(trained)
    assert pasted.MODEL.ANCHOR_GENERATOR == trained.MODEL.ANCHOR_GENERATOR


def test_levels_get_their_share(tool, tree, tmp_path, capsys):
    out, levels = tmp_path / "anchors.yaml", ("MODEL.RPN.IN_FEATURES", "['p2', 'p3']")
    assert tool.main(arguments(tree, "--output", str(out), opts=levels)) == 0
    assert generator_of(out)["SIZES"] == [[8.0], [16.0]]
    rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows.values()] == [1, 1, 1, 15]
    levels = ("MODEL.RPN.IN_FEATURES", "['p2', 'p3', 'p4']")
    assert tool.main(arguments(tree, opts=levels)) == 2
    assert "gave 2 SIZES" in capsys.readouterr().err


def test_the_plot_shows_every_method_beside_its_recall(tool, tree, tmp_path, monkeypatch):
    axes, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (axes.extend(self.axes), save(self, *a, **k))
    )
    file = tmp_path / "out" / "anchors.png"
    file.parent.mkdir()
    assert tool.main(arguments(tree, "--plot", str(file))) == 0
    with Image.open(file) as image:
        assert image.format == "PNG" and min(image.size) > 300
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    *scatter, recall = axes
    assert [ax.get_title() for ax in scatter] == [*tool.METHODS, tool.STOCK]
    assert [ax.get_xscale() for ax in scatter] == ["log"] * 4
    boxes, anchors = scatter[2].lines
    assert sorted(zip(*boxes.get_data())) == sorted(zip(*anchors.get_data())) == [(8, 8), (16, 16)]
    # The default's IoUs are 0.0625 and 0.25: the recall is 1 up to the first, 1/2 up to the second.
    line = {line.get_label(): line.get_data() for line in recall.lines}[tool.STOCK]
    assert [list(values) for values in line] == [[0, 0.0625, 0.25, 1], [1, 1, 0.5, 0]]


@pytest.mark.parametrize("option", ["--output", "--plot"])
def test_a_folder_that_is_missing_is_one_sentence(tool, tree, tmp_path, capsys, option):
    assert tool.main(arguments(tree, option, str(tmp_path / "no" / "file"))) == 2
    error = capsys.readouterr().err
    assert option in error and "there is no folder" in error


def test_no_boxes_is_one_sentence(tool, voc_tree, capsys):
    root = voc_tree({"a": []})
    assert tool.main(["--config-file", CONFIG, "DATASETS.ICH_ROOT", str(root)]) == 2
    assert "has no box" in capsys.readouterr().err
