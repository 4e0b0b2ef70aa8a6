#!/usr/bin/env python
"""DICOM as windowed PNG of the same size, to draw boxes on in LabelImg.

export.json in OUTPUT says of which slice each picture is, without saying whose; so
prepare_labelimg.py finds the way from an XML drawn on a picture back to its DICOM file.

    python datasets/export_png.py exams --output pictures --window 50 100
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path

from ich_det2.cli import guard, progress, warn
from ich_det2.data.dicom import read_identity, read_series, read_windowed
from ich_det2.data.pictures import write_picture
from ich_det2.data.tree_writer import pseudonym
from ich_det2.files import remove_leftovers, write_atomically

INDEX = "export.json"


def main(argv=None) -> int:
    """Run the command; returns the exit code, 2 for an error of the user."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of DICOM files")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="for the pictures"
    )
    parser.add_argument(
        "--window", type=float, nargs=2, default=(50, 100), metavar=("LEVEL", "WIDTH"), help="HU"
    )
    args = parser.parse_args(argv)
    return guard(
        "export_png.py",
        lambda: export(args.source, args.output, tuple(args.window)),
        interrupted="the same command goes on from here.",
    )


def export(source: Path, output: Path, window: tuple[float, float]) -> None:
    """Write the index, and the pictures that are not there yet or show another window."""
    series, skipped = read_series(source)
    index, paths, count = {}, {}, Counter()
    for s in progress(series, "series"):
        prefix = pseudonym("patient", s.patient_id or s.study_uid)[8:]
        prefix += "_" + pseudonym("series", s.series_uid)[7:13]
        for path, frame in zip(s.files, s.frames):
            if frame is not None:
                continue  # a tree of slices cannot hold a file of several
            # Slices of one series in two orientations are two series here, of the same UID.
            name = f"{prefix}_{count[prefix]:03d}"
            count[prefix] += 1
            uid = read_identity(path)[2]
            paths[name] = path
            index[name] = {"sop": hashlib.sha256(uid.encode()).hexdigest(), "window": [*window]}
    if not index:
        raise ValueError(f"{source}: holds no CT slices; {len(skipped)} files were skipped.")
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    earlier = json.loads((output / INDEX).read_text()) if (output / INDEX).is_file() else {}
    for name in index:
        if earlier.get(name) != index[name]:
            (output / f"{name}.png").unlink(missing_ok=True)
    # Before the pictures, so that what is there is always what it says.
    with write_atomically(output / INDEX) as file:
        json.dump(index, file, indent=1)
    for name, path in progress(paths.items(), "pictures"):
        if not (output / f"{name}.png").exists():
            grey, _ = read_windowed(path, [window])
            write_picture(output / f"{name}.png", grey[..., 0])
    if skipped:
        warn(f"{len(skipped)} files are no CT slices; the first: {skipped[0][1]}")
    print(f"{output}: {len(index)} pictures; ignored: {len(skipped)} files")


if __name__ == "__main__":
    raise SystemExit(main())
