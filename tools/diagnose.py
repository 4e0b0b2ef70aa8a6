#!/usr/bin/env python
"""Diagnoses head CT with a trained model: DICOM or windowed images in, an answer to check out.

    python tools/diagnose.py zoo://ct-ich path/to/exam --output diagnosis
    python tools/diagnose.py output/csfrcnn_r50 path/to/exam --output diagnosis
    python tools/diagnose.py zoo://ct-ich --manifest studies.csv --output archive --workers 4

The model is OUTPUT_DIR of a training or, by zoo://NAME, one that comes with the package.
In DIR: slices.csv and patients.csv with scores and verdicts, diagnosis.json with the boxes and the
files that were skipped and why, and overlays/<patient>/<series>-<slice>.png of the positive slices
and of each patient's highest scored one. A classifier gives scores without boxes. A patient with a
slice that could not be read, or that seems to be missing, is incomplete: a bleed on it would be
missed. Patients are numbered, not named; --key FILE leads the results back to the exams. PNG and
JPEG are one patient each, unless they are in JPEGImages/ beside a patients.csv. @FILE takes inputs
from a file, one a line. In Python: ich_det2.diagnose. For research only, not for clinical use.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ich_det2.cli import guard
from ich_det2.dicom_out import ALL_KINDS, SR_CLASSES
from ich_det2.inference import BACKENDS, ENGINES

MAX_NOTES = 20
"""Lines of notes on the terminal; all are in the files."""

NOTHING = "nothing was written."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for an error of the user."""
    args = parse_args(argv)
    left = "what is done is kept, the same command goes on." if args.manifest else NOTHING
    return guard("diagnose.py", lambda: run(args), interrupted=left)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )
    # An empty line is no argument; as a path it would be the current folder.
    parser.convert_arg_line_to_args = lambda line: [line.strip()] if line.strip() else []
    parser.add_argument("model", metavar="MODEL", help="OUTPUT_DIR of a training, or zoo://NAME")
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="*",
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
        "--batch-size",
        type=int,
        metavar="N",
        help="slices in a batch (default: the config's; 1 for PyTorch on a CPU)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="", help="default: a GPU if any"
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="eager",
        help="engine of the network on a CPU: PyTorch, or ONNX Runtime or OpenVINO, which take "
        "half the time once compiled and are refused unless they answer alike (default eager)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of the network on a CPU; 1 costs least on a shared machine (default: PyTorch's)",
    )
    parser.add_argument(
        "--identify",
        action="store_true",
        help="write Patient ID and UIDs, and keep them in the names of files",
    )
    parser.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="CSV, for its owner alone, that leads results back to files, Patient ID and UIDs",
    )
    parser.add_argument(
        "--any-body-part",
        action="store_true",
        help="also slices whose Body Part Examined names another part than the head",
    )
    parser.add_argument(
        "--viewer",
        action="store_true",
        help="also viewer.html, a page to look through the slices with their boxes (of several "
        "patients viewers/<patient>.html)",
    )
    parser.add_argument(
        "--dicom",
        nargs="+",
        choices=ALL_KINDS,
        metavar="KIND",
        help="also DICOM objects for a PACS, with the identity of their source, in a folder of "
        f"their own; of {', '.join(ALL_KINDS)}: structured report, presentation state, Secondary "
        "Capture, Key Object Selection and, of a model that gives masks, Segmentation",
    )
    parser.add_argument(
        "--dicom-output",
        type=Path,
        metavar="DIR",
        help="new folder for them (default: --output with '_dicom' behind its name)",
    )
    parser.add_argument(
        "--sr-class",
        choices=SR_CLASSES,
        default="3d",
        help="Comprehensive 3D SR, or Comprehensive SR for older viewers (default 3d)",
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="CSV",
        help="many studies in place of INPUT: a table with the columns study (name of its folder "
        "in DIR) and path (file or folder); what an earlier run has finished is left",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="of --manifest: this machine, or a Ray cluster (RAY_ADDRESS) (default local)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="of --manifest: that each load the model once (default 1)",
    )
    parser.add_argument("--all-overlays", action="store_true", help="of negative slices too")
    parser.add_argument("--force", action="store_true", help="replace an earlier result in DIR")
    args = parser.parse_args(argv)
    if bool(args.inputs) == bool(args.manifest):
        parser.error("give INPUT, or --manifest with the studies.")
    if args.manifest and (args.key or args.force):
        parser.error("--manifest takes no --key and no --force: it goes on with what is there.")
    if args.dicom_output and not args.dicom:
        parser.error("--dicom-output names a folder for what --dicom asks for; give both.")
    if args.dicom:
        args.dicom = list(dict.fromkeys(args.dicom))
        args.dicom_output = args.dicom_output or args.output.with_name(f"{args.output.name}_dicom")
    return args


