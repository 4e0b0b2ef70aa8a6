#!/usr/bin/env python
"""RSNA Intracranial Hemorrhage Detection: DICOM with image labels and without boxes.

The labels are written to labels.csv, so the tree is one to evaluate the diagnosis on: its images
have no boxes to train with. SOURCE holds the DICOM files at any depth, named by their ID.

    python datasets/prepare_rsna.py rsna/stage_2_train --output data/rsna \\
        --labels rsna/stage_2_train.csv --limit 2000
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from ich_det2.data.dicom import read_identity, read_place, read_size
from ich_det2.data.prepare import progress, run_preparer, warn
from ich_det2.data.tree_writer import pseudonym


def main(argv=None) -> int:
    return run_preparer("rsna", __doc__, argv, prepare, options=add_options)


def add_options(parser) -> None:
    parser.add_argument(
        "--labels", type=Path, required=True, metavar="CSV", help="stage_2_train.csv"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images alone")


def prepare(args, tree) -> None:
    labels = read_labels(args.labels)
    files = sorted(args.source.rglob("*.dcm"))
    paths = [path for path in files if path.stem in labels]
    if unknown := len(files) - len(paths):
        warn(f"{unknown} of {len(files)} DICOM files have no label and were left out.")
    refused = 0
    for path in progress(paths[: args.limit], "images"):
        if not tree.wants(path.stem, [], label=labels[path.stem]):
            continue
        try:
            patient, study, _ = read_identity(path)
            size, (series, position) = read_size(path), read_place(path)
        except ValueError as error:
            warn(f"left out: {error}")
            refused += 1
            continue
        tree.add(
            path.stem,
            path,
            [],
            size=size,
            patient=pseudonym("patient", patient or path.stem),
            study=pseudonym("study", study or path.stem),
            series=pseudonym("series", series or path.stem),
            position_mm=position,
            label=labels[path.stem],
        )
    if refused:
        warn(f"{refused} of {len(paths)} images cannot be read and were left out.")


def read_labels(path: Path) -> dict[str, int]:
    """The label "any" of each image.

    Raises:
        ValueError: naming file and line, if it is not RSNA's table.
    """
    labels = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        if not {"ID", "Label"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path}: lacks the columns ID and Label; expected RSNA's table.")
        for row in rows:
            match = re.fullmatch(r"(ID_\w+)_(\w+)", row["ID"])
            if not match or row["Label"] not in ("0", "1"):
                raise ValueError(
                    f"{path}, line {rows.line_num}: is {row['ID']},{row['Label']}, expected "
                    "ID_xxx_type and 0 or 1."
                )
            if match[2] == "any":
                labels[match[1]] = int(row["Label"])
    return labels


if __name__ == "__main__":
    raise SystemExit(main())
