"""The page a reader opens after an evaluation, and the same numbers as JSON."""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ..files import write_atomically, write_json
from ..version import __version__
from . import plots
from .analysis import LEVELS, Settings, analyse, compare, levels_of
from .checklist import checklist, facts_of
from .compare import COMPARED
from .diagnosis import METRICS, summarize
from .operating_point import OperatingPoint
from .predictions import Predictions
from .visualize import draw_predictions

N_WORST = 6
"""Misses, and false alarms, that are shown."""

ReadImage = Callable[[str], np.ndarray]
"""From a path to uint8 (H, W, C); raises OSError or ValueError if there is no such image."""


@dataclass(frozen=True)
class Model:
    """A model and what it found on the dataset of the report.

    Attributes:
        name: unique in a report.
        predictions: on the dataset.
        settings: thresholds, costs and rules to judge them by, the model's operating threshold
            among them.
        point: where that comes from, if it was chosen on validation.
        facts: what the training run answers of the checklists, by ``checklist``'s names.
        history: the validations in training, rows with "iteration".
        training: the training's scalars, likewise.
        masks: how its masks agree with the true ones, as :class:`MaskEvaluator` summarizes it.
        differs: of a what-if, config key -> value that the model was trained with, and here.
    """

    name: str
    predictions: Predictions
    settings: Settings
    point: OperatingPoint | None = None
    facts: dict[str, str] = field(default_factory=dict)
    history: Sequence[dict] = ()
    training: Sequence[dict] = ()
    masks: Mapping | None = None
    differs: Mapping[str, tuple[object, object]] = field(default_factory=dict)


