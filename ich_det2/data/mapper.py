"""A slice on disk as the input of a Detectron2 model."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Instances

from .augmentation import build_augmentation, shift_scale_transform
from .cache import SliceCache
from .dicom import pixel_ratio, read_windowed
from .head import asymmetry_picture, density_picture, find_skull
from .inspection import WINDOW
from .pictures import is_picture, read_picture


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
        context_slices: int = 0,
        sequence_slices: int = 0,
        scan_slices: int = 0,
        skull_mask: bool = False,
        density: bool = False,
        asymmetry: bool = False,
        masks: bool = False,
        cache_dir: str | Path = "",
    ):
        """
        Args:
            is_train: annotations become "instances"; without it they are dropped.
            augmentations: applied in this order.
            windows: 1 or 3 pairs (level HU, width HU).
            context_slices: slices on either side that are channels of their own, with the slice
                itself in the middle.
            sequence_slices: slices on either side that "sequence" holds, with the slice itself.
            scan_slices: slices that "scan" holds.
            skull_mask: blank what lies outside of the skull, see :func:`find_skull`.
            density: the second of the three channels is :func:`density_picture`.
            asymmetry: the third of the three channels is :func:`asymmetry_picture`.
            masks: in training "instances" have "gt_masks" and "gt_has_mask", bool (M,), where there
                is a box: one whose mask is not known has an empty one, which teaches no mask.
            cache_dir: of a :class:`SliceCache`; "" for none.

        Raises:
            ValueError: if there are not 1 or 3 windows, or one of them is no pair of numbers, or
                context is asked of several windows or beside a sequence.
        """
        if len(windows) not in (1, 3) or any(np.shape(window) != (2,) for window in windows):
            raise ValueError(
                f"INPUT.WINDOWS is {windows}, expected 1 or 3 pairs [level HU, width HU]."
            )
        if any(width <= 0 for _, width in windows):
            raise ValueError(f"INPUT.WINDOWS is {windows}, expected widths above 0 HU.")
        if context_slices < 0 or context_slices and len(windows) != 1:
            raise ValueError(
                f"INPUT.CONTEXT_SLICES is {context_slices} with {len(windows)} windows, expected 0,"
                " or more with one window: a slice is a channel."
            )
        for key, asked in (("DENSITY", density), ("ASYMMETRY", asymmetry)):
            if asked and (len(windows) != 1 or context_slices):
                raise ValueError(
                    f"INPUT.{key} is True with {len(windows)} windows and INPUT.CONTEXT_SLICES"
                    f" {context_slices}, expected one window and 0: there are three channels."
                )
        if sequence_slices < 0 or context_slices and sequence_slices:
            raise ValueError(
                f"INPUT.SEQUENCE_SLICES is {sequence_slices} with INPUT.CONTEXT_SLICES"
                f" {context_slices}, expected 0 or more, and one of the two at most."
            )
        if scan_slices < 0 or scan_slices and (context_slices or sequence_slices):
            raise ValueError(
                f"INPUT.SCAN_SLICES is {scan_slices} with INPUT.CONTEXT_SLICES {context_slices} and"
                f" INPUT.SEQUENCE_SLICES {sequence_slices}, expected 0 or more, and one of the"
                " three at most."
            )
        self.is_train = is_train
        self.scan_slices = scan_slices
        self._scans: dict[tuple, torch.Tensor] = {}
        self.sequence_slices = sequence_slices
        self.context_slices = context_slices
        self.skull_mask = skull_mask
        self.density = density
        self.asymmetry = asymmetry
        self.masks = masks
        self.cache = SliceCache(cache_dir) if cache_dir else None
        self.augmentations = T.AugmentationList(augmentations)
        self.windows = [(float(level), float(width)) for level, width in windows]

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        return {
            "is_train": is_train,
            "augmentations": build_augmentation(cfg, is_train),
            "windows": cfg.INPUT.WINDOWS,
            "context_slices": cfg.INPUT.CONTEXT_SLICES,
            "sequence_slices": cfg.INPUT.SEQUENCE_SLICES,
            "scan_slices": cfg.INPUT.SCAN_SLICES,
            "skull_mask": cfg.INPUT.SKULL_MASK,
            "density": cfg.INPUT.DENSITY,
            "asymmetry": cfg.INPUT.ASYMMETRY,
            "masks": cfg.INPUT.MASK_FORMAT == "bitmask",
            "cache_dir": cfg.INPUT.CACHE_DIR,
        }

    def read_image(self, path: str | Path, frame: int | None = None) -> np.ndarray:
        """Reads a slice as grey values.

        Args:
            path: DICOM, or an image of 8 bit.
            frame: 0-based, of a DICOM file of several frames.

        Returns:
            uint8 (H, W, C), C the number of windows; 1 for an image of 8 bit.

        Raises:
            ValueError: naming the file, if it cannot be read.
        """
        return self._read_slice(path, frame)[0]

    def _read_slice(
        self, path: str | Path, frame: int | None
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """A slice as grey values (H, W, C); in a brain window, (H, W), if that is asked for; and
        the height of its pixels over their width."""
        path = Path(path)
        if is_picture(path):
            image = read_picture(path)
            return image[..., None], image, 1.0
        windows = [*self.windows, WINDOW] if self._needs_skull else self.windows
        image, spacing_mm = read_windowed(path, windows, frame, cache=self.cache)
        return image[..., : len(self.windows)], image[..., -1], pixel_ratio(spacing_mm)

    @property
    def _needs_skull(self) -> bool:
        return self.skull_mask or self.density or self.asymmetry

    def _read_channels(self, path: str | Path, frame: int | None) -> tuple[np.ndarray, float]:
        """A slice as the network's channels, and the height of its pixels over their width."""
        image, brain, ratio = self._read_slice(path, frame)
        skull = find_skull(brain) if self._needs_skull else None
        if self.density or self.asymmetry:
            channels = [image[..., 0]] * 3
            if self.density:
                channels[1] = density_picture(brain, skull)
            if self.asymmetry:
                channels[2] = asymmetry_picture(brain, skull, ratio)
            image = np.stack(channels, axis=-1)
        if self.skull_mask and skull is not None:
            image = image * skull[..., None]
        return image, ratio

    def _read_context(self, dataset_dict: dict, image: np.ndarray) -> list[np.ndarray]:
        """The slices before a slice, uint8 (H, W, C), itself, and the slices after it; none if
        nobody asks for them."""
        reach = self.context_slices or self.sequence_slices
        if not reach:
            return []
        files = dataset_dict.pop("context_files", None)
        if files is None or len(files) != 2 * reach + 1:
            key = "CONTEXT_SLICES" if self.context_slices else "SEQUENCE_SLICES"
            raise ValueError(
                f"{dataset_dict['file_name']}: INPUT.{key} is {reach}, but it is not known which"
                " slices are its neighbours: give DICOM with Image Position (Patient), or pictures"
                " in a VOC tree whose patients.csv has the column position_mm, and register them by"
                f" register_ich_voc(..., context={reach})."
            )
        slices = [image] * len(files)
        for i, (path, frame) in enumerate(files):
            if (str(path), frame) != (dataset_dict["file_name"], dataset_dict.get("frame")):
                beside, _ = self._read_channels(path, frame)
                if beside.shape == image.shape:
                    slices[i] = beside
        return slices

    def _map_scan(
        self, dataset_dict: dict, size: tuple[int, int], transforms: T.TransformList
    ) -> torch.Tensor:
        """The slices of a scan, float32 (scan_slices, 3, H, W), transformed alike. One of another
        size (H, W) than the transformed slice was is scaled to it."""
        files = dataset_dict.pop("scan_files", None)
        if files is None or len(files) != self.scan_slices:
            raise ValueError(
                f"{dataset_dict['file_name']}: INPUT.SCAN_SLICES is {self.scan_slices}, but it is"
                " not known of which scan it is: give DICOM with Image Position (Patient), or"
                " pictures in a VOC tree whose patients.csv has the column position_mm, and"
                f" register them by register_ich_voc(..., scan={self.scan_slices})."
            )
        # The slices of a scan ask for it one after another, and a file may change in between.
        stats = [os.stat(path) for path, _ in files]
        versions = ((str(path), frame) for path, frame in files)
        crop = dataset_dict.get("crop")
        key = (*versions, *((s.st_mtime_ns, s.st_size) for s in stats), size, crop and tuple(crop))
        scan = None if self.is_train else self._scans.get(key)
        if scan is None:
            slices = {}
            for path, frame in files:
                if (path, frame) not in slices:
                    image, _ = self._read_channels(path, frame)
                    if image.shape[:2] != size:
                        image = T.ResizeTransform(*image.shape[:2], *size).apply_image(image)
                    slices[path, frame] = _as_tensor(transforms.apply_image(image))
            scan = torch.stack([slices[path, frame] for path, frame in files])
        if not self.is_train:
            self._scans = {key: scan}
        return scan

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Args:
            dataset_dict: see ``load_ich_voc``; "frame" may name a frame of a DICOM file of
                several; "crop" (of ``find_crops``), of which all else sees no more than is in it,
                and "shift_scale" (of ``expand_dataset``) are applied before the augmentations.

        Returns:
            A copy with "image", float32 (3, H, W) in 0..255, or (2 ``context_slices`` + 1, H, W),
            the slices before, itself and those after; with ``sequence_slices`` "sequence", float32
            (2 ``sequence_slices`` + 1, 3, H, W); with ``scan_slices`` "scan", float32
            (``scan_slices``, 3, H, W); all slices are transformed alike. In training "instances".
            "height" and "width" are those of the whole slice, to which ``uncrop`` maps boxes back.

        Raises:
            ValueError: naming the file, if it cannot be read.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        image, ratio = self._read_channels(dataset_dict["file_name"], dataset_dict.get("frame"))
        utils.check_image_size(dataset_dict, image)
        context = self._read_context(dataset_dict, image)
        annotations = dataset_dict.pop("annotations", None)

        aug_input = T.AugInput(image)
        transforms = T.TransformList([])
        if (crop := dataset_dict.get("crop")) is not None:
            x0, y0, x1, y1 = crop
            cut = T.CropTransform(x0, y0, x1 - x0, y1 - y0)
            aug_input.transform(cut)
            transforms += cut
        height, width = aug_input.image.shape[:2]
        if (square_height := round(height * ratio)) != height:
            # As round as the head is; a detector's boxes are scaled back along each axis.
            square = T.ResizeTransform(height, width, square_height, width)
            aug_input.transform(square)
            transforms += square
        fixed = dataset_dict.pop("shift_scale", None)
        if fixed is not None:
            fixed = shift_scale_transform(aug_input.image.shape[:2], *fixed)
            aug_input.transform(fixed)
            transforms += fixed
        transforms += self.augmentations(aug_input)
        middle = dataset_dict["image"] = _as_tensor(aug_input.image)
        slices = [middle if s is image else _as_tensor(transforms.apply_image(s)) for s in context]
        if self.sequence_slices:
            dataset_dict["sequence"] = torch.stack(slices)
        elif self.context_slices:
            dataset_dict["image"] = torch.cat([s[:1] for s in slices])
        if self.scan_slices:
            dataset_dict["scan"] = self._map_scan(dataset_dict, image.shape[:2], transforms)

        if self.is_train and annotations is not None:
            dataset_dict["instances"] = self._instances(
                annotations, transforms, tuple(dataset_dict["image"].shape[1:])
            )
        return dataset_dict

    def _instances(
        self, annotations: list[dict], transforms: T.TransformList, size: tuple[int, int]
    ) -> Instances:
        """What is left of the annotations in a transformed slice of a size (H, W)."""
        masks = [a.pop("segmentation", None) for a in annotations]
        known = [self.masks and bool(mask) for mask in masks]
        for a, mask, is_known in zip(annotations, masks, known):
            if is_known:
                a["segmentation"] = mask
            utils.transform_instance_annotations(a, transforms, size)
            if self.masks and not is_known:
                a["segmentation"] = np.zeros(size, dtype=np.uint8)
        instances = utils.annotations_to_instances(annotations, size, mask_format="bitmask")
        keep = instances.gt_boxes.nonempty(threshold=1e-5)
        if self.masks and annotations:
            instances.gt_has_mask = torch.tensor(known)
            # Of a lesion that has left the slice a corner of the turned box may be left.
            keep &= instances.gt_masks.nonempty() | ~instances.gt_has_mask
        return instances[keep]


def _as_tensor(image: np.ndarray) -> torch.Tensor:
    """From (H, W) or (H, W, C), C 1 or 3, to float32 (3, H, W)."""
    # OpenCV, which rotates, drops the axis of a single channel.
    image = image.reshape(*image.shape[:2], -1).transpose(2, 0, 1).astype(np.float32)
    # One window fills three channels.
    return torch.from_numpy(image).expand(3, -1, -1).contiguous()
