#!/usr/bin/env python
"""RSNA Intracranial Hemorrhage Detection: DICOM with image labels and without boxes.

The labels are written to labels.csv, so the tree is one to evaluate the diagnosis on: its images
have no boxes to train with. SOURCE holds the DICOM files at any depth, named by their ID.

    python datasets/prepare_rsna.py rsna/stage_2_train --output data/rsna \\
        --labels rsna/stage_2_train.csv --limit 2000
"""

from __future__ import annotations

import re
from pathlib import Path

from ich_det2.cli import progress, warn
from ich_det2.data.dicom import is_dicom, read_identity, read_place, read_size
from ich_det2.data.prepare import run_preparer
from ich_det2.data.tree import read_table
from ich_det2.data.tree_writer import pseudonym
from ich_det2.files import walk


def main(argv=None) -> int:
    return run_preparer("rsna", __doc__, argv, prepare, options=add_options)


def add_options(parser) -> None:
    parser.add_argument(
        "--labels", type=Path, required=True, metavar="CSV", help="stage_2_train.csv"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images alone")


def prepare(args, tree) -> None:
    labels = read_labels(args.labels)
    files = [p for p in walk(args.source) if p.suffix.lower() == ".dcm" or is_dicom(p)]
    ids = {path: next((i for i in (path.name, path.stem) if i in labels), None) for path in files}
    paths = [path for path in files if ids[path] is not None]
    if unknown := len(files) - len(paths):
        warn(f"{unknown} of {len(files)} DICOM files have no label and were left out.")
        tree.ignored["DICOM files without a label"] += unknown
    if lacking := len(labels.keys() - ids.values()):
        warn(f"{lacking} of {len(labels)} labelled images are not in {args.source}.")
    for path in progress(paths[: args.limit], "images"):
        image = ids[path]
        if not tree.wants(image, [], label=labels[image]):
            continue
        try:
            patient, study, _ = read_identity(path)
            size, (series, position) = read_size(path), read_place(path)
        except ValueError as error:
            warn(f"left out: {error}")
            tree.ignored["images that cannot be read"] += 1
            continue
        tree.add(
            image,
            path,
            [],
            size=size,
            patient=pseudonym("patient", patient or study or image),
            study=pseudonym("study", study or image),
            series=pseudonym("series", series or image),
            position_mm=position,
            label=labels[image],
        )
    if refused := tree.ignored["images that cannot be read"]:
        warn(f"{refused} of {len(paths)} images cannot be read and were left out.")


def read_labels(path: Path) -> dict[str, int]:
    """The label "any" of each image.

    Raises:
        ValueError: naming file and line, if it is not RSNA's table.
    """
    labels: dict[str, int] = {}
    for line, row in read_table(path, ("ID", "Label"), fold=str):
        match = re.fullmatch(r"(ID_\w+)_(\w+)", row["ID"])
        if not match or row["Label"] not in ("0", "1"):
            raise ValueError(
                f"{path}, line {line}: is {row['ID']},{row['Label']}, expected ID_xxx_type and 0"
                " or 1."
            )
        if match[2] == "any" and labels.setdefault(match[1], int(row["Label"])) != int(
            row["Label"]
        ):
            raise ValueError(f"{path}, line {line}: the image {match[1]} has two labels.")
    return labels


if __name__ == "__main__":
    raise SystemExit(main())
