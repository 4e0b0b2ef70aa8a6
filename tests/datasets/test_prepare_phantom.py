"""The command ``datasets/prepare_phantom.py``, on small slices to stay quick."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ich_det2.data.voc import read_voc
from ich_det2.phantom import TYPES, Phantom, dataset

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "datasets" / "prepare_phantom.py"
SIZE = 64


def load_script():
    spec = importlib.util.spec_from_file_location("prepare_phantom", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


command = load_script()


def start(output, patients, **environment):
    """The command in a process group of its own, with two workers."""
    args = ["--output", str(output), "--patients", patients, "--size", str(SIZE), "--workers", "2"]
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *args],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(output, *extra):
    return command.main(
        ["--output", str(output), "--patients", "6", "--size", str(SIZE), "--workers", "1", *extra]
    )


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_files_for_any_number_of_workers(phantom_tree, tmp_path):
    """Run as a person would, and where nothing can import PyTorch or Detectron2."""
    output = tmp_path / "out" / "again"
    for name in ("torch", "detectron2"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not wanted')")
    process = start(output, "6", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    slices = [read_voc(path).objects for path in (output / "Annotations").iterdir()]
    boxes = [found.name for objects in slices for found in objects]
    types = ", ".join(f"{name} {boxes.count(name)}" for name in TYPES)
    assert stdout == (
        f"{output}: 78 images, {sum(map(bool, slices))} with boxes, {len(boxes)} boxes ({types}), "
        "6 patients (3 bleeding; train 2, val 2, test 2).\n"
    )
    assert tree(output) == tree(phantom_tree)
    assert [p.name for p in output.parent.iterdir()] == ["again"]


def test_complete_phantom_is_left_alone(phantom_tree, capsys):
    before = (phantom_tree / "phantom.json").stat().st_mtime_ns
    assert run(phantom_tree) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (phantom_tree / "phantom.json").stat().st_mtime_ns == before


def test_other_parameters_are_refused(phantom_tree, capsys):
    before = tree(phantom_tree)
    assert run(phantom_tree, "--seed", "5") == 2
    message = capsys.readouterr().err
    assert "seed 0 (asked for 5)" in message and "--force" in message
    assert message.count("\n") == 1
    assert tree(phantom_tree) == before


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("marker", [None, "{}", "[1]", "not json", '{"parameters": {}}'])
def test_foreign_folder_is_refused(tmp_path, capsys, force, marker):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    if marker is not None:
        (tmp_path / "mine" / "phantom.json").write_text(marker)
    before = tree(tmp_path)
    assert run(tmp_path / "mine", *force) == 2
    assert "is not a phantom" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_file_as_output_is_refused(tmp_path):
    (tmp_path / "file").write_text("text")
    assert run(tmp_path / "file", "--force") == 2
    assert (tmp_path / "file").read_text() == "text"


def test_a_link_to_nothing_yet_is_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "make_patient", small_patient)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "phantom")
    assert run(tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/phantom/phantom.json").is_file()


def test_file_as_parent_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    assert run(tmp_path / "file" / "phantom") == 2
    assert "give another --output" in capsys.readouterr().err


def small_patient(rng, *, types=(), size=64):
    """A quick stand-in for ``make_patient``: noise, without any lesion."""
    return Phantom(
        hu=rng.normal(0, 5, (2, size, size)).astype(np.float32),
        labels=np.zeros((2, size, size), np.uint8),
        lesions=[[], []],
        position_mm=np.array([[0, 0, 0], [0, 0, 7.5]]),
        pixel_mm=0.5,
        kernel="H31s",
    )


def test_force_replaces_a_phantom_and_empty_folder_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "make_patient", small_patient)
    output = tmp_path / "phantom"
    output.mkdir()
    assert run(output) == 0
    (output / "stale.txt").write_text("old")
    assert run(output, "--seed", "5", "--force") == 0
    assert not (output / "stale.txt").exists()
    assert json.loads((output / "phantom.json").read_text())["parameters"]["seed"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["phantom"]


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted: nothing was written."),
        (OSError(28, "No space left on device"), 2, "left on device); give another --output."),
    ],
)
def test_failure_leaves_no_trace(tmp_path, monkeypatch, capsys, failure, code, message):
    calls = []

    def fail(rng, **options):
        calls.append(options)
        if len(calls) == 3:
            raise failure
        return small_patient(rng, **options)

    monkeypatch.setattr(dataset, "make_patient", fail)
    assert run(tmp_path / "phantom") == code
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"), [("--patients", "5"), ("--size", "8"), ("--workers", "0"), ("--seed", "x")]
)
def test_bad_numbers(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "phantom", option, value)
    assert error.value.code == 2
    assert f"{option}: got '{value}', expected a whole number" in capsys.readouterr().err


def test_an_interrupted_run_is_one_sentence_and_no_debris(tmp_path):
    """Ctrl-C reaches the workers too."""
    process = start(tmp_path / "phantom", "600")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".phantom-*/new/Annotations/*.xml")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    last = stderr.splitlines()[-1]
    assert last == "prepare_phantom.py: interrupted: nothing was written."
    assert "Traceback" not in stderr and list(tmp_path.iterdir()) == []
