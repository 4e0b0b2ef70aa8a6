#!/usr/bin/env python
"""Images with segmentation masks (BHSD, INSTANCE22, Seg-CQ500, ...) as a VOC tree.

SOURCE holds two folders with files of the same names: pictures (PNG, JPEG; masks as PNG with index
or colour) or NIfTI volumes in HU, which become DICOM slices. The boxes are those around the
connected parts of each class, whose pixels become SegmentationObject/.

    python datasets/prepare_masks.py BHSD --output data/bhsd --masks ground_truths \\
        --classes 1=EDH 2=IPH 3=IVH 4=SAH 5=SDH
    python datasets/prepare_masks.py pictures --output data/p --classes ff0000=SDH 00ff00=IPH
"""

from __future__ import annotations

import argparse
import re

import numpy as np

from ich_det2.cli import progress, warn
from ich_det2.data.dicom.writing import encode_ct
from ich_det2.data.pictures import read_mask_picture, read_picture
from ich_det2.data.prepare import run_preparer
from ich_det2.data.tree import fit_id
from ich_det2.data.tree_writer import objects_of_mask
from ich_det2.data.volumes import read_with_mask
from ich_det2.files import walk

BACKGROUND = "-"
"""As the name of a class: what is no bleed."""

PICTURES = (".png", ".jpg", ".jpeg", ".bmp")


def main(argv=None) -> int:
    return run_preparer("masks", __doc__, argv, prepare, options=add_options)


def add_options(parser) -> None:
    parser.add_argument("--images", default="images", help="folder in SOURCE (default: images)")
    parser.add_argument("--masks", default="masks", help="folder in SOURCE (default: masks)")
    parser.add_argument(
        "--classes",
        nargs="+",
        type=parse_class,
        metavar="VALUE=NAME",
        help="value or colour (rrggbb) of each class, VALUE=- for one that is background"
        " (default: all that is not 0 is hemorrhage)",
    )
    parser.add_argument("--min-pixels", type=int, default=4, help="smaller parts are left out")
    parser.add_argument(
        "--patient",
        type=parse_pattern,
        default=re.compile(r"(.+?)(?:[_-]\d+)?$"),
        metavar="REGEX",
        help="its first group, of a file's stem, is the patient (default: all but a last number)",
    )


class Colour(int):
    """A value that is 0xRRGGBB."""


def parse_class(text: str) -> tuple[int, str]:
    """ "2=IPH" or "00ff00=IPH" as value and name; a colour is its 24 bits."""
    value, _, name = text.partition("=")
    colour = re.fullmatch(r"#?([0-9a-fA-F]{6})", value)
    if not name or not (colour or value.isdigit()):
        raise argparse.ArgumentTypeError(f"'{text}': expected VALUE=NAME or rrggbb=NAME")
    return (Colour(colour[1], 16) if colour else int(value)), name.strip()


def parse_pattern(text: str) -> re.Pattern:
    """A regular expression with a group."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{text}': is no regular expression ({error})") from None
    if not pattern.groups:
        raise argparse.ArgumentTypeError(f"'{text}': expected a group, (...), for the patient")
    return pattern


def prepare(args, tree) -> None:
    names = dict(args.classes or ())
    images, masks = find(args.source / args.images), find(args.source / args.masks)
    if missing := sorted(images.keys() ^ masks.keys()):
        raise ValueError(
            f"{args.source}: '{missing[0]}' and {len(missing) - 1} more have an image or a mask "
            "alone; expected the same names in both folders."
        )
    guessed = []
    for name, path in progress(images.items(), "images"):
        identifier = fit_id(name)
        if path.suffix.lower() in PICTURES:
            # Without classes any colour is a bleed; a black background is 0 in both.
            mask = read_mask_picture(masks[name], colours=not names or in_colours(names))
            check_values(mask, names, masks[name], tree)
            objects, parts = find_objects(mask, names, args)
            if not tree.wants(identifier, objects, masks=parts):
                continue
            grey = read_picture(path)
            if grey.shape != mask.shape:
                raise ValueError(
                    f"{path}: is {grey.shape}, its mask {mask.shape}; expected the same size."
                )
            match = args.patient.match(name)
            patient = match[1] if match else name
            tree.add(identifier, grey, objects, size=grey.shape, patient=patient, masks=parts)
            continue
        scan, mask = read_with_mask(path, masks[name])
        guessed += [f"{path.name}: {scan.guessed}"] if scan.guessed else []
        check_values(mask, names, masks[name], tree)
        depth, rows, columns = scan.spacing_mm
        for i, hu in enumerate(scan.slices):
            image_id = f"{identifier}_{i:03d}"
            objects, parts = find_objects(mask[i], names, args)
            if not tree.wants(image_id, objects, masks=parts):
                continue
            height = i * depth
            content = encode_ct(
                hu, name=image_id, series=name, height_mm=height, spacing_mm=(rows, columns)
            )
            tree.add(
                *(image_id, content, objects),
                size=hu.shape,
                patient=identifier,
                position_mm=height,
                masks=parts,
            )
    if ignored := sum(tree.ignored.values()):
        warn(f"{ignored} times a mask has a value of no class, which is taken for background.")
    if guessed:
        warn(
            f"the orientation of {len(guessed)} volumes is a guess ({guessed[0]}); look at the"
            " slices by tools/inspect_data.py."
        )


def find_objects(mask: np.ndarray, names: dict[int, str], args) -> tuple[list, np.ndarray]:
    """The objects of a mask (H, W), and a picture of them: by class, or one kind where no classes
    are given."""
    known = {value: None if name == BACKGROUND else name for value, name in names.items()}
    name_of = known.get if names else lambda value: "hemorrhage"
    return objects_of_mask(mask, name_of, min_pixels=args.min_pixels)


def in_colours(names: dict[int, str]) -> bool:
    """Whether classes are colours; a mask has those or values."""
    return any(isinstance(value, Colour) for value in names)


def check_values(mask: np.ndarray, names: dict[int, str], path, tree) -> None:
    """Counts values that --classes does not name.

    Raises:
        ValueError: a mask has nothing but such values.
    """
    values = set(np.unique(mask).tolist()) - {0}
    unknown = sorted(values - names.keys()) if names else []
    colours = in_colours(names)
    words = [f"{v:06x}" if colours else str(v) for v in unknown]
    if unknown and len(unknown) == len(values):
        raise ValueError(
            f"{path}: of the {'colours' if colours else 'values'} {', '.join(words[:8])} none is"
            f" among --classes, {', '.join(f'{v:06x}' if colours else str(v) for v in names)}; name"
            " them too (VALUE=- is background), or save the mask without soft edges."
        )
    for word in words:
        tree.ignored[f"images or volumes with the mask value {word} of no class"] += 1


def find(folder) -> dict:
    """Pictures and volumes in a folder by stem."""
    found = {}
    for path in walk(folder):
        if path.parent == folder and stem(path) and found.setdefault(stem(path), path) != path:
            raise ValueError(f"{path}: has the name of {found[stem(path)].name}; rename one.")
    return found


def stem(path) -> str:
    """A file's name without its suffix; empty for what is neither picture nor NIfTI."""
    lower = path.name.lower()
    for suffix in (*PICTURES, ".nii.gz", ".nii"):
        if lower.endswith(suffix):
            return path.name[: -len(suffix)]
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
