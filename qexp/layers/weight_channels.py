"""The channels of a weight: its ranges and factors by output and by input channel, whatever the layer's type."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.Linear


def arranged(layer: Layer, weight: Tensor | None = None) -> Tensor:
    """Returns the weight as `[groups, outputs a group, inputs a group, positions]`: a view of it where it is contiguous."""
    weight = layer.weight if weight is None else weight
    if isinstance(layer, nn.Linear):
        return weight.reshape(1, *weight.shape, 1)
    if isinstance(layer, nn.ConvTranspose2d):
        inputs = weight.shape[0] // layer.groups
        return weight.reshape(layer.groups, inputs, weight.shape[1], -1).transpose(1, 2)
    outputs = weight.shape[0] // layer.groups
    return weight.reshape(layer.groups, outputs, weight.shape[1], -1)


def channels(layer: Layer) -> tuple[int, int]:
    """Returns the numbers of output and input channels."""
    g, outputs, inputs, _ = arranged(layer).shape
    return g * outputs, g * inputs


def output_range(layer: Layer) -> Tensor:
    """Returns `max|W|` of each output channel, `[O]`."""
    return arranged(layer).detach().abs().amax((2, 3)).flatten()


def input_range(layer: Layer, count: int) -> Tensor:
    """Returns `max|W|` of what each of `count` channels that come in meets, `[count]`; a flattened channel is several inputs."""
    each = arranged(layer).detach().abs().amax((1, 3)).flatten()
    return each.reshape(count, -1).amax(1)


@torch.no_grad()
def scale_outputs(layer: Layer, factor: Tensor) -> None:
    """Multiplies each output channel's weights and bias by `factor` `[O]`, in place."""
    w = arranged(layer)
    _replace(layer, w * factor.to(w.dtype).reshape(w.shape[0], w.shape[1], 1, 1))
    if layer.bias is not None:
        layer.bias.mul_(factor.to(w.dtype))


@torch.no_grad()
def scale_inputs(layer: Layer, factor: Tensor) -> None:
    """Multiplies the weights that each incoming channel meets by `factor` `[C]`, in place."""
    w = arranged(layer)
    each = factor.to(w.dtype).repeat_interleave(w.shape[0] * w.shape[2] // len(factor))
    _replace(layer, w * each.reshape(w.shape[0], 1, w.shape[2], 1))


def response(layer: Layer, weight: Tensor, inputs: Tensor) -> Tensor:
    """Returns what a constant input of `inputs` `[I]` gives at each output, `[O]`: the sum of `weight` times it over the kernel.

    Away from the borders, whose padding is zero; of a transposed convolution on average over the positions of its stride.
    """
    w = arranged(layer, weight.detach()).double()
    out = (w.sum(3) * inputs.double().reshape(w.shape[0], 1, w.shape[2])).sum(2).flatten()
    if isinstance(layer, nn.ConvTranspose2d):
        out = out / (layer.stride[0] * layer.stride[1])
    return out


def _replace(layer: Layer, arranged_weight: Tensor) -> None:
    w = arranged_weight.transpose(1, 2) if isinstance(layer, nn.ConvTranspose2d) else arranged_weight
    layer.weight.copy_(w.reshape(layer.weight.shape))
