"""Pixels as network input: moves the data set's mean and standard deviation into the weights of the first layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import float_class
from qexp.network.recorder import record

FORMS = ("exact", "nearest")
CODE = 1e-3  # in steps between pixel values: a number nearer than this to a whole number counts as whole
PIXELS = 256


@dataclass(frozen=True)
class PixelGrid:
    """The input grid of a network on pixels: `(pixel - zero) * unit`, so that the padding is a pixel value too.

    Attributes:
        unit: A power of two near the size of a pixel step in the normalised image: floats hold every pixel exactly, and weights keep
            a magnitude that suits training.
        zero: Per channel, the pixel that a normalised image has at zero, or the nearest.
        off: Per channel, distance of that pixel from the zero of the normalised image.
    """

    unit: float
    zero: tuple[int, ...]
    off: tuple[float, ...]

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float], max_value: float) -> PixelGrid:
        """Returns the grid for images that a data set makes as `(pixel / max_value - mean) / std`."""
        unit = 2.0 ** round(float(torch.log2(1 / (max_value * torch.tensor(std, dtype=torch.float64).mean()))))
        places = [max_value * m for m in mean]
        zero = [min(max(round(place), 0), PIXELS - 1) for place in places]
        return cls(unit, tuple(zero), tuple(z - place for z, place in zip(zero, places)))

    def rule(self, layers: Sequence[str]) -> dict[str, Any]:
        """Returns the rule that gives the inputs of layers this grid."""
        ends = {
            "low": [-z * self.unit for z in self.zero],
            "high": [(PIXELS - 1 - z) * self.unit for z in self.zero],
        }
        return {
            "layers": list(layers),
            "input": {
                "_target_": "qexp.quantizers.uniform.Uniform",
                "bits": 8,
                "symmetric": False,
                "granularity": "channel",
                "range": {"_target_": "qexp.ranges.given.Given", **ends},
            },
        }


def readers(model: nn.Module, example: Tensor) -> list[str]:
    """Returns the convolutions that read the images.

    Raises:
        QexpError: Another layer reads the images too, or the network has no graph to find that out.
    """
    graph = record(model, example).graph
    where = "quant.pixels"
    if graph is None:
        raise QexpError(f"{where} needs to know which layers read the images, but {type(model).__name__} has no graph")
    steps = [step for step in graph.steps if any(ref.step.op == "input" for ref in step.operands)]
    for step in steps:
        layer = model.get_submodule(step.module) if step.op == "module" else None
        plain = isinstance(layer, nn.Conv2d) and float_class(layer).forward is nn.Conv2d.forward
        if not plain or layer.padding_mode != "zeros":
            raise QexpError(
                f"{where}: {step.name or 'the result'} reads the images and is no ordinary Conv2d, so mean and std cannot go into its "
                "weights; leave quant.pixels out (deploy=int8), or begin the network with a convolution"
            )
    return list(dict.fromkeys(step.module for step in steps))


@torch.no_grad()
def fold_pixels(
    model: nn.Module, names: Sequence[str], grid: PixelGrid, how: Mapping[str, Any], form: str = "exact"
) -> None:
    """Changes convolutions, in place, to read `(pixel - zero) * unit` instead of `(pixel / max_value - mean) / std`.

    `W' = W / (max_value * std * unit)` per input channel, and the bias takes the difference between `zero` and the mean. A convolution that
    pads does so with `zero`: exact where the mean is a pixel value, else off by at most half a step of a pixel (`nearest`).

    Args:
        model: The float network.
        names: The convolutions that read the images.
        grid: The grid of the images.
        how: The data set's current normalisation: `mean`, `std`, `max_value`.
        form: `exact` refuses what `nearest` does not.

    Raises:
        QexpError: A padded image would not be the same.
    """
    for name in names:
        layer = model.get_submodule(name)
        padded = layer.padding == "same" or (not isinstance(layer.padding, str) and any(layer.padding))
        worst = max(range(len(grid.off)), key=lambda c: abs(grid.off[c]))
        if form == "exact" and padded and abs(grid.off[worst]) > CODE:
            raise QexpError(
                f"quant.pixels=exact is not possible: {name} pads images with their mean, which is pixel "
                f"{grid.zero[worst] - grid.off[worst]:.6g} in channel {worst} and no code; quant.pixels=nearest pads with "
                f"{grid.zero[worst]}, which changes the border by less than half a pixel step"
            )
        factor = 1 / (float(how["max_value"]) * torch.tensor(list(how["std"]), dtype=torch.float64))
        off = torch.tensor(grid.off, dtype=torch.float64)
        weight = layer.weight.double()
        per = weight.shape[1]
        groups = layer.groups

        def of_output(values: Tensor, count: int = len(weight), per: int = per, groups: int = groups) -> Tensor:
            return values.reshape(groups, per).repeat_interleave(count // groups, 0)  # [O, I / groups]

        shift = (weight.sum((2, 3)) * of_output(off * factor)).sum(1)
        weight = weight * of_output(factor / grid.unit)[:, :, None, None]
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
        if layer.bias is not None or bool(shift.abs().gt(0).any()):
            bias = shift + (0 if layer.bias is None else layer.bias.double())
            layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
