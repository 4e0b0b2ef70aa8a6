"""The autoencoder beside AlexNet: its loss, its heat map by hand, and what sees it."""

import pytest
import torch

from ich_det2.modeling import AutoencoderAlexNetSVM


@pytest.fixture
def network():
    torch.manual_seed(0)
    return AutoencoderAlexNetSVM(63)


def test_the_heat_map_is_the_mean_error_of_25_pixels(network):
    grey, rebuilt = torch.zeros(1, 1, 63, 63), torch.zeros(1, 1, 63, 63)
    grey[0, 0, 10, 20], rebuilt[0, 0, 0, 0] = 0.5, 0.9
    heat = network.heat_map(grey, rebuilt)
    # |0.5 - 0| over 25 pixels; in the corner |0 - 0.9| over the 3 x 3 that there are.
    assert heat[0, 0, 8, 18].item() == pytest.approx(0.5 / 25)
    assert heat[0, 0, 0, 0].item() == pytest.approx(0.9 / 9)
    assert not heat[0, 0, 7, 20] and heat.shape == grey.shape


@pytest.mark.parametrize("side", [63, 64, 224])
def test_it_rebuilds_the_slice_from_a_sixteenth_of_its_values(network, side):
    grey = torch.rand(2, 1, side, side)
    code = network.encoder(grey)
    assert code.shape == (2, 16, -(-side // 16), -(-side // 16))
    assert network.reconstruct(grey).shape == grey.shape


def test_it_learns_by_the_squared_error_and_not_from_the_labels(network):
    x = torch.randn(4, 3, 63, 63)
    logits, losses = network(x)
    grey = x.mean(1, keepdim=True)
    expected = (network.reconstruct(grey) - grey).square().mean()
    torch.testing.assert_close(losses, {"loss_reconstruction": expected})
    logits.sum().backward()
    own = [*network.encoder.parameters(), *network.decoder.parameters()]
    assert all(p.grad is None for p in own) and network.heat_conv.weight.grad.any()


def test_the_map_is_one_more_channel_of_the_first_convolution(network):
    x, heat = torch.randn(2, 3, 63, 63), torch.rand(2, 1, 63, 63)
    first, own = network.features[0], network.heat_conv
    weight = torch.cat([first.weight, own.weight], dim=1)
    with torch.no_grad():
        both = torch.nn.functional.conv2d(
            torch.cat([x, heat], dim=1), weight, first.bias, first.stride, first.padding
        )
        torch.testing.assert_close(first(x) + own(heat), both)
        network.eval()
        seen = network._see(x, heat)
        torch.testing.assert_close(seen, network._features_of(network.features[1:](both)))
