"""OUTPUT_DIR: what lies where in it, and the records of what was trained and evaluated there.

    config.yaml, run.json        what the model was trained with; written once, when training starts
    model_best.pth, .json        the best model by validation, and how good it was
    model_final.pth              the last one
    model_0000999.pth, last_checkpoint
                                 where --resume goes on
    operating_point.json         the threshold, chosen on validation for the best model
    metrics.json, events.*, log.txt, diagnosis_history.csv, .png
    inference/<dataset>/         evaluations with the settings of the record
    what_if/<name>/              evaluations with others: config.yaml and evaluation.json say with
                                 which, inference/<dataset>/ holds what came out
    earlier-<n>/                 what was left of a training that never reached a checkpoint
    settings.json, done, terminal.txt, cost.json
                                 of a cell of an experiment

A folder in which a model of another one was evaluated holds the files of a what-if.
"""

import csv
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..evaluation.evaluator import DIAGNOSIS
from ..evaluation.mask_evaluator import MASK_METRICS, read_summary
from ..evaluation.operating_point import OperatingPoint
from ..files import sha256, write_atomically, write_json
from ..version import __version__
from .checkpoint import LAST_CHECKPOINT
from .config import Differences, change_answers, differences, load_config, not_continuable

logger = logging.getLogger(__name__)

_WHAT_IF, _INFERENCE, _EARLIER = "what_if", "inference", "earlier"
_OF_A_TRAINING = (
    *("config.yaml", "run.json", "evaluation.json", "operating_point.json", LAST_CHECKPOINT),
    *("model_*.pth", "model_best.json", "metrics.json", "events.out.tfevents.*", "log.txt*"),
    *("diagnosis_history.*", _INFERENCE, _WHAT_IF),
)
EXPECTED = "expected OUTPUT_DIR of a training run by tools/train_net.py"

Fingerprints = Mapping[str, Mapping]
"""By name of a dataset what is in it, of :func:`ich_det2.data.datasets.fingerprints`."""


def _file(name: str) -> property:
    return property(lambda self: self.path / name, doc=f"Path of {name}.")


