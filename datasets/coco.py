#!/usr/bin/env python
"""COCO JSON to a VOC tree and back.

    python datasets/coco.py import annotations.json images --output data/mine
    python datasets/coco.py export data/mine train --output train.json

A COCO image may name its patient in "patient_id"; without it each image is a patient of its own.
Polygons and run lengths in "segmentation" become SegmentationObject/, and back run lengths; of
several objects that hold a pixel the smallest has it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from ich_det2.cli import guard, progress, warn
from ich_det2.data.masks import decode_mask, encode_mask, labels_of_masks
from ich_det2.data.tree import VocTree, fit_id, image_size, read_text
from ich_det2.data.tree_writer import VocWriter
from ich_det2.files import write_atomically

XYXY_ABS, XYWH_ABS = 0, 1
"""Of Detectron2's BoxMode; COCO's own is the latter."""


def main(argv=None) -> int:
    """Run the command; returns the exit code, 2 for an error of the user."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_voc = commands.add_parser("import", help="COCO JSON to a VOC tree")
    to_voc.add_argument("json", type=Path)
    to_voc.add_argument("images", type=Path, help="folder that file_name is relative to")
    to_voc.add_argument("--output", type=Path, required=True, metavar="ROOT")
    to_coco = commands.add_parser("export", help="a list of a VOC tree to COCO JSON")
    to_coco.add_argument("root", type=Path)
    to_coco.add_argument("split", help="list in ImageSets/Main")
    to_coco.add_argument("--output", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    if args.command == "import":
        return guard(
            "coco.py",
            lambda: import_coco(args.json, args.images, args.output),
            interrupted="the same command goes on from here.",
        )
    return guard("coco.py", lambda: export_coco(args.root, args.split, args.output))


def import_coco(path: Path, folder: Path, output: Path) -> None:
    """Write a VOC tree.

    Raises:
        ValueError: naming the file, if it is no COCO JSON, names an image twice or outside the
            folder, or holds boxes of images or categories that are not in it or are no pixels.
    """
    images, boxes, segmentations = read_coco(path)
    root = folder.resolve()
    with VocWriter(output, database="coco") as tree:
        for image in progress(images, "images"):
            name = str(image["file_name"]).replace("\\", "/")
            source = (root / name).resolve()
            if not source.is_relative_to(root) or not source.is_file():
                raise ValueError(f"{path}: the image '{name}' is not in {folder}.")
            identifier = fit_id(source.stem)
            objects = boxes[image["id"]]
            masks = masks_of(path, image, segmentations[image["id"]])
            if not tree.wants(identifier, objects, masks=masks):
                continue
            size = image_size(source)
            if size != (image["height"], image["width"]):
                raise ValueError(
                    f"{source}: is {size[1]} x {size[0]} pixels, {path.name} says"
                    f" {image['width']} x {image['height']}; the boxes are of another image."
                )
            patient = str(image.get("patient_id") or identifier)
            tree.add(identifier, source, objects, size=size, patient=patient, masks=masks)
        if tree.dropped:
            warn(
                f"{tree.dropped.total()} boxes were dropped; an image that lost all of its boxes"
                " is labelled as bleeding in labels.csv."
            )
        if not tree.counts["boxes"]:
            warn("no image has a box: there is nothing to learn from; check the source.")
        print(f"{output}: {tree.summary()}")


def masks_of(path: Path, image: dict, segmentations: list) -> np.ndarray | None:
    """The objects of an image as ``VocWriter.add`` takes masks; None where none has one.

    Args:
        path: of the JSON.
        image: its entry.
        segmentations: of each object: polygons, run lengths, or empty.

    Raises:
        ValueError: naming the file, if one is neither polygons nor run lengths of the image.
    """
    if not any(segmentations):
        return None
    size = image["height"], image["width"]
    try:
        masks = [decode_segmentation(s, size) if s else None for s in segmentations]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{path}: a segmentation of the image {image['id']} is neither polygons nor run lengths"
            f" of {size[1]} x {size[0]} pixels ({error})."
        ) from error
    return labels_of_masks(masks, size)


def decode_segmentation(segmentation: list | dict, size: tuple[int, int]) -> np.ndarray:
    """COCO's "segmentation" as a mask, bool (H, W) of a size (H, W)."""
    if isinstance(segmentation, dict):
        if tuple(segmentation["size"]) != size:
            raise ValueError(f"its size is {segmentation['size']}")
        if isinstance(counts := segmentation["counts"], list):
            if sum(counts) != size[0] * size[1]:
                raise ValueError(f"its counts are of {sum(counts)} pixels")
            segmentation = coco_mask.frPyObjects(segmentation, *size)
        return decode_mask(segmentation)
    polygons = [[float(v) for v in polygon] for polygon in segmentation]
    if any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        raise ValueError("a polygon has less than three points or half a one")
    return decode_mask(coco_mask.merge(coco_mask.frPyObjects(polygons, *size)))


