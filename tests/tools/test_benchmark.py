"""The benchmark compares like with like."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import RLELossless

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_train_step_is_measured_against_stock(tool, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = ["--size", "64", "--batch", "2", "--steps", "2", "--warmup", "1", "--device", "cpu"]
    tool.train_step(tool.parse_args(["train-step", *options]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    stock = next(line for line in lines if line.startswith("| stock Detectron2"))
    assert stock.count("1.0000") == 2
    assert len(lines) == 4  # with the header


def test_each_config_is_measured_in_a_process_of_its_own(tmp_path):
    # The script itself, since the processes it spawns import it again.
    names = ("csfrcnn_r50_fpn", "frcnn_effnet_lite0", "classifier_bhcnet_gru")
    names += ("classifier_cnn3d",)
    files = [tmp_path / f"{name}.yaml" for name in names]
    for file, base in zip(files, names):
        file.write_text(f"_BASE_: {ROOT}/configs/{base}.yaml\n")
    options = ["--size", "64", "--steps", "1", "--warmup", "0", "--threads", "1"]
    command = [sys.executable, "-W", "ignore", ROOT / "tools/benchmark.py", "configs"]
    done = subprocess.run([*command, *files, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "1 threads" in lines[0] and "1 x 64 px" in lines[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[3:]]
    assert [row[0] for row in rows] == [file.name for file in files]
    fpn, lite0, gru, cnn3d = rows
    # ResNet50 has 23.5 million, FPN 3.3, the box head 13.9, the RPN 0.6.
    assert float(fpn[1]) == pytest.approx(41.3, abs=0.2)
    # Parameters, gradients and momentum, and no memory of the bigger network before.
    assert float(fpn[5]) > float(lite0[5]) + 3 * 36e6 * 4 / 2**30
    assert float(gru[1]) == float(cnn3d[1]) == pytest.approx(0.3, abs=0.06)
    assert 0 < float(lite0[3]) <= float(lite0[2]) and float(lite0[4]) > 0


def test_no_config_to_measure_is_one_sentence(tool, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert tool.main(["configs"]) == 2
    assert "name config files" in capsys.readouterr().err


def test_calls_alternate_and_warmup_is_not_counted(tool):
    calls = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = tool.interleave(steps, rounds=2, warmup=1, device="cpu")
    assert "".join(calls) == "abbaab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_the_diagnosis_is_measured_against_a_loop_with_the_same_result(tool, capsys):
    few = ["--images", "2000", "--patients", "100", "--thresholds", "3", "--resamples", "20"]
    args = tool.parse_args(["diagnosis", *few, "--bootstrap-images", "500"])
    args.run(args)
    *_, last = capsys.readouterr().out.splitlines()
    ratio, difference = last.removeprefix("loop / ours: ").split("; largest difference ")
    assert float(ratio) > 1 and float(difference) < 1e-12


@pytest.mark.parametrize("compress", [False, True])
def test_slices_read_in_each_way_are_compared(tool, capsys, tmp_path, write_ct, compress):
    hu = np.random.default_rng(0).integers(-200, 300, (64, 64))
    path = write_ct(tmp_path / "a.dcm", hu, SeriesInstanceUID="1.2")
    if compress:
        ds = pydicom.dcmread(path)
        ds.compress(RLELossless)
        ds.save_as(path)
    command = ["read-slices", str(tmp_path), "--rounds", "2", "--memory", "kept"]
    assert tool.main(command) == 0
    out = capsys.readouterr().out
    assert f"1 {'compressed' if compress else 'uncompressed'} slices" in out
    rows = [line for line in out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == (4 if compress else 3)
    assert rows[0].count("1.00") == 2  # pydicom against itself
    difference = float(out.splitlines()[0].split()[-1])
    assert difference < 1e-6


def test_slices_are_read_with_memory_given_back_and_kept(tool, capfd, tmp_path, write_ct):
    write_ct(tmp_path / "a.dcm", np.zeros((512, 512)), SeriesInstanceUID="1.2")
    assert tool.main(["read-slices", str(tmp_path), "--rounds", "1"]) == 0
    out = capfd.readouterr().out
    assert out.index("memory given back") < out.index("memory kept")
    with pytest.raises(SystemExit) as stop:
        tool.main(["read-slices", str(tmp_path / "none")])
    assert stop.value.code == 2
    assert "none" in capfd.readouterr().err


def test_the_loader_is_measured(tool, capsys, full_tree, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = ["--workers", "0", "1", "--batches", "2", "SOLVER.IMS_PER_BATCH", "2"]
    config = ["--config-file", "configs/csfrcnn_effnet_lite0.yaml"]
    assert tool.main(["loader", "--data", str(full_tree("dicom")), *config, *options]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line[0] == "|"][2:]
    assert [int(row[1]) for row in rows] == [0, 1]
    assert all(float(row[2]) > 0 for row in rows)


def test_a_diagnosis_from_files_is_measured_against_detectron2s_predictor(
    tool, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)
    sizes = ["--studies", "1", "--slices", "3", "--size", "64", "--rounds", "1"]
    tool.diagnose(tool.parse_args(["diagnose", *sizes]))
    out = capsys.readouterr().out
    (differ,) = [line for line in out.splitlines() if line.startswith("eager: largest")]
    assert float(differ.split()[-1]) < 1e-4
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(rows) == 4 and rows[2].count("1.0000") == 2


def test_the_cost_of_more_studies_and_slices_is_fitted_by_lines(tool, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    sizes = ["--studies", "1", "2", "--slices", "10", "12", "--size", "64", "--rounds", "1"]
    tool.growth(tool.parse_args(["growth", *sizes]))
    out = capsys.readouterr().out.splitlines()
    assert len([line for line in out if line.startswith("| ") and "studies" not in line]) == 3
    fits = [line for line in out if line.startswith("over ")]
    assert [line.split(":")[0] for line in fits] == ["over studies", "over slices"]
    assert all("at most 0.0% off" in line for line in fits)  # two points each
