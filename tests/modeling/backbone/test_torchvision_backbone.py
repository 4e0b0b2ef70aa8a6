"""torchvision's networks as backbones: sizes, stride, centres, frozen layers."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from torch import nn
from torchvision.models import get_model_weights, vgg16

from ich_det2 import add_ich_config
from ich_det2.modeling.backbone.torchvision_backbone import vgg16_layers

CONFIGS = Path(__file__).parents[3] / "configs"
BUILDERS = {"vgg16": "build_vgg16_backbone", "inception_v3": "build_inception_v3_backbone"}


def build(network, *opts):
    cfg = get_cfg()
    add_ich_config(cfg)
    cfg.MODEL.BACKBONE.NAME = BUILDERS.get(network, network)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.merge_from_list(list(opts))
    torch.manual_seed(0)
    return build_backbone(cfg)


@pytest.mark.parametrize("size", [(16, 96), (80, 48), (96, 64)])
@pytest.mark.parametrize(
    ("network", "name", "channels"), [("vgg16", "conv5_3", 512), ("inception_v3", "Mixed_6e", 768)]
)
@torch.no_grad()
def test_the_map_is_a_sixteenth_of_the_input(network, name, channels, size):
    backbone = build(network).eval()
    ((key, shape),) = backbone.output_shape().items()
    assert (key, shape.channels, shape.stride) == (name, channels, 16)
    assert backbone.size_divisibility == 16
    features = backbone(torch.zeros(2, 3, *size))
    assert list(features) == [name]
    assert features[name].shape == (2, channels, size[0] // 16, size[1] // 16)


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("network", BUILDERS)
@torch.no_grad()
def test_sixteen_pixels_are_one_cell(network, upright):
    backbone = build(network).double().eval()
    image = torch.zeros(1, 3, 32, 1280, dtype=torch.float64)
    # Far enough from both ends that neither is seen by a cell that sees the noise.
    image[..., 632:648] = torch.rand(1, 3, 32, 16, dtype=torch.float64)
    turned = (lambda x: x.transpose(2, 3)) if upright else (lambda x: x)
    (here,) = backbone(turned(image)).values()
    (there,) = backbone(turned(image.roll(16, dims=3))).values()
    here, there = turned(here), turned(there)
    assert here[..., 40].abs().max() > 0
    torch.testing.assert_close(there[..., 1:], here[..., :-1])
    assert not torch.allclose(there, here)


def centre_offset(backbone, monkeypatch, *, upright=False):
    """Pixels from (i + 0.5) * 16 to the centre of what cell i sees: by support and by weight.

    With equal positive weights, and means for maxima, the gradient counts the paths from pixels to
    the cell.
    """

    def mean_pool(x, kernel_size, stride, padding=0, *_, **__):
        return F.avg_pool2d(x, kernel_size, stride, padding)

    monkeypatch.setattr(F, "max_pool2d", mean_pool)
    backbone = backbone.double().eval()
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    size = (1024, 16) if upright else (16, 1024)
    image = torch.ones(1, 3, *size, dtype=torch.float64, requires_grad=True)
    (features,) = backbone(image).values()
    features.sum(dim=(0, 1)).flatten()[32].backward()
    paths = image.grad.sum(dim=(0, 1, 3 if upright else 2))
    seen = paths.nonzero().flatten()
    assert 0 < seen[0] and seen[-1] < 1023
    centre = 32.5 * 16
    by_weight = ((torch.arange(1024) + 0.5) * paths).sum() / paths.sum()
    return (seen[0] + seen[-1] + 1).item() / 2 - centre, by_weight.item() - centre


# Padding all of Inception's windows alike would give -7.5, as ResNet's.
@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize(
    ("network", "offset"), [("vgg16", 0.0), ("inception_v3", 0.5), ("r50", -7.5)]
)
def test_anchors_stand_where_cells_look(network, offset, upright, monkeypatch):
    cfg = get_cfg()
    add_ich_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"csfrcnn_{network}.yaml"))
    by_support, by_weight = centre_offset(build_backbone(cfg), monkeypatch, upright=upright)
    assert by_support == offset
    assert by_weight == pytest.approx(offset, abs=1e-6)
    assert abs((cfg.MODEL.ANCHOR_GENERATOR.OFFSET - 0.5) * 16 - offset) <= 0.5


@pytest.mark.parametrize(
    ("network", "freeze_at", "frozen"),
    [
        ("vgg16", 0, ()),
        ("vgg16", 1, ("0.", "2.")),  # conv1_1, conv1_2
        ("vgg16", 2, ("0.", "2.", "5.", "7.")),
        ("vgg16", 5, ("",)),
        ("inception_v3", 0, ()),
        ("inception_v3", 1, ("Conv2d_1", "Conv2d_2")),
        ("inception_v3", 2, ("Conv2d_",)),
        ("inception_v3", 3, ("Conv2d_", "Mixed_5")),
        ("inception_v3", 4, ("",)),
    ],
)
@pytest.mark.parametrize("freeze_bn", [False, True])
def test_freeze_at_freezes_exactly_the_early_stages(network, freeze_at, frozen, freeze_bn):
    opts = ("MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.TORCHVISION.FREEZE_BN", freeze_bn)
    layers = build(network, *opts).features
    for name, parameter in layers.named_parameters():
        assert parameter.requires_grad is not name.startswith(frozen), name
    for name, module in layers.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert not freeze_bn and not name.startswith(frozen), name
        if isinstance(module, FrozenBatchNorm2d):
            assert freeze_bn or name.startswith(frozen), name


@pytest.mark.parametrize(("network", "stages"), [("vgg16", 5), ("inception_v3", 4)])
def test_freezing_more_stages_than_there_are_is_an_error(network, stages):
    message = f"FREEZE_AT is {stages + 1}, but the backbone has {stages} stages"
    with pytest.raises(ValueError, match=message):
        build(network, "MODEL.BACKBONE.FREEZE_AT", stages + 1)


def test_random_vgg16_starts_as_torchvisions():
    theirs = [p for n, p in vgg16().features.named_parameters() if n.endswith("weight")]
    ours = [p for n, p in vgg16_layers().named_parameters() if n.endswith("weight")]
    assert len(ours) == len(theirs) == 13
    for a, b in zip(ours, theirs):
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.1)


def count(module):
    return sum(p.numel() for p in module.parameters())


FC = 2048 * 1000 + 1000


FPN_STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}


@pytest.mark.parametrize(
    ("config", "channels", "strides"),
    [
        ("csfrcnn_vgg16.yaml", 512, {"conv5_3": 16}),
        ("csfrcnn_inception_v3.yaml", 768, {"Mixed_6e": 16}),
        ("csfrcnn_r50.yaml", 1024, {"res4": 16}),
        ("csfrcnn_r50_fpn.yaml", 256, FPN_STRIDES),
        ("csfrcnn_effnet_lite0.yaml", 112, {"stride16": 16}),
    ],
)
@torch.no_grad()
def test_each_config_has_its_maps(tiny_cfg, config, channels, strides):
    cfg = tiny_cfg(config=config)
    features = build_backbone(cfg).eval()(torch.zeros(1, 3, 64, 128))
    shapes = {k: tuple(v.shape) for k, v in features.items() if k in cfg.MODEL.RPN.IN_FEATURES}
    assert shapes == {k: (1, channels, 64 // s, 128 // s) for k, s in strides.items()}


@pytest.mark.parametrize(
    ("config", "library", "behind", "published"),
    [
        # In millions: 138 in VGG16's publication (table 2); the others' give none.
        ("csfrcnn_vgg16.yaml", "vgg16", 4096 * 1000 + 1000, 138),
        ("csfrcnn_inception_v3.yaml", "inception_v3", FC, 24),
        ("csfrcnn_r50.yaml", "resnet50", FC, 26),
        ("csfrcnn_r50_fpn.yaml", "resnet50", FC, 26),
    ],
)
def test_parameters_are_the_publications(tiny_cfg, config, library, behind, published):
    opts = ("MODEL.ROI_BOX_HEAD.FC_DIM", "4096", "MODEL.BACKBONE.FREEZE_AT", "0")
    opts += ("MODEL.RESNETS.NORM", "BN", "MODEL.TORCHVISION.FREEZE_BN", "False")
    with torch.device("meta"):
        model = build_model(tiny_cfg("MODEL.DEVICE", "meta", *opts, config=config))
    heads = model.roi_heads
    if library == "vgg16":
        assert count(model.backbone) == 14_714_688
        found = count(model.backbone) + count(heads.box_head)
    elif config.endswith("fpn.yaml"):
        found = count(model.backbone.bottom_up)
    else:
        found = count(model.backbone) + count(heads.res5)
    # What torchvision counts itself, less the classifying layer, and the auxiliary classifier.
    total = get_model_weights(library).DEFAULT.meta["num_params"]
    total -= {"inception_v3": 3_326_696}.get(library, 0)
    assert found == total - behind
    assert round(total / 1e6) == published
