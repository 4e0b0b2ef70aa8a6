"""Augmentation of slices: drawn anew each time, or the paper's fixed expansion."""

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data import transforms as T
from PIL import Image


def build_augmentation(cfg, is_train: bool) -> list[T.Augmentation]:
    """What moves and changes a slice in training, then the resize to the network's input.

    Args:
        cfg: reads ``INPUT.AUG``, ``INPUT.MIN_SIZE_*``, ``INPUT.MAX_SIZE_*``, ``INPUT.RANDOM_FLIP``.
        is_train: without it there is only the resize.
    """
    if not is_train:
        return [T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)]
    augs = []
    shift, scale = cfg.INPUT.AUG.SHIFT, cfg.INPUT.AUG.SCALE
    if shift > 0 or scale > 0:
        augs.append(RandomShiftScale(shift, scale))
    if cfg.INPUT.AUG.ROTATE > 0:
        augs.append(T.RandomRotation([-cfg.INPUT.AUG.ROTATE, cfg.INPUT.AUG.ROTATE], expand=False))
    if cfg.INPUT.AUG.JITTER > 0:
        low, high = 1 - cfg.INPUT.AUG.JITTER, 1 + cfg.INPUT.AUG.JITTER
        augs += [T.RandomContrast(low, high), T.RandomBrightness(low, high)]
    augs.append(
        T.ResizeShortestEdge(
            cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        )
    )
    if cfg.INPUT.RANDOM_FLIP != "none":
        augs.append(
            T.RandomFlip(
                horizontal=cfg.INPUT.RANDOM_FLIP == "horizontal",
                vertical=cfg.INPUT.RANDOM_FLIP == "vertical",
            )
        )
    return augs


class RandomShiftScale(T.Augmentation):
    """Moves and scales a slice on a canvas of its own size; what comes in is air (0)."""

    def __init__(self, shift: float, scale: float):
        """
        Args:
            shift: at most this fraction of the width and height to either side.
            scale: a factor drawn from [1 / (1 + scale), 1 + scale], log-uniform.
        """
        super().__init__()
        self.shift, self.scale = shift, scale

    def get_transform(self, image: np.ndarray) -> T.Transform:
        draws = np.random.uniform(-1, 1, size=3)
        return shift_scale_transform(image.shape[:2], *_from_draws(draws, self.shift, self.scale))


def shift_scale_transform(
    image_size: tuple[int, int], shift_x: float, shift_y: float, scale: float
) -> T.Transform:
    """The transform that moves an image's content and scales it about its centre.

    Args:
        image_size: (H, W) in pixels; the output has the same size.
        shift_x, shift_y: fraction of the width and height, to the right and down.
        scale: larger than 1 enlarges.
    """
    h, w = image_size
    cx, cy = w * (0.5 - shift_x / scale), h * (0.5 - shift_y / scale)
    half_w, half_h = w / (2 * scale), h / (2 * scale)
    return _ExtentTransform((cx - half_w, cy - half_h, cx + half_w, cy + half_h), (h, w))


class _ExtentTransform(T.ExtentTransform):
    """Detectron2's transform by OpenCV, a tenth of Pillow's time and most of a mapper's."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        h, w = self.output_size
        x0, y0, x1, y1 = self.src_rect
        step_x, step_y = (x1 - x0) / w, (y1 - y0) / h
        # From the output to the input, between centres of pixels, which OpenCV counts from 0.
        matrix = np.array([[step_x, 0, x0 + step_x / 2 - 0.5], [0, step_y, y0 + step_y / 2 - 0.5]])
        nearest = (self.interp if interp is None else interp) == Image.NEAREST
        flags = (cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR) | cv2.WARP_INVERSE_MAP
        moved = cv2.warpAffine(img, matrix, (w, h), flags=flags)
        return moved.reshape(h, w, *img.shape[2:])  # OpenCV drops the axis of a single channel


def expand_dataset(
    dicts: Sequence[dict], factor: int, *, shift: float, scale: float, seed: int = 0
) -> list[dict]:
    """The paper's fixed expansion: each image stands ``factor`` times, moved and scaled.

    The first copy is untouched; the others carry ``shift_scale`` = (shift_x, shift_y, scale),
    drawn once, which the mapper applies. The same seed draws the same whatever the order.

    Args:
        dicts: dataset dicts.
        factor: copies of each image, >= 1; the paper's is 4.
        shift: see :class:`RandomShiftScale`.
        scale: see :class:`RandomShiftScale`.
        seed: of the draws.

    Raises:
        ValueError: if factor is smaller than 1.
    """
    if factor < 1:
        raise ValueError(f"INPUT.AUG.EXPAND must be a whole number >= 1, got {factor}.")
    out = []
    for d in dicts:
        out.append(d)
        rng = np.random.default_rng([seed, *str(d["image_id"]).encode()])
        for draws in rng.uniform(-1, 1, size=(factor - 1, 3)):
            out.append({**d, "shift_scale": _from_draws(draws, shift, scale)})
    return out


def _from_draws(draws: np.ndarray, shift: float, scale: float) -> tuple[float, float, float]:
    """Three draws in [-1, 1] as (shift_x, shift_y, scale factor)."""
    return (
        float(draws[0]) * shift,
        float(draws[1]) * shift,
        float(np.exp(draws[2] * np.log1p(scale))),
    )
