"""The network by another engine: the same answers, for any size and number of images, or none.

``test_accelerate.py`` runs these in a process of their own, since the engines leave threads behind.
"""

import importlib.util

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from ich_det2.inference import accelerate as module
from ich_det2.inference.accelerate import accelerate

ENGINES = [
    pytest.param(name, marks=pytest.mark.skipif(not there, reason=f"no {name}"))
    for name, there in (
        ("onnxruntime", all(map(importlib.util.find_spec, ("onnxruntime", "onnx")))),
        ("openvino", importlib.util.find_spec("openvino")),
    )
]
CONFIGS = ["csfrcnn_effnet_lite0.yaml", "diagnosis_effnet_lite0.yaml", "csfrcnn_r50_fpn.yaml"]


def images(*sizes, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [
        {"image": torch.rand((3, h, w), generator=rng) * 255, "height": h, "width": w}
        for h, w in sizes
    ]


@pytest.fixture
def build(tiny_cfg):
    """Two models of the same weights, whose scores differ from box to box."""

    def make(config):
        cfg = tiny_cfg(config=config)
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
        torch.manual_seed(1)
        model = build_model(cfg).eval()
        with torch.no_grad():
            model.roi_heads.box_predictor.cls_score.weight *= 30
        twin = build_model(cfg).eval()
        twin.load_state_dict(model.state_dict())
        return model, twin

    return make


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("config", CONFIGS)
def test_it_answers_as_eager_for_all_sizes_of_images_and_batches(build, backend, config):
    model, twin = build(config)
    fast = accelerate(twin, backend, 1)
    tolerance = 1e-3 if "r50" in config else 1e-5
    with torch.inference_mode():
        for sizes in ([(64, 64)] * 2, [(64, 64)], [(64, 96)] * 3, [(80, 64), (64, 70)]):
            inputs = images(*sizes, seed=len(sizes))
            wanted, found = model(inputs), fast(inputs)
            module.check_equal(wanted, found, backend, tolerance)
            assert [len(x["instances"]) > 0 for x in wanted] == [True] * len(sizes)
    # The parts that were swapped are no longer in memory.
    assert (
        sum(p.numel() for p in twin.parameters()) < sum(p.numel() for p in model.parameters()) / 2
    )


@pytest.mark.parametrize("backend", ENGINES)
def test_an_image_without_proposals(build, backend):
    model, twin = build(CONFIGS[0])
    for m in (model, twin):
        m.proposal_generator.min_box_size = 1000.0  # nothing is that large
    fast = accelerate(twin, backend, 1)
    with torch.inference_mode():
        for _ in range(2):
            (found,) = fast(images((64, 64)))
            assert len(found["instances"]) == 0
        twin.proposal_generator.min_box_size = model.proposal_generator.min_box_size = 0.0
        inputs = images((64, 64))
        module.check_equal(model(inputs), fast(inputs), backend, 1e-5)
        twin.proposal_generator.min_box_size = 1000.0
        assert len(fast(inputs)[0]["instances"]) == 0


def test_boxes_at_one_place_are_told_apart_by_their_scores():
    def output(*scores):
        found = Instances((9, 9), scores=torch.tensor(scores))
        found.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 5.0, 6.0]]).repeat(len(scores), 1))
        found.pred_classes = torch.zeros(len(scores))
        return {"instances": found}

    module.check_equal([output(0.9, 0.5, 0.1)], [output(0.5, 0.9, 0.1)], "onnx", 1e-5)
    for other in (output(0.9, 0.4, 0.1), output(0.9, 0.1)):
        with pytest.raises(ValueError, match="scores differ by"):
            module.check_equal([output(0.9, 0.5, 0.1)], [other], "onnx", 1e-5)


@pytest.mark.parametrize("fault", ["scores", "boxes"])
def test_an_engine_that_answers_otherwise_is_refused(build, monkeypatch, fault):
    model, twin = build(CONFIGS[0])
    part = {"scores": "box_head", "boxes": "rpn_head"}[fault]

    def off(flat, inputs, threads):
        wrong = type(flat.part).__name__.lower().endswith(part.replace("_", "")) or (
            part == "box_head" and "FastRCNN" in type(flat.part).__name__
        )
        return lambda tensors: [x * 1.2 if wrong else x for x in flat(*tensors)]

    monkeypatch.setattr(module, "_openvino", off)
    monkeypatch.setitem(__import__("sys").modules, "openvino", module)
    with torch.inference_mode(), pytest.raises(ValueError, match="does not answer as eager does"):
        accelerate(twin, "openvino", 1)(images((64, 64)))


def test_what_cannot_be_accelerated_is_named(build, monkeypatch, tiny_cfg):
    model, _ = build(CONFIGS[0])
    assert accelerate(model, "eager") is model
    with pytest.raises(ValueError, match="expected one of eager, onnxruntime, openvino"):
        accelerate(model, "tensorrt")
    with pytest.raises(ValueError, match="threads is 0"):
        accelerate(model, "openvino", 0)
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ValueError, match=r"pip install 'ich_det2\[fast\]'"):
        accelerate(model, "openvino")
    monkeypatch.setitem(__import__("sys").modules, "openvino", module)
    with pytest.raises(ValueError, match="is for detectors with a backbone and an RPN"):
        accelerate(torch.nn.Linear(1, 1), "openvino")
