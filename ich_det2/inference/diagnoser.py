"""A trained model on slices: what it finds on each.

Sizes: H, W are an image's rows and columns, M its boxes.
"""

import contextlib
import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode

from ..data.crop import Box, Entry, find_crops, uncrop
from ..data.mapper import IchDatasetMapper
from ..data.masks import encode_mask
from ..engine.anchors import needs_anchors
from ..engine.checkpoint import for_inference, load_trained
from ..engine.config import context_settings
from ..engine.operating_point import find_operating_point
from ..engine.run_folder import EXPECTED, RunFolder
from ..files import sha256
from ..zoo import model_folder
from .accelerate import accelerate
from .slices import Slice, _reason

# Enough to hide the decoding of most files behind a network; each holds one slice in memory.
_READERS = 4

# On a CPU slices side by side, of a thread each, are through sooner than one slice by many threads;
# each has its maps in memory.
_WORKERS = 8


@dataclass(frozen=True)
class Detections:
    """What a model finds on a slice.

    Attributes:
        boxes: float32 (M, 4): x0, y0, x1, y1 in pixels of the original image.
        scores: float64 (M,), so that they compare with a threshold as in the evaluation.
        classes: int (M,), indices into ``DATASETS.ICH_CLASSES``.
        size: (H, W) of the original image.
        image_score: of a model that scores the slice itself, with boxes (``DiagnosisRCNN``) or
            without (``ImageClassifier``); None for other detectors. Smoothed, if it is.
        raw_score: the slice's score before smoothing; None without.
        raw_scores: float64 (M,), of the boxes before smoothing; None where they keep theirs.
        masks: of the boxes, as ``data.masks.encode_mask`` keeps them; None of a model without.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    size: tuple[int, int]
    image_score: float | None = None
    raw_score: float | None = None
    raw_scores: np.ndarray | None = None
    masks: tuple[dict, ...] | None = None

    @property
    def score(self) -> float:
        """The slice's own, else the highest of the boxes, 0 without boxes."""
        if self.image_score is not None:
            return self.image_score
        return self.scores.max().item() if len(self.scores) else 0.0

    def at_least(self, score: float) -> "Detections":
        """The boxes of this score and more, and in any case the highest."""
        if not len(self.scores):
            return self
        return self.of(self.scores >= min(score, self.scores.max()))

    def of(self, which: np.ndarray) -> "Detections":
        """Some of the boxes: a mask or indices."""
        kept = np.arange(len(self.scores))[which]
        return replace(
            self,
            boxes=self.boxes[kept],
            scores=self.scores[kept],
            classes=self.classes[kept],
            raw_scores=None if self.raw_scores is None else self.raw_scores[kept],
            masks=None if self.masks is None else tuple(self.masks[i] for i in kept),
        )


def load_run(folder: str | os.PathLike, *, device: str = "") -> tuple[CfgNode, Path]:
    """Reads what a training run left in its OUTPUT_DIR.

    Args:
        folder: holds ``config.yaml`` and its best or last weights; or ``zoo://NAME``.
        device: "cpu" or "cuda" in place of ``MODEL.DEVICE``.

    Returns:
        The config and the path of the weights.

    Raises:
        FileNotFoundError, ValueError: one sentence, if something is missing or unreadable.
    """
    run = RunFolder(model_folder(folder))
    config = run.config
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds no GPU; use cpu.")
    try:
        cfg = run.read_config(device)
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise ValueError(f"{config}: is no config of Detectron2 ({_reason(error, config)}).") from (
            error
        )
    weights = run.weights()
    if weights is None:
        names = f"{run.best.name} nor {run.final.name}"
        raise FileNotFoundError(f"{run.path}: holds neither {names}; {EXPECTED}.")
    if needs_anchors(cfg):
        raise ValueError(
            f"{config}: leaves the anchors open, so the weights cannot be used; take the "
            f"{config.name} that training wrote beside them."
        )
    return cfg, weights


