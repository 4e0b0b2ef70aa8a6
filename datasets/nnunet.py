#!/usr/bin/env python
"""A VOC tree with masks as a data set of nnU-Net (v2), and nnU-Net's results back.

    python datasets/nnunet.py export data/mine --output nnUNet_raw/Dataset501_ICH
    python datasets/nnunet.py import predictions data/mine test --output output/nnunet_test \\
        --dataset nnUNet_raw/Dataset501_ICH
    python tools/evaluate.py output/nnunet_test --threshold 0.5

A case is a stack of neighbouring slices of a series, as NIfTI in HU, where DICOM says where each
lies; of pictures it is, with --pixel-mm, by position_mm of patients.csv. Else, or with --png, a
case is a slice, as PNG. cases.csv says which slice of which case is which image. Training and
validation are imagesTr, by splits_final.json, and tests imagesTs. What bleeds without a known mask
is nnU-Net's "ignore". Results are the masks that nnUNetv2_predict writes, with the probabilities
beside them if it was called with --save_probabilities.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ich_det2.cli import guard, progress, warn
from ich_det2.data.context import find_places
from ich_det2.data.dicom import read_hu, read_plane, read_windowed
from ich_det2.data.masks import encode_mask
from ich_det2.data.pictures import is_picture, read_mask_picture, read_picture, write_picture
from ich_det2.data.tree import VocTree, read_table, read_text
from ich_det2.data.volumes import read_stack, write_stack
from ich_det2.evaluation.predictions import RESULTS, Predictions, write_predictions
from ich_det2.files import is_hidden, replace_folder, write_csv, write_json

CASES, DATASET, SPLITS = "cases.csv", "dataset.json", "splits_final.json"
FIELDS = ("case", "slice", "image")
NIFTI, PNG = ".nii.gz", ".png"
BACKGROUND, IGNORE = "background", "ignore"

SAME_STEP = 0.1
"""By which part slices of a stack may be nearer or further than the ones before them."""


def main(argv=None) -> int:
    """Run the command; returns the exit code, 2 for an error of the user."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to = commands.add_parser("export", help="a VOC tree to nnU-Net's raw data")
    to.add_argument("root", type=Path)
    to.add_argument("--output", type=Path, required=True, metavar="nnUNet_raw/DatasetNNN_NAME")
    to.add_argument(
        "--splits",
        nargs="+",
        type=parse_pair,
        default=[("train", "val")],
        metavar="TRAIN:VAL",
        help="pairs of lists, one for each of nnU-Net's folds (default: train:val)",
    )
    to.add_argument("--test", metavar="LIST", help="(default: test, if there is such a list)")
    to.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="one takes every object as that class, several keep the types (default: all names)",
    )
    to.add_argument("--png", action="store_true", help="single slices as PNG")
    to.add_argument(
        "--window", type=float, nargs=2, default=(50, 100), metavar=("LEVEL", "WIDTH"),
        help="HU, of DICOM as PNG",
    )  # fmt: skip
    to.add_argument("--pixel-mm", type=float, help="side of a pixel of pictures")
    back = commands.add_parser("import", help="nnU-Net's results for tools/evaluate.py")
    back.add_argument("predictions", type=Path, help="folder of masks")
    back.add_argument("root", type=Path, help="the VOC tree, for the truth")
    back.add_argument("split", help="list in ImageSets/Main, whose slices have to be all there")
    back.add_argument("--dataset", type=Path, required=True, help="what export has written")
    back.add_argument("--output", type=Path, required=True, metavar="DIR")
    back.add_argument("--min-pixels", type=int, default=1, help="smaller lesions are left out")
    args = parser.parse_args(argv)
    return guard("nnunet.py", lambda: export(args) if args.command == "export" else bring(args))


def parse_pair(text: str) -> tuple[str, str]:
    """ "train:val" as the names of two lists."""
    first, _, second = text.partition(":")
    if not first or not second:
        raise argparse.ArgumentTypeError(f"'{text}': expected TRAIN:VAL, names of two lists")
    return first, second


# ---- export ------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What nnU-Net takes as one: a stack of slices, or a single one.

    Attributes:
        images: ids, from the feet to the head for an ordinary series.
        steps_mm: as of ``write_stack``; None for a slice of no known place.
    """

    images: tuple[str, ...]
    steps_mm: np.ndarray | None = None

    @property
    def name(self) -> str:
        """Its first image's id."""
        return self.images[0]


