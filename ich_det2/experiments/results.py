"""Results of many trainings: a row each, mean and spread over seeds, the best on validation.

A row has the training's values of the experiment's axes, "seed" among them, and metrics named
``<split>/<level>/<metric>`` (``val/image/auc``, ``test/lesion/voc_ap50``) after ``diagnosis.json``.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..evaluation.diagnosis import diagnosis_table
from ..evaluation.intervals import delong_interval
from ..evaluation.predictions import Predictions
from ..evaluation.yardstick import Yardstick, paired_differences

SEED = "seed"
Row = dict[str, object]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation (NaN for a single value) and number of what is no NaN."""
    values = np.array([v for v in values if not math.isnan(v)], dtype=float)
    n = len(values)
    return {
        "mean": float(values.mean()) if n else math.nan,
        "std": float(values.std(ddof=1)) if n > 1 else math.nan,
        "n": n,
    }


def groups_of(rows: Sequence[Row], axes: Sequence[str]) -> dict[tuple, list[Row]]:
    """Rows by their values of the axes, "seed" left out, in order of appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[a] for a in axes if a != SEED), []).append(row)
    return groups


def spread_table(
    rows: Sequence[Row], axes: Sequence[str], metrics: Mapping[str, str]
) -> list[dict]:
    """A row for each choice of the axes' values, over seeds.

    Args:
        rows: one for each training.
        axes: names; "seed" is averaged over.
        metrics: column of the table -> name of a metric, NaN where a training lacks it.

    Returns:
        Rows with the axes, and "<column> mean", "<column> std" and "<column> n".
    """
    names = [axis for axis in axes if axis != SEED]
    table = []
    for group, members in groups_of(rows, axes).items():
        entry = dict(zip(names, group))
        for column, metric in metrics.items():
            found = spread([float(row.get(metric, math.nan)) for row in members])
            entry |= {f"{column} {key}": value for key, value in found.items()}
        table.append(entry)
    return table


def select(rows: Sequence[Row], axis: str, metric: str) -> dict:
    """Picks a value of an axis by the mean over seeds of a metric on validation.

    Only values with as many seeds as the best supplied one compete, and of equals the smallest is
    taken.

    Args:
        rows: one for each training.
        axis: name of the searched setting, a key of the rows.
        metric: name, larger is better.

    Returns:
        axis -> value, "metric", "mean", "std", "n", and "candidates": how many competed.

    Raises:
        ValueError: if the metric is not one of the validation, or no row has it.
    """
    if not metric.startswith("val/"):
        raise ValueError(f"'{metric}' picks {axis}, expected a metric of the validation: val/...")
    of_value = {
        value: spread([float(row.get(metric, math.nan)) for row in members])
        for (value,), members in groups_of(rows, [axis]).items()
    }
    most = max((found["n"] for found in of_value.values()), default=0)
    if not most:
        raise ValueError(f"no training has a '{metric}', so no {axis} can be picked.")
    candidates = {v: found for v, found in of_value.items() if found["n"] == most}
    value = min(candidates, key=lambda v: (-candidates[v]["mean"], v))
    return {axis: value, "metric": metric, **candidates[value], "candidates": len(candidates)}


def threshold_curves(
    runs: Mapping[str, Sequence[Predictions]], thresholds: Sequence[float], metrics: Sequence[str]
) -> list[dict]:
    """Metrics of the images' diagnosis over thresholds, mean and spread over seeds.

    Args:
        runs: name -> predictions of its trainings.
        thresholds: scores from which an image is called positive.
        metrics: names in ``diagnosis.METRICS``; a precision without positive calls is left out.

    Returns:
        Rows with "name", "threshold", and "<metric> mean", "<metric> std" and "<metric> n".
    """
    rows = []
    for name, members in runs.items():
        tables = [diagnosis_table("image", p.labels, p.scores, thresholds) for p in members]
        for threshold, same in zip(thresholds, zip(*tables)):
            row = {"name": name, "threshold": threshold}
            for metric in metrics:
                found = spread([entry[metric] for entry in same])
                row |= {f"{metric} {key}": value for key, value in found.items()}
            rows.append(row)
    return rows


def patterns(
    runs: Mapping[str, Predictions], thresholds: Mapping[str, float], *, each: int
) -> dict[str, list[str]]:
    """Positive images by who finds them, some evenly spaced ones of each kind.

    Args:
        runs: name -> predictions of the same images.
        thresholds: name -> score from which an image is called positive.
        each: how many at most.

    Returns:
        "found by ...; missed by ..." -> image ids; what most find comes first.

    Raises:
        ValueError: if the images differ.
    """
    first = next(iter(runs.values()))
    hits = {}
    for name, predictions in runs.items():
        if set(predictions.image_ids) != set(first.image_ids):
            raise ValueError(f"'{name}' was tested on other images than '{next(iter(runs))}'.")
        hits[name] = predictions.take(first.image_ids).scores >= thresholds[name]
    kinds: dict[tuple, list[str]] = {}
    for i in np.flatnonzero(first.labels == 1):
        kinds.setdefault(tuple(bool(h[i]) for h in hits.values()), []).append(first.image_ids[i])
    result = {}
    for kind in sorted(kinds, reverse=True):
        found = [name for name, hit in zip(runs, kind) if hit]
        missed = [name for name, hit in zip(runs, kind) if not hit]
        parts = [f"{w} by {', '.join(n)}" for w, n in (("found", found), ("missed", missed)) if n]
        members = kinds[kind]
        places = np.unique(np.linspace(0, len(members) - 1, min(each, len(members))).astype(int))
        result["; ".join(parts)] = [members[i] for i in places]
    return result


def differences_to(
    found: Mapping[str, Mapping[object, Yardstick]], reference: str, axis: str
) -> list[dict]:
    """How systems differ from one of them, over the seeds that both have.

    Args:
        found: name -> seed -> what it is measured by, all on the same images.
        reference: name; if it was not tested, there is nothing to compare with.
        axis: what the names are.

    Returns:
        Rows with the axis, "seeds" (how many), and those of ``paired_differences``.

    Raises:
        ValueError: if a system was tested on other images than the reference.
    """
    rows: list[dict] = []
    for name, seeds in found.items():
        others = found.get(reference, {})
        pairs = [(seeds[seed], others[seed]) for seed in seeds if seed in others]
        if name == reference or not pairs:
            continue
        if any(one.found.image_ids != pairs[0][1].found.image_ids for p in pairs for one in p):
            raise ValueError(f"'{name}' was tested on other images than '{reference}'.")
        rows += [{axis: name, "seeds": len(pairs), **row} for row in paired_differences(pairs)]
    return rows


def not_above_chance(yardsticks: Iterable[Yardstick]) -> bool:
    """Whether no seed's AUC of slices is above 0.5 with its 95 % interval over patients.

    An AUC of 1 has no interval. It is above chance where less than one in 40 orders of as many
    patients puts all that bleed before all others.
    """
    return not any(_is_above_chance(y.found) for y in yardsticks)


def _is_above_chance(found: Predictions) -> bool:
    low, _ = delong_interval(found.labels, found.scores, found.patients)
    if not math.isnan(low):
        return low > 0.5
    bleeding = np.asarray(found.labels) == 1
    scores = np.asarray(found.scores)
    if bleeding.all() or not bleeding.any() or scores[bleeding].min() <= scores[~bleeding].max():
        return False
    patients = np.asarray(found.patients)
    number, positive = len({*patients}), len({*patients[bleeding]})
    return math.comb(number, positive) > 40
