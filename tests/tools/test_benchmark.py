"""The benchmark compares like with like."""

import importlib.util
from pathlib import Path

import pytest

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
