#!/usr/bin/env python
"""Diagnoses head CT with a trained model: DICOM or windowed images in, an answer to check out.

    python tools/diagnose.py output/csfrcnn_r50 path/to/exam --output diagnosis

In DIR: slices.csv and patients.csv with scores and verdicts, diagnosis.json with the boxes and the
files that were skipped and why, and overlays/<patient>/<series>-<slice>.png of the positive slices
and of each patient's highest scored one. A classifier gives scores without boxes. A patient with a
slice that could not be read has n_slices_failed above 0: a bleed on it would be missed. Patients
are numbered, not named. PNG and JPEG are one patient each, unless they are in JPEGImages/ beside a
patients.csv. @FILE takes inputs from a file, one a line. For research only, not for clinical use.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ich_det2 import __version__
from ich_det2.engine.config import context_settings
from ich_det2.engine.operating_point import find_operating_point
from ich_det2.evaluation.diagnosis import diagnose, patient_scores
from ich_det2.evaluation.visualize import draw_overlay
from ich_det2.files import sha256, write_atomically, write_csv
from ich_det2.inference.diagnoser import Detections, Diagnoser, load_run
from ich_det2.inference.slices import Skipped, Slice, find_slices

TOOL = "ich_det2 tools/diagnose.py"
NOTICE = (
    "For research only, not for clinical use: a negative verdict does not exclude a hemorrhage."
)
SLICE_FIELDS = ("patient", "series", "slice", "file", "score", "verdict", "n_boxes")
PATIENT_FIELDS = (
    "patient",
    "n_slices",
    "n_slices_failed",
    "n_positive_slices",
    "score",
    "verdict",
    "worst_slice_file",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for an error of the user."""
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"diagnose.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diagnose.py: interrupted, nothing was written.", file=sys.stderr)
        return 130
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )
    # An empty line is no argument; as a path it would be the current folder.
    parser.convert_arg_line_to_args = lambda line: [line.strip()] if line.strip() else []
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="OUTPUT_DIR of a training")
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        metavar="INPUT",
        help="DICOM file, PNG or JPEG that is windowed already, or folder of them",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new folder for the results"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="positive at this score and above (default: the model's operating point)",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="slices in a batch (default: the config's)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="", help="default: a GPU if any"
    )
    parser.add_argument(
        "--identify",
        action="store_true",
        help="write Patient ID and UIDs, and keep them in the names of files",
    )
    parser.add_argument("--all-overlays", action="store_true", help="of negative slices too")
    parser.add_argument("--force", action="store_true", help="replace an earlier result in DIR")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Diagnoses and writes; nothing is written unless everything is.

    Raises:
        FileNotFoundError, ValueError: one sentence with the remedy.
    """
    console, status = Console(), Console(stderr=True)
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold is {args.threshold}, expected a score from 0 to 1.")
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}, expected at least 1.")
    check_output(args.output, args.inputs, force=args.force)
    cfg, weights = load_run(args.model, device=args.device)
    point, threshold = None, args.threshold
    if threshold is None:
        point = find_operating_point(cfg, weights)
        threshold = cfg.TEST.DIAGNOSIS.OPERATING_THRESHOLD
    rule = cfg.TEST.DIAGNOSIS.PATIENT_RULES[0]
    slices, skipped = find_slices(args.inputs, identify=args.identify, **context_settings(cfg))
    status.print(f"Model: {weights}", markup=False, highlight=False, soft_wrap=True)
    diagnoser = Diagnoser.from_run(cfg, weights, batch_size=args.batch_size or 0)

    with new_folder(args.output) as folder, progress_bar(status) as progress:
        results, failed = detect(diagnoser, slices, threshold, progress)
        skipped = skipped + failed
        if not results:
            raise ValueError(
                f"none of {len(slices)} slices can be decoded; the first, {failed[0].file}, "
                f"{failed[0].reason.rstrip('.')}."
            )
        patients = summarize_patients(results, skipped, threshold, rule)
        classes = list(cfg.DATASETS.ICH_CLASSES)
        draw_overlays(
            folder, diagnoser, results, classes, threshold, progress, every=args.all_overlays
        )
        model = {
            "run": Path(cfg.OUTPUT_DIR).name,
            "weights": weights.name,
            "sha256": sha256(weights),
            "operating_point": point and {"rule": point.rule, "dataset": point.dataset},
            "patient_rule": rule,
        }
        write_results(
            folder, results, patients, skipped, model, classes, threshold, identify=args.identify
        )
    report(console, args.output, patients, skipped)


def check_output(output: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Refuses a folder whose replacement could lose something, before hours of work.

    Raises:
        ValueError: one sentence with the remedy.
    """
    folder = output.resolve()
    for path in (p.resolve() for p in inputs):
        if folder.is_relative_to(path) and path.is_dir() or path.is_relative_to(folder):
            raise ValueError(
                f"--output {output} and the input {path.name} lie in one another, so a later run "
                "would take results for images; give a folder elsewhere."
            )
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a new folder.")
    if os.path.ismount(folder):
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


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of ``path`` when the block ends well."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    earlier = path.with_name(f".{path.name}.{os.getpid()}.old")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rename(earlier)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)


