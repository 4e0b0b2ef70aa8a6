"""Checkpoints that cannot run code when loaded, and are written whole or not at all."""

import pickle
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from ..files import write_atomically
from ..modeling.backbone.timm_backbone import CLASSIFIER_HEAD, STATE_PREFIXES, pretrained_state_dict
from ..modeling.backbone.torchvision_weights import pretrained_checkpoint

TIMM_PREFIX = "timm://"
TORCHVISION_PREFIX = "torchvision://"
LIBRARY_PREFIXES = (TIMM_PREFIX, TORCHVISION_PREFIX)

LAST_CHECKPOINT = "last_checkpoint"
"""The file of OUTPUT_DIR in which fvcore's Checkpointer notes what --resume goes on from."""

# What a pickle of numpy arrays (Detectron2's model zoo) is made of, and nothing else.
_SAFE_GLOBALS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
}


class _NumpyUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _SAFE_GLOBALS:
            raise pickle.UnpicklingError(f"it holds '{module}.{name}'")
        return super().find_class(module, name)


def load_tensors(path: str | Path) -> dict:
    """A file of ``torch.save`` on the CPU, if it holds tensors and plain values only.

    Raises:
        ValueError: if it holds anything else, or is no such file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no checkpoint of tensors and plain values: {str(error).splitlines()[0]}"
        ) from error


class IchCheckpointer(DetectionCheckpointer):
    """:class:`DetectionCheckpointer` that loads only tensors, and takes libraries' weights.

    ``timm://NAME`` are the ImageNet weights of a timm network, for :class:`TimmBackbone` and for
    :class:`ImageClassifier`, ``torchvision://NAME`` those of VGG16, Inception V3 and ResNet50 for
    backbone and head.
    """

    def load(self, path: str, *args, **kwargs) -> dict:
        """As :meth:`DetectionCheckpointer.load`.

        Raises:
            ValueError: if the file holds anything but tensors, arrays and plain values, or a
                library's weights cannot be had or are another network's.
        """
        if not path.startswith(LIBRARY_PREFIXES):
            return super().load(path, *args, **kwargs)
        path = path.partition("?")[0]  # names of a library's layers need no heuristics
        self.logger.info(f"[IchCheckpointer] Loading from {path} ...")
        if path.startswith(TORCHVISION_PREFIX):
            self._load_torchvision(path)
            return {}
        state = pretrained_state_dict(path[len(TIMM_PREFIX) :])
        shapes = {key: value.shape for key, value in self.model.state_dict().items()}
        # A backbone has none of the layers behind its last map, a classifier its own last one.
        state = {
            prefix + key: value
            for prefix in STATE_PREFIXES
            for key, value in state.items()
            if shapes.get(prefix + key) == value.shape
        }
        missing = [
            key
            for key in shapes
            if key.startswith(STATE_PREFIXES)
            and not key.endswith("tracked")
            and not key.startswith(CLASSIFIER_HEAD)
            and key not in state
        ]
        if missing or not state:
            raise ValueError(
                f"MODEL.WEIGHTS is '{path}', but the model is another network; set MODEL.TIMM.NAME"
                " (of a classifier MODEL.CLASSIFIER.NAME) to the same."
            )
        self._log_incompatible_keys(self._load_model({"model": state}))
        return {}

    def _load_torchvision(self, path: str) -> None:
        network = path[len(TORCHVISION_PREFIX) :]
        incompatible = self._load_model(pretrained_checkpoint(network))
        lost = [key for key, *_ in incompatible.incorrect_shapes] + incompatible.missing_keys
        # An FPN's own layers are in no classifier.
        lost = [k for k in lost if k.startswith("backbone.") and not k.startswith("backbone.fpn_")]
        if lost:
            raise ValueError(
                f"MODEL.WEIGHTS is '{path}', but the model's backbone is another network, with"
                f" '{lost[0]}'; set MODEL.BACKBONE.NAME to the same."
            )
        self._log_incompatible_keys(incompatible)

    def _load_file(self, filename: str) -> dict:
        if filename.endswith(".pkl"):
            with PathManager.open(filename, "rb") as f:
                try:
                    _NumpyUnpickler(f, encoding="latin1").load()
                except (pickle.UnpicklingError, EOFError, ValueError) as error:
                    raise ValueError(
                        f"{filename} is no pickle of numpy arrays alone ({error}); it is not"
                        " loaded, since it could run code."
                    ) from error
        return super()._load_file(filename)

    def _load_model(self, checkpoint: dict):
        incompatible = super()._load_model(checkpoint)
        # Stock Detectron2 has no ratio k; it starts at its first value. A norm's count of batches
        # is not used.
        ours = ("anchor_sampler._ratio", "num_batches_tracked")
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if not key.endswith(ours)]
        return incompatible

    def _torch_load(self, f: str) -> dict:
        return load_tensors(f)

    def save(self, name: str, *, tag_last: bool = True, **kwargs) -> None:
        """As ``Checkpointer.save``, but atomic, which fvcore's is not.

        Args:
            name: file name without suffix.
            tag_last: whether ``--resume`` goes on from this file.
            kwargs: further plain values to save.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), **kwargs}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info(f"Saving checkpoint to {path}")
        with write_atomically(path, "wb") as f:
            torch.save(data, f)
        if tag_last:
            self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        # A run killed while fvcore writes the file could not be resumed.
        with write_atomically(Path(self.save_dir) / LAST_CHECKPOINT) as f:
            f.write(last_filename_basename)


def load_trained(cfg: CfgNode, weights: str | Path):
    """Builds a model and loads a trained checkpoint.

    Returns:
        The model in evaluation mode on ``cfg.MODEL.DEVICE``.

    Raises:
        ValueError: if the file is no checkpoint.
    """
    model = build_model(cfg)
    IchCheckpointer(model).load(str(weights))
    return model.eval()
