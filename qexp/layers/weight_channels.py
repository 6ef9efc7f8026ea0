"""Ranges and factors of a weight by output and by input channel, for all layer types."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.Linear


def arranged(layer: Layer, weight: Tensor | None = None) -> Tensor:
    """Returns the weight as `[groups, outputs per group, inputs per group, positions]`; a view where the weight is contiguous."""
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
    """Returns `max|W|` over the weights of each of `count` incoming channels, `[count]`; a flattened channel has several inputs."""
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
    """Multiplies the weights of each incoming channel by `factor` `[C]`, in place."""
    w = arranged(layer)
    each = factor.to(w.dtype).repeat_interleave(w.shape[0] * w.shape[2] // len(factor))
    _replace(layer, w * each.reshape(w.shape[0], 1, w.shape[2], 1))


def response(layer: Layer, weight: Tensor, inputs: Tensor) -> Tensor:
    """Returns each output `[O]` for a constant input `inputs` `[I]`: the sum of `weight` times the input over the kernel.

    This holds away from the borders, where zeros are padded. For a transposed convolution it is the mean over the positions of its stride.
    """
    w = arranged(layer, weight.detach()).double()
    out = (w.sum(3) * inputs.double().reshape(w.shape[0], 1, w.shape[2])).sum(2).flatten()
    if isinstance(layer, nn.ConvTranspose2d):
        out = out / (layer.stride[0] * layer.stride[1])
    return out


def _replace(layer: Layer, arranged_weight: Tensor) -> None:
    w = arranged_weight.transpose(1, 2) if isinstance(layer, nn.ConvTranspose2d) else arranged_weight
    layer.weight.copy_(w.reshape(layer.weight.shape))
