#!/usr/bin/env python
"""Divide the images of a VOC tree into train, val and test, by patient.

Reads ROOT/DICOM/*.dcm or ROOT/JPEGImages/*, ROOT/Annotations/*.xml and ROOT/patients.csv, and
writes ROOT/ImageSets/Main/{train,val,test}.txt. Without patients.csv the patients are those of the
DICOM headers, and patients.csv is written with pseudonyms, so that it holds no identity.

    python datasets/make_splits.py data/ich --by patient --ratios 0.5 0.2 0.3 --seed 0
    python datasets/make_splits.py data/ich --folds 5

Patients are divided so that images, positive images and each type of hemorrhage have like shares.
With --folds K there are K pairs of lists instead, fold0_train.txt and fold0_val.txt to
fold<K-1>_val.txt; every image is in the val list of exactly one. A split that exists is checked by
datasets/audit_splits.py.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ich_det2.data.dicom import read_identity
from ich_det2.data.splits import (
    find_images,
    read_patients,
    split_by_group,
    split_by_image,
    split_stratified,
)
from ich_det2.data.voc import read_voc
from ich_det2.files import write_atomically

Patients = dict[str, tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 2 for an error of the user."""
    args = parse_args(argv)
    try:
        make_splits(args)
    except (ValueError, OSError) as error:
        print(f"make_splits: {error}", file=sys.stderr)
        return 2
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder of the VOC tree")
    parser.add_argument(
        "--by",
        choices=("patient", "image"),
        default="patient",
        help="what stays in one split (default: patient). 'image' divides as the paper does and "
        "puts slices of one patient into training and test: its results are too good",
    )
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        default=[0.5, 0.2, 0.3],
        metavar="R",
        help="share of each split, of sum 1 (default: 0.5 0.2 0.3, as in the paper)",
    )
    parser.add_argument(
        "--names",
        nargs="+",
        default=["train", "val", "test"],
        metavar="NAME",
        help="name of each split (default: train val test)",
    )
    parser.add_argument("--folds", type=int, metavar="K", help="K-fold lists instead of --ratios")
    parser.add_argument(
        "--stratify",
        choices=("type", "positive"),
        default="type",
        help="what is shared out evenly: types of hemorrhage, positive images and images (default),"
        " or positive and negative patients alone",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, another split")
    parser.add_argument(
        "--force", action="store_true", help="replace splits that are there and differ"
    )
    return parser.parse_args(argv)


def make_splits(args: argparse.Namespace) -> None:
    """Divide, write and report; nothing is written unless everything is in order.

    Raises:
        FileNotFoundError: no tree, images or annotations.
        ValueError: wrong arguments or files, unknown patients, or splits that would be replaced.
    """
    if args.folds is not None:
        if args.folds < 2:
            raise ValueError(f"--folds is {args.folds}, expected at least 2.")
        args.ratios = [1 / args.folds] * args.folds
        args.names = [f"fold{i}_val" for i in range(args.folds)]
    if len(args.names) != len(args.ratios):
        raise ValueError(
            f"--ratios has {len(args.ratios)} values and --names {len(args.names)}, expected as "
            "many of both."
        )
    for name in args.names:
        if not re.fullmatch(r"\w[\w.-]*", name) or args.names.count(name) > 1:
            raise ValueError(f"--names has '{name}', expected different names without folders.")

    files = find_images(args.root)
    types = read_types(args.root, files)
    positive = {image: bool(names) for image, names in types.items()}
    patients, new_patients = find_patients(args.root, files, required=args.by == "patient")
    images = list(files)
    labels = [positive[image] for image in images]
    if args.by == "patient":
        groups = [patients[image][0] for image in images]
        wanted = sum(ratio > 0 for ratio in args.ratios)
        if len(set(groups)) < wanted:
            raise ValueError(
                f"{args.root}: has images of {len(set(groups))} patient(s) for {wanted} splits, "
                "expected at least one patient each; see the patients in patients.csv or in the "
                "DICOM headers."
            )
        if args.stratify == "type":
            parts = split_stratified(groups, list(types.values()), args.ratios, seed=args.seed)
        else:
            parts = split_by_group(groups, args.ratios, stratify=labels, seed=args.seed)
    else:
        parts = split_by_image(images, args.ratios, stratify=labels, seed=args.seed)
    splits = {name: [images[i] for i in part] for name, part in zip(args.names, parts, strict=True)}
    lists = dict(splits)
    for name in splits if args.folds else ():
        held = set(splits[name])
        lists[name.replace("_val", "_train")] = [image for image in images if image not in held]

    write_splits(
        args.root,
        lists,
        patients if new_patients and args.by == "patient" else None,
        force=args.force,
    )
    report(splits, positive, patients)
    if args.by == "image":
        warn_of_leakage(splits, patients)


def read_types(root: Path, images: Mapping[str, Path]) -> dict[str, set[str]]:
    """The names of the objects in each image's annotation."""
    types = {}
    for image in images:
        path = root / "Annotations" / f"{image}.xml"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: the image {image} has no annotation; a healthy slice needs one too, "
                "without objects."
            )
        types[image] = {obj.name for obj in read_voc(path).objects}
    return types


