"""The command line that all preparers in ``datasets/`` share: SOURCE --output ROOT, progress,
exit code 2 with one sentence for an error of the user."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from ..cli import guard, warn
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

    def run() -> None:
        if not args.source.is_dir():
            raise FileNotFoundError(f"{args.source}: no such folder; see datasets/README.md.")
        with VocWriter(args.output, database=name) as tree:
            prepare(args, tree)
            if not len(tree):
                raise ValueError(f"{args.source}: no image was found; see datasets/README.md.")
            if not tree.counts["boxes"] and not tree.has_labels:
                warn("no image has a box: there is nothing to learn from; check the source.")
            if tree.dropped:
                warn(
                    f"{tree.dropped.total()} boxes were dropped; an image that lost all of its"
                    " boxes is labelled as bleeding in labels.csv."
                )
            print(
                f"{args.output}: {tree.summary()}. Next: python datasets/make_splits.py "
                f"{args.output}, then python tools/inspect_data.py {args.output}"
            )

    return guard(f"prepare_{name}.py", run, interrupted="the same command goes on from here.")