class RunFolder:
    """The one owner of an OUTPUT_DIR: knows the names in it, reads it, and keeps its record."""

    config = _file("config.yaml")
    record = _file("run.json")
    evaluation = _file("evaluation.json")
    best = _file("model_best.pth")
    best_value = _file("model_best.json")
    final = _file("model_final.pth")
    operating_point = _file("operating_point.json")
    metrics = _file("metrics.json")
    history = _file("diagnosis_history.csv")
    history_figure = _file("diagnosis_history.png")
    settings = _file("settings.json")
    done = _file("done")
    terminal = _file("terminal.txt")
    cost = _file("cost.json")
    _last = _file(LAST_CHECKPOINT)

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    @classmethod
    def beside(cls, weights: str | Path) -> "RunFolder":
        """The folder in which weights lie; one that does not exist for a URL."""
        return cls(Path(str(weights).partition("?")[0]).parent)

    @classmethod
    def of_inference(cls, folder: str | Path) -> "RunFolder | None":
        """The OUTPUT_DIR, or the what-if in one, whose ``inference/<dataset>`` a folder is."""
        folder = Path(folder).resolve()
        run = cls(folder.parents[1]) if folder.is_dir() else None
        inside = run is not None and folder.parent.name == _INFERENCE and run.config.is_file()
        return run if inside else None

    @property
    def name(self) -> str:
        """Of the folder, for a person; a what-if's has its run's in front."""
        path = self.path.resolve()
        return f"{path.parents[1].name} {path.name}" if path.parent.name == _WHAT_IF else path.name

    def inference(self, dataset: str) -> Path:
        """Where the evaluation of a dataset lies."""
        return self.path / _INFERENCE / dataset

    # ---- what is there -----------------------------------------------------------------------

    def weights(self) -> Path | None:
        """The trained model: the best by validation, else the last."""
        return next((path for path in (self.best, self.final) if path.is_file()), None)

    def checkpoint(self) -> Path | None:
        """What --resume goes on from.

        Raises:
            ValueError: if it is noted, but not there.
        """
        if not self._last.is_file():
            return None
        name = self._last.read_text(encoding="utf-8").strip()
        if not name or Path(name).name != name or not (self.path / name).is_file():
            raise ValueError(
                f"{self._last}: names '{name}', which is not in that folder; put the checkpoint"
                f" back, or remove {self._last.name} to start anew."
            )
        return self.path / name

    def read_config(self, device: str = "cpu") -> CfgNode:
        """What the model was trained with.

        Args:
            device: in place of ``MODEL.DEVICE``; "" keeps it.

        Raises:
            FileNotFoundError, ValueError: naming the file.
        """
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: no such folder; {EXPECTED}.")
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.path}: holds no {self.config.name}; {EXPECTED}.")
        return load_config(self.config, ["MODEL.DEVICE", device] if device else [])

    def read_record(self) -> dict:
        """What ``run.json`` says; empty for a model that was trained before there was one."""
        return _read_json(self.record)

    def read_differences(self) -> Differences:
        """How a what-if differs from what its model was trained with; empty for a training."""
        differs = _read_json(self.evaluation).get("differs", {})
        return {key: (values["trained"], values["here"]) for key, values in differs.items()}

    def read_operating_point(self) -> OperatingPoint | None:
        """The threshold chosen for the best model, if it is there.

        Raises:
            ValueError: naming the file, if it cannot be read.
        """
        there = self.operating_point.is_file()
        return OperatingPoint.load(self.operating_point) if there else None

    def read_history(self) -> list[dict]:
        """The validations, by iteration; none where there is no history."""
        if not self.history.is_file():
            return []
        with open(self.history, encoding="utf-8", newline="") as file:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]

    def read_metrics(self) -> list[dict]:
        """The training's scalars, by iteration; none where there are none."""
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        rows: dict[int, dict] = {}
        for n, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                # A resumed run measures again what came after its checkpoint.
                rows[row["iteration"]] = row
            except (ValueError, KeyError, TypeError):
                if n < len(lines):  # a killed run leaves half of the last line
                    raise ValueError(f"{self.metrics}: line {n} is no JSON with iteration.") from (
                        None
                    )
        return [rows[iteration] for iteration in sorted(rows)]

    def read_results(self) -> dict[str, float]:
        """All numbers of the evaluations: "<split>/<level>/<metric>" -> value, NaN where undefined;
        "ich_val" is called "val"."""
        results: dict[str, float] = {}
        for path in sorted((self.path / _INFERENCE).glob(f"*/{DIAGNOSIS}")):
            split = path.parent.name.removeprefix("ich_")
            for level, values in _read_json(path).items():
                named = values.items() if isinstance(values, Mapping) else [("", values)]
                for key, value in named:
                    name = "/".join(filter(None, (split, level, key)))
                    results[name] = math.nan if value is None else value
        for folder in sorted((self.path / _INFERENCE).glob("*/")):
            found = read_summary(folder) or {}
            for key in MASK_METRICS if found else ():
                name = f"{folder.name.removeprefix('ich_')}/masks/{key}"
                results[name] = math.nan if found[key] is None else found[key]
        return results

    # ---- a training --------------------------------------------------------------------------

    def check_free(self) -> None:
        """Whether a new training may begin here.

        Raises:
            ValueError: if there is a trained model, which would be lost.
        """
        if self._last.is_file() or any(self.path.glob("model_*.pth")):
            raise ValueError(
                f"OUTPUT_DIR '{self.path}' holds a training already; go on with it by --resume,"
                " give another OUTPUT_DIR, or remove that folder to train anew."
            )

    def check_writable(self) -> None:
        """Whether the folder can be written, or made.

        Raises:
            ValueError: if not.
        """
        path = self.path.resolve()
        while not path.exists() and path != path.parent:
            path = path.parent
        if not path.is_dir():
            raise ValueError(f"OUTPUT_DIR '{self.path}': '{path}' is a file, expected a folder.")
        if not os.access(path, os.W_OK | os.X_OK):
            raise ValueError(
                f"OUTPUT_DIR '{self.path}': '{path}' cannot be written; give another OUTPUT_DIR."
            )

    def check_continues(self, cfg: CfgNode) -> None:
        """Whether a config goes on with the training here, which has begun.

        Raises:
            FileNotFoundError, ValueError: if it is another training's.
        """
        if not self.config.is_file():
            raise FileNotFoundError(
                f"{self.path}: holds a checkpoint, but no {self.config.name} that says what it was"
                " trained with; put it back, or give another OUTPUT_DIR."
            )
        if differs := not_continuable(differences(self.read_config(), cfg)):
            raise ValueError(
                f"--resume goes on with what {self.config} says: {in_words(differs)}; leave that as"
                " it is, or train anew in another OUTPUT_DIR."
            )

    def check_same_data(self, data: Fingerprints) -> None:
        """Whether a training that goes on here has the data that it began with.

        Raises:
            ValueError: if a dataset has changed since.
        """
        if differs := self.changed_data(data):
            raise ValueError(
                f"--resume goes on with the data of {self.record}, which have changed since:"
                f" {in_words(differs)}; put them back as they were, or train anew in another"
                f" OUTPUT_DIR (MODEL.WEIGHTS '{self.checkpoint()}' starts from this model)."
            )

    def begin(self, cfg: CfgNode, data: Fingerprints | None = None) -> None:
        """Writes the record of a training that starts here; it is never changed afterwards.

        What a training that never reached a checkpoint has left is set aside.

        Args:
            cfg: with which.
            data: what is in its datasets, see :func:`fingerprints`; None where that is not known.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._set_aside()
        origin = _origin(cfg, "initial_weights")
        record = {"started": _now(), **origin, "data": data or {}, "resumed": []}
        write_json(self.record, record)
        self._write_config(cfg)

    def note_resumed(self, cfg: CfgNode, iteration: int) -> None:
        """Notes beside the record that the training goes on, and with what other settings."""
        record = self.read_record()
        changed = differences(self.read_config(), cfg)
        note = {"date": _now(), "iteration": iteration, "versions": versions()}
        note["changed"] = {key: list(pair) for key, pair in changed.items()}
        record.setdefault("resumed", []).append(note)
        write_json(self.record, record)

    def _set_aside(self) -> None:
        found = [path for pattern in _OF_A_TRAINING for path in self.path.glob(pattern)]
        if not found:
            return
        numbers = (re.fullmatch(rf"{_EARLIER}-(\d+)", p.name) for p in self.path.iterdir())
        number = max((int(match[1]) for match in numbers if match), default=0) + 1
        folder = self.path / f"{_EARLIER}-{number}"
        folder.mkdir()
        for path in found:
            path.rename(folder / path.name)

    # ---- an evaluation -----------------------------------------------------------------------

    def place_of(self, cfg: CfgNode, data: Fingerprints) -> "RunFolder":
        """Where the evaluation of ``MODEL.WEIGHTS`` is written: here, if it is of the model, the
        settings and the data of the record, or if there is no record; else in a what-if of its
        own."""
        differs, weights = self.answers_differ(cfg, data), cfg.MODEL.WEIGHTS
        if self.config.is_file() and not self._evaluates(weights):
            differs["MODEL.WEIGHTS"] = ("", hash_of(weights) or weights)
        if not differs:
            return self
        values = json.dumps([(key, now) for key, (_, now) in sorted(differs.items())])
        digest = hashlib.sha256(values.encode()).hexdigest()[:8]
        words = (re.split(r"[. ]", key)[-1].lower() for key in sorted(differs))
        names = "-".join(dict.fromkeys(words))
        return RunFolder(self.path / _WHAT_IF / f"{names[:60]}-{digest}")

    def begin_evaluation(
        self,
        cfg: CfgNode,
        data: Fingerprints,
        differs: Differences,
        point: OperatingPoint | None,
    ) -> None:
        """Writes what is evaluated here, but not over the record of a training.

        Args:
            cfg: with which; its ``MODEL.WEIGHTS`` are the model's.
            data: what is in DATASETS.TEST.
            differs: how that differs from what the model was trained with.
            point: the model's operating point, if it has one.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.config.is_file() and not self.evaluation.is_file():
            return
        words = {key: {"trained": before, "here": now} for key, (before, now) in differs.items()}
        note = {"evaluated": _now(), **_origin(cfg, "weights"), "data": data, "differs": words}
        write_json(self.evaluation, note)
        if point is not None:
            point.save(self.operating_point)
        self._write_config(cfg)

    def answers_differ(self, cfg: CfgNode, data: Fingerprints) -> Differences:
        """How a config and the data with which the model here is evaluated differ from what it was
        trained with; empty where that is not known.

        Args:
            cfg: of the evaluation.
            data: what is in its DATASETS.TEST.
        """
        if not self.config.is_file():
            return {}
        differs = change_answers(differences(self.read_config(), cfg))
        known = self._known.get("data", {})
        unknown = any(n.startswith("ich_") and n not in known for n in cfg.DATASETS.TEST)
        if unknown and self.data_differ(cfg):
            differs["DATASETS.ICH_ROOT"] = (self.data_root(), cfg.DATASETS.ICH_ROOT)
        return differs | self.changed_data(data)

    def changed_data(self, data: Fingerprints) -> Differences:
        """The datasets of the record that are not any more what they were, in words; one that the
        record does not know is left out.

        Args:
            data: what is in them now.
        """
        known = self._known.get("data", {})
        pairs = {name: (known[name], now) for name, now in data.items() if name in known}
        return {
            f"data set {name}": tuple(map(_count, pair))
            for name, pair in pairs.items()
            if any(pair[0][key] != pair[1][key] for key in pair[0].keys() & pair[1].keys())
        }

    def changed_weights(self, cfg: CfgNode) -> Differences:
        """``MODEL.WEIGHTS`` that the training here began with, if that file is another one now,
        both by the beginning of their SHA-256; empty where one of them is not known."""
        before = self.read_record().get("initial_weights", {}).get("sha256")
        now = hash_of(cfg.MODEL.WEIGHTS) if before else None
        return {"MODEL.WEIGHTS": (before[:12], now[:12])} if now and now != before else {}

    def data_root(self) -> str:
        """DATASETS.ICH_ROOT of the record, absolute if that is known."""
        return self._known.get("data_root", self.read_config().DATASETS.ICH_ROOT)

    def data_differ(self, cfg: CfgNode) -> bool:
        """Whether a config reads another VOC tree than the record."""
        return Path(self.data_root()).resolve() != Path(cfg.DATASETS.ICH_ROOT).resolve()

    @property
    def _known(self) -> dict:
        return self.read_record() or _read_json(self.evaluation)

    def _evaluates(self, weights: str) -> bool:
        """Whether weights are a model's that evaluations here are of."""
        if self.evaluation.is_file():
            known = _read_json(self.evaluation).get("weights", {}).get("sha256")
            return known == hash_of(weights)
        return RunFolder.beside(weights).path.resolve() == self.path.resolve()

    def _write_config(self, cfg: CfgNode) -> None:
        with write_atomically(self.config) as file:
            file.write(cfg.dump())