def export(args) -> None:
    """Write images, labels, splits and what each slice is.

    Raises:
        FileNotFoundError, ValueError: one sentence; nothing is written then.
    """
    if not re.fullmatch(r"Dataset\d{3}_\w+", args.output.name):
        raise ValueError(
            f"--output is '{args.output}', expected a folder such as nnUNet_raw/Dataset501_ICH, by"
            " which nnU-Net finds it."
        )
    if args.output.exists() and any(args.output.iterdir()):
        raise ValueError(f"{args.output}: is not empty; remove it, or give another --output.")
    tree = VocTree(args.root)
    test = args.test or ("test" if "test" in tree.lists else None)
    lists = {name: tree.read_list(name) for pair in args.splits for name in pair}
    training = list(dict.fromkeys(image for ids in lists.values() for image in ids))
    testing = tree.read_list(test) if test else []
    check_apart(tree, [(lists[a], lists[b]) for a, b in args.splits] + [(training, testing)])
    classes = class_values(tree, args.classes, training + testing)
    cases = None if args.png else find_stacks(tree, training + testing, args.pixel_mm)
    ending = NIFTI if cases else PNG
    cases = cases or [Case((image,)) for image in training + testing]
    folds = [(part(cases, lists[a]), part(cases, lists[b])) for a, b in args.splits]
    parts = {"Tr": part(cases, training), "Ts": part(cases, testing)}
    ignored = known = 0
    with replace_folder(args.output) as folder:
        for where, chosen in parts.items():
            for case in progress(chosen, f"images{where}"):
                labels = [label_slice(tree, image, classes) for image in case.images]
                ignored += sum(bool((a == classes[IGNORE]).any()) for a in labels)
                # "ignore" is the highest label.
                known += sum(bool((a % classes[IGNORE]).any()) for a in labels)
                write_case(tree, case, labels, folder, where, ending, args.window)
        if not known:
            raise ValueError(
                f"{tree.root}: no object has a mask, so there is nothing to learn from."
            )
        if not ignored:
            del classes[IGNORE]
        hu = ending == NIFTI and not is_picture(tree.images[cases[0].name])
        content = {
            "channel_names": {"0": "CT" if hu else "windowed CT"},
            "labels": {BACKGROUND: 0, **classes},
            "numTraining": len(parts["Tr"]),
            "file_ending": ending,
            "overwrite_image_reader_writer": "NibabelIO" if ending == NIFTI else "NaturalImage2DIO",
        }
        write_json(folder / DATASET, content)
        names = [{"train": [c.name for c in a], "val": [c.name for c in b]} for a, b in folds]
        write_json(folder / SPLITS, names)
        rows = [(c.name, i, image) for c in cases for i, image in enumerate(c.images)]
        write_csv(folder / CASES, FIELDS, [dict(zip(FIELDS, row)) for row in rows])
    if ignored:
        warn(f"{ignored} slices bleed where no mask is known, which is labelled '{IGNORE}'.")
    print(
        f"{args.output}: {len(parts['Tr'])} cases to train on, {len(parts['Ts'])} to test,"
        f" {len(rows)} slices; labels {', '.join(f'{v} {k}' for k, v in classes.items())}"
    )


def class_values(
    tree: VocTree, given: Sequence[str] | None, images: Iterable[str]
) -> dict[str, int]:
    """Labels by the name of an object; the last is "ignore".

    Raises:
        ValueError: an object has another name, or a name is nnU-Net's.
    """
    found = set().union(*(tree.types[image] for image in images))
    names = list(given or sorted(found))
    if len(set(names)) < len(names) or {BACKGROUND, IGNORE} & set(names):
        raise ValueError(f"the classes are {names}, expected different names, none of nnU-Net's.")
    if unknown := sorted(found - set(names)) if len(names) > 1 else []:
        raise ValueError(f"{tree.root} has objects '{unknown[0]}', expected one of {names}.")
    values = {name: i for i, name in enumerate(names, start=1)}
    return values | {IGNORE: len(names) + 1}


