"""Decoded slices on disk, so that a compressed series is decoded once and not in every epoch."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np

from ..files import write_atomically

logger = logging.getLogger(__name__)

_VERSION = 1
"""Raise it when the same file is read to other HU."""


class SliceCache:
    """A folder of arrays, each named by a digest of all that it depends on.

    A source that changed asks for another name, so nothing stale is ever found. Files appear whole
    (written beside their place and renamed), so workers and machines may share a folder: at worst
    two decode the same slice. A damaged file is decoded anew. Names hold no identity, but the
    arrays are as confidential as the images. Nothing is ever deleted; remove the folder to free
    its space (half a MiB for a slice of 512 x 512).
    """

    def __init__(self, folder: str | os.PathLike):
        """
        Args:
            folder: made when the first slice is kept.
        """
        self.folder = Path(folder)
        self._writable = True

    def get(self, key: tuple[Hashable, ...], make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of a key, made where it is not there yet.

        Args:
            key: all that the array depends on: path, size and modification time of the source, SOP
                Instance UID, frame.
            make: returns float32 HU (H, W); called if need be.

        Returns:
            float32 (H, W), fresh memory.
        """
        digest = hashlib.sha256(repr((_VERSION, *key)).encode()).hexdigest()
        path = self.folder / digest[:2] / f"{digest}.npy"
        try:
            return np.load(path, allow_pickle=False).astype(np.float32, copy=False)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, EOFError):
            logger.warning("%s is damaged, its slice is decoded anew.", path)
        hu = make()
        if self._writable:
            self._keep(path, hu)
        return hu

    def _keep(self, path: Path, hu: np.ndarray) -> None:
        # Whole HU fit 16 bits, half of float32.
        small = hu.astype(np.int16)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(path, "wb") as file:
                np.save(file, small if np.array_equal(small, hu) else hu)
        except OSError as error:
            self._writable = False
            logger.warning(
                "INPUT.CACHE_DIR %s cannot be written (%s): slices are decoded each time.",
                self.folder,
                error.strerror,
            )
