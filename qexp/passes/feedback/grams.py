"""A layer as a matrix product: the inputs of its weights and their Gram matrices over the calibration images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORMS = (nn.Conv2d, nn.Linear)


@dataclass
class Grams:
    """Products of inputs, summed over all positions of all images, one matrix per group of the layer: `[groups, n, n]` float64.

    Attributes:
        floating: `X X'`, X `[n, positions]` from the float network.
        cross: `X^ X'`, X^ from the network quantized so far; rows belong to X^.
        quantized: `X^ X^'`.
        positions: How many columns were summed.
    """

    floating: Tensor
    cross: Tensor
    quantized: Tensor
    positions: int = 0

    @classmethod
    def empty(cls, layer: nn.Module) -> Grams:
        """Returns empty sums for a layer."""
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        n = layer.weight[0].numel()
        device = layer.weight.device
        return cls(*(torch.zeros(groups, n, n, dtype=torch.float64, device=device) for _ in range(3)))

    def add(self, x: Tensor, seen: Tensor) -> None:
        """Adds columns `[groups, n, positions]` of the float and of the quantized network; computes products in float32."""
        self.floating += (x @ x.mT).double()
        self.cross += (seen @ x.mT).double()
        self.quantized += (seen @ seen.mT).double()
        self.positions += x.shape[-1]

    def error(self, w: Tensor, q: Tensor) -> float:
        """Returns `|W X - W^ X^|^2 / |W X|^2` of float and quantized weights `[groups, rows, n]`."""
        whole = (w @ self.floating * w).sum()
        off = whole - 2 * (q @ self.cross * w).sum() + (q @ self.quantized * q).sum()
        return float(off / whole) if whole > 0 else 0.0


def columns(layer: nn.Module, x: Tensor) -> Tensor:
    """Returns the inputs of each output position, `[groups, n, positions]`, in the order of the weights; zeros at padding."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).T[None]
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), 0
    patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)  # [N, Cin kh kw, L]
    n, _, places = patches.shape
    grouped = patches.reshape(n, layer.groups, -1, places)
    return grouped.permute(1, 2, 0, 3).reshape(layer.groups, grouped.shape[2], n * places)


def rows(layer: nn.Module, w: Tensor) -> Tensor:
    """Returns weights as `[groups, outputs of a group, n]`."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return w.reshape(groups, w.shape[0] // groups, -1)
