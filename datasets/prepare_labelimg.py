#!/usr/bin/env python
"""A folder of DICOM, PNG or JPEG with LabelImg's XML as a VOC tree.

An XML has the name of its image and lies beside it, or anywhere in SOURCE. Images without an XML
are healthy with --healthy, and left out otherwise. With --dicom, pictures written by export_png.py
are replaced by the DICOM slices that they show.

    python datasets/prepare_labelimg.py pictures --output data/mine --dicom exams --healthy
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from ich_det2.cli import progress, warn
from ich_det2.data.dicom import is_dicom, read_identity, read_place, read_series
from ich_det2.data.pictures import PICTURE_SUFFIXES, is_picture
from ich_det2.data.prepare import run_preparer
from ich_det2.data.tree import fit_id, image_size, plain
from ich_det2.data.tree_writer import pseudonym
from ich_det2.data.voc import read_voc
from ich_det2.files import walk

INDEX = "export.json"


def main(argv=None) -> int:
    return run_preparer("labelimg", __doc__, argv, prepare, options=add_options)


def add_options(parser) -> None:
    parser.add_argument("--dicom", type=Path, metavar="DIR", help="what export_png.py was given")
    parser.add_argument("--healthy", action="store_true", help="images without an XML are healthy")


def prepare(args, tree) -> None:
    paths = walk(args.source)
    annotations = by_name(p for p in paths if p.suffix.lower() == ".xml")
    images = by_name(p for p in paths if is_picture(p) or is_dicom(p))
    slices = find_exported(args.source / INDEX, args.dicom) if args.dicom else {}
    if stray := sorted(annotations.keys() - images.keys()):
        warn(f"{len(stray)} XML without an image, '{stray[0]}' for one, were left out.")
        tree.ignored["XML without an image"] += len(stray)
    for name, path in progress(images.items(), "images"):
        if name not in annotations and not args.healthy:
            tree.ignored["images without an XML (--healthy takes them)"] += 1
            continue
        voc = read_voc(annotations[name]) if name in annotations else None
        objects = [(obj.name, obj.box) for obj in voc.objects] if voc else []
        if not tree.wants(fit_id(name), objects):
            continue
        path = slices.get(name, path)
        patient, study, series, position = name, "", "", None
        size = image_size(path)
        if not is_picture(path):
            patient, study, _ = read_identity(path)
            series, position = read_place(path)
            patient, study = patient or study or name, study or patient or name
            patient, study = pseudonym("patient", patient), pseudonym("study", study)
            series = pseudonym("series", series or study)
        if voc and voc.width is not None and (voc.height, voc.width) != size:
            raise ValueError(
                f"{voc.path}: was drawn on {voc.width} x {voc.height} pixels, the image has "
                f"{size[1]} x {size[0]}."
            )
        tree.add(
            fit_id(name),
            path,
            objects,
            size=size,
            patient=patient,
            study=study,
            series=series,
            position_mm=position,
        )


def by_name(paths: Iterable[Path]) -> dict[str, Path]:
    """Files by name without a suffix of an image or XML; the end of a UID is no suffix.

    Raises:
        ValueError: naming two files of one name, of which one would be lost.
    """
    found: dict[str, Path] = {}
    for path in paths:
        known = path.suffix.lower() in (".xml", ".dcm", ".ima", *PICTURE_SUFFIXES)
        name = plain(path.stem if known else path.name)
        if found.setdefault(name, path) != path:
            raise ValueError(f"{path}: has the name of {found[name]}; rename one.")
    return found


def find_exported(index: Path, dicom: Path) -> dict[str, Path]:
    """The DICOM file of each picture that export_png.py wrote.

    Raises:
        FileNotFoundError, ValueError: no index, or a slice that is not in the folder any more.
    """
    if not index.is_file():
        raise FileNotFoundError(f"{index}: no such file; --dicom needs what export_png.py wrote.")
    wanted = json.loads(index.read_text(encoding="utf-8"))
    series, _ = read_series(dicom)
    paths = {
        hashlib.sha256(read_identity(path)[2].encode()).hexdigest(): path
        for s in series
        for path in dict.fromkeys(s.files)
    }
    missing = [name for name, entry in wanted.items() if entry["sop"] not in paths]
    if missing:
        raise ValueError(
            f"{dicom}: lacks the slices of {len(missing)} pictures, '{missing[0]}' for one."
        )
    return {name: paths[entry["sop"]] for name, entry in wanted.items()}


if __name__ == "__main__":
    raise SystemExit(main())
