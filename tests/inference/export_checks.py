"""The whole graph as ONNX: the same answers, on slices that it was not traced on too.

``test_accelerate.py`` runs these in a process of their own.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ich_det2.inference import export as module
from ich_det2.inference.accelerate import check_equal
from ich_det2.inference.diagnoser import Diagnoser
from ich_det2.inference.export import export_onnx
from ich_det2.phantom import write_exam

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnxruntime", "onnx"))), reason="no onnxruntime"
)
SMALL = ("MODEL.RPN.POST_NMS_TOPK_TEST", 20, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
RES5 = ("MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 8)
TYPES = ("MODEL.ROI_HEADS.NUM_CLASSES", 2, "DATASETS.ICH_CLASSES", ["IPH", "SDH"])


@pytest.mark.parametrize(
    ("config", "opts", "names"),
    [
        ("csfrcnn_effnet_lite0.yaml", SMALL, ["boxes", "scores", "classes"]),
        ("csfrcnn_effnet_lite0.yaml", (*SMALL, *TYPES), ["boxes", "scores", "classes"]),
        ("csfrcnn_r50.yaml", (*SMALL, *RES5), ["boxes", "scores", "classes"]),
        (
            "diagnosis_effnet_lite0.yaml",
            (*SMALL, "MODEL.ROI_HEADS.REFINE_TEST", 2),
            ["boxes", "scores", "classes", "image_score"],
        ),
        ("mask_rcnn_effnet_lite0.yaml", SMALL, ["boxes", "scores", "classes"]),
        ("classifier_lenet.yaml", ("MODEL.CLASSIFIER.INPUT_SIZE", 64), ["image_score"]),
    ],
)
def test_the_graph_answers_as_pytorch(write_run, tmp_path, config, opts, names):
    import onnx
    import onnxruntime

    run, path = write_run(*opts, config=config), tmp_path / "model.onnx"
    assert export_onnx(run, path) > 5
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_outputs()] == names
    about = {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props}
    assert "not for clinical use" in about["note"] and about["run"] == "run"
    assert str(tmp_path) not in json.dumps(about)

    diagnoser = Diagnoser.load(run, device="cpu")
    rng = torch.Generator().manual_seed(7)
    others = [torch.zeros(3, 64, 64), torch.rand((3, 64, 64), generator=rng) * 255]
    with torch.no_grad():
        wanted = [diagnoser.model([{"image": image}])[0] for image in others]
    found = [
        module._as_output(dict(zip(names, session.run(names, {"image": x.numpy()}))), x)
        for x in others
    ]
    check_equal(wanted, found, "onnx", 1e-3 if "r50" in config else 1e-5)


def test_a_slice_without_boxes(write_run, tmp_path):
    import onnxruntime

    opts = (*SMALL[:3], 0.96, "MODEL.ROI_HEADS.REFINE_TEST", 1)
    run = write_run(*opts, config="diagnosis_effnet_lite0.yaml")
    export_onnx(run, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    model = Diagnoser.load(run, device="cpu").model
    counts = set()
    for grey in range(0, 256, 15):
        image = torch.full((3, 64, 64), float(grey))
        with torch.no_grad():
            (wanted,) = model([{"image": image}])
        boxes, *_, score = session.run(None, {"image": image.numpy()})
        assert len(boxes) == len(wanted["instances"])
        assert score == pytest.approx(float(wanted["image_score"]), abs=1e-5)
        counts.add(len(boxes) > 0)
    assert counts == {False, True}


def test_slices_of_another_size_than_the_first_are_left_out(write_run, tmp_path):
    for seed, size in enumerate((64, 96)):
        write_exam(tmp_path / "exam" / str(size), seed=seed, size=size)
    run = write_run(*SMALL, "INPUT.MIN_SIZE_TEST", 0)  # slices keep their size
    number = len(list((tmp_path / "exam/64").iterdir()))
    assert export_onnx(run, tmp_path / "model.onnx", tmp_path / "exam") == number


def test_a_graph_that_answers_otherwise_is_not_written(run_dir, tmp_path, monkeypatch):
    def off(tensors, image):
        return right(
            {k: v * np.float32(1.01) if k == "scores" else v for k, v in tensors.items()}, image
        )

    right = module._as_output
    monkeypatch.setattr(module, "_as_output", off)
    with pytest.raises(ValueError, match="onnx does not answer as eager does"):
        export_onnx(run_dir, tmp_path / "model.onnx")
    assert list(tmp_path.glob("*.onnx*")) == [] and list(tmp_path.glob(".*tmp")) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("classifier_cnn3d.yaml", "reads several slices"),
        ("threshold.yaml", "cannot be traced as one graph"),
    ],
)
def test_what_no_graph_of_one_slice_holds_is_refused(write_run, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(write_run(config=config), tmp_path / "model.onnx")


def test_what_is_missing_is_named(run_dir, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        export_onnx(run_dir, tmp_path / "model.onnx", tmp_path / "no-exam")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ValueError, match=r"pip install 'ich_det2\[fast\]'"):
        export_onnx(run_dir, tmp_path / "model.onnx")


def test_the_command_keeps_what_is_there(run_dir, tmp_path, capsys):
    path = Path(__file__).parents[2] / "tools/export_model.py"
    spec = importlib.util.spec_from_file_location("export_model", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    out = tmp_path / "model.onnx"
    assert tool.main([str(run_dir), "--output", str(out)]) == 0
    assert "equal to PyTorch on" in capsys.readouterr().out and out.stat().st_size > 1e5
    assert tool.main([str(run_dir), "--output", str(out)]) == 2
    assert tool.main([str(run_dir), "--output", str(tmp_path / "no/model.onnx")]) == 2
    assert "no such folder" in capsys.readouterr().err
