"""Checkpoints that cannot run code when loaded, and are written whole or not at all."""

import copy
import pickle
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch.nn.parallel import DistributedDataParallel

from ..files import write_atomically
from ..modeling.channels import RGB, adapt_input_weights
from ..modeling.weights import LIBRARY_PREFIXES

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
    """:class:`DetectionCheckpointer` that loads only tensors, and knows another network's weights.

    Of ``timm://NAME`` and ``torchvision://NAME`` (:mod:`ich_det2.modeling.weights`) the whole
    backbone or classifier has to come. Where images have other than three channels, the first
    convolution of ImageNet weights is adapted as timm does.
    """

    _path = ""

    def load(self, path: str, *args, **kwargs) -> dict:
        """As :meth:`DetectionCheckpointer.load`.

        Raises:
            ValueError: if the file holds anything but tensors, arrays and plain values, or a
                library's weights cannot be had or are another network's.
        """
        self._path = path
        return super().load(path, *args, **kwargs)

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
        heads, backbone = checkpoint.pop("heads", ()), getattr(self.model, "backbone", None)
        if "__author__" in checkpoint or checkpoint.get("matching_heuristics"):
            channels = len(getattr(self.model, "pixel_mean", range(RGB)))
            # Of a backbone whose 2D network sees something else than the image.
            channels = getattr(backbone, "network_channels", channels)
            adapt_input_weights(checkpoint["model"], channels)
        for name, module in self.model.named_modules():
            if hasattr(module, "take_sizes"):  # of a fitted part, as many as were found then
                module.take_sizes(checkpoint["model"], f"{name}." if name else "")
        incompatible = super()._load_model(checkpoint)
        none_fits = len(incompatible.missing_keys) == len(self.model.state_dict())
        # Stock Detectron2 has no ratio k; it starts at its first value. A norm's count of batches
        # is not used.
        ours = ("anchor_sampler._ratio", "num_batches_tracked")
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if not key.endswith(ours)]
        if self._path.startswith(LIBRARY_PREFIXES):
            # Layers of a backbone or classifier, but for those that ImageNet has none or other of:
            # heads, deformable convolutions, and what stands around a bottom-up network.
            body = "backbone.bottom_up." if hasattr(backbone, "bottom_up") else "backbone."
            ends = tuple(f".{head}" for head in heads)
            lost = [
                key
                for key in missing
                if none_fits
                or key.startswith((body, "network."))
                and ".conv2_offset." not in key
                and not key.rpartition(".")[0].endswith(ends)
            ]
            if lost:
                raise ValueError(
                    f"MODEL.WEIGHTS is '{self._path}', but the model is another network, with"
                    f" '{lost[0]}'; set MODEL.BACKBONE.NAME and, with timm, MODEL.TIMM.NAME (of a"
                    " classifier MODEL.CLASSIFIER.NAME) to the same."
                )
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


def for_inference(model: torch.nn.Module) -> torch.nn.Module:
    """The model as evaluation and diagnosis run it, both alike: on a CPU with folded batch norms.

    Args:
        model: of a training, maybe in the midst of it, which it is left to as it is.

    Returns:
        A copy in evaluation mode, if a backbone of it has norms to fold; else the model itself.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    able = any(hasattr(m, "fold_batch_norms") for m in inner.modules())
    if not able or next(inner.parameters()).device.type != "cpu":
        return model
    inner = copy.deepcopy(inner).eval()
    for module in list(inner.modules()):
        if hasattr(module, "fold_batch_norms"):
            module.fold_batch_norms()
    return inner
