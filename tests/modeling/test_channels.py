"""As many channels as MODEL.PIXEL_MEAN has values."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from ich_det2.modeling import CLASSIFIER_REGISTRY
from ich_det2.modeling.backbone.torchvision_backbone import vgg16_layers
from ich_det2.modeling.channels import set_input_channels

SMALL = (
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 4, "MODEL.RPN.PRE_NMS_TOPK_TEST", 20),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", -1.0),
)


def model_of(tiny_cfg, config, channels, *opts):
    grey = ("MODEL.PIXEL_MEAN", [100.0] * channels, "MODEL.PIXEL_STD", [50.0] * channels)
    torch.manual_seed(0)
    return build_model(tiny_cfg(*SMALL, *grey, *opts, config=config)).eval()


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("network", ["effnet_lite0", "r50", "vgg16", "inception_v3"])
@torch.no_grad()
def test_a_detector_takes_images_of_so_many_channels(tiny_cfg, network, channels):
    model = model_of(tiny_cfg, f"csfrcnn_{network}.yaml", channels)
    image = 255 * torch.rand(channels, 64, 64)
    (found,) = model([{"image": image, "height": 64, "width": 64}])
    assert torch.isfinite(found["instances"].pred_boxes.tensor).all()


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("name", [name for name, _ in CLASSIFIER_REGISTRY if name[0].isupper()])
@torch.no_grad()
def test_a_classifier_takes_images_of_so_many_channels(tiny_cfg, name, channels):
    opts = ("MODEL.CLASSIFIER.NAME", name, "MODEL.CLASSIFIER.INPUT_SIZE", 96)
    opts += ("INPUT.SEQUENCE_SLICES", 1, "INPUT.SCAN_SLICES", 3)
    model = model_of(tiny_cfg, "classifier_lenet.yaml", channels, *opts)
    image = 255 * torch.rand(channels, 64, 64)
    slices = [
        {"image": x, **dict.fromkeys(("sequence", "scan"), torch.stack([x] * 3))}
        for x in (image, 255 - image)
    ]
    if model.needs_fit:
        model.fit(model.embed(slices), torch.tensor([1, 0]))
    (found,) = model(slices[:1])
    assert 0 <= found["image_score"] <= 1


def test_three_channels_are_torchvisions_network_bit_for_bit():
    torch.manual_seed(0)
    stock = vgg16_layers().state_dict()
    torch.manual_seed(0)
    layers = vgg16_layers(3)
    before = layers[0].weight
    set_input_channels(layers, 3)
    assert layers[0].weight is before
    assert all(torch.equal(v, stock[k]) for k, v in layers.state_dict().items())


@pytest.mark.parametrize("conv", [nn.Conv2d, nn.Conv3d])
def test_the_first_convolution_keeps_its_answer_to_grey(conv):
    torch.manual_seed(0)
    network = nn.Sequential(conv(3, 4, 3, padding=1), conv(4, 2, 1))
    grey = torch.rand(1, 1, *[8] * (network[0].weight.ndim - 2))
    expected = network(grey.expand(-1, 3, *grey.shape[2:]))
    set_input_channels(network, 1)
    torch.testing.assert_close(network(grey), expected)
    assert network[0].weight.requires_grad and network[1].in_channels == 4


def test_a_network_for_other_channels_is_named():
    with pytest.raises(ValueError, match="Conv2d takes images of 2 channels, but MODEL.PIXEL_MEAN"):
        set_input_channels(nn.Conv2d(2, 4, 3), 5)
    set_input_channels(nn.Conv2d(5, 4, 3), 5)
    set_input_channels(nn.Linear(3, 1), 5)  # no convolution