def read_coco(path: Path) -> tuple[list[dict], dict[object, list], dict[object, list]]:
    """The images of COCO JSON; names and boxes (x0, y0, x1, y1) by image id; and "segmentation" of
    each of these, None where there is none.

    Raises:
        ValueError: naming the file.
    """
    try:
        content = json.loads(read_text(path))
        names = unique(path, content["categories"], "category", lambda c: str(c["name"]).strip())
        images = unique(path, content["images"], "image", dict)
        for image in images.values():
            image["file_name"], image["height"], image["width"] = (
                str(image["file_name"]), int(image["height"]), int(image["width"]),
            )  # fmt: skip
        annotations = content["annotations"]
        unique(path, [a for a in annotations if "id" in a], "annotation", dict)
        boxes: dict[object, list] = {image: [] for image in images}
        segmentations: dict[object, list] = {image: [] for image in images}
        for a in annotations:
            if a["image_id"] not in images or a["category_id"] not in names:
                raise ValueError(
                    f"the annotation {a.get('id')} is of image {a['image_id']} and category"
                    f" {a['category_id']}, of which one is not in the file"
                )
            boxes[a["image_id"]].append((names[a["category_id"]], box_of(a)))
            segmentations[a["image_id"]].append(a.get("segmentation"))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        lacking = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: is not COCO JSON of boxes ({lacking}).") from error
    except ValueError as error:
        raise ValueError(f"{path}: is not COCO JSON of boxes: {error}.") from error
    corners = [value for objects in boxes.values() for _, box in objects for value in box]
    if corners and max(corners) <= 1:
        raise ValueError(
            f"{path}: no box reaches beyond 1, so they seem to be fractions of the image; expected"
            " pixels: multiply x and width by the image's width, y and height by its height."
        )
    crowds = sum(bool(a.get("iscrowd")) for a in annotations)
    if crowds:
        warn(f"{crowds} boxes are around crowds (iscrowd 1); each is taken as one box.")
    return list(images.values()), boxes, segmentations


def unique(path: Path, entries: list, what: str, value: Callable) -> dict:
    """Values by id.

    Raises:
        ValueError: two entries have one id.
    """
    found = {}
    for entry in entries:
        if entry["id"] in found:
            raise ValueError(
                f"two entries have the {what} id {entry['id']!r}, as when exports are merged; give"
                " each an id of its own"
            )
        found[entry["id"]] = value(entry)
    return found


def box_of(annotation: dict) -> tuple[float, float, float, float]:
    """The box as (x0, y0, x1, y1); Detectron2's "bbox_mode" is heeded."""
    x, y, a, b = map(float, annotation["bbox"])
    mode = int(annotation.get("bbox_mode", XYWH_ABS))
    if mode not in (XYXY_ABS, XYWH_ABS):
        raise ValueError(f"bbox_mode is {mode}, expected 0 (XYXY_ABS) or 1 (XYWH_ABS)")
    return (x, y, a, b) if mode == XYXY_ABS else (x, y, x + a, y + b)


def export_coco(root: Path, split: str, output: Path) -> None:
    """Write a list of a VOC tree as COCO JSON; boxes as x, y, width, height from 0, masks as run
    lengths.

    The ids of categories are those of all names in the tree, so that lists agree on them.
    """
    tree = VocTree(root)
    names = sorted(set().union(*tree.types.values()))
    categories = {name: i for i, name in enumerate(names, start=1)}
    images, annotations = [], []
    for number, name in enumerate(tree.read_list(split), start=1):
        height, width = tree.size(name)
        images.append(
            {
                "id": number,
                "file_name": tree.images[name].relative_to(root).as_posix(),
                "height": height,
                "width": width,
                **({"patient_id": tree.patients[name][0]} if name in tree.patients else {}),
            }
        )
        for obj, mask in zip(tree.annotation(name).objects, tree.masks(name)):
            x0, y0, x1, y1 = obj.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": categories[obj.name],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0) if mask is None else int(mask.sum()),
                    "iscrowd": 0,
                    **({} if mask is None else {"segmentation": encode_mask(mask)}),
                }
            )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for name, i in categories.items()],
    }
    with write_atomically(output) as file:
        json.dump(content, file)
    positive = len({a["image_id"] for a in annotations})
    print(f"{output}: {len(images)} images, {positive} with boxes, {len(annotations)} boxes")


if __name__ == "__main__":
    raise SystemExit(main())