def check_apart(tree: VocTree, pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> None:
    """Raises: ValueError: a patient is in both lists of a pair."""
    for first, second in pairs:
        both = {patient_of(tree, i) for i in first} & {patient_of(tree, i) for i in second}
        if both:
            raise ValueError(
                f"{tree.root}: {len(both)} patients are in two lists that have to be apart; make"
                " lists by patient with datasets/make_splits.py."
            )


def patient_of(tree: VocTree, image: str) -> str:
    """By ``patients.csv``, else by the DICOM header, else the image itself."""
    known = tree.patients.get(image)
    return known[0] if known else tree.header_patients.get(image, image)


def find_stacks(tree: VocTree, images: Sequence[str], pixel_mm: float | None) -> list[Case] | None:
    """Stacks of neighbouring slices, each at one distance from the next; None where it is not known
    of each image where it lies.

    A slice further away than one and a half times its series' usual distance is no neighbour, but
    of three or more at equal distances.
    """
    places = find_places(tree, images)
    planes = {image: find_plane(tree, image, places.get(image), pixel_mm) for image in images}
    if any(plane is None for plane in planes.values()):
        return None
    series: dict[str, list[str]] = {}
    for image in sorted(images, key=lambda image: (places[image][1], image)):
        series.setdefault(places[image][0], []).append(image)
    cases = []
    for members in series.values():
        heights = np.array([places[image][1] for image in members])
        kinds = [(tree.size(image), planes[image][:, :2].round(3).tolist()) for image in members]
        alike = [a == b for a, b in zip(kinds, kinds[1:])]
        for start, stop in stacks_of(np.diff(heights), alike):
            stack = members[start:stop]
            steps = planes[stack[0]].copy()
            if len(stack) > 1:  # tilted gantries shift each slice
                way = planes[stack[-1]][:, 3] - planes[stack[0]][:, 3]
                steps[:, 2] = way / (len(stack) - 1)
            cases.append(Case(tuple(stack), steps))
    return cases


def find_plane(
    tree: VocTree, image: str, place: tuple[str, float] | None, pixel_mm: float | None
) -> np.ndarray | None:
    """Where the pixels of an image lie, as ``read_plane`` says it; None where it is not known."""
    if place is None:
        return None
    if not is_picture(tree.images[image]):
        return read_plane(tree.images[image])
    if pixel_mm is None:
        return None
    return np.array([[pixel_mm, 0, 0, 0], [0, pixel_mm, 0, 0], [0, 0, 1, place[1]]], dtype=float)


def stacks_of(gaps_mm: np.ndarray, alike: Sequence[bool]) -> list[tuple[int, int]]:
    """Runs of slices at equal distances.

    Args:
        gaps_mm: of D sorted slices the D - 1 distances.
        alike: D - 1 times whether two neighbours have pixels of one size in one orientation.

    Returns:
        First slice and the one behind the last of each run; every slice is in one.
    """

    def equal(a: float, b: float) -> bool:
        return abs(a - b) <= SAME_STEP * min(a, b)

    positive = gaps_mm[gaps_mm > 0]
    usual = float(np.median(positive)) if len(positive) else 0.0
    stacks, start = [], 0
    for i, gap in enumerate(gaps_mm):
        if i == start:
            again = i + 1 < len(gaps_mm) and equal(gap, gaps_mm[i + 1])
            joined = gap <= 1.5 * usual or again
        else:
            joined = equal(gap, gaps_mm[i - 1])
        if not (gap > 0 and joined and alike[i]):
            stacks.append((start, i + 1))
            start = i + 1
    return [*stacks, (start, len(gaps_mm) + 1)]


def part(cases: Iterable[Case], images: Sequence[str]) -> list[Case]:
    """The cases of a list.

    Raises:
        ValueError: a part of a case alone is in it.
    """
    wanted = set(images)
    found = [case for case in cases if wanted & set(case.images)]
    for case in found:
        if lacking := sorted(set(case.images) - wanted):
            raise ValueError(
                f"'{case.name}' and '{lacking[0]}' are neighbours in one series, but in two lists;"
                " make lists by patient with datasets/make_splits.py, or export single slices by"
                " --png."
            )
    return found


def label_slice(tree: VocTree, image: str, classes: Mapping[str, int]) -> np.ndarray:
    """The labels of a slice's pixels, uint8 (H, W)."""
    objects, masks = tree.annotation(image).objects, tree.masks(image)
    labels = np.zeros(tree.size(image), dtype=np.uint8)
    if not objects and tree.labels.get(image):
        labels[:] = classes[IGNORE]
    for obj, mask in zip(objects, masks):
        if mask is None:
            x0, y0, x1, y1 = obj.box
            rows = slice(int(y0), int(np.ceil(y1)))
            labels[rows, int(x0) : int(np.ceil(x1))] = classes[IGNORE]
    for obj, mask in zip(objects, masks):
        if mask is not None:
            labels[mask] = classes.get(obj.name, 1)  # of one class all are
    return labels


def write_case(
    tree: VocTree,
    case: Case,
    labels: Sequence[np.ndarray],
    folder: Path,
    where: str,
    ending: str,
    window: Sequence[float],
) -> None:
    """Write a case's image and labels into imagesTr and labelsTr, or those of the test."""
    paths = [folder / f"images{where}" / f"{case.name}_0000{ending}"]
    paths.append(folder / f"labels{where}" / f"{case.name}{ending}")
    for path in paths:
        path.parent.mkdir(exist_ok=True)
    files = [tree.images[image] for image in case.images]
    if ending == PNG:
        (file,) = files
        grey = read_picture(file) if is_picture(file) else read_windowed(file, [window])[0][..., 0]
        write_picture(paths[0], grey)
        write_picture(paths[1], labels[0])
        return
    slices = np.stack([read_picture(f) if is_picture(f) else read_hu(f) for f in files])
    whole = np.clip(np.rint(slices), -0x8000, 0x7FFF).astype(np.int16)
    write_stack(paths[0], whole, case.steps_mm)
    write_stack(paths[1], np.stack(labels), case.steps_mm)


# ---- import ------------------------------------------------------------------------------------


def bring(args) -> None:
    """Write nnU-Net's results on a list as an evaluation leaves a model's.

    Raises:
        FileNotFoundError, ValueError: one sentence that names the file.
    """
    # These load Detectron2, which an export does without.
    from ich_det2.data.datasets import load_ich_voc
    from ich_det2.modeling.components import find_components, slice_score

    labels, ending = read_dataset(args.dataset / DATASET)
    places, sizes = read_cases(args.dataset / CASES)
    dicts = {d["image_id"]: d for d in load_ich_voc(args.root, args.split)}
    if missing := [image for image in dicts if image not in places]:
        raise ValueError(f"{args.dataset / CASES}: has no image '{missing[0]}' of {args.split}.")
    wanted = list(dict.fromkeys(places[image][0] for image in dicts))
    files = find_files(args.predictions, ending, wanted)
    results, boxes, scores = [], {}, {}
    for case in progress(wanted, "cases"):
        found, probabilities = read_case(files[case], args.dataset, case, ending, labels)
        if len(found) != sizes[case]:
            raise ValueError(f"{files[case]}: has {len(found)} slices, expected {sizes[case]}.")
        for image in (i for i in dicts if places[i][0] == case):
            number, d = places[image][1], dicts[image]
            if found[number].shape != (d["height"], d["width"]):
                raise ValueError(
                    f"{files[case]}: is {found[number].shape[::-1]} pixels, '{image}'"
                    f" {(d['width'], d['height'])}."
                )
            chances = probabilities[:, number].astype(np.float32)
            parts = find_components(found[number], chances, min_pixels=args.min_pixels)
            corners = parts.boxes.astype(float)
            xywh = np.c_[corners[:, :2], corners[:, 2:] - corners[:, :2]]
            boxes[image] = np.c_[parts.scores.astype(float), xywh]
            scores[image] = slice_score(chances.sum(axis=0), args.min_pixels)
            results += [
                {
                    "image_id": image,
                    "category_id": int(c),
                    "bbox": box.tolist(),
                    "score": float(score),
                    "segmentation": encode_mask(mask),
                }
                for box, score, c, mask in zip(xywh, parts.scores, parts.classes, parts.masks)
            ]
    predictions = predictions_of(dicts.values(), boxes, scores)
    args.output.mkdir(parents=True, exist_ok=True)
    write_predictions(predictions, args.output)
    write_json(args.output / RESULTS, results)
    print(
        f"{args.output}: {len(results)} lesions on {len(dicts)} slices of {len(wanted)} cases; now"
        f" python tools/evaluate.py {args.output} --threshold 0.5"
    )


def predictions_of(
    dicts: Iterable[dict], boxes: Mapping[str, np.ndarray], scores: Mapping[str, float]
) -> Predictions:
    """What was found, by image id, beside the truth of dataset dicts."""
    dicts = list(dicts)
    ids = [d["image_id"] for d in dicts]
    true = [np.array([a["bbox"] for a in d["annotations"]]).reshape(-1, 4) for d in dicts]
    return Predictions(
        image_ids=ids,
        patients=[d["patient_id"] for d in dicts],
        files=[d["file_name"] for d in dicts],
        labels=np.array([d["image_label"] for d in dicts]),
        scores=np.array([scores[image] for image in ids]),
        boxes=[boxes[image] for image in ids],
        true_boxes=[np.c_[b[:, :2], b[:, 2:] - b[:, :2]] for b in true],
        types=[[a["type"] for a in d["annotations"]] for d in dicts],
    )


def read_dataset(path: Path) -> tuple[dict[str, int], str]:
    """Labels by name, and the ending of files, as dataset.json has them.

    Raises:
        ValueError: naming the file.
    """
    try:
        content = json.loads(read_text(path))
        labels, ending = dict(content["labels"]), content["file_ending"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no dataset.json of nnU-Net v2 ({error}).") from error
    values = sorted(v for k, v in labels.items() if isinstance(v, int))
    if values != list(range(len(labels))) or labels.get(BACKGROUND) != 0 or len(labels) < 2:
        raise ValueError(
            f"{path}: has the labels {labels}, expected {BACKGROUND} 0 and the next whole numbers,"
            " one each; regions of several labels are not known here."
        )
    if ending not in (NIFTI, PNG):
        raise ValueError(f"{path}: file_ending is '{ending}', expected {NIFTI} or {PNG}.")
    return labels, ending


def read_cases(path: Path) -> tuple[dict[str, tuple[str, int]], dict[str, int]]:
    """Case and number of slice by image id, and the number of slices of each case.

    Raises:
        ValueError: naming the file and the line.
    """
    places: dict[str, tuple[str, int]] = {}
    sizes: dict[str, int] = {}
    for line, row in read_table(path, FIELDS):
        number = sizes.setdefault(row["case"], 0)
        if row["slice"] != str(number) or row["image"] in places:
            raise ValueError(
                f"{path}, line {line}: is slice {row['slice']} of '{row['case']}', the image"
                f" '{row['image']}', expected slice {number}, and each image once."
            )
        places[row["image"]] = row["case"], number
        sizes[row["case"]] += 1
    return places, sizes


def find_files(folder: Path, ending: str, wanted: Sequence[str]) -> dict[str, Path]:
    """The masks in a folder by case.

    Raises:
        FileNotFoundError, ValueError: no folder, a case lacks, or a mask is of another.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected what nnUNetv2_predict wrote.")
    paths = sorted(path for path in folder.glob(f"*{ending}") if not is_hidden(path))
    found = {path.name.removesuffix(ending): path for path in paths}
    for what, names in (
        ("has no mask of", sorted(set(wanted) - set(found))),
        ("has a mask of another list's case, or of none,", sorted(set(found) - set(wanted))),
    ):
        if names:
            raise ValueError(
                f"{folder}: {what} '{names[0]}{ending}' and {len(names) - 1} more; expected"
                f" {len(wanted)} cases, one file each."
            )
    return found


def read_case(
    path: Path, dataset: Path, case: str, ending: str, labels: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A mask and the probabilities of its classes, 0 and 1 where nnU-Net has not saved them.

    Args:
        path: of the mask; the probabilities are beside it, as NPZ.
        dataset: what export has written.
        case: its name.
        ending: of files.
        labels: by name.

    Returns:
        int32 (D, H, W), and (K, D, H, W) without the background's.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    if ending == PNG:
        found = read_mask_picture(path)[None]
    else:
        images = (dataset / f"images{where}" / f"{case}_0000{ending}" for where in ("Tr", "Ts"))
        found = read_stack(path, next((i for i in images if i.is_file()), dataset / CASES))
    if unknown := sorted(set(np.unique(found).tolist()) - set(labels.values())):
        raise ValueError(f"{path}: has the value {unknown[0]}, expected one of {dict(labels)}.")
    found = np.where(found == labels.get(IGNORE, -1), 0, found)
    number = len(labels) - 1 - (IGNORE in labels)
    if not (archive := path.with_name(f"{case}.npz")).is_file():
        return found, np.stack([found == c for c in range(1, number + 1)])
    try:
        with np.load(archive, allow_pickle=False) as content:
            probabilities = content["probabilities"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{archive}: holds no probabilities of nnU-Net ({error}).") from error
    if probabilities.shape != (number + 1, *found.shape):
        raise ValueError(
            f"{archive}: is sized {probabilities.shape}, expected {(number + 1, *found.shape)}:"
            " classes, slices, rows, columns."
        )
    own = np.take_along_axis(probabilities, found[None], axis=0)[0]
    # What is left of a mask behind nnU-Net's postprocessing is still the most probable class.
    if ((found > 0) & (own < probabilities.max(axis=0) - 0.01)).any():
        raise ValueError(f"{archive}: its most probable classes are not those of {path.name}.")
    return found, probabilities[1:]


if __name__ == "__main__":
    raise SystemExit(main())
