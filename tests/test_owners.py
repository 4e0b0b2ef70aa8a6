"""One owner each: where a tree's and a run's files are named, and where a picture is opened."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    p for room in ("ich_det2", "tools", "datasets") for p in sorted((ROOT / room).rglob("*.py"))
]


def strings(tree):
    """The text constants of a module, but for docstrings and parts of sentences."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if " " not in node.value and "\n" not in node.value:
                yield node.value


TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES
}


def places(found_in):
    """The files in which a syntax tree holds something."""
    return [name for name, tree in TREES.items() if any(found_in(tree))]


@pytest.mark.parametrize(
    "name",
    ["ImageSets", "Annotations", "JPEGImages", "SegmentationObject", "SegmentationClass",
     "patients.csv", "labels.csv"],
)  # fmt: skip
def test_names_of_a_tree_are_in_one_place(name):
    found = set(places(lambda tree: (s == name for s in strings(tree))))
    # What VOC calls the folder within an XML, and a table of the diagnosis, are others.
    found -= {"ich_det2/data/voc.py"} if name == "JPEGImages" else set()
    found -= (
        {"ich_det2/inference/outputs.py", "tools/diagnose.py"} if name == "patients.csv" else set()
    )
    assert found == {"ich_det2/data/tree.py"}


@pytest.mark.parametrize(
    "name",
    ["model_best", "model_final", "last_checkpoint", "metrics.json", "operating_point.json",
     "diagnosis_history.csv", "config.yaml", "inference"],
)  # fmt: skip
def test_names_of_a_run_are_in_one_place(name):
    known = (name, f"{name}.pth", f"{name}.json")
    found = places(lambda tree: (s in known for s in strings(tree)))
    # fvcore's Checkpointer writes this one itself.
    owner = "checkpoint" if name == "last_checkpoint" else "run_folder"
    assert found == [f"ich_det2/engine/{owner}.py"]


def test_pictures_are_opened_in_one_place():
    def opens(tree):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                yield (node.value.id, node.attr) in {
                    ("Image", "open"), ("cv2", "imread"), ("utils", "read_image"),
                }  # fmt: skip

    assert places(opens) == ["ich_det2/data/pictures.py"]
