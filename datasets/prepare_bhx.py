#!/usr/bin/env python
"""CQ500 head CT with the boxes of BHX (Brain Hemorrhage eXtended), as a VOC tree of DICOM.

SOURCE is the folder of CQ500's DICOM files, at any depth. A series with a box is taken whole: its
slices without a box are healthy. Series without any box are left out, since BHX did not look at
all of them; with --reads, series of studies that all three readers of CQ500 called free of
hemorrhage are taken as healthy.

    python datasets/prepare_bhx.py CQ500 --output data/bhx \\
        --boxes 1_Initial_Manual_Labeling.csv --reads reads.csv
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

from ich_det2.cli import progress, warn
from ich_det2.data.dicom import read_identity, read_series, read_size
from ich_det2.data.prepare import run_preparer
from ich_det2.data.tree import read_table
from ich_det2.data.tree_writer import pseudonym

NAMES = {
    "Intraventricular": "IVH",
    "Intraparenchymal": "IPH",
    "Subarachnoid": "SAH",
    "Epidural": "EDH",
    "Subdural": "SDH",
    "Chronic": "Chronic",
}
"""BHX's labelName, and the object's name in the annotation."""

NEEDED = ("SOPInstanceUID", "data", "labelName", "labelType")


def main(argv=None) -> int:
    return run_preparer("bhx", __doc__, argv, prepare, options=add_options)


def add_options(parser) -> None:
    parser.add_argument(
        "--boxes", type=Path, nargs="+", required=True, metavar="CSV", help="BHX's tables of boxes"
    )
    parser.add_argument(
        "--label-types",
        nargs="+",
        metavar="TYPE",
        help="keep boxes of these labelType only, e.g. handDrawn (default: all)",
    )
    parser.add_argument("--reads", type=Path, metavar="CSV", help="CQ500's reads.csv")


def prepare(args, tree) -> None:
    boxes = defaultdict(list)
    for path in args.boxes:
        for uid, box in read_boxes(path, args.label_types):
            boxes[uid].append(box)
    healthy = read_healthy(args.reads) if args.reads else set()
    series, skipped = read_series(args.source)
    found, taken, frames = set(), 0, 0
    count: Counter = Counter()
    for s in progress(series, "series"):
        if s.frames[0] is not None:  # a tree of slices cannot hold a file of several
            frames += 1
            continue
        uids = {path: read_identity(path)[2] for path in s.files}
        positive = any(uid in boxes for uid in uids.values())
        if not positive and number_of(s.patient_id) not in healthy:
            continue
        taken += 1
        found |= set(uids.values()) & set(boxes)
        patient = pseudonym("patient", s.patient_id or s.study_uid)
        series_name = pseudonym("series", s.series_uid)
        for path, position in zip(s.files, s.positions_mm):
            # Slices of one series in two orientations are two series here, of the same UID.
            name = f"{patient[8:]}_{series_name[7:13]}_{count[series_name]:03d}"
            count[series_name] += 1
            found_boxes = boxes.get(uids[path], [])
            objects = [(label, box) for label, box, _ in found_boxes]
            if not tree.wants(name, objects):
                continue
            tree.add(
                name,
                path,
                objects,
                size=read_size(path),
                patient=patient,
                study=pseudonym("study", s.study_uid or s.patient_id),
                series=series_name,
                position_mm=position,
                source={"labelType": [kind for _, _, kind in found_boxes]},
            )
    if frames:
        warn(f"{frames} series are multi-frame files and were left out; export one slice a file.")
        tree.ignored["series of multi-frame files"] += frames
    if skipped:
        reasons = Counter(reason for _, reason in skipped).most_common(3)
        warn(f"{len(skipped)} files are no CT slices, mostly: {'; '.join(r for r, _ in reasons)}")
        tree.ignored["files that are no CT slices"] += len(skipped)
    if missing := len(boxes.keys() - found):
        warn(f"{missing} of {len(boxes)} slices with boxes are not among the {taken} series taken.")
        tree.ignored["slices with boxes that are not in the series taken"] += missing


def read_boxes(path: Path, label_types):
    """Pairs of SOP Instance UID and (name, box, labelType).

    Raises:
        ValueError: naming file and line, if a row is not BHX's.
    """
    for line, row in read_table(path, NEEDED, fold=str):
        if label_types and row["labelType"] not in label_types:
            continue
        where = f"{path}, line {line}"
        try:
            data = ast.literal_eval(row["data"])
            x, y, w, h = (float(data[key]) for key in ("x", "y", "width", "height"))
        except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
            raise ValueError(f"{where}: data is {row['data'][:60]!r}, expected a box.") from None
        if not all(map(math.isfinite, (x, y, w, h))) or w <= 0 or h <= 0:
            raise ValueError(f"{where}: the box {row['data'][:60]} is empty.")
        name = NAMES.get(row["labelName"])
        if name is None:
            raise ValueError(
                f"{where}: labelName is {row['labelName']!r}, expected one of {list(NAMES)}."
            )
        yield row["SOPInstanceUID"], (name, (x, y, x + w, y + h), row["labelType"])


def number_of(patient_id: str) -> str:
    """CQ500's number: "310" of "CQ500-CT-310" and of "CQ500CT310 CQ500CT310"."""
    match = re.search(r"CQ500-?CT-?(\d+)", patient_id)
    return match[1].lstrip("0") if match else patient_id


def read_healthy(path: Path) -> set[str]:
    """Numbers of the studies that all readers called free of hemorrhage."""
    rows = [row for _, row in read_table(path, ("name", "R1:ICH"), fold=str)]
    readers = [column for column in rows[0] if re.fullmatch(r"R\d:ICH", column)] if rows else []
    return {number_of(row["name"]) for row in rows if all(row[r] == "0" for r in readers)}


if __name__ == "__main__":
    raise SystemExit(main())
