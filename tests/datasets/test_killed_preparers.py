"""A preparer that was killed (SIGKILL) and started again leaves what an undisturbed one does."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from ich_det2.data.tree_writer import JOURNAL
from ich_det2.data.voc import write_voc

ROOT = Path(__file__).parents[2]
RAS = np.diag([0.5, 0.5, 5, 1])


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "datasets" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def exam(tmp_path, write_ct):
    """Four slices of one series."""
    folder = tmp_path / "exam"
    folder.mkdir()
    for i in range(4):
        write_ct(
            folder / f"ID_{i}.dcm", np.full((32, 32), 20.0 * i), PatientID="CQ500-CT-7",
            StudyInstanceUID="1.7", SeriesInstanceUID="1.7.1", SOPInstanceUID=f"1.7.1.{i}",
            ImagePositionPatient=[0, 0, 5 * i], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        )  # fmt: skip
    return folder


def bhx(tmp_path, exam):
    box = "\"{'x': 1, 'y': 2, 'width': 9, 'height': 9}\""
    (tmp_path / "boxes.csv").write_text(
        f"SOPInstanceUID,data,labelName,labelType\n1.7.1.2,{box},Subdural,handDrawn\n"
    )
    return "prepare_bhx", [exam, "--boxes", tmp_path / "boxes.csv"]


def rsna(tmp_path, exam):
    lines = ["ID,Label", *(f"ID_{i}_any,{i % 2}" for i in range(4))]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return "prepare_rsna", [exam, "--labels", tmp_path / "labels.csv"]


def labelimg(tmp_path, exam):
    return "prepare_labelimg", [exam, "--healthy"]


def export(tmp_path, exam):
    return "export_png", [exam]


def save_volumes(folder, names):
    rng = np.random.default_rng(0)
    for name in names:
        mask = np.zeros((24, 24, 2), np.uint8)
        mask[4:9, 4:9, 1] = 1
        hu = rng.integers(-1000, 100, (24, 24, 2)).astype(np.int16)
        for kind, data in (("images", hu), ("masks", mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(data, RAS), folder / kind / f"{name}.nii")


def ct_ich(tmp_path, exam):
    source = tmp_path / "ct-ich"
    save_volumes(source, ("049", "050"))
    (source / "images").rename(source / "ct_scans")
    types = "Intraventricular,Intraparenchymal,Subarachnoid,Epidural,Subdural"
    rows = [f"{patient},{i},0,{i - 1},0,0,0" for patient in (49, 50) for i in (1, 2)]
    text = "\n".join([f"PatientNumber,SliceNumber,{types}", *rows])
    (source / "hemorrhage_diagnosis_raw_ct.csv").write_text(text + "\n")
    return "prepare_ct_ich", [source]


def masks(tmp_path, exam):
    save_volumes(tmp_path / "volumes", ("a", "b"))
    return "prepare_masks", [tmp_path / "volumes"]


def pictures(tmp_path, exam):
    for kind in ("images", "masks"):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (16, 16), i).save(tmp_path / "pictures" / kind / f"p_{i}.png")
    return "prepare_masks", [tmp_path / "pictures"]


def coco(tmp_path, exam):
    images = [{"id": i, "file_name": f"ID_{i}.dcm", "height": 32, "width": 32} for i in range(4)]
    boxes = [{"image_id": 2, "bbox": [1, 2, 9, 9], "category_id": 1}]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "SDH"}]}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    return "coco", ["import", tmp_path / "coco.json", exam]


SOURCES = (bhx, rsna, labelimg, export, ct_ich, masks, pictures, coco)


def content(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def times(root):
    return {
        p: p.stat().st_mtime_ns for p in root.rglob("*") if p.suffix in (".xml", ".png", ".dcm")
    }


# Forks a child for each command: this process may have threads, which a fork does not survive.
SERVER = """
import importlib.util, json, os, signal, sys
import ich_det2.data, nibabel, rich.progress

