"""Activations with learned slopes and shifts for one-bit networks; they keep both signs for the sign function that follows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _per_channel(parameter: Tensor) -> Tensor:
    return parameter[:, None, None]


class RPReLU(nn.Module):
    """`(x - xi if x > xi else slope (x - xi)) + zeta`, with xi, slope and zeta learned per channel.

    Gradients: `dx = g (1 or slope)`, `dxi = -sum dx`, `dzeta = sum g`, `dslope = sum of g (x - xi) where x <= xi`.

    Args:
        channels: Channels of the tensor `[N, C, H, W]`.
        slope: Initial slope below xi; xi and zeta start at 0.

    Source: Liu et al. 2020, "ReActNet" (arXiv 2003.03488), equation 2.
    """

    def __init__(self, channels: int, slope: float = 0.25) -> None:
        super().__init__()
        self.xi = nn.Parameter(torch.zeros(channels))
        self.zeta = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), slope))

    def forward(self, input: Tensor) -> Tensor:
        bent = F.prelu(input - _per_channel(self.xi), self.slope)
        return bent + _per_channel(self.zeta)


class Maxout(nn.Module):
    """`gp relu(x) - gn relu(-x)`, with both slopes learned per channel.

    Gradients: `dx = g (gp or gn)`, `dgp = sum g relu(x)`, `dgn = -sum g relu(-x)`.

    Args:
        channels: Channels of the tensor `[N, C, H, W]`.
        positive, negative: Initial slopes.

    Source: Tu et al. 2022, "AdaBin" (arXiv 2208.08084), section 3.4.
    """

    def __init__(self, channels: int, positive: float = 1.0, negative: float = 0.25) -> None:
        super().__init__()
        self.positive = nn.Parameter(torch.full((channels,), positive))
        self.negative = nn.Parameter(torch.full((channels,), negative))

    def forward(self, input: Tensor) -> Tensor:
        return torch.where(input > 0, _per_channel(self.positive), _per_channel(self.negative)) * input


ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda channels: nn.ReLU(),
    "hardtanh": lambda channels: nn.Hardtanh(),
    "prelu": lambda channels: nn.PReLU(channels),
    "rprelu": RPReLU,
    "maxout": Maxout,
}
