"""Transposed convolutions: zeros between the pixels, and an ordinary convolution with the kernel turned around."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from qexp.integer.layers.moves import padded, reshaped
from qexp.integer.layers.shapes import pair
from qexp.integer.values import Value
from qexp.integer.walk import Walk
from qexp.layers.weight_channels import arranged


def spread_out(walk: Walk, name: str, layer: nn.ConvTranspose2d, x: Value) -> Value:
    """Returns a map with zeros between and around its pixels, over which the turned kernel moves one pixel at a time."""
    c, h, w = x.shape
    sh, sw = pair(layer.stride)
    if (sh, sw) != (1, 1):
        x = padded(walk, name, reshaped(walk, name, x, (c, h, 1, w, 1)), (0,) * 5, (0, 0, sh - 1, 0, sw - 1))
        x = reshaped(walk, name, x, (c, h * sh, w * sw))
    settings = (layer.kernel_size, layer.padding, layer.dilation, layer.output_padding)
    before, after = [0], [0]
    for k, p, d, more, s in zip(*map(pair, settings), (sh, sw)):
        before.append(d * (k - 1) - p)
        after.append(d * (k - 1) - p + more - (s - 1))
    return padded(walk, name, x, before, after)


def turned(layer: nn.ConvTranspose2d, weight: Tensor) -> Tensor:
    """Returns a transposed convolution's weight `[I, O / groups, h, w]` as that of the ordinary one, `[O, I / groups, h, w]`."""
    size = weight.shape[2:]
    return arranged(layer, weight).reshape(layer.out_channels, -1, *size).flip(2, 3)


def turned_back(layer: nn.ConvTranspose2d, weight: np.ndarray) -> np.ndarray:
    """Returns the layer's own form of a weight `[O, I / groups, h, w]`."""
    outputs = layer.out_channels // layer.groups
    parts = torch.from_numpy(weight).flip(2, 3).reshape(layer.groups, outputs, *weight.shape[1:])
    return parts.transpose(1, 2).reshape(layer.in_channels, outputs, *weight.shape[2:]).numpy()