def run_and_die(path, args, number):
    replace, calls = os.replace, []

    def killing(*paths):
        calls.append(paths)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = killing
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    spec = importlib.util.spec_from_file_location("preparer", path)
    module = sys.modules["preparer"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(args)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            run_and_die(*json.loads(line))
        finally:
            os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def kill():
    """Function that runs a command and kills it while it writes its n-th file."""
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as server:

        def run(name, args, number):
            line = json.dumps([str(ROOT / "datasets" / f"{name}.py"), args, number])
            server.stdin.write(line + "\n")
            server.stdin.flush()
            assert server.stdout.readline().strip() == str(-signal.SIGKILL)

        yield run
        server.stdin.close()


@pytest.mark.parametrize("source", SOURCES, ids=lambda f: f.__name__)
def test_killed_and_started_again(tmp_path, exam, monkeypatch, kill, source):
    name, args = source(tmp_path, exam)
    main = tool(name).main
    args = [*map(str, args), "--output"]
    written, replace = [], os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *p: (written.append(p), replace(*p)))
        assert main([*args, str(tmp_path / "whole")]) == 0
    expected = content(tmp_path / "whole")
    assert len(written) >= 5 and len(expected) >= 5

    for number in range(1, len(written) + 1):
        root = tmp_path / f"killed-{number}"
        kill(name, [*args, str(root)], number)
        before = times(root)
        assert main([*args, str(root)]) == 0
        assert content(root) == expected
        # But for an image and mask whose annotation was not there yet nothing was written again.
        after = times(root)
        again = [path for path in before if after[path] != before[path]]
        assert len({path.stem for path in again}) <= 1 and not any(
            path.suffix == ".xml" for path in again
        )


def test_a_phantom_is_there_whole_or_not_at_all(tmp_path, kill):
    main = tool("prepare_phantom").main
    args = ["--patients", "6", "--size", "64", "--workers", "1", "--output"]
    root = tmp_path / "killed"
    kill("prepare_phantom", [*args, str(root)], 30)
    assert not root.exists()
    assert main([*args, str(root)]) == 0
    slices = {path.stem for path in (root / "DICOM").iterdir()}
    assert len(slices) == 6 * 13
    assert {path.stem for path in (root / "Annotations").iterdir()} == slices


def test_a_half_written_row_is_not_taken(tmp_path, exam):
    args = [str(exam), "--healthy", "--output", str(tmp_path / "t")]
    assert tool("prepare_labelimg").main(args) == 0
    expected = content(tmp_path / "t")
    row = {"image": "ID_1", "patient": "x", "study": "x", "series": "x", "position_mm": ""}
    (tmp_path / "t" / JOURNAL).write_text(json.dumps([row, None, None])[:-9])
    assert tool("prepare_labelimg").main(args) == 0
    assert content(tmp_path / "t") == expected


def test_what_changed_in_the_source_is_written_anew(tmp_path, exam):
    main, args = tool("prepare_labelimg").main, [str(exam), "--healthy", "--output"]
    assert main([*args, str(tmp_path / "t")]) == 0
    box = [("SDH", (2, 3, 20, 21))]
    write_voc(exam / "ID_2.xml", filename="ID_2.dcm", width=32, height=32, objects=box)
    before = times(tmp_path / "t")
    assert main([*args, str(tmp_path / "t")]) == main([*args, str(tmp_path / "u")]) == 0
    assert content(tmp_path / "t") == content(tmp_path / "u")
    after = times(tmp_path / "t")
    assert {path.stem for path in before if after[path] != before[path]} == {"ID_2"}


def test_pictures_of_another_window_are_written_anew(tmp_path, exam):
    main, args = tool("export_png").main, [str(exam), "--output"]
    assert main([*args, str(tmp_path / "t")]) == 0
    window = ["--window", "40", "80"]
    assert main([*args, str(tmp_path / "t"), *window]) == 0
    assert main([*args, str(tmp_path / "u"), *window]) == 0
    assert content(tmp_path / "t") == content(tmp_path / "u")
    assert main([*args, str(tmp_path / "t")]) == 0
    assert content(tmp_path / "t") != content(tmp_path / "u")