def find_patients(
    root: Path, images: Mapping[str, Path], *, required: bool
) -> tuple[Patients, bool]:
    """Patient and study of the images, from ``patients.csv`` or else from the DICOM headers.

    Returns:
        The patients, and whether they are new: pseudonyms out of headers. If not ``required``,
        images whose patient nobody knows are left out.
    """
    if (root / "patients.csv").exists():
        patients = read_patients(root)
        known = {image: patients[image] for image in images if image in patients}
        if required and len(known) < len(images):
            lacking = sorted(set(images) - set(known))
            raise ValueError(
                f"{root / 'patients.csv'}: lacks {len(lacking)} of {len(images)} images, "
                f"'{lacking[0]}' for one; add a line for each."
            )
        return known, False

    identities = {}
    for image, path in images.items():
        header = read_identity(path) if path.suffix.lower() == ".dcm" else ("", "", "")
        patient, study, _ = header
        if patient:
            identities[image] = (patient, study)
        elif required:
            raise ValueError(
                f"{path}: does not say whose image it is; write {root / 'patients.csv'} with the "
                "header image,patient and a line for each image."
            )
    return pseudonymise(identities), True


def pseudonymise(identities: Patients) -> Patients:
    """Number patients and studies as they first appear among the sorted images."""
    names: dict[str, str] = {}
    studies: dict[tuple[str, str], str] = {}
    result = {}
    for image, identity in sorted(identities.items()):
        patient = names.setdefault(identity[0], f"P{len(names) + 1:04d}")
        study = studies.setdefault(identity, f"S{len(studies) + 1:04d}")
        result[image] = (patient, study)
    return result


def write_splits(
    root: Path, splits: Mapping[str, Sequence[str]], patients: Patients | None, *, force: bool
) -> None:
    """Write a list for each split and, if given, ``patients.csv``: all of them or none."""
    folder = root / "ImageSets" / "Main"
    texts = {folder / f"{name}.txt": "\n".join([*ids, ""]) for name, ids in splits.items()}
    for path, text in texts.items():
        if path.exists() and not force:
            present = path.read_text(encoding="utf-8", errors="replace")
            if sorted(present.split()) != sorted(text.split()):
                raise ValueError(f"{path}: holds another split; replace it with --force.")
    if patients is not None:
        table = io.StringIO()
        rows = [(image, *value) for image, value in sorted(patients.items())]
        csv.writer(table, lineterminator="\n").writerows([("image", "patient", "study"), *rows])
        texts[root / "patients.csv"] = table.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for path, text in texts.items():
            file = stack.enter_context(write_atomically(path))
            file.write(text)
            file.flush()  # a full disk shows here, before the first file takes its place


def report(
    splits: Mapping[str, Sequence[str]], positive: Mapping[str, bool], patients: Patients
) -> None:
    """Print a table with a row for each split."""
    table = Table("split", title="Splits")
    for heading in ("patients", "images", "of all", "positive images", "of split"):
        table.add_column(heading, justify="right")
    total = sum(len(ids) for ids in splits.values())
    for name, ids in splits.items():
        known = {patients[image][0] for image in ids if image in patients}
        hits = sum(positive[image] for image in ids)
        table.add_row(
            name,
            str(len(known)) if known else "unknown",
            str(len(ids)),
            f"{len(ids) / total:.1%}",
            str(hits),
            f"{hits / len(ids):.1%}" if ids else "-",
        )
    Console().print(table)


def warn_of_leakage(splits: Mapping[str, Sequence[str]], patients: Patients) -> None:
    """Say on stderr how many patients a split by image has torn apart."""
    places: dict[str, set[str]] = {}
    for name, ids in splits.items():
        for image in ids:
            if image in patients:
                places.setdefault(patients[image][0], set()).add(name)
    torn = sum(len(names) > 1 for names in places.values())
    count = f"{torn} of {len(places)} patients" if places else "an unknown number of patients"
    print(
        f"WARNING: DATA LEAKAGE: {count} have images in more than one split. Neighbouring slices "
        "are near copies, so scores on these splits are too good; use them only to reproduce the "
        "paper, and --by patient for anything else.",
        file=sys.stderr,
    )


if __name__ == "__main__":
    raise SystemExit(main())
