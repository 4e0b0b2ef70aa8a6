"""Converted weights: the features are torchvision's own."""

import importlib.util
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.modeling import build_model
from torch import nn
from torchvision.models import get_model_weights
from torchvision.models._api import WeightsEnum

from ich_det2.engine import IchCheckpointer
from ich_det2.engine.checks import check_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "convert_weights.py"
    spec = importlib.util.spec_from_file_location("convert_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def library_model(network):
    """torchvision's model with random weights, and norms that have seen some noise."""
    torch.manual_seed(0)
    kwargs = {"init_weights": True, "transform_input": True} if network == "inception_v3" else {}
    model = torchvision.models.get_model(network, weights=None, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches seen
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    if network != "vgg16":
        with torch.no_grad():
            model.train()(
                torch.randn(2, 3, 299, 299)
                if network == "inception_v3"
                else torch.randn(4, 3, 64, 64)
            )
    return model.eval()


OPTS = {"resnet50": ("MODEL.RESNETS.STRIDE_IN_1X1", "False")}
CONFIGS = {"vgg16": "csfrcnn_vgg16.yaml", "inception_v3": "csfrcnn_inception_v3.yaml"}


def detector(tiny_cfg, network, *opts, config=None):
    config = config or CONFIGS.get(network, "csfrcnn_r50.yaml")
    opts = ("MODEL.ROI_BOX_HEAD.FC_DIM", "4096", *OPTS.get(network, ()), *opts)
    return build_model(tiny_cfg(*opts, config=config)).eval()


@pytest.fixture
def converted(tool, tiny_cfg, tmp_path, capsys):
    """A library's model, and our detector with its weights, by way of two files."""

    def make(network, *opts, config=None):
        library = library_model(network)
        source, output = tmp_path / "source.pth", tmp_path / "output.pth"
        torch.save(library.state_dict(), source)
        assert tool.main([str(source), str(output), "--network", network]) == 0
        assert f"MODEL.WEIGHTS {output}" in capsys.readouterr().out
        model = detector(tiny_cfg, network, *opts, config=config)
        IchCheckpointer(model).load(str(output))
        for file in (source, output):
            file.unlink()  # half a gigabyte each
        return library, model

    return make


def test_vgg16_features_and_head_are_torchvisions(converted):
    library, model = converted("vgg16")
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        features = model.backbone(images)["conv5_3"]
        assert torch.equal(features, library.features[:-1](images))
        # torchvision's pooling to 7 x 7 is the identity at 224 pixels.
        pooled = library.features(images)
        head = model.roi_heads.box_head(pooled)
        assert torch.equal(head, library.classifier[:-1](library.avgpool(pooled).flatten(1)))
        assert head.std() > 0


def test_inception_v3_features_and_head_are_torchvisions(converted):
    library, model = converted("inception_v3")
    seen = {}

    def keep(module, inputs, output):
        seen[module] = output

    for layer in (library.Mixed_6e, library.Mixed_7c):
        layer.register_forward_hook(keep)
    # Our pixel statistics (mean and deviation 127.5) and ImageNet's with transform_input.
    grey = torch.rand(2, 3, 299, 299)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        library((grey - mean) / std)
        theirs = seen[library.Mixed_6e]
        assert theirs.shape[2:] == (17, 17)
        head = model.roi_heads.res5(theirs)
        assert head.shape == (2, 2048, 8, 8) and head.std() > 0.1
        assert torch.equal(head, seen[library.Mixed_7c])

        # The library's model padded likewise, on an input of a side divisible by 16.
        for layer in (library.Conv2d_1a_3x3, library.Conv2d_2a_3x3, library.Conv2d_4a_3x3):
            layer.conv.padding = (1, 1)
        library.maxpool1.padding = library.maxpool2.padding = 1
        library.Mixed_6a.register_forward_pre_hook(lambda _, args: F.pad(args[0], (0, 1, 0, 1)))
        grey = grey[..., :288, :288]
        library((grey - mean) / std)
        ours = model.backbone((255 * grey - model.pixel_mean) / model.pixel_std)["Mixed_6e"]
    assert ours.shape[2:] == (18, 18) and ours.std() > 0.1
    torch.testing.assert_close(ours, seen[library.Mixed_6e], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", ["csfrcnn_r50.yaml", "csfrcnn_r50_fpn.yaml"])
def test_resnet50_features_and_res5_are_torchvisions(converted, config):
    library, model = converted("resnet50", config=config)
    x = images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        x = library.maxpool(library.relu(library.bn1(library.conv1(x))))
        res4 = library.layer3(library.layer2(library.layer1(x)))
        res5 = library.layer4(res4)
        if config.endswith("fpn.yaml"):
            bottom_up = model.backbone.bottom_up(images)
            ours4, ours5 = bottom_up["res4"], bottom_up["res5"]
        else:
            ours4 = model.backbone(images)["res4"]
            ours5 = model.roi_heads.res5(ours4)
    assert res5.std() > 0.1
    torch.testing.assert_close(ours4, res4, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours5, res5, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    with tempfile.TemporaryDirectory() as folder:  # not kept: hundreds of megabytes
        monkeypatch.setenv("FVCORE_CACHE", folder)
        yield


def library_state(network):
    """Weights of the right names and sizes, each filled with a number of its own."""
    kwargs = {"init_weights": False} if network == "inception_v3" else {}
    with torch.device("meta"):
        state = torchvision.models.get_model(network, weights=None, **kwargs).state_dict()
    return {k: torch.full(v.shape, i, dtype=v.dtype) for i, (k, v) in enumerate(state.items())}


# What the detector has and a classifier has not.
OWN = ("proposal_generator.", "roi_heads.box_predictor.", "pixel_", "backbone.fpn_")


@pytest.mark.parametrize("freeze_bn", ["True", "False"])
@pytest.mark.parametrize(
    ("network", "config"),
    [
        ("vgg16", "csfrcnn_vgg16.yaml"),
        ("inception_v3", "csfrcnn_inception_v3.yaml"),
        ("resnet50", "csfrcnn_r50.yaml"),
        ("resnet50", "csfrcnn_r50_fpn.yaml"),
    ],
)
def test_librarys_weights_fill_the_detector(
    tiny_cfg, monkeypatch, caplog, network, config, freeze_bn
):
    state = library_state(network)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *args, **kwargs: state)
    norm = ("MODEL.RESNETS.NORM", "FrozenBN" if freeze_bn == "True" else "BN")
    opts = ("MODEL.TORCHVISION.FREEZE_BN", freeze_bn, *norm)
    opts += ("MODEL.ROI_BOX_HEAD.FC_DIM", "4096" if network == "vgg16" else "16")
    model = detector(tiny_cfg, network, *opts, config=config)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    checkpointer = IchCheckpointer(model)
    incompatible = []
    monkeypatch.setattr(checkpointer, "_log_incompatible_keys", incompatible.append)
    check_weights(f"torchvision://{network}", trained=False)
    checkpointer.load(f"torchvision://{network}")
    (found,) = incompatible
    assert not found.unexpected_keys and not found.incorrect_shapes
    own = (*OWN, "roi_heads.box_head.") if "fpn" in config else OWN
    assert all(key.startswith(own) for key in found.missing_keys)
    # Key by key: each tensor of the library's, all different, came to one place.
    after = model.state_dict()
    loaded = [v for k, v in after.items() if not k.startswith(own) and "tracked" not in k]
    classifying = ("fc.", "AuxLogits.", "classifier.6.")
    given = [v for k, v in state.items() if not k.startswith(classifying) and "tracked" not in k]
    assert sorted(map(signature, loaded)) == sorted(map(signature, given))
    assert all(torch.equal(after[k], before[k]) for k in after if k.startswith(own))


def test_a_retinanet_has_levels_that_no_classifier_has(tiny_cfg, monkeypatch):
    state = library_state("resnet50")
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *args, **kwargs: state)
    opts = (
        "MODEL.META_ARCHITECTURE",
        "RetinaNet",
        "MODEL.FPN.IN_FEATURES",
        "['res3','res4','res5']",
    )
    opts += ("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone")
    model = detector(tiny_cfg, "resnet50", *opts, config="csfrcnn_r50_fpn.yaml")
    IchCheckpointer(model).load("torchvision://resnet50")
    loaded = model.backbone.bottom_up.state_dict()
    assert all(v.min() == v.max() for k, v in loaded.items())


def signature(tensor):
    assert tensor.min() == tensor.max()
    return tensor.max().item(), tuple(tensor.shape)


def test_weights_of_another_network_are_refused(tiny_cfg, monkeypatch):
    state = library_state("inception_v3")
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *args, **kwargs: state)
    model = detector(tiny_cfg, "vgg16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16")
    with pytest.raises(ValueError, match="is another network, with 'backbone.features.0"):
        IchCheckpointer(model).load("torchvision://inception_v3")


@pytest.mark.parametrize("network", ["vgg16", "inception_v3", "resnet50"])
def test_without_a_network_connection_the_way_out_is_named(monkeypatch, network):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        check_weights(f"torchvision://{network}", trained=False)
    for text in (get_model_weights(network).DEFAULT.url, "not known", "MODEL.WEIGHTS ''"):
        assert text in str(error.value)


def not_a_file(path):
    path.unlink()


def text(path):
    path.write_text("weights")


def a_list(path):
    torch.save([1, 2], path)


def other_network(path):
    torch.save(library_state("resnet50"), path)


def one_missing(path):
    state = torch.load(path, weights_only=True)
    del state["Mixed_7c.branch_pool.bn.bias"]
    torch.save(state, path)


def one_of_another_size(path):
    state = torch.load(path, weights_only=True)
    state["Mixed_5b.branch1x1.conv.weight"] = torch.zeros(64, 200, 1, 1)
    torch.save(state, path)


def one_too_many(path):
    torch.save({**torch.load(path, weights_only=True), "head.weight": torch.zeros(1)}, path)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.pth"
    torch.save(library_state("inception_v3"), path)
    return path


@pytest.mark.parametrize(
    ("damage", "output", "words"),
    [
        (not_a_file, "out.pth", ("in.pth", "No such file")),
        (text, "out.pth", ("in.pth", "no checkpoint of tensors")),
        (a_list, "out.pth", ("in.pth", "'Conv2d_1a_3x3.conv.weight' is missing")),
        (other_network, "out.pth", ("in.pth", "torchvision's inception_v3", "is missing")),
        (one_missing, "out.pth", ("'Mixed_7c.branch_pool.bn.bias' is missing, expected (192,)",)),
        (one_of_another_size, "out.pth", ("sized (64, 200, 1, 1), expected (64, 192, 1, 1)",)),
        (one_too_many, "out.pth", ("has no 'head.weight'",)),
        (None, "out.pkl", ("out.pkl", "ends in .pth")),
        (None, "in.pth", ("the source too",)),
        (None, "gone/out.pth", ("no folder", "gone")),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(tool, source, capsys, damage, output, words):
    if damage:
        damage(source)
    out = source.parent / output
    assert tool.main([str(source), str(out), "--network", "inception_v3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("convert_weights.py: error: ")
    for word in words:
        assert word in line
    assert {p.name for p in source.parent.iterdir()} <= {"in.pth"}


@pytest.mark.parametrize("wrapped", [False, True])
def test_other_classes_and_reference_scripts_checkpoints_convert(tool, source, capsys, wrapped):
    state = torch.load(source, weights_only=True)
    state = {k: v for k, v in state.items() if not k.startswith("AuxLogits.")}
    state["fc.weight"], state["fc.bias"] = torch.zeros(2, 2048), torch.zeros(2)
    torch.save({"model": state, "epoch": 3} if wrapped else state, source)
    out = source.parent / "out.pth"
    assert tool.main([str(source), str(out), "--network", "inception_v3"]) == 0
    keys = torch.load(out, weights_only=True)["model"]
    assert len(keys) == sum(not k.startswith("fc.") and "tracked" not in k for k in state)


def test_help_says_what_to_set(tool, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for word in ("vgg16", "inception_v3", "resnet50", "torchvision://NAME", "3x3 convolutions"):
        assert word in out
