"""The crop of slices to the head: one for a series, so that the head does not jump.

H, W are a slice's rows and columns. Boxes and crops are x0, y0, x1, y1: edges of pixels, 0-based.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from .dicom import pixel_ratio, read_windowed
from .head import Head, find_head
from .inspection import WINDOW
from .pictures import is_picture, read_picture
from .tree import VocTree

logger = logging.getLogger(__name__)

Entry = tuple[str, int | None]
"""A file, and its 0-based frame if it holds several."""
Box = tuple[int, int, int, int]

MARGIN = 0.04
"""Of the head's longer side, on each side of it."""


def crop_to(heads: Sequence[Head]) -> Box:
    """The crop that holds the heads of all slices of a series, with a margin.

    It is square in millimetres. Where it would reach beyond the image it is moved into it, and
    where it is larger than the image it is cut.

    Args:
        heads: one or more, of slices of one size and ratio.
    """
    # At the vertex the largest part may be the couch, which lies beside the head of other slices.
    x0, y0, x1, y1 = max(heads, key=lambda head: head.area).box
    boxes = np.array([head.box for head in heads])
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    boxes = boxes[(x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)]
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    (height, width), pixel = heads[0].size, np.array([1, heads[0].ratio])
    side = ((high - low) * pixel).max() * (1 + 2 * MARGIN)
    image = np.array([width, height])
    sides = np.minimum(np.ceil(side / pixel), image)
    start = np.clip(np.floor((low + high - sides) / 2), 0, image - sides)
    left, top, right, bottom = map(int, [*start, *(start + sides)])
    return left, top, right, bottom


def find_crops(series: Iterable[Sequence[Entry]]) -> dict[Entry, Box]:
    """The crop of each slice: that of its series, of slices of its size.

    Each file is read once, and in this process not again as long as it stays as it is. One that
    cannot be read, or shows no head, has no say.

    Args:
        series: the slices of each.

    Returns:
        Crops by slice; slices of a series without any head are left out.
    """
    crops: dict[Entry, Box] = {}
    with ThreadPoolExecutor(max_workers=4) as pool:
        for entries in series:
            kinds: dict[tuple, list[tuple[Entry, Head | None]]] = defaultdict(list)
            for entry, (head, kind) in zip(entries, pool.map(_look, entries), strict=True):
                kinds[kind].append((entry, head))
            for members in kinds.values():
                if heads := [head for _, head in members if head is not None]:
                    crops |= dict.fromkeys((entry for entry, _ in members), crop_to(heads))
    return crops


def find_tree_crops(tree: VocTree, images: Sequence[str]) -> dict[str, Box]:
    """The crops of images of a VOC tree by image id: of their whole series, whatever its lists.

    An image of which no series is known is cropped by itself; one of a series without any head is
    left out.
    """
    start, wanted = time.perf_counter(), set(images)
    series = [part for members, _ in tree.series() for part in _parts(tree, members)]
    series = [members for members in series if wanted & set(members)]
    known = {image for members in series for image in members}
    series += [[image] for image in sorted(wanted - known)]
    ids: dict[Entry, str] = {(os.fspath(tree.images[i]), None): i for s in series for i in s}
    entries = {image: entry for entry, image in ids.items()}
    found = find_crops([[entries[image] for image in members] for members in series])
    crops = {ids[entry]: crop for entry, crop in found.items() if ids[entry] in wanted}
    logger.info(
        "INPUT.HEAD_CROP: looked for the head in %d slices of %d series in %.1f s; %d of %d images"
        " are cropped.",
        *(len(ids), len(series), time.perf_counter() - start, len(crops), len(wanted)),
    )
    return crops


def uncrop(inputs: Sequence[dict], outputs: Sequence[dict]) -> Sequence[dict]:
    """Maps boxes and masks that a model found on cropped slices back to the slices.

    Args:
        inputs: of the mapper: "height" and "width" of the whole slice, and perhaps "crop".
        outputs: of the model, whose "instances" are scaled to that height and width.

    Returns:
        The outputs, changed in place.
    """
    for item, output in zip(inputs, outputs, strict=True):
        if item.get("crop") is None or "instances" not in output:
            continue
        x0, y0, x1, y1 = item["crop"]
        instances = output["instances"]
        boxes = instances.pred_boxes
        scale = boxes.tensor.new_tensor([(x1 - x0) / item["width"], (y1 - y0) / item["height"]] * 2)
        boxes.tensor = boxes.tensor * scale + boxes.tensor.new_tensor([x0, y0] * 2)
        if instances.has("pred_masks"):
            whole = torch.zeros_like(instances.pred_masks)
            for mask, place in zip(instances.pred_masks, whole):
                values, size = mask[None, None].float(), (y1 - y0, x1 - x0)
                shrunk = F.interpolate(values, size, mode="bilinear", antialias=True)
                place[y0:y1, x0:x1] = shrunk[0, 0] >= 0.5
            instances.pred_masks = whole
    return outputs


def _parts(tree: VocTree, members: Sequence[str]) -> list[list[str]]:
    """A series as a diagnosis has it, where pictures without a position are a series apart."""
    parts: dict[bool, list[str]] = defaultdict(list)
    for image in members:
        by_table = is_picture(tree.images[image])
        parts[by_table and math.isnan(tree.places[image][1])].append(image)
    return list(parts.values())


def _look(entry: Entry) -> tuple[Head | None, tuple]:
    """The head of a slice; and size and ratio, which slices with one crop share."""
    try:
        stat = os.stat(entry[0])
        return _find(*entry, stat.st_mtime_ns, stat.st_size)
    except Exception:  # decoders answer damage with many kinds of errors, and it is said elsewhere
        return None, ()


@lru_cache(maxsize=1 << 17)
def _find(path: str, frame: int | None, *version: int) -> tuple[Head | None, tuple]:
    if is_picture(path):
        grey, ratio = read_picture(path), 1.0
    else:
        image, spacing_mm = read_windowed(Path(path), [WINDOW], frame)
        grey, ratio = image[..., 0], pixel_ratio(spacing_mm)
    return find_head(grey, ratio), (grey.shape, ratio)