def trained_config(
    cfg: CfgNode,
    folders: Sequence[str | Path],
    is_open: Callable[[CfgNode], bool],
    what: str,
    key: str,
) -> CfgNode:
    """The config that a model was trained with, for what its own config leaves open.

    Args:
        cfg: its own.
        folders: of training runs, the first that knows is taken; without any that of MODEL.WEIGHTS,
            then OUTPUT_DIR.
        is_open: whether a config leaves it open.
        what: in a word, such as "anchors".
        key: under which it is in a config.

    Raises:
        ValueError: if none has a record of it.
    """
    runs = [RunFolder(path) for path in folders]
    runs = runs or [RunFolder.beside(cfg.MODEL.WEIGHTS), RunFolder(cfg.OUTPUT_DIR)]
    for run in runs:
        trained = run.read_config() if run.config.is_file() else None
        if trained is not None and not is_open(trained):
            logger.info("The %s of %s taken from %s.", what, key, run.config)
            return trained
    places = " or in ".join(f"'{run.path}'" for run in runs)
    raise ValueError(
        f"the config leaves the {what} of {key} open, and there is no {runs[0].config.name} with"
        f" the trained {what} in {places}; use --config-file with that of the training run."
    )


def in_words(differs: Differences) -> str:
    """Differences as they read within a sentence."""
    return "; ".join(f"{key} {before!r}, not {now!r}" for key, (before, now) in differs.items())


def versions() -> dict[str, str]:
    """Of what a model's answers depend on."""
    return {
        "ich_det2": __version__,
        "detectron2": detectron2.__version__,
        "torch": torch.__version__,
    }


def hash_of(weights: str | Path) -> str | None:
    """SHA-256 of weights that Detectron2's PathManager finds as a file; None otherwise."""
    name = str(weights).partition("?")[0]
    try:
        path = Path(PathManager.get_local_path(name)) if name else None
    except Exception:  # a download raises whatever its transport raises
        return None
    return sha256(path) if path is not None and path.is_file() else None


def _origin(cfg: CfgNode, weights: str) -> dict:
    """Versions, data and weights that a training or an evaluation begins with."""
    path = cfg.MODEL.WEIGHTS
    return {
        "versions": versions(),
        "data_root": str(Path(cfg.DATASETS.ICH_ROOT).resolve()),
        weights: {"name": Path(path).name, "sha256": hash_of(path)},
    }


def _count(data: Mapping) -> str:
    """A fingerprint in words."""
    return ", ".join(f"{key} {str(value)[:12]}" for key, value in data.items())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected an object of JSON.")
    return content