@contextlib.contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """Bars with slices per second; they vanish where the output is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f} slices/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def track(progress: Progress, name: str, items, total: int):
    """Yields the items while a bar shows how many a second there are."""
    task = progress.add_task(name, total=total, rate=0.0)
    start = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        progress.update(task, advance=1, rate=done / max(time.monotonic() - start, 1e-6))


Results = list[tuple[Slice, Detections]]


def detect(
    diagnoser: Diagnoser, slices: Sequence[Slice], threshold: float, progress: Progress
) -> tuple[Results, list[Skipped]]:
    """Runs the detector; keeps the boxes worth showing.

    Returns:
        The slices with the boxes from half the threshold up, and always the highest; and those of
        folders that could not be decoded.

    Raises:
        ValueError: naming a given file that cannot be decoded.
    """
    results, failed = [], []
    outputs = diagnoser(slices)
    with contextlib.closing(outputs):
        for entry, found in track(
            progress, "detecting", zip(slices, outputs, strict=True), len(slices)
        ):
            if isinstance(found, Detections):
                results.append((entry, found.at_least(threshold / 2)))
            elif entry.given:
                raise ValueError(f"{entry.path}: {found}")
            else:
                failed.append(Skipped(entry.file, str(found), lost=True, patients=(entry.patient,)))
    return results, failed


def verdict(score: float, threshold: float) -> str:
    """In a word."""
    return "positive" if diagnose([score], threshold) else "negative"


def summarize_patients(
    results: Results, skipped: Sequence[Skipped], threshold: float, rule: str
) -> list[dict]:
    """Rows of ``patients.csv``; a patient is positive by the rule, see ``patient_scores``.

    A patient without one readable slice, or with fewer than the rule asks for, has no score and
    the verdict "undetermined".
    """
    found: dict[str, Results] = {name: [] for entry in skipped for name in entry.patients}
    for entry, detections in results:
        found.setdefault(entry.patient, []).append((entry, detections))
    rows = []
    for name, slices in sorted(found.items()):
        row = {
            "patient": name,
            "n_slices": len(slices),
            "n_slices_failed": sum(name in entry.patients for entry in skipped),
            "n_positive_slices": 0,
            "score": None,
            "verdict": "undetermined",
            "worst_slice_file": None,
        }
        if slices:
            worst, _ = max(slices, key=lambda s: s[1].score)
            scores = [detections.score for _, detections in slices]
            (score,) = patient_scores([0] * len(slices), scores, 1, rule).tolist()
            row |= {
                "n_positive_slices": sum(score >= threshold for score in scores),
                "worst_slice_file": worst.file,
            }
            if math.isfinite(score):
                row |= {"score": score, "verdict": verdict(score, threshold)}
        rows.append(row)
    return rows


def overlay_path(entry: Slice) -> Path:
    """Where a slice's overlay is, in the output folder."""
    return Path("overlays", entry.patient, f"{entry.series}-{entry.index:03d}.png")