def run_archive(args: argparse.Namespace) -> int:
    """Diagnoses the studies of a manifest; the exit code is 1 if some failed.

    Raises:
        FileNotFoundError, ValueError: one sentence with the remedy.
    """
    from ich_det2.inference.archive import Settings, diagnose_archive, read_manifest

    jobs = read_manifest(args.manifest)
    settings = Settings(
        model=args.model,
        output=str(args.output.absolute()),
        device=args.device,
        batch_size=args.batch_size,
        backend=args.backend,
        threads=args.threads,
        threshold=args.threshold,
        identify=args.identify,
        any_body_part=args.any_body_part,
        overlays="all" if args.all_overlays else "positive",
        viewer=args.viewer,
        dicom=tuple(args.dicom or ()),
        sr_class=args.sr_class,
        dicom_output=str(args.dicom_output.absolute()) if args.dicom else "",
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("studies", total=len(jobs))

        def tell(row: dict) -> None:
            progress.update(task, advance=1)
            if row["status"] == "failed":
                line = f"{row['study']}: failed: {row['error']}"
                console.print(line, soft_wrap=True, markup=False, highlight=False)

        rows = diagnose_archive(
            jobs, settings, engine=args.engine, workers=args.workers, progress=tell
        )
    failed = sum(row["status"] == "failed" for row in rows)
    positive = sum(row["verdict"] == "positive" for row in rows)
    again = ", which the same command tries again" if failed else ""
    print(
        f"{len(rows)} studies: {positive} positive, {failed} failed{again}."
        f" Table: {args.output / 'studies.csv'}"
    )
    return 1 if failed else 0


def run(args: argparse.Namespace) -> int | None:
    """Diagnoses and writes; nothing is written unless everything is.

    Raises:
        FileNotFoundError, ValueError: one sentence with the remedy.
    """
    if args.manifest:
        return run_archive(args)
    # PyTorch and Detectron2 take seconds to import, which --help need not wait for.
    from ich_det2.dicom_out import check_dicom_output, write_dicom
    from ich_det2.files import check_writable, replace_folder
    from ich_det2.inference.api import diagnose
    from ich_det2.inference.diagnoser import Diagnoser
    from ich_det2.inference.outputs import check_outputs

    status = Console(stderr=True)
    check_outputs(args.output, args.inputs, key=args.key, force=args.force)
    dicom = {"kinds": args.dicom, "sr_class": args.sr_class, "force": args.force}
    if args.dicom:
        inputs = [*args.inputs, args.output]
        check_dicom_output(args.dicom_output, inputs, **dicom)
        check_writable(args.dicom_output, "--dicom-output")
        check_sources(args.inputs)
    model = Diagnoser.load(
        args.model,
        device=args.device,
        batch_size=args.batch_size,
        backend=args.backend,
        threads=args.threads,
    )
    status.print(
        f"Model: {args.model} ({model.facts['weights']})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    with progress_bar(status) as progress:
        diagnosis = diagnose(
            args.inputs,
            model,
            threshold=args.threshold,
            identify=args.identify,
            any_body_part=args.any_body_part,
            progress=progress,
        )
        with contextlib.ExitStack() as stack:
            if args.dicom:
                # Takes its place once all else is written.
                fresh = stack.enter_context(replace_folder(args.dicom_output))
                write_dicom(diagnosis, fresh, **dicom)
            diagnosis.write(
                args.output,
                overlays="all" if args.all_overlays else "positive",
                viewer=args.viewer,
                key=args.key,
                force=args.force,
                progress=progress,
            )
    report(diagnosis, args.output, Console())
    if args.viewer:
        several = (args.output / "viewers").is_dir()
        print(f"To look through: {args.output / ('viewers' if several else 'viewer.html')}")
    if args.dicom:
        print(f"DICOM objects, with the identity of their source: {args.dicom_output}")


def check_sources(inputs: Sequence[Path]) -> None:
    """Refuses pictures as a source of DICOM objects.

    Raises:
        FileNotFoundError, ValueError: one sentence with the remedy.
    """
    from ich_det2.data.pictures import PICTURE_SUFFIXES
    from ich_det2.files import walk

    files = [file for path in inputs for file in (walk(path) if path.is_dir() else [path])]
    if files and all(file.suffix.lower() in PICTURE_SUFFIXES for file in files):
        raise ValueError("--dicom needs DICOM files, but the inputs are PNG or JPEG; leave it out.")


@contextlib.contextmanager
def progress_bar(console: Console) -> Iterator:
    """Passes items on, and shows how many a second there are; nothing remains where the output is
    no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f} slices/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def track(items: Iterable, what: str, total: int) -> Iterator:
            task = progress.add_task(what, total=total, rate=0.0)
            start = time.monotonic()
            for done, item in enumerate(items, start=1):
                yield item
                progress.update(task, advance=1, rate=done / max(time.monotonic() - start, 1e-6))

        yield track


def report(diagnosis, output: Path, console: Console) -> None:
    """Prints a table of the patients, what was noticed, and where to look."""
    table = Table(caption=diagnosis.notice)
    table.add_column("patient")
    for name in ("slices", "not read", "missing", "positive slices", "score"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    styles = {"positive": "bold red", "undetermined": "bold yellow"}
    for p in diagnosis.patients:
        lost = p.n_slices_failed, p.n_slices_missing
        style = styles.get(p.verdict, "" if p.complete else "yellow")
        table.add_row(
            p.patient,
            str(p.n_slices),
            *(f"[bold yellow]{n}[/]" if n else "0" for n in lost),
            str(p.n_positive_slices),
            "" if p.score is None else f"{p.score:.3f}",
            f"[{style}]{p.wording}[/]" if style else p.wording,
        )
    console.print(table)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    notes = [f"{p.patient}: {note}" for p in diagnosis.patients for note in p.notes]
    for note in notes[:MAX_NOTES]:
        say(note)
    if len(notes) > MAX_NOTES:
        say(f"... and {len(notes) - MAX_NOTES} more notes in {output / 'patients.csv'}")
    if skipped := diagnosis.skipped:
        lost = sum(entry.lost for entry in skipped)
        say(
            f"Skipped files: {len(skipped)}, of these slices that could not be read: {lost}; "
            f"reasons in {output / 'diagnosis.json'}"
        )
        if elsewhere := sum("Body Part Examined" in entry.reason for entry in skipped):
            say(f"{elsewhere} of them for their Body Part Examined; --any-body-part reads them")
    say(f"Overlays: {output / 'overlays'}")


if __name__ == "__main__":
    sys.exit(main())
