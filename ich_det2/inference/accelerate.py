"""The dense parts of a detector by a faster engine on a CPU: OpenVINO or ONNX Runtime.

Backbone, RPN head and box head are swapped in place, and all else stays Detectron2's: anchors, NMS,
pooling, post-processing. What comes out is compared with PyTorch's on the model's own first batch,
and refused unless it says the same.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torchvision.ops import box_iou

from . import BACKENDS

TOLERANCE, TOLERANCE_OF_DEEP = 1e-5, 1e-3
"""How far scores may differ; of networks of bottleneck blocks, such as ResNet50, whose values of up
to thousands leave fewer digits."""

_MATCH = 0.99
"""IoU from which on two boxes are one."""

logger = logging.getLogger(__name__)

Run = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


def accelerate(model: nn.Module, backend: str, threads: int = 1) -> nn.Module:
    """Prepares a model in evaluation mode for another engine.

    Args:
        model: a ``GeneralizedRCNN`` on the CPU, or an ensemble of them.
        backend: of ``inference.BACKENDS``.
        threads: of the engine.

    Returns:
        The model itself for "eager", else what takes its place: it swaps the parts when it is
        given its first batch, and raises a ValueError then and ever after if the answers differ.

    Raises:
        ValueError: the engine is not known or not installed, or the model has no such parts.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}.")
    if threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1.")
    if backend == "eager":
        return model
    try:
        __import__({"onnxruntime": "onnxruntime", "openvino": "openvino"}[backend])
        if backend == "onnxruntime":
            __import__("onnx")
    except ImportError as error:
        raise ValueError(
            f"backend {backend} needs {error.name}, which is not installed;"
            " pip install 'ich_det2[fast]'."
        ) from error
    if next(model.parameters()).device.type != "cpu":
        raise ValueError(f"backend {backend} runs on the CPU; give --device cpu, or eager.")
    if not _places(model):
        raise ValueError(
            f"backend {backend} is for detectors with a backbone and an RPN, but this is a"
            f" {type(model).__name__}; use eager."
        )
    return _Accelerated(model, backend, threads)


class _Accelerated(nn.Module):
    """Compares on its first batch, then is the swapped model."""

    def __init__(self, model: nn.Module, backend: str, threads: int):
        super().__init__()
        self.model = model
        self._backend, self._threads, self._checked = backend, threads, False
        self._refused: str | None = None

    def forward(self, inputs: list[dict]) -> list[dict]:
        if self._checked:
            return self.model(inputs)
        if self._refused is not None:
            raise ValueError(self._refused)
        wanted = self.model(inputs)
        parts = [(owner, name, getattr(owner, name)) for owner, name in _places(self.model)]
        try:
            for owner, name, part in parts:
                setattr(owner, name, _Swapped(part, self._backend, self._threads))
            found = self.model(inputs)
            check_equal(wanted, found, self._backend, tolerance_of(self.model))
        except BaseException as error:
            for owner, name, part in parts:
                setattr(owner, name, part)
            self._refused = str(error) if isinstance(error, ValueError) else None
            raise
        for owner, name in _places(self.model):
            getattr(owner, name).drop_eager()
        self._checked = True
        return found