def draw_overlays(
    folder: Path,
    diagnoser: Diagnoser,
    results: Results,
    classes: Sequence[str],
    threshold: float,
    progress: Progress,
    *,
    every: bool,
) -> None:
    """Draws the positive slices and each patient's highest scored, or every one."""
    highest: dict[str, tuple] = {}
    for i, (entry, found) in enumerate(results):
        highest[entry.patient] = max(highest.get(entry.patient, (-1.0, 0)), (found.score, -i))
    shown = {-i for _, i in highest.values()}
    chosen = [
        result
        for i, result in enumerate(results)
        if every or i in shown or result[1].score >= threshold
    ]
    for entry, found in track(progress, "drawing", chosen, len(chosen)):
        # Read again: keeping all slices would take a series' size in memory.
        overlay = draw_overlay(
            diagnoser.mapper.read_image(entry.path, entry.frame),
            found.boxes,
            found.scores,
            [classes[i] for i in found.classes],
            threshold=threshold,
            score=found.score,
            caption=f"{entry.patient}   {entry.series}   slice {entry.index}",
        )
        path = folder / overlay_path(entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(overlay).save(path, compress_level=4)


def write_results(
    folder: Path,
    results: Results,
    patients: Sequence[dict],
    skipped: Sequence[Skipped],
    model: dict,
    classes: Sequence[str],
    threshold: float,
    *,
    identify: bool,
) -> None:
    """Writes ``slices.csv``, ``patients.csv`` and ``diagnosis.json``."""
    slice_rows, by_patient, patient_ids = [], {}, {}
    for entry, found in results:
        row = {
            "patient": entry.patient,
            "series": entry.series,
            "slice": entry.index,
            "file": entry.file,
            "score": found.score,
            "verdict": verdict(found.score, threshold),
            "n_boxes": int((found.scores >= threshold).sum()),
        }
        if identify:
            row |= {
                "patient_id": entry.patient_id,
                "series_uid": entry.series_uid,
                "sop_uid": entry.sop_uid,
            }
            patient_ids[entry.patient] = entry.patient_id
        slice_rows.append(row)
        overlay = overlay_path(entry)
        details = {key: value for key, value in row.items() if key not in ("patient", "n_boxes")}
        details["overlay"] = overlay.as_posix() if (folder / overlay).is_file() else None
        details["boxes"] = [
            {"box": [round(float(v), 2) for v in box], "score": float(score), "class": classes[i]}
            for box, score, i in zip(found.boxes, found.scores, found.classes, strict=True)
        ]
        by_patient.setdefault(entry.patient, []).append(details)
    if identify:
        patients = [{**row, "patient_id": patient_ids.get(row["patient"], "")} for row in patients]
    extra = ("patient_id", "series_uid", "sop_uid") if identify else ()
    write_csv(folder / "slices.csv", (*SLICE_FIELDS, *extra), slice_rows)
    write_csv(folder / "patients.csv", (*PATIENT_FIELDS, *extra[:1]), patients)
    content = {
        "tool": TOOL,
        "version": __version__,
        "notice": NOTICE,
        "model": model,
        "threshold": threshold,
        "boxes": "[x0, y0, x1, y1] in pixels of the original image, from half the threshold up, and"
        " each slice's highest",
        "patients": [
            {
                **row,
                "complete": row["n_slices_failed"] == 0,
                "slices": by_patient.get(row["patient"], []),
            }
            for row in patients
        ],
        "skipped": [
            {
                "file": entry.file,
                "reason": entry.reason,
                "lost_slice": entry.lost,
                "patients": list(entry.patients),
            }
            for entry in skipped
        ],
    }
    with write_atomically(folder / "diagnosis.json") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)


def report(
    console: Console, output: Path, patients: Sequence[dict], skipped: Sequence[Skipped]
) -> None:
    """Prints a table of the patients and where to look."""
    table = Table(caption=NOTICE)
    table.add_column("patient")
    for name in ("slices", "not read", "positive slices", "score"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    styles = {"positive": "bold red", "undetermined": "bold yellow"}
    for row in patients:
        word, failed = row["verdict"], row["n_slices_failed"]
        text = f"{word}, incomplete" if failed and word == "negative" else word
        style = styles.get(word, "yellow" if failed else "")
        table.add_row(
            row["patient"],
            str(row["n_slices"]),
            f"[bold yellow]{failed}[/]" if failed else "0",
            str(row["n_positive_slices"]),
            "" if row["score"] is None else f"{row['score']:.3f}",
            f"[{style}]{text}[/]" if style else text,
        )
    console.print(table)
    lost = sum(entry.lost for entry in skipped)
    if skipped:
        note = f"Skipped files: {len(skipped)}, of these slices that could not be read: {lost}"
        console.print(
            f"{note}; reasons in {output / 'diagnosis.json'}", soft_wrap=True, markup=False
        )
    console.print(f"Overlays: {output / 'overlays'}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main())
