"""The command line that all preparers in ``datasets/`` share: SOURCE --output ROOT, progress,
exit code 2 with one sentence for an error of the user."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from .tree_writer import VocWriter


def run_preparer(
    name: str,
    description: str,
    argv: Sequence[str] | None,
    prepare: Callable[[argparse.Namespace, VocWriter], None],
    *,
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:
    """Parse the command line, prepare, report.

    Args:
        name: of the data set and of the command, as in ``prepare_<name>``.
        description: the script's docstring.
        argv: the arguments; None for those of the process.
        prepare: writes the images of ``args.source`` into the tree.
        options: adds further arguments.

    Returns:
        The exit code: 2 for an error of the user, 130 after an interruption.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of the data set")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="ROOT",
        help="VOC tree to make or to go on with",
    )
    options(parser)
    args = parser.parse_args(argv)
    try:
        if not args.source.is_dir():
            raise FileNotFoundError(f"{args.source}: no such folder; see datasets/README.md.")
        with VocWriter(args.output, database=name) as tree:
            prepare(args, tree)
            if not len(tree):
                raise ValueError(f"{args.source}: no image was found; see datasets/README.md.")
            if tree.dropped:
                warn(f"{tree.dropped} boxes have no pixel in their image and were left out.")
            print(
                f"{args.output}: {len(tree)} images. Next: python datasets/make_splits.py "
                f"{args.output}, then python tools/inspect_data.py {args.output}"
            )
    except (ValueError, OSError) as error:
        print(f"prepare_{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"prepare_{name}: stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def progress(items: Iterable, what: str) -> Iterator:
    """The items, with a bar on stderr."""
    items = list(items)
    yield from track(items, what, console=Console(stderr=True))


def warn(message: str) -> None:
    """Something a person should know, on stderr."""
    print(f"warning: {message}", file=sys.stderr)