def write_report(
    folder: Path,
    models: Sequence[Model],
    *,
    dataset: str,
    read_image: ReadImage | None = None,
) -> dict:
    """Writes ``report.html``, which needs nothing but itself, and ``report.json``.

    Args:
        folder: made if need be.
        models: one, or several on the same images, which are compared with each other.
        dataset: its name.
        read_image: draws the worst misses and false alarms; None lists them only.

    Returns:
        The content of the JSON.

    Raises:
        ValueError: if models that are to be compared were not run on the same images.
    """
    comparisons = [
        {
            "first": a.name,
            "other": b.name,
            **compare(a.predictions, b.predictions, a.settings, b.settings),
        }
        for a, b in combinations(models, 2)
    ]
    entries = [_entry(model) for model in models]
    content = {
        "dataset": dataset,
        "version": __version__,
        "models": entries,
        "comparisons": comparisons,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", content)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(num=_number, interval=_interval, p=_p_value, words=_words)
    page = environment.get_template("report.html.jinja").render(
        **content,
        levels=LEVELS,
        metrics=METRICS,
        compared=COMPARED,
        figures=[_figures(model, entry) for model, entry in zip(models, entries)],
        pictures=[_pictures(model, entry, read_image) for model, entry in zip(models, entries)],
        together=_together(models) if len(models) > 1 else [],
    )
    with write_atomically(folder / "report.html") as file:
        file.write(page)
    return content


def _entry(model: Model) -> dict:
    point = None if model.point is None else asdict(model.point)
    temperature = None if model.point is None else model.point.temperature
    analysis = analyse(model.predictions, model.settings, temperature=temperature)
    return {
        "name": model.name,
        "differs": {key: {"trained": a, "here": b} for key, (a, b) in model.differs.items()},
        "operating_point": point,
        "alternatives": _alternatives(model),
        "analysis": analysis,
        "masks": model.masks,
        **worst_cases(model.predictions, model.settings.operating_threshold),
        "checklist": [asdict(item) for item in checklist(model.facts | facts_of(analysis, point))],
    }


def _alternatives(model: Model) -> list[dict]:
    """What the other rules would have chosen on validation, and what that gives here."""
    if model.point is None:
        return []
    rows = []
    for rule, threshold in model.point.alternatives.items():
        if threshold is not None:
            rule_levels = levels_of(model.predictions, model.settings.patient_rules[0])
            row = {"rule": rule, "threshold": threshold}
            for level, (y_true, y_score, _) in rule_levels.items():
                row[level] = summarize(
                    y_true, y_score, threshold, cost_ratio=model.settings.cost_ratio
                )
            rows.append(row)
    return rows


def worst_cases(predictions: Predictions, threshold: float) -> dict[str, list[dict]]:
    """The images that are most wrong at the threshold, at most one of a patient.

    Returns:
        "misses" (positive images, lowest score first) and "false_alarms" (negative images, highest
        score first), each at most ``N_WORST``: "image_id", "patient", "score", "types".
    """
    called, positive = predictions.scores >= threshold, predictions.labels == 1
    order = np.argsort(predictions.scores, kind="stable")
    result = {}
    for name, chosen in (
        ("misses", order[(positive & ~called)[order]]),
        ("false_alarms", order[::-1][(~positive & called)[order[::-1]]]),
    ):
        first = {predictions.patients[i]: i for i in reversed(chosen)}
        cases = [i for i in chosen if first[predictions.patients[i]] == i]
        result[name] = [
            {
                "image_id": predictions.image_ids[i],
                "patient": predictions.patients[i],
                "score": float(predictions.scores[i]),
                "types": sorted(set(predictions.types[i])) if predictions.types else [],
            }
            for i in cases[:N_WORST]
        ]
    return result


# ---- pictures --------------------------------------------------------------------------------


def _svg(plot: Callable, *args) -> str:
    buffer = io.BytesIO()
    plot(*args, buffer)
    return _uri("image/svg+xml", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _figures(model: Model, entry: dict) -> list[dict]:
    analysis, threshold = entry["analysis"], model.settings.operating_threshold
    levels = {
        name: level[:2]
        for name, level in levels_of(model.predictions, model.settings.patient_rules[0]).items()
    }
    rows = analysis["thresholds"]
    figures = [
        ("Metrics over thresholds", _svg(plots.plot_thresholds, rows, threshold)),
        ("ROC curves", _svg(plots.plot_roc, levels, threshold)),
        ("Precision and recall", _svg(plots.plot_pr, levels, threshold)),
    ]
    if analysis["lesions"] is not None:
        curves = {
            f"{key.split('_')[0]}, {curve['hit']}, CPM {_number(curve['cpm'])}": curve["curve"]
            for key, curve in analysis["lesions"]["froc"].items()
        }
        figures.append(("FROC curves", _svg(plots.plot_froc, curves)))
    if analysis["calibration"] is not None:
        names = {"as_scored": "as scored", "scaled": "temperature scaled"}
        forms = {
            f"{names[form]}, ECE {_number(bins['ece'])}": bins
            for form, bins in analysis["calibration"]["image"].items()
        }
        figures.append(("Calibration", _svg(plots.plot_calibration, forms)))
    if any("rpn/ratio_target" in row for row in model.training):
        figures.append(("Ratio k and positive scores", _svg(plots.plot_training, model.training)))
    if model.history:
        figures.append(("Validation over training", _svg(plots.plot_history, model.history)))
    wide = ("Metrics over", "Ratio k", "Validation")
    return [{"title": title, "uri": uri, "wide": title.startswith(wide)} for title, uri in figures]


def _together(models: Sequence[Model]) -> list[dict]:
    """ROC curves of all models, by level."""
    figures = []
    for level in LEVELS:
        curves = {
            model.name: levels_of(model.predictions, model.settings.patient_rules[0])[level][:2]
            for model in models
        }
        thresholds = {model.name: model.settings.operating_threshold for model in models}
        title = f"ROC curves, {level} level"
        uri = _svg(plots.plot_roc, curves, thresholds)
        figures.append({"title": title, "uri": uri, "wide": False})
    return figures


def _pictures(model: Model, entry: dict, read_image: ReadImage | None) -> dict[str, list[dict]]:
    """Overlays of the worst cases; "uri" is None where the image is not at hand."""
    predictions, threshold = model.predictions, model.settings.operating_threshold
    place = {image: i for i, image in enumerate(predictions.image_ids)}
    result = {}
    for kind in ("misses", "false_alarms"):
        result[kind] = []
        for case in entry[kind]:
            i, uri = place[case["image_id"]], None
            if read_image is not None:
                try:
                    image = read_image(predictions.files[i])
                except (OSError, ValueError):
                    image = None
                if image is not None:
                    uri = _overlay(image, predictions, i, threshold)
            result[kind].append({**case, "uri": uri})
    return result


def _overlay(image: np.ndarray, predictions: Predictions, i: int, threshold: float) -> str:
    buffer = io.BytesIO()
    overlay = draw_predictions(image, predictions, i, threshold)
    Image.fromarray(overlay).save(buffer, format="JPEG", quality=85)
    return _uri("image/jpeg", buffer.getvalue())


# ---- words -----------------------------------------------------------------------------------


def _number(value, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value}" if isinstance(value, int) else f"{value:.{digits}f}"


def _interval(bounds) -> str:
    if bounds is None or not all(math.isfinite(b) for b in bounds):
        return ""
    return f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"


def _p_value(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _words(name: str) -> str:
    """A metric's or rule's name as it reads in a table."""
    known = {"auc": "AUC", "npv": "NPV", "mcc": "MCC", "f1": "F1", "f2": "F2"}
    return known.get(name, name.replace("_", " "))
