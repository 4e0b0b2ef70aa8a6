"""The files that a diagnosis is written to.

A new output format is one more function over a ``Diagnosis``, see ``WRITERS``.
"""

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from ..evaluation.predictions import RAW_SCORE
from ..files import check_writable, nested, replace_folder, write_atomically, write_csv
from .results import (
    KEY_FIELDS,
    NOTE_FIELDS,
    PATIENT_FIELDS,
    SLICE_FIELDS,
    Diagnosis,
    Progress,
    SliceDiagnosis,
    patient_rows,
    slice_rows,
)
from .viewer import write_viewers

OVERLAYS = ("positive", "all", "none")


def write_outputs(
    diagnosis: Diagnosis,
    folder: str | os.PathLike,
    *,
    overlays: str,
    viewer: bool,
    key: str | os.PathLike | None,
    force: bool,
    progress: Progress,
) -> None:
    """Writes all outputs, or none; see :meth:`Diagnosis.write`."""
    if overlays not in OVERLAYS:
        raise ValueError(f"overlays is {overlays!r}, expected one of {', '.join(OVERLAYS)}.")
    check_outputs(folder, diagnosis.inputs, key=key, force=force)
    with _key_of(diagnosis, key), replace_folder(folder) as temporary:
        _draw_overlays(diagnosis, temporary, overlays, progress)
        for write in WRITERS:
            write(diagnosis, temporary)
        if viewer:
            write_viewers(diagnosis, temporary, progress)


def check_outputs(
    folder: str | os.PathLike,
    inputs: Sequence[str | os.PathLike],
    *,
    key: str | os.PathLike | None = None,
    force: bool = False,
) -> None:
    """Refuses outputs whose writing could lose or betray something, before hours of work.

    Raises:
        ValueError: one sentence with the remedy.
    """
    output = Path(folder)
    resolved = Path(os.path.realpath(output))
    check_writable(output, "--output")
    if path := nested(output, inputs):
        raise ValueError(
            f"--output {output} and the input {path.name} lie in one another, so a later run "
            "would take results for images; give a folder elsewhere."
        )
    if key is not None:
        _check_key(Path(key), resolved, force)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a new folder.")
    if os.path.ismount(resolved):
        raise ValueError(f"--output {output} is a mount point; give a new folder in it.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not force:
        raise ValueError(
            f"--output {output} is not empty; give a new folder, or --force to replace an earlier "
            "result."
        )
    try:
        earlier = "tool" in json.loads((output / "diagnosis.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        earlier = False
    if not earlier:
        raise ValueError(
            f"--output {output} holds no result of this tool, so --force does not replace it; give "
            "a new folder."
        )


def _check_key(key: Path, output: Path, force: bool) -> None:
    if key.is_symlink():
        raise ValueError(f"--key {key} is a link, which is not followed; give a new file.")
    if Path(os.path.realpath(key)).is_relative_to(output):
        raise ValueError(
            f"--key {key} lies in the folder of the results, which it shall be apart from; give a "
            "file elsewhere."
        )
    if not key.parent.is_dir():
        raise ValueError(f"--key {key}: there is no such folder; make it first.")
    check_writable(key, "--key")
    if not key.exists():
        return
    try:
        with open(key, encoding="utf-8", newline="") as file:
            earlier = key.is_file() and tuple(next(csv.reader(file), ())) == KEY_FIELDS
    except (OSError, ValueError):
        earlier = False
    if not (force and earlier):
        raise ValueError(
            f"--key {key} exists; give a new file"
            + (", or --force to replace an earlier key." if earlier else ".")
        )


def _draw_overlays(diagnosis: Diagnosis, folder: Path, which: str, progress: Progress) -> None:
    """Draws slices with their boxes, see :meth:`Diagnosis.write`."""
    highest: dict[str, SliceDiagnosis] = {}
    for s in diagnosis.slices:
        if s.patient not in highest or s.score > highest[s.patient].score:
            highest[s.patient] = s
    wanted = {
        "all": lambda s: True,
        "none": lambda s: False,
        "positive": lambda s: s.verdict == "positive" or s is highest[s.patient],
    }[which]
    chosen = [s for s in diagnosis.slices if wanted(s)]
    for s in progress(chosen, "drawing", len(chosen)):
        # Read again: keeping all slices would take a series' size in memory.
        overlay = diagnosis.draw(s)
        path = folder / s.overlay
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(overlay).save(path, compress_level=4)


def write_slices(diagnosis: Diagnosis, folder: Path) -> None:
    """``slices.csv``."""
    extra = ("patient_id", "series_uid", "sop_uid") if diagnosis.identify else ()
    if any(s.raw_score is not None for s in diagnosis.slices):
        extra += (RAW_SCORE,)
    classes = dict.fromkeys(c for s in diagnosis.slices for c in s.area_mm2 or ())
    extra += tuple(f"area_mm2_{name}" for name in classes)
    rows = [_by_class(_six_decimals(row), "area_mm2") for row in slice_rows(diagnosis)]
    write_csv(folder / "slices.csv", (*SLICE_FIELDS, *extra), rows)


def write_patients(diagnosis: Diagnosis, folder: Path) -> None:
    """``patients.csv``."""
    extra = ("patient_id",) if diagnosis.identify else ()
    classes = dict.fromkeys(c for p in diagnosis.patients for c in p.volume_ml or ())
    extra += tuple(f"volume_ml_{name}" for name in classes)
    rows = []
    for row in patient_rows(diagnosis):
        told = {"complete": "yes" if row["complete"] else "no", "notes": "; ".join(row["notes"])}
        rows.append(_by_class(_six_decimals(row) | told, "volume_ml"))
    write_csv(folder / "patients.csv", (*PATIENT_FIELDS, *extra, *NOTE_FIELDS), rows)


def write_diagnosis(diagnosis: Diagnosis, folder: Path) -> None:
    """``diagnosis.json``; says which overlays there are."""
    content = diagnosis.to_dict()
    paths = {(s.patient, s.series, s.index): s.overlay for s in diagnosis.slices}
    for patient in content["patients"]:
        for s in patient["slices"]:
            path = paths[patient["patient"], s["series"], s["slice"]]
            s["overlay"] = path if (folder / path).is_file() else None
    with write_atomically(folder / "diagnosis.json") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)


WRITERS = (write_slices, write_patients, write_diagnosis)
"""What writes a diagnosis into a folder that holds the overlays already."""


@contextlib.contextmanager
def _key_of(diagnosis: Diagnosis, path: str | os.PathLike | None) -> Iterator[None]:
    """Writes the key, if any, which takes its place when the block ends well."""
    if path is None:
        yield
        return
    with write_atomically(path, private=True) as file:
        writer = csv.DictWriter(file, KEY_FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(diagnosis.key)
        yield


def _by_class(row: dict, name: str) -> dict:
    """A row with a column for each class in the place of what it says by class."""
    values = row.pop(name, None) or {}
    return row | {f"{name}_{kind}": f"{value:.3f}" for kind, value in values.items()}


def _six_decimals(row: dict) -> dict:
    scores = {key: row[key] for key in ("score", RAW_SCORE) if key in row}
    return row | {k: "" if score is None else f"{score:.6f}" for k, score in scores.items()}
