#!/usr/bin/env python
"""COCO JSON to a VOC tree and back.

    python datasets/coco.py import annotations.json images --output data/mine
    python datasets/coco.py export data/mine train --output train.json

A COCO image may name its patient in "patient_id"; without it each image is a patient of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from ich_det2.data.prepare import progress
from ich_det2.data.splits import find_images, read_patients
from ich_det2.data.tree_writer import VocWriter
from ich_det2.data.voc import read_voc
from ich_det2.files import write_atomically


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
    try:
        if args.command == "import":
            import_coco(args.json, args.images, args.output)
        else:
            export_coco(args.root, args.split, args.output)
    except (ValueError, OSError) as error:
        print(f"coco: {error}", file=sys.stderr)
        return 2
    return 0


def import_coco(path: Path, folder: Path, output: Path) -> None:
    """Write a VOC tree.

    Raises:
        ValueError: naming the file, if it is no COCO JSON or names an image outside the folder.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {c["id"]: str(c["name"]).strip() for c in content["categories"]}
        boxes: dict[int, list] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            x, y, w, h = map(float, annotation["bbox"])
            box = (x, y, x + w, y + h)
            boxes[annotation["image_id"]].append((names[annotation["category_id"]], box))
        images = [
            (i, str(i["file_name"]), int(i["height"]), int(i["width"])) for i in content["images"]
        ]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not COCO JSON of boxes ({error!r}).") from error
    root = folder.resolve()
    with VocWriter(output, database="coco") as tree:
        for image, name, height, width in progress(images, "images"):
            source = (root / name).resolve()
            if not source.is_relative_to(root) or not source.is_file():
                raise ValueError(f"{path}: the image '{name}' is not in {folder}.")
            identifier = re.sub(r"[^\w.-]", "_", source.stem)
            if tree.wants(identifier, boxes[image["id"]]):
                tree.add(
                    identifier,
                    source,
                    boxes[image["id"]],
                    size=(height, width),
                    patient=str(image.get("patient_id", identifier)),
                )
        print(f"{output}: {len(tree)} images")


def export_coco(root: Path, split: str, output: Path) -> None:
    """Write a list of a VOC tree as COCO JSON; boxes as x, y, width, height from 0."""
    listed = root / "ImageSets" / "Main" / f"{split}.txt"
    if not listed.is_file():
        raise FileNotFoundError(f"{listed}: no such list.")
    files, patients = find_images(root), read_patients(root)
    images, annotations, categories = [], [], {}
    for number, name in enumerate(listed.read_text().split(), start=1):
        voc = read_voc(root / "Annotations" / f"{name}.xml")
        if name not in files or voc.width is None or voc.height is None:
            raise ValueError(f"{voc.path}: has no size or no image.")
        images.append(
            {
                "id": number,
                "file_name": files[name].relative_to(root).as_posix(),
                "height": voc.height,
                "width": voc.width,
                **({"patient_id": patients[name][0]} if name in patients else {}),
            }
        )
        for obj in voc.objects:
            x0, y0, x1, y1 = obj.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": categories.setdefault(obj.name, len(categories) + 1),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for name, i in categories.items()],
    }
    with write_atomically(output) as file:
        json.dump(content, file)


if __name__ == "__main__":
    raise SystemExit(main())