class Diagnoser:
    """Runs a trained model over slices, in batches, while the next ones are decoded."""

    def __init__(
        self,
        model: torch.nn.Module,
        mapper: IchDatasetMapper,
        *,
        batch_size: int,
        classes: Sequence[str] = ("hemorrhage",),
        threshold: float = 0.5,
        patient_rule: str = "any",
        smoothing: Sequence[float] = (),
        smoothing_iou: float = 0.0,
        smoothing_boxes: Sequence[float] = (),
        context: dict | None = None,
        head_crop: bool = False,
        workers: int = 1,
        facts: dict | None = None,
    ):
        """
        Args:
            model: ``GeneralizedRCNN`` or ``ImageClassifier`` in evaluation mode.
            mapper: of evaluation (``is_train=False``).
            batch_size: slices in a batch, >= 1.
            workers: batches that are given to the model side by side; PyTorch's threads are shared
                out among them.
            classes: names of the model's classes.
            threshold: of its operating point.
            patient_rule: see ``patient_scores``.
            smoothing: weights of ``smooth_scores``; none leaves the scores as they are.
            smoothing_iou: of ``smooth_boxes``, with smoothing; 0 leaves the scores of boxes.
            smoothing_boxes: weights of ``smooth_boxes``; none takes those of ``smoothing``.
            context: which neighbours the mapper asks for, arguments of ``find_slices``.
            head_crop: crop slices to the head, see :func:`find_crops`.
            facts: which model it is, for a person.
        """
        self.model = model
        self.mapper = mapper
        self.batch_size = batch_size
        self.classes = tuple(classes)
        self.threshold = threshold
        self.patient_rule = patient_rule
        self.smoothing = tuple(smoothing)
        self.smoothing_iou = smoothing_iou if self.smoothing else 0.0
        self.smoothing_boxes = tuple(smoothing_boxes)
        self.context = context or {}
        self.head_crop = head_crop
        self.workers = workers
        self.facts = facts or {}

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        *,
        device: str = "",
        batch_size: int | None = None,
        backend: str = "eager",
        threads: int | None = None,
    ) -> "Diagnoser":
        """Loads the model that a training run left in its OUTPUT_DIR.

        Args:
            folder: as of :func:`load_run`.
            device: "cpu" or "cuda" in place of ``MODEL.DEVICE``.
            batch_size: slices in a batch; if None, 1 for PyTorch on a CPU, where more cost more of
                its time for each slice, else ``TEST.BATCH_SIZE``.
            backend: engine of the dense parts on a CPU, of ``inference.BACKENDS``.
            threads: of the network on a CPU; PyTorch's choice if None (of another backend 1).

        Raises:
            FileNotFoundError, ValueError: one sentence, if something is missing, damaged or of
                another model, or the backend is not there.
        """
        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads is {threads}, expected at least 1.")
            torch.set_num_threads(threads)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
        cfg, weights = load_run(folder, device=device)
        point = find_operating_point(cfg, weights)
        try:
            model = load_trained(cfg, weights)
        except (KeyError, AssertionError) as error:
            raise ValueError(
                f"{RunFolder.beside(weights).config}: {_reason(error, weights)}."
            ) from error
        _check_weights(model, weights)
        model = accelerate(for_inference(model), backend, threads or 1)
        plain = backend == "eager" and cfg.MODEL.DEVICE == "cpu"
        patient_rule = cfg.TEST.DIAGNOSIS.PATIENT_RULES[0]
        smoothing = list(cfg.TEST.DIAGNOSIS.SMOOTHING)
        smoothing_iou = cfg.TEST.DIAGNOSIS.SMOOTHING_IOU
        smoothing_boxes = list(cfg.TEST.DIAGNOSIS.SMOOTHING_BOXES)
        return cls(
            model,
            IchDatasetMapper(cfg, is_train=False),
            batch_size=batch_size or (1 if plain else cfg.TEST.BATCH_SIZE),
            classes=cfg.DATASETS.ICH_CLASSES,
            threshold=cfg.TEST.DIAGNOSIS.OPERATING_THRESHOLD,
            patient_rule=patient_rule,
            smoothing=smoothing,
            smoothing_iou=smoothing_iou,
            smoothing_boxes=smoothing_boxes,
            context=context_settings(cfg),
            head_crop=cfg.INPUT.HEAD_CROP,
            workers=min(torch.get_num_threads(), _WORKERS) if plain else 1,
            facts={
                "run": Path(cfg.OUTPUT_DIR).name,
                "weights": weights.name,
                "sha256": sha256(weights),
                "operating_point": point and {"rule": point.rule, "dataset": point.dataset},
                "patient_rule": patient_rule,
                **({"backend": backend} if backend != "eager" else {}),
                **({"smoothing": smoothing} if smoothing else {}),
                **({"smoothing_iou": smoothing_iou} if smoothing and smoothing_iou else {}),
                **({"smoothing_boxes": smoothing_boxes} if smoothing_boxes else {}),
            },
        )

    def __call__(self, slices: Iterable[Slice]) -> Iterator[Detections | ValueError]:
        """
        Args:
            slices: of :func:`find_slices`. Not more of them than a few batches are in memory at a
                time. With ``head_crop`` those of a series are cropped alike.

        Yields:
            For each slice in its order what was found, or why it cannot be decoded (in words that
            do not hold the path).
        """
        if self.workers == 1:
            for batch in self._batches(slices):
                yield from self._detect(batch)
            return
        with _THREADS.shared() as threads:
            share = max(1, threads // self.workers)
            pool = ThreadPoolExecutor(self.workers, "detect", torch.set_num_threads, (share,))
            for found in _ahead(pool, self._detect, zip(self._batches(slices)), self.workers):
                yield from found

    def _batches(self, slices: Iterable[Slice]) -> Iterator[list[dict | ValueError]]:
        waiting: list[dict | ValueError] = []
        for item in self.inputs(slices):
            sizes = {x["image"].shape for x in waiting if isinstance(x, dict)}
            # Images of different size would be padded, which changes what is found on them.
            if isinstance(item, dict) and sizes and item["image"].shape not in sizes:
                yield waiting
                waiting = []
            waiting.append(item)
            if len(waiting) >= self.batch_size:
                yield waiting
                waiting = []
        yield waiting

    def inputs(self, slices: Iterable[Slice]) -> Iterator[dict | ValueError]:
        """What the model is given of each slice, decoded by threads a few slices or two batches
        ahead.

        Args:
            slices: as of :meth:`__call__`.

        Yields:
            For each slice in its order a mapped dict, or why it cannot be decoded.
        """
        ahead = max(2 * self.batch_size, _READERS)
        yield from _ahead(
            ThreadPoolExecutor(_READERS, "read"), self._read, self._with_crops(slices), ahead
        )

    def _with_crops(self, slices: Iterable[Slice]) -> Iterator[tuple[Slice, Box | None]]:
        """Slices and their crops; the head of a series is looked for when its first one is due."""
        slices = list(slices) if self.head_crop else slices
        series: dict[tuple[str, str], list[Entry]] = defaultdict(list)
        crops: dict[Entry, Box] = {}
        for s in slices if self.head_crop else ():
            series[s.patient, s.series].append((os.fspath(s.path), s.frame))
        for s in slices:
            if members := series.pop((s.patient, s.series), None):
                crops |= find_crops([members])
            yield s, crops.get((os.fspath(s.path), s.frame))

    def _read(self, entry: Slice, crop: Box | None) -> dict | ValueError:
        others = {"context_files": entry.context_files, "scan_files": entry.scan_files}
        inputs = {"file_name": os.fspath(entry.path), "frame": entry.frame, "crop": crop}
        try:
            return self.mapper(inputs | others)
        except Exception as error:  # decoders answer damage with many kinds of errors
            paths = (Path(path) for files in others.values() for path, _ in files)
            return ValueError(_reason(error, entry.path, *paths))

    def _detect(self, items: Sequence[dict | ValueError]) -> list[Detections | ValueError]:
        inputs = [x for x in items if isinstance(x, dict)]
        outputs = iter(())
        if inputs:
            with torch.inference_mode():
                outputs = iter(uncrop(inputs, self.model(inputs)))
        return [_detections(x, next(outputs)) if isinstance(x, dict) else x for x in items]


class _Threads:
    """PyTorch's number of threads, which a worker that sets its own sets for all threads to come.

    Of diagnoses that overlap the first one knows the number, and each gives it back.
    """

    def __init__(self):
        self._lock, self._users, self._number = threading.Lock(), 0, 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[int]:
        with self._lock:
            self._number = self._number if self._users else torch.get_num_threads()
            self._users += 1
        try:
            yield self._number
        finally:
            with self._lock:
                self._users -= 1
                torch.set_num_threads(self._number)


_THREADS = _Threads()


def _ahead(
    pool: ThreadPoolExecutor, function: Callable, arguments: Iterable[tuple], ahead: int
) -> Iterator:
    """What a function says of each, in their order, while a pool is at work on those ahead."""
    try:
        pending = deque()
        for each in arguments:
            pending.append(pool.submit(function, *each))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _detections(inputs: dict, output: dict) -> Detections:
    score = float(output["image_score"]) if "image_score" in output else None
    if "instances" not in output:
        nothing = (np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, int))
        return Detections(*nothing, (inputs["height"], inputs["width"]), score)
    instances = output["instances"].to("cpu")
    return Detections(
        boxes=instances.pred_boxes.tensor.numpy(),
        scores=instances.scores.numpy().astype(np.float64),
        classes=instances.pred_classes.numpy(),
        size=instances.image_size,
        image_score=score,
        masks=tuple(encode_mask(mask) for mask in instances.pred_masks.numpy())
        if instances.has("pred_masks")
        else None,
    )


def _check_weights(model: torch.nn.Module, weights: Path) -> None:
    """A checkpoint loads with a mere warning if tensors are missing; random ones would diagnose.

    Raises:
        ValueError: naming a tensor.
    """
    trained = torch.load(weights, map_location="cpu", weights_only=True)
    trained = trained.get("model", trained)
    for name, tensor in model.state_dict().items():
        if name not in trained or trained[name].shape != tensor.shape:
            raise ValueError(
                f"{weights}: does not fit the config.yaml beside it, '{name}' is "
                f"{'of another shape' if name in trained else 'missing'}; take both from one run."
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"{weights}: '{name}' holds NaN or infinity, so the training diverged; "
                "train again with a lower SOLVER.BASE_LR."
            )
