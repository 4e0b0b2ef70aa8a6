"""The documentation: its examples run, its links lead somewhere, its names exist."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from ich_det2.phantom import write_exam

REPO = Path(__file__).parents[1]
README = REPO / "README.md"
PAGES = [
    *(REPO / name for name in ("README.md", "RESULTS.md", "CHANGELOG.md", "datasets/README.md")),
    *sorted((REPO / "docs").glob("*.md")),
]
NOTEBOOK = REPO / "examples" / "diagnose_phantom.ipynb"


def page_id(path):
    return str(path.relative_to(REPO))


def code_blocks(path):
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.M | re.S)


def anchors(path):
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.fixture
def run(tmp_path, tiny_cfg):
    """OUTPUT_DIR of a model of random weights."""
    folder = tmp_path / "output" / "csfrcnn_r50"
    folder.mkdir(parents=True)
    cfg = tiny_cfg("OUTPUT_DIR", str(folder))
    torch.manual_seed(3)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model_best.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


@pytest.fixture
def exam(tmp_path, monkeypatch):
    """A phantom exam of a few slices in the current folder."""
    files = write_exam(tmp_path / "exam", seed=1, size=64)
    for path in files[6:]:
        path.unlink()
    monkeypatch.chdir(tmp_path)
    return files[0].parent


@pytest.mark.parametrize("path", [README, REPO / "docs" / "api.md"], ids=page_id)
def test_examples_run_one_after_another(path, exam, run):
    names = {"exam": exam, "run": run}
    blocks = code_blocks(path)
    assert blocks
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{path.name}, example {number}", "exec"), names)


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.is_relative_to(REPO) and there.exists(), target
        assert not heading or heading in anchors(there), target


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_named_modules_and_files_exist(path):
    text = path.read_text()
    for name in set(re.findall(r"\bich_det2(?:\.[A-Za-z_]\w*)+", text)):
        resolve(name)
    for name in re.findall(r"`((?:ich_det2|configs|tests|tools|datasets|docs)/[\w./-]+)`", text):
        if not name.startswith(("datasets/phantom", "datasets/prepare_X")):  # to be made
            assert (REPO / name).exists(), name


def resolve(dotted):
    """Imports a module, or what a dotted name in one means."""
    found = importlib.import_module("ich_det2")
    for part in dotted.split(".")[1:]:
        if not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)


def test_rooms_and_their_files_are_where_the_table_says():
    text = (REPO / "docs" / "architecture.md").read_text()
    rooms = dict(re.findall(r"^\| `ich_det2/(\w+)/` \| (.*) \|$", text, re.M))
    package = REPO / "ich_det2"
    assert rooms.keys() == {path.parent.name for path in package.glob("*/__init__.py")}
    for room, words in rooms.items():
        for name in re.findall(r"`(\w+(?:\.py|/))`", words):
            assert (package / room / name).exists(), f"{room}/{name}"


def test_every_stable_name_is_on_the_page_of_the_api():
    text = (REPO / "docs" / "api.md").read_text()
    for name in importlib.import_module("ich_det2").__all__:
        assert f"`ich_det2.{name}`" in text


@pytest.mark.parametrize("model", ["given", "untrained"])
def test_notebook_runs_cell_by_cell(model, run, tmp_path, monkeypatch, capsys):
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    if model == "given":
        monkeypatch.setenv("ICH_DET2_RUN", str(run))
    else:
        monkeypatch.delenv("ICH_DET2_RUN", raising=False)
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    diagnosis, overlay = names["diagnosis"], names["overlay"]
    assert len(diagnosis.slices) == len(names["files"]) and diagnosis.patients[0].complete
    assert overlay.size[0] >= 256 and overlay.mode == "RGB"
    assert ("RANDOM" in capsys.readouterr().out) == (model == "untrained")
