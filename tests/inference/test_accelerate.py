"""Runs engine_checks.py and export_checks.py, each in a process of its own; and what needs no
engine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from ich_det2.inference import accelerate as module

HERE = Path(__file__).parent


@pytest.mark.parametrize("checks", ["engine_checks.py", "export_checks.py"])
def test_other_engines_answer_as_eager_does_or_are_refused(checks):
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    told = subprocess.run(
        [*argv, str(HERE / checks)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=HERE.parents[1],
    )
    assert told.returncode == 0, told.stdout[-5000:]
    assert " passed" in told.stdout


def test_a_refused_engine_stays_refused_and_pytorch_in_place(tiny_cfg, monkeypatch):
    cfg = tiny_cfg(config="csfrcnn_effnet_lite0.yaml")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    torch.manual_seed(1)
    model = build_model(cfg).eval()
    parts = [name for name, _ in model.named_modules()]
    off = lambda flat, inputs, threads: lambda tensors: [x * 1.2 for x in flat(*tensors)]  # noqa: E731
    monkeypatch.setattr(module, "_openvino", off)
    monkeypatch.setitem(sys.modules, "openvino", module)
    fast, said = module.accelerate(model, "openvino", 1), set()
    for seed in range(3):
        image = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(seed)) * 255
        inputs = [{"image": image, "height": 64, "width": 64}]
        with torch.inference_mode(), pytest.raises(ValueError, match="does not answer") as error:
            fast(inputs)
        said.add(str(error.value))
    assert len(said) == 1
    assert [name for name, _ in model.named_modules()] == parts
