"""A slice on disk as the input of a Detectron2 model."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from PIL import Image

from .augmentation import build_augmentation, shift_scale_transform
from .dicom import apply_window, read_hu


class IchDatasetMapper:
    """Maps a dataset dict to what ``GeneralizedRCNN`` takes.

    A DICOM slice becomes HU, then one channel per window; an 8-bit image (PNG, JPEG) is taken as
    windowed already. Both then go the same way: grey values 0..255, augmentation, "image",
    "instances", and "image_label".
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        windows: Sequence[tuple[float, float]],
    ):
        """
        Args:
            is_train: annotations become "instances"; without it they are dropped.
            augmentations: applied in this order.
            windows: 1 or 3 pairs (level HU, width HU).

        Raises:
            ValueError: if there are not 1 or 3 windows, or one of them is no pair of numbers.
        """
        if len(windows) not in (1, 3) or any(np.shape(window) != (2,) for window in windows):
            raise ValueError(
                f"INPUT.WINDOWS is {windows}, expected 1 or 3 pairs [level HU, width HU]."
            )
        if any(width <= 0 for _, width in windows):
            raise ValueError(f"INPUT.WINDOWS is {windows}, expected widths above 0 HU.")
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.windows = [(float(level), float(width)) for level, width in windows]

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        return {
            "is_train": is_train,
            "augmentations": build_augmentation(cfg, is_train),
            "windows": cfg.INPUT.WINDOWS,
        }

    def read_image(self, path: str | Path) -> np.ndarray:
        """Reads a slice as grey values.

        Args:
            path: DICOM, or an image of 8 bit.

        Returns:
            uint8 (H, W, C), C the number of windows; 1 for an image of 8 bit.

        Raises:
            ValueError: naming the file, if it cannot be read.
        """
        path = Path(path)
        if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
            return _read_windowed(path)
        hu = read_hu(path)
        # 256 grey levels are finer than a CT's noise, and let Detectron2 resize with the
        # antialiasing that it has for uint8 alone.
        windows = [apply_window(hu, level, width) for level, width in self.windows]
        return np.stack([np.rint(w * 255).astype(np.uint8) for w in windows], axis=-1)

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Args:
            dataset_dict: see ``load_ich_voc``; "shift_scale" (of ``expand_dataset``) is applied
                before the augmentations.

        Returns:
            A copy with "image", float32 (3, H, W) in 0..255, and in training "instances".

        Raises:
            ValueError: naming the file, if it cannot be read.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        image = self.read_image(dataset_dict["file_name"])
        utils.check_image_size(dataset_dict, image)
        annotations = dataset_dict.pop("annotations", None)

        aug_input = T.AugInput(image)
        transforms = T.TransformList([])
        fixed = dataset_dict.pop("shift_scale", None)
        if fixed is not None:
            fixed = shift_scale_transform(image.shape[:2], *fixed)
            aug_input.transform(fixed)
            transforms += fixed
        transforms += self.augmentations(aug_input)
        # OpenCV, which rotates, drops the axis of a single channel.
        image = aug_input.image.reshape(*aug_input.image.shape[:2], -1)
        image = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32))
        # One window fills three channels.
        dataset_dict["image"] = image.expand(3, -1, -1).contiguous()

        if self.is_train and annotations is not None:
            size = tuple(image.shape[1:])
            instances = utils.annotations_to_instances(
                [utils.transform_instance_annotations(a, transforms, size) for a in annotations],
                size,
            )
            dataset_dict["instances"] = utils.filter_empty_instances(instances)
        return dataset_dict


def _read_windowed(path: Path) -> np.ndarray:
    """An 8-bit image as uint8 (H, W, 1); colours become grey.

    Raises:
        ValueError: naming the file, if it cannot be read or has more than 8 bit.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(
                    f"{path} has more than 8 bit (mode {image.mode}), expected an 8-bit image that"
                    " is windowed already; give the DICOM files instead."
                )
        return utils.read_image(str(path), format="L")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}.") from error
