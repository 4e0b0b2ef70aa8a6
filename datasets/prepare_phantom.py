"""Write a synthetic data set of head CT series with intracranial hemorrhage (ich_det2.phantom).

python datasets/prepare_phantom.py --output datasets/phantom
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ich_det2.cli import guard
from ich_det2.files import replace_folder
from ich_det2.phantom.dataset import parameters, read_parameters, write_dataset
from ich_det2.phantom.patient import NUM_SLICES


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return guard("prepare_phantom.py", lambda: run(args))


def build_parser() -> argparse.ArgumentParser:
    affinity = hasattr(os, "sched_getaffinity")
    processors = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        description="Write a synthetic data set of head CT series (DICOM, with VOC boxes of five "
        "types of intracranial hemorrhage), for demonstrations and tests without any download.",
        epilog="The same patients, seed and size give the same files, whatever the workers. "
        "The data are computed and contain nothing of any person; results on them say nothing "
        "about performance on patients.",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write, e.g. datasets/phantom"
    )

    def number(option: str, minimum: int, default: int, text: str, named: str = "") -> None:
        text += f" (default: {named}%(default)s)"
        parser.add_argument(option, type=at_least(minimum), default=default, help=text)

    patients = f"number of patients, {NUM_SLICES} slices each, half of them bleeding; at least 6"
    number("--patients", 6, 80, patients)
    number("--seed", 0, 0, "seed of everything")
    machine = "the processors of this machine, "
    number("--workers", 1, processors, "number of processes", machine)
    number("--size", 64, 512, "rows and columns of a slice, pixels")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an older phantom in the output folder; never touches any other folder",
    )
    return parser


def at_least(minimum: int) -> Callable[[str], int]:
    """A whole number, for argparse."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected a whole number of at least {minimum}"
            )
        return int(text)

    return parse


def run(args: argparse.Namespace) -> None:
    wanted = parameters(args.patients, args.seed, args.size)
    found = read_parameters(args.output)
    empty = args.output.is_dir() and not any(args.output.iterdir())
    if found is None and not empty and os.path.lexists(os.path.realpath(args.output)):
        raise ValueError(
            f"{args.output} exists and is not a phantom data set, so it stays as it is; "
            "give another --output (--force replaces phantoms only)."
        )
    if found == wanted and not args.force:
        print(f"{args.output} already holds this phantom data set; nothing to do.")
        return
    if found is not None and not args.force:
        differences = ", ".join(
            f"{key} {found.get(key)} (asked for {value})"
            for key, value in wanted.items()
            if found.get(key) != value
        )
        raise ValueError(
            f"{args.output} holds a phantom data set with other parameters: {differences}; "
            "replace it with --force or give another --output."
        )
    try:
        with replace_folder(args.output) as folder:
            counts = write_dataset(
                folder,
                patients=args.patients,
                seed=args.seed,
                size=args.size,
                workers=min(args.workers, args.patients),
            )
    except OSError as error:
        raise ValueError(
            f"{args.output} cannot be written ({error}); give another --output."
        ) from error
    boxes, splits = (
        ", ".join(f"{name} {count}" for name, count in counts[key].items())
        for key in ("boxes", "split_patients")
    )
    print(
        f"{args.output}: {counts['slices']} images, {counts['bleeding_slices']} with boxes, "
        f"{sum(counts['boxes'].values())} boxes ({boxes}), {counts['patients']} patients "
        f"({counts['bleeding_patients']} bleeding; {splits})."
    )


if __name__ == "__main__":
    raise SystemExit(main())
