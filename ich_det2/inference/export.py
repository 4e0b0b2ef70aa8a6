"""A trained model as one ONNX graph, for runtimes without PyTorch."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.export import TracingAdapter
from detectron2.structures import Boxes, Instances
from torch import nn

from ..files import write_atomically
from ..phantom import write_exam
from .accelerate import check_equal, tolerance_of
from .diagnoser import Diagnoser
from .slices import find_slices

_OPSET = 17
_BOXES = ("boxes", "scores", "classes")
_SCORE = "image_score"


def export_onnx(model: str | os.PathLike, path: str | os.PathLike, exam=None) -> int:
    """Writes a model as ONNX, after it has answered as PyTorch does in ONNX Runtime.

    The graph takes "image", float32 (3, S, S): a slice's channels from 0 to 255 as
    ``IchDatasetMapper`` makes them for S = ``INPUT.MIN_SIZE_TEST``. It gives "boxes" (M, 4), x0,
    y0, x1, y1 in pixels of that input, "scores" (M,), "classes" (M,) and, of a model with an image
    score, "image_score" (). Reading, windowing, masks, smoothing along the series and the verdict
    are not in it; its metadata say what it is made of.

    Args:
        model: OUTPUT_DIR of a training, or ``zoo://NAME``.
        path: the file to write.
        exam: a folder or file of slices on which the answers are compared; None takes a phantom's.

    Returns:
        The number of slices that were compared.

    Raises:
        ValueError: if ONNX or its runtime is not installed, the model cannot be traced, no slice is
            square, or the answers differ, in which case nothing is written.
        FileNotFoundError: if there is no such model or exam.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            f"the export needs {error.name}, which is not installed; pip install 'ich_det2[fast]'."
        ) from error
    diagnoser = Diagnoser.load(model, device="cpu")
    if getattr(getattr(diagnoser.model, "roi_heads", None), "mask_on", False):
        diagnoser.model.roi_heads.mask_on = False
    if diagnoser.mapper.sequence_slices or diagnoser.mapper.scan_slices:
        raise ValueError(f'{model}: reads several slices, expected a model of one "image".')
    inputs = list(_inputs(diagnoser, exam))
    if not inputs:
        raise ValueError(
            f"{exam}: no slice becomes a square input, expected one at least to compare answers on."
        )
    with torch.no_grad():
        wanted = [diagnoser.model([{"image": image}])[0] for image in inputs]
    # Traced on what has the most boxes.
    most = max(range(len(inputs)), key=lambda i: len(wanted[i].get("instances", ())))
    names = [
        *(_BOXES if "instances" in wanted[0] else ()),
        *((_SCORE,) if _SCORE in wanted[0] else ()),
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    TracingAdapter(_Graph(diagnoser.model, names), inputs[most]).eval(),
                    (inputs[most],),
                    file,
                    input_names=["image"],
                    output_names=names,
                    opset_version=_OPSET,
                    dynamo=False,
                    dynamic_axes={name: {0: "boxes"} for name in names if name in _BOXES},
                )
        except Exception as error:  # tracers fail in many ways
            raise ValueError(
                f"{model}: cannot be traced as one graph ({type(error).__name__}); diagnose"
                " --backend onnxruntime runs its dense parts."
            ) from error
        graph = onnx.load(file)
        about = {"input": "float32 (3, S, S), 0 to 255, as IchDatasetMapper makes it"}
        about |= {"classes": diagnoser.classes, "threshold": diagnoser.threshold}
        about |= diagnoser.facts | {"note": "research only, not for clinical use"}
        onnx.helper.set_model_props(graph, {k: json.dumps(v) for k, v in about.items()})
        onnx.checker.check_model(graph)
    content = graph.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found = [
        _as_output(dict(zip(names, session.run(names, {"image": image.numpy()}))), image)
        for image in inputs
    ]
    check_equal(wanted, found, "onnx", tolerance_of(diagnoser.model))
    with write_atomically(path, "wb") as out:
        out.write(content)
    return len(inputs)


class _Graph(nn.Module):
    """A picture in, what is found on it out, as a tuple of tensors."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (output,) = self.model([{"image": image}])
        tensors = {_SCORE: output.get(_SCORE)}
        instances = output.get("instances")
        if instances is not None:  # also where there is none in it
            values = instances.pred_boxes.tensor, instances.scores, instances.pred_classes
            tensors |= dict(zip(_BOXES, values))
        return tuple(tensors[name] for name in self.names)


def _as_output(tensors: dict[str, np.ndarray], image: torch.Tensor) -> dict:
    """What the graph gives as a model's output."""
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in tensors.items()}
    output = {_SCORE: tensors[_SCORE]} if _SCORE in tensors else {}
    if "boxes" in tensors:
        output["instances"] = Instances(
            tuple(image.shape[1:]),
            pred_boxes=Boxes(tensors["boxes"]),
            scores=tensors["scores"],
            pred_classes=tensors["classes"],
        )
    return output


def _inputs(diagnoser: Diagnoser, exam) -> Iterator[torch.Tensor]:
    """Square slices as the network sees them, of the first one's size."""
    with tempfile.TemporaryDirectory() as folder:
        if exam is None:
            exam = Path(folder) / "phantom"
            write_exam(exam)
        slices, first = find_slices([exam], **diagnoser.context).slices, None
        for inputs in diagnoser.inputs(slices):
            if not isinstance(inputs, dict):
                continue
            _, height, width = shape = inputs["image"].shape
            if height == width and shape == (first or shape):
                first = shape
                yield inputs["image"]
