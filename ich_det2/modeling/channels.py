"""Networks made for RGB on images of another number of channels."""

import torch
from timm.models import adapt_input_conv
from torch import nn

RGB = 3


def set_input_channels(network: nn.Module, channels: int) -> None:
    """Lets the first convolution of a network take images of C channels, in place.

    Its weights are adapted as timm does it: summed for one channel, else repeated and scaled by
    3 / C. At 3 channels nothing is changed.

    Args:
        network: whose first convolution, in the order of its modules, sees the image.
        channels: C, number of channels of the images.

    Raises:
        ValueError: if the first convolution takes neither 3 nor C channels.
    """
    kinds = nn.Conv2d, nn.Conv3d
    first = next((m for m in network.modules() if isinstance(m, kinds)), None)
    if first is None or first.in_channels == channels:
        return
    if first.in_channels != RGB:
        raise ValueError(
            f"{type(network).__name__} takes images of {first.in_channels} channels, but"
            f" MODEL.PIXEL_MEAN has {channels} values; give as many."
        )
    first.in_channels = channels
    weight = first.weight.detach()
    flat = adapt_input_conv(channels, weight.flatten(2)[..., None])  # of any number of axes
    first.weight = nn.Parameter(flat.reshape(-1, channels, *weight.shape[2:]))


def adapt_input_weights(state: dict, channels: int) -> None:
    """Adapts weights of a network for RGB, as :func:`set_input_channels`, in place.

    Args:
        state: arrays or tensors by name; a convolution of 3 channels is the first one.
        channels: C, number of channels of the images.
    """
    for name, weight in state.items():
        if getattr(weight, "ndim", 0) == 4 and weight.shape[1] == RGB != channels:
            state[name] = adapt_input_conv(channels, torch.as_tensor(weight))
