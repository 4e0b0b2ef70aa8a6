#!/usr/bin/env python
"""Divide the images of a VOC tree into train, val and test, by patient.

Reads ROOT/DICOM/*.dcm or ROOT/JPEGImages/*, ROOT/Annotations/*.xml and ROOT/patients.csv, and
writes ROOT/ImageSets/Main/{train,val,test}.txt. Without patients.csv the patients are those of the
DICOM headers, and patients.csv is written with pseudonyms, so that it holds no identity.

    python datasets/make_splits.py data/ich --by patient --ratios 0.5 0.2 0.3 --seed 0
    python datasets/make_splits.py data/ich --folds 5
    python datasets/make_splits.py data/ich --by image --bleeding-patients \\
        --names paper_train paper_val paper_test

Patients are divided so that images, positive images and each type of hemorrhage have like shares.
With --folds K there are K pairs of lists instead, fold0_train.txt and fold0_val.txt to
fold<K-1>_val.txt; every image is in the val list of exactly one. A split that exists is checked by
datasets/audit_splits.py. The last command is the paper's protocol, for comparison with its figures.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ich_det2.cli import guard
from ich_det2.data.splits import (
    make_folds,
    positive_groups,
    split_by_group,
    split_by_image,
    split_stratified,
)
from ich_det2.data.tree import PATIENTS, VocTree

Patients = dict[str, tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 2 for an error of the user."""
    args = parse_args(argv)
    return guard("make_splits.py", lambda: make_splits(args))


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
    parser.add_argument(
        "--bleeding-patients",
        type=float,
        nargs="?",
        const=865 / 735,
        metavar="NEGATIVES",
        help="leave out patients without hemorrhage, and draw at most NEGATIVES of the others' "
        "negative images for each positive one (default: 865 / 735, as in the paper)",
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
    if args.folds is not None and args.folds < 2:
        raise ValueError(f"--folds is {args.folds}, expected at least 2.")
    if args.folds is None and len(args.names) != len(args.ratios):
        raise ValueError(
            f"--ratios has {len(args.ratios)} values and --names {len(args.names)}, expected as "
            "many of both."
        )
    for name in args.names:
        if not re.fullmatch(r"\w[\w.-]*", name) or args.names.count(name) > 1:
            raise ValueError(f"--names has '{name}', expected different names without folders.")

    if args.bleeding_patients is not None and not 0 <= args.bleeding_patients < math.inf:
        raise ValueError(f"--bleeding-patients is {args.bleeding_patients}, expected at least 0.")

    tree = VocTree(args.root)
    images, types = list(tree.images), list(tree.findings.values())
    of_patients = args.by == "patient" or args.bleeding_patients is not None
    patients, new_patients = find_patients(tree, required=of_patients)
    if args.bleeding_patients is not None:
        kept = positive_groups(
            [patients[image][0] for image in images],
            [bool(shown) for shown in types],
            negatives_per_positive=args.bleeding_patients,
            seed=args.seed,
        )
        images, types = [images[i] for i in kept], [types[i] for i in kept]
    groups = images if args.by == "image" else [patients[image][0] for image in images]
    wanted = args.folds or sum(ratio > 0 for ratio in args.ratios)
    if args.by == "patient" and len(set(groups)) < wanted:
        raise ValueError(
            f"{args.root}: has images of {len(set(groups))} patient(s) for {wanted} splits, "
            "expected at least one patient each; see the patients in patients.csv or in the "
            "DICOM headers."
        )
    lists = {name: [images[i] for i in part] for name, part in divide(args, groups, types).items()}
    held_out = {n: ids for n, ids in lists.items() if not (args.folds and n.endswith("_train"))}
    tree.write_lists(
        lists,
        patients=patients if new_patients and of_patients else None,
        force=args.force,
    )
    report(held_out, {image: bool(shown) for image, shown in tree.findings.items()}, patients)
    if args.by == "image":
        warn_of_leakage(held_out, patients)


def divide(args: argparse.Namespace, groups: Sequence[str], types: Sequence) -> dict[str, Sequence]:
    """Indices of the images of each list."""
    positive = [bool(shown) for shown in types]
    coarse = [{"hemorrhage"} if p else set() for p in positive]
    if args.folds is not None:
        fine = args.by == "patient" and args.stratify == "type"
        return make_folds(groups, types if fine else coarse, args.folds, seed=args.seed)
    if args.by == "image":
        parts = split_by_image(groups, args.ratios, stratify=positive, seed=args.seed)
    elif args.stratify == "type":
        parts = split_stratified(groups, types, args.ratios, seed=args.seed)
    else:
        parts = split_by_group(groups, args.ratios, stratify=positive, seed=args.seed)
    return dict(zip(args.names, parts, strict=True))


def find_patients(tree: VocTree, *, required: bool) -> tuple[Patients, bool]:
    """Patient and study of the images, from ``patients.csv`` or else from the DICOM headers.

    Returns:
        The patients, and whether they are new: pseudonyms out of headers. If not ``required``,
        images whose patient nobody knows are left out.
    """
    if tree.has_patients:
        if required and (lacking := sorted(tree.images.keys() - tree.patients.keys())):
            raise ValueError(
                f"{tree.root / PATIENTS}: lacks {len(lacking)} of {len(tree.images)} images, "
                f"'{lacking[0]}' for one; add a line for each."
            )
        return tree.patients, False
    identities = {}
    for image, path in tree.images.items():
        patient, study, _ = tree.header(image)
        if patient:  # or the study, where people of different names share a Patient ID
            identities[image] = (tree.header_patients[image], study)
        elif required:
            raise ValueError(
                f"{path}: does not say whose image it is; write {tree.root / PATIENTS} with "
                "the header image,patient and a line for each image."
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
    for name, ids in splits.items():
        if ids and not any(positive[image] for image in ids):
            print(
                f"WARNING: {name} has no image with hemorrhage, so nothing can be learnt of, or"
                " measured on, bleeding slices there; give more patients or other ratios.",
                file=sys.stderr,
            )


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