def _places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the dense parts are: their owner and name."""
    found = []
    for m in model.modules():
        if hasattr(m, "backbone") and hasattr(m, "proposal_generator"):
            found += [(m, "backbone"), (m.proposal_generator, "rpn_head")]
            heads = m.roi_heads
            found += [(heads, name) for name in ("box_head", "res5") if _is_one(heads, name)]
    return found


def _is_one(owner: nn.Module, name: str) -> bool:
    # A cascade has a list of heads, which stay.
    part = getattr(owner, name, None)
    return isinstance(part, nn.Module) and not isinstance(part, nn.ModuleList)


class _Swapped(nn.Module):
    """A part whose forward another engine runs; compiled for the first batch's number of channels,
    and any size of images and batches."""

    def __init__(self, part: nn.Module, backend: str, threads: int):
        super().__init__()
        self.part, self._backend, self._threads = part, backend, threads
        self._run: Run | None = None
        # Of the part's output: a dict of these names, two lists of so many, or a tensor of rows.
        self._kind, self._names, self._first, self._row = None, [], 0, ()
        # What Detectron2 asks of a backbone and of a head.
        for name in ("size_divisibility", "padding_constraints"):
            if hasattr(part, name):
                setattr(self, name, getattr(part, name))
        self._shape = part.output_shape() if callable(getattr(part, "output_shape", None)) else None
        if not callable(getattr(part, "output_shape", None)) and hasattr(part, "output_shape"):
            self.output_shape = part.output_shape

    def output_shape(self):
        return self._shape

    def drop_eager(self) -> None:
        """Forgets the part that was swapped, whose weights the engine has; unless there was no
        proposal yet to compile it for."""
        if self._run is not None:
            self.part = None

    def forward(self, x):
        inputs = list(x) if isinstance(x, (list, tuple)) else [x]
        if self._run is None:
            if not len(inputs[0]):
                return self.part(x)
            self._compile(x, inputs)
        if not len(inputs[0]):  # no proposal: nothing that an engine can be asked
            return torch.zeros((0, *self._row))
        outputs = self._run(inputs)
        if self._kind is dict:
            return dict(zip(self._names, outputs, strict=True))
        if self._kind is tuple:
            return outputs[: self._first], outputs[self._first :]
        return outputs[0]

    def _compile(self, x, inputs: list[torch.Tensor]) -> None:
        example = self.part(x)
        self._kind = type(example)
        if self._kind is dict:
            self._names = list(example)
        elif self._kind is tuple:  # of an RPN head
            self._first = len(example[0])
        else:
            self._row = tuple(example.shape[1:])
        flat = _Flat(self.part, isinstance(x, (list, tuple))).eval()
        build = {"openvino": _openvino, "onnxruntime": _onnxruntime}[self._backend]
        self._run = build(flat, inputs, self._threads)


class _Flat(nn.Module):
    """Tensors in, a tuple of tensors out, which is what engines know."""

    def __init__(self, part: nn.Module, takes_list: bool):
        super().__init__()
        self.part, self.takes_list = part, takes_list

    def forward(self, *inputs):
        out = self.part(list(inputs) if self.takes_list else inputs[0])
        if isinstance(out, dict):
            return tuple(out.values())
        if isinstance(out, tuple):
            return tuple(x for part in out for x in part)
        return (out,)


def _openvino(flat: _Flat, inputs: list[torch.Tensor], threads: int) -> Run:
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    # As openvino.convert_model, which would also tell its makers of it over the network.
    with torch.no_grad():
        decoder = TorchScriptPythonDecoder(flat, example_input=tuple(inputs))
        frontend = FrontEndManager().load_by_framework("pytorch")
        converted = frontend.convert(frontend.load(decoder))
    # Any number of images or proposals, and any size of maps.
    converted.reshape(
        {
            port: [-1, x.shape[1], *[-1] * (x.dim() - 2)]
            for port, x in zip(converted.inputs, inputs, strict=True)
        }
    )
    compiled = openvino.Core().compile_model(
        converted,
        "CPU",
        {
            # Newer CPUs would take bfloat16.
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()

    def run(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        given = [np.ascontiguousarray(x.detach().numpy()) for x in tensors]
        found = request.infer(dict(enumerate(given)), share_inputs=True)
        return [torch.from_numpy(np.array(value)) for value in found.values()]

    return run


def _onnxruntime(flat: _Flat, inputs: list[torch.Tensor], threads: int) -> Run:
    import onnxruntime

    names = [f"input{i}" for i in range(len(inputs))]
    with torch.no_grad():
        outs = [f"output{i}" for i in range(len(flat(*inputs)))]
        file = io.BytesIO()
        torch.onnx.export(
            flat,
            tuple(inputs),
            file,
            input_names=names,
            output_names=outs,
            opset_version=17,
            dynamo=False,
            dynamic_axes={
                name: {i: f"{name}_{i}" for i in ((0, 2, 3) if x.dim() == 4 else (0,))}
                for name, x in zip(names, inputs, strict=True)
            },
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )

    def run(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        given = {name: x.detach().numpy() for name, x in zip(names, tensors, strict=True)}
        return [torch.from_numpy(value) for value in session.run(outs, given)]

    return run


def tolerance_of(model: nn.Module) -> float:
    """How far the scores of a model may differ from engine to engine."""
    deep = any("Bottleneck" in type(m).__name__ for m in model.modules())
    return TOLERANCE_OF_DEEP if deep else TOLERANCE


def check_equal(wanted: list[dict], found: list[dict], backend: str, tolerance: float) -> None:
    """Whether two answers say the same.

    Args:
        wanted, found: outputs of a Detectron2 model, the second by another engine.
        backend: its name.
        tolerance: of the scores.

    Raises:
        ValueError: they do not.
    """
    most = 0.0
    for own, other in zip(wanted, found, strict=True):
        if "image_score" in own:
            most = max(most, abs(float(own["image_score"]) - float(other["image_score"])))
        if "instances" not in own:
            continue
        a, b = own["instances"], other["instances"]
        # Boxes at the least score may come and go by less than the tolerance.
        least = min((float(x.scores.min()) for x in (a, b) if len(x)), default=0.0)
        for one, rest in ((a, b), (b, a)):
            one = one[one.scores > least + tolerance]
            if not len(one):
                continue
            if not len(rest):
                raise ValueError(_differs(backend, "finds boxes that the other does not"))
            near = box_iou(one.pred_boxes.tensor, rest.pred_boxes.tensor) >= _MATCH
            near &= one.pred_classes[:, None] == rest.pred_classes
            if not near.any(dim=1).all():
                raise ValueError(_differs(backend, "finds boxes that the other does not"))
            # Of several at one place, as the vote leaves them, the one of the same score.
            gaps = (one.scores[:, None] - rest.scores).abs().where(near, math.inf)
            most = max(most, float(gaps.min(dim=1).values.max()))
    if most > tolerance:
        text = f"scores differ by {most:.1e}, expected {tolerance:.0e} at most"
        raise ValueError(_differs(backend, text))
    logger.info("%s says the same as eager on %d images, to %.1e.", backend, len(wanted), most)


def _differs(backend: str, what: str) -> str:
    return f"backend {backend} does not answer as eager does on this model: {what}; use eager."
