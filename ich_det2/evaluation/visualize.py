"""A slice with its boxes and its verdict, for a reader to check.

Sizes: H, W are the slice's rows and columns, M its boxes, G the true ones.
"""

import math
from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .predictions import Predictions

MIN_SIDE = 600
"""A slice whose longer side is shorter, in pixels, is enlarged by a whole factor."""

POSITIVE = (255, 170, 0)
CANDIDATE = (165, 132, 72)
TRUTH = (70, 200, 255)
TEXT = (225, 225, 225)
FAINT = (140, 140, 140)
STRIP = (22, 22, 26)


def draw_overlay(
    image: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: Sequence[str],
    *,
    threshold: float,
    score: float,
    caption: str,
    truth: np.ndarray | None = None,
    masks: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Draws a slice, its boxes, and a strip below it with the verdict.

    True boxes, where given, are drawn thin in their own colour below the predicted ones.

    Boxes at or above the threshold are drawn strong, with label and score; those from half the
    threshold up to it thin and dim. Masks are drawn as the outlines of what is in them.

    Args:
        image: uint8 (H, W, C); the first channel is shown.
        boxes: (M, 4): x0, y0, x1, y1 in pixels of the image.
        scores: (M,).
        labels: M names.
        threshold: of the verdict.
        score: the slice's.
        caption: which slice it is.
        truth: true boxes, (G, 4): x0, y0, x1, y1 in pixels of the image.
        masks: of the boxes, M of bool (H, W); None of a model without.

    Returns:
        uint8 RGB; wider than the image where that is narrow, and higher by the strip.
    """
    grey = np.ascontiguousarray(image[..., 0])
    height, width = grey.shape
    factor = max(1, math.ceil(MIN_SIDE / max(height, width)))
    if factor > 1:
        size = (width * factor, height * factor)
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_CUBIC)
    height, width = grey.shape
    unit = max(1, round(min(height, width) / 450))  # width of a thin line, pixels

    canvas = Image.fromarray(grey).convert("RGB")
    draw = ImageDraw.Draw(canvas)
    if truth is not None:
        for box in np.asarray(truth, dtype=float).reshape(-1, 4) * factor:
            _frame(draw, box, TRUTH, unit)
    order = np.argsort(scores, kind="stable")
    corners = np.asarray(boxes, dtype=float).reshape(-1, 4) * factor
    for i in order:
        if threshold / 2 <= scores[i] < threshold:
            _frame(draw, corners[i], CANDIDATE, unit)
            _outline(draw, masks, i, factor, CANDIDATE, unit)
    found = [i for i in order[::-1] if scores[i] >= threshold]
    for i in reversed(found):
        _frame(draw, corners[i], POSITIVE, 2 * unit)
        _outline(draw, masks, i, factor, POSITIVE, unit)
    taken = [tuple(corners[i]) for i in found]
    for i in found:
        text = f"{labels[i]} {_probability(scores[i], threshold)}"
        taken.append(_write_label(draw, grey, corners[i], text, taken, unit))
    return np.asarray(_add_strip(canvas, score, threshold, caption))


def draw_predictions(
    image: np.ndarray, predictions: Predictions, i: int, threshold: float
) -> np.ndarray:
    """:func:`draw_overlay` of the ``i``-th of stored predictions, with boxes where it has some."""
    boxes = np.zeros((0, 5)) if predictions.boxes is None else predictions.boxes[i]
    truth = None if predictions.true_boxes is None else _corners(predictions.true_boxes[i])
    return draw_overlay(
        image,
        _corners(boxes[:, 1:]),
        boxes[:, 0],
        ["box"] * len(boxes),
        threshold=threshold,
        score=float(predictions.scores[i]),
        caption=f"{predictions.image_ids[i]}   patient {predictions.patients[i]}",
        truth=truth,
    )


def _corners(boxes: np.ndarray) -> np.ndarray:
    return np.c_[boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]


def _frame(draw: ImageDraw.ImageDraw, box, colour, line: int) -> None:
    """A frame around the box, so that the line hides nothing of what is in it."""
    x0, y0, x1, y1 = (round(float(v)) for v in box)
    limit_x, limit_y = draw.im.size
    outer = (
        max(x0 - line, 0),
        max(y0 - line, 0),
        min(x1 + line, limit_x) - 1,
        min(y1 + line, limit_y) - 1,
    )
    if outer[2] >= outer[0] and outer[3] >= outer[1]:
        draw.rectangle(outer, outline=colour, width=line)


def _outline(draw: ImageDraw.ImageDraw, masks, i: int, factor: int, colour, line: int) -> None:
    """The outlines of the i-th mask, on the outermost of its pixels; of holes too."""
    if masks is None:
        return
    mask = np.kron(masks[i].astype(np.uint8), np.ones((factor, factor), np.uint8))
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for contour in contours:
        points = [tuple(map(int, point)) for point in contour[:, 0]]
        draw.line([*points, points[0]], fill=colour, width=line)


def _write_label(draw, grey, box, text, taken, unit):
    """Writes beside the box, where it hides no other box and little tissue; returns the place."""
    font = _font(14 + 5 * (unit - 1))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad, gap = 3 * unit, 3 * unit
    w, h = round(right - left) + 2 * pad, round(bottom - top) + 2 * pad
    x0, y0, x1, y1 = box
    places = [
        (x0, y0 - h - gap),
        (x0, y1 + gap),
        (x1 + gap, y0),
        (x0 - w - gap, y0),
        (x1 - w, y0 - h - gap),
        (x1 - w, y1 + gap),
        (x1 + gap, y1 - h),
        (x0 - w - gap, y1 - h),
    ]
    limit_y, limit_x = grey.shape
    places = [
        (round(max(min(x, limit_x - w), 0)), round(max(min(y, limit_y - h), 0))) for x, y in places
    ]
    hidden = [
        sum(_overlap((x, y, x + w, y + h), other) for other in taken)
        + grey[y : y + h, x : x + w].sum() / 255
        for x, y in places
    ]
    x, y = places[int(np.argmin(hidden))]
    draw.rectangle((x, y, x + w - 1, y + h - 1), fill=STRIP)
    draw.text((x + pad - left, y + pad - top), text, font=font, fill=POSITIVE)
    return (x, y, x + w, y + h)


def _overlap(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _add_strip(canvas: Image.Image, score: float, threshold: float, caption: str) -> Image.Image:
    size = max(13, round(min(canvas.size) / 46))
    font, small = _font(size), _font(round(size * 0.8))
    positive = score >= threshold
    verdict = "POSITIVE" if positive else "NEGATIVE"
    numbers = f"score {_probability(score, threshold)}   threshold {_threshold(threshold)}"
    notice = "research only, not for clinical use"
    pad = round(size * 0.7)
    first = font.getlength(f"{verdict}   {numbers}")
    second = small.getlength(f"{caption}   {notice}")
    width = max(canvas.width, math.ceil(max(first, second)) + 2 * pad)
    line = round(size * 1.35)
    out = Image.new("RGB", (width, canvas.height + 2 * line + 2 * pad), STRIP)
    out.paste(canvas, ((width - canvas.width) // 2, 0))
    draw = ImageDraw.Draw(out)
    y = canvas.height + pad + size
    draw.text((pad, y), verdict, font=font, fill=POSITIVE if positive else TEXT, anchor="ls")
    x = pad + font.getlength(f"{verdict}   ")
    draw.text((x, y), numbers, font=font, fill=TEXT, anchor="ls")
    draw.text((pad, y + line), caption, font=small, fill=TEXT, anchor="ls")
    draw.text((width - pad, y + line), notice, font=small, fill=FAINT, anchor="rs")
    return out


def _probability(score: float, threshold: float) -> str:
    """Two decimals, or as many as tell a score from the threshold that it is below."""
    for digits in (2, 3, 4):
        text = f"{score:.{digits}f}"
        # As a reader compares it: with the threshold that is shown.
        if (float(text) >= float(_threshold(threshold))) == (score >= threshold):
            return text
    return f"{score:.7f}"


def _threshold(threshold: float) -> str:
    """Three significant digits, of which trailing zeros are left out."""
    return f"{threshold:.3g}"


@cache
def _font(size: int):
    return ImageFont.load_default(size=size)
