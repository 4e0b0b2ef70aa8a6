#!/usr/bin/env python
"""Check the splits of a VOC tree for leaks; exit with 1 and a list if there are any.

Reads ROOT/ImageSets/Main/{train,val,test}.txt, ROOT/patients.csv and the images. Two splits may
share no patient, no study, no SOP Instance UID, and no slice that looks nearly the same.

    python datasets/audit_splits.py data/ich
    python datasets/audit_splits.py data/ich --names fold0_train fold0_val
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ich_det2.cli import guard, progress
from ich_det2.data.audit import find_leaks
from ich_det2.data.tree import VocTree


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 for clean splits, 1 for leaks, 2 for an error of the user."""
    args = parse_args(argv)
    return guard("audit_splits.py", lambda: audit(args))


def audit(args: argparse.Namespace) -> int:
    """Look for leaks and print them; returns 1 if there are any."""
    tree, console = VocTree(args.root), Console()
    leaks = find_leaks(
        tree, args.names, pixels=not args.no_pixels, track=lambda items: progress(items, "images")
    )
    if not leaks:
        total = sum(len(tree.read_list(name)) for name in args.names)
        console.print(f"No leak among {total} images in {len(args.names)} splits.")
        return 0
    table = Table("what is shared", "splits", "images", "", title=f"{len(leaks)} LEAKS")
    for leak in leaks:
        table.add_row(leak.kind, " / ".join(leak.splits), " / ".join(leak.images), leak.detail)
    console.print(table)
    print(
        f"audit_splits.py: {len(leaks)} leaks: scores on these splits are too good;"
        f" {leaks[0].remedy}; then divide anew by `python datasets/make_splits.py {args.root}"
        " --force`.",
        file=sys.stderr,
    )
    return 1


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder of the VOC tree")
    parser.add_argument(
        "--names",
        nargs="+",
        default=["train", "val", "test"],
        metavar="NAME",
        help="lists in ImageSets/Main (default: train val test)",
    )
    parser.add_argument("--no-pixels", action="store_true", help="do not compare the images")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
