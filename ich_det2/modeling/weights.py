"""Weights as paths: ``timm://NAME``, ``torchvision://NAME`` (ImageNet), ``zoo://NAME``.

Importing this module registers them in Detectron2's PathManager, so that its own checkpointer
takes them too, as in ``MODEL.WEIGHTS timm://resnet50.a1_in1k``.
"""

from pathlib import Path
from types import ModuleType
from urllib.parse import quote

import timm
import torch
import torchvision
from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import get_cache_dir

from ..files import write_atomically
from ..zoo import PREFIX, weights
from .backbone import timm_backbone, torchvision_weights


class LibraryHandler(PathHandler):
    """Weights of a library's networks, by name, as checkpoints in iopath's cache."""

    def __init__(self, library: ModuleType, source: ModuleType):
        """
        Args:
            library: its name stands before "://"; each version has files of its own.
            source: offers ``pretrained_checkpoint(name)``, what ``DetectionCheckpointer`` takes,
                of tensors and plain values, and ``library_file(name)``, where the library keeps its
                own, or None where that is not known.
        """
        super().__init__()
        self.prefix = f"{library.__name__}://"
        self._library, self._source = library, source

    def _get_supported_prefixes(self) -> list[str]:
        return [self.prefix]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        self._check_kwargs(kwargs)
        name, library = path.removeprefix(self.prefix), self._library
        folder = Path(get_cache_dir(), "ich_det2", library.__name__)
        cached = folder / f"{quote(name, safe='')}-{library.__version__}.pth"
        if force or not _is_current(cached, self._source.library_file(name)):
            checkpoint = self._source.pretrained_checkpoint(name)
            folder.mkdir(parents=True, exist_ok=True)
            with write_atomically(cached, "wb") as file:
                torch.save(checkpoint, file)
        return str(cached)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return open(self._get_local_path(path, **kwargs), mode, buffering)


def _is_current(cached: Path, original: Path | None) -> bool:
    if not cached.is_file() or original is None:
        return cached.is_file()
    return original.is_file() and original.stat().st_mtime <= cached.stat().st_mtime


class ZooHandler(PathHandler):
    """Weights of a model that comes with the package (:mod:`ich_det2.zoo`), to fine-tune from."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        self._check_kwargs(kwargs)
        return str(weights(path))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return open(self._get_local_path(path, **kwargs), mode, buffering)


HANDLERS = (
    LibraryHandler(timm, timm_backbone),
    LibraryHandler(torchvision, torchvision_weights),
)
for _handler in (*HANDLERS, ZooHandler()):
    PathManager.register_handler(_handler, allow_override=True)

LIBRARY_PREFIXES = tuple(handler.prefix for handler in HANDLERS)
"""What a path begins with that names weights for a backbone or classifier, not a whole detector."""
