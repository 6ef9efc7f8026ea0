"""Layers whose gradient PyTorch computes slowly on a CPU, and the same layers computed in another way with the same values.

* The gradient of a strided depthwise convolution in bfloat16 takes 15 to 100 times as long as in float32 (PyTorch 2.14 has no fast form
  of it): in a training step under autocast, the layer computes in float32.
* The gradient of every n-th pixel is a tensor with its channels outermost, whatever the layout of the pixels; all later additions and
  convolutions then change layouts. An average over windows of one pixel gives the same pixels, and a gradient in their layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qexp.layers.quantized import float_class
from qexp.models.modules import StridedPad


@contextmanager
def quick_gradients(model: nn.Module) -> Iterator[None]:
    """Makes the layers of a model with slow gradients compute in another way inside a `with` block."""
    changed: list[tuple[nn.Module, str]] = []
    for layer in model.modules():
        if type(layer) is StridedPad and "forward" not in vars(layer):
            layer.forward = _Pixels(layer).forward
            changed.append((layer, "forward"))
        elif _is_slow(layer):
            layer._conv_forward = _Wide(layer).forward
            changed.append((layer, "_conv_forward"))
    try:
        yield
    finally:
        for layer, name in changed:
            del vars(layer)[name]


def _is_slow(layer: nn.Module) -> bool:
    return (
        float_class(layer) is nn.Conv2d
        and layer.groups == layer.in_channels > 1
        and max(layer.stride) > 1
        and "_conv_forward" not in vars(layer)
    )


class _Wide:
    """A convolution that computes in float32 in a training step under autocast on a CPU."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        compute = type(self.layer)._conv_forward
        if not (input.is_cpu and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")):
            return compute(self.layer, input, weight, bias)
        with torch.autocast("cpu", enabled=False):
            y = compute(self.layer, input.float(), weight.float(), None if bias is None else bias.float())
        return y.to(torch.get_autocast_dtype("cpu"))


class _Pixels:
    """A parameter-free shortcut with a gradient in the layout of its input."""

    def __init__(self, layer: StridedPad) -> None:
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not (x.is_cpu and torch.is_grad_enabled() and x.is_contiguous(memory_format=torch.channels_last)):
            return type(layer).forward(layer, x)
        return F.pad(F.avg_pool2d(reread(x), 1, layer.stride), (0, 0, 0, 0, layer.before, layer.after))


def read_twice(y: Tensor, again: Tensor) -> Tensor:
    """Returns `y` with a note: one of its readers may take `again`, the same values with a gradient of their own."""
    y.again = again, y._version
    return y


def reread(x: Tensor) -> Tensor:
    """Returns what a second reader of a tensor takes; the tensor itself where there is nothing else, or where it was changed in place."""
    again, version = getattr(x, "again", (x, x._version))
    return again if x._version == version else x
