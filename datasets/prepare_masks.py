#!/usr/bin/env python
"""Images with segmentation masks (BHSD, INSTANCE22, Seg-CQ500, ...) as a VOC tree.

SOURCE holds two folders with files of the same names: pictures (PNG, JPEG; masks as PNG with index
or colour) or NIfTI volumes in HU, which become DICOM slices. The boxes are those around the
connected parts of each class.

    python datasets/prepare_masks.py BHSD --output data/bhsd --masks ground_truths \\
        --classes 1=EDH 2=IPH 3=IVH 4=SAH 5=SDH
    python datasets/prepare_masks.py pictures --output data/p --classes ff0000=SDH 00ff00=IPH
"""

from __future__ import annotations

import argparse
import re

import numpy as np
from PIL import Image

from ich_det2.data.dicom.writing import encode_ct
from ich_det2.data.prepare import progress, run_preparer
from ich_det2.data.tree_writer import boxes_of_mask
from ich_det2.data.volumes import read_with_mask

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
        help="value or colour (rrggbb) of each class (default: all that is not 0 is hemorrhage)",
    )
    parser.add_argument("--min-pixels", type=int, default=4, help="smaller parts are left out")
    parser.add_argument(
        "--patient",
        type=parse_pattern,
        default=re.compile(r"(.+?)(?:[_-]\d+)?$"),
        metavar="REGEX",
        help="its first group, of a file's stem, is the patient (default: all but a last number)",
    )


def parse_class(text: str) -> tuple[int, str]:
    """ "2=IPH" or "00ff00=IPH" as value and name; a colour is its 24 bits, over 0xFF."""
    value, _, name = text.partition("=")
    colour = re.fullmatch(r"#?([0-9a-fA-F]{6})", value)
    if not name or not (colour or value.isdigit()):
        raise argparse.ArgumentTypeError(f"'{text}': expected VALUE=NAME or rrggbb=NAME")
    return (int(colour[1], 16) if colour else int(value)), name.strip()


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
    names = dict(args.classes) if args.classes else None
    name_of = (lambda value: "hemorrhage") if names is None else names.get
    images, masks = find(args.source / args.images), find(args.source / args.masks)
    if missing := sorted(images.keys() ^ masks.keys()):
        raise ValueError(
            f"{args.source}: '{missing[0]}' and {len(missing) - 1} more have an image or a mask "
            "alone; expected the same names in both folders."
        )
    for name, path in progress(images.items(), "images"):
        identifier = re.sub(r"[^\w.-]", "_", name)
        if path.suffix.lower() in PICTURES:
            mask = read_mask(masks[name], colours=bool(names) and max(names) > 0xFF)
            objects = boxes_of_mask(mask, name_of, min_pixels=args.min_pixels)
            if not tree.wants(identifier, objects):
                continue
            with Image.open(path) as image:
                grey = np.asarray(image.convert("L"))
            if grey.shape != mask.shape:
                raise ValueError(
                    f"{path}: is {grey.shape}, its mask {mask.shape}; expected the same size."
                )
            match = args.patient.match(name)
            patient = match[1] if match else name
            tree.add(identifier, grey, objects, size=grey.shape, patient=patient)
            continue
        scan, mask = read_with_mask(path, masks[name])
        depth, rows, columns = scan.spacing_mm
        for i, hu in enumerate(scan.slices):
            image_id = f"{identifier}_{i:03d}"
            objects = boxes_of_mask(mask[i], name_of, min_pixels=args.min_pixels)
            if not tree.wants(image_id, objects):
                continue
            height = i * depth
            content = encode_ct(
                hu, name=image_id, series=name, height_mm=height, spacing_mm=(rows, columns)
            )
            tree.add(
                image_id, content, objects, size=hu.shape, patient=identifier, position_mm=height
            )


def find(folder) -> dict:
    """Pictures and volumes in a folder by stem."""
    found = {}
    for path in sorted(folder.glob("*")):
        if stem(path) and found.setdefault(stem(path), path) != path:
            raise ValueError(f"{path}: has the name of {found[stem(path)].name}; rename one.")
    return found


def stem(path) -> str:
    """A file's name without its suffix; empty for what is neither picture nor NIfTI."""
    lower = path.name.lower()
    for suffix in (*PICTURES, ".nii.gz", ".nii"):
        if lower.endswith(suffix) and not path.name.startswith("."):
            return path.name[: -len(suffix)]
    return ""


def read_mask(path, *, colours: bool) -> np.ndarray:
    """Whole numbers (H, W): the index, the grey value, or the 24 bits of a colour."""
    with Image.open(path) as image:
        if colours:
            red, green, blue = np.asarray(image.convert("RGB"), dtype=np.int32).transpose(2, 0, 1)
            return red << 16 | green << 8 | blue
        if image.mode in ("RGB", "RGBA"):
            image = image.convert("L")
        return np.asarray(image).astype(np.int32)


if __name__ == "__main__":
    raise SystemExit(main())
