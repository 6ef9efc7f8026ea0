"""The rounding variables: one real number per weight; its rectified sigmoid is the fraction of a step added to the floor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qexp.quantizers.learned_rounding import LearnedRounding

STRETCH, SHIFT = 1.2, 0.1  # zeta - gamma and -gamma of the paper: the sigmoid reaches 0 and 1 at finite arguments


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Returns `clip(1.2 sigmoid(v) - 0.1, 0, 1)`."""
    return (STRETCH * v.sigmoid() - SHIFT).clamp(0, 1)


def start(fraction: Tensor) -> Tensor:
    """Returns the v at which the rectified sigmoid is `fraction`, 0 <= fraction < 1."""
    return -torch.log(STRETCH / (fraction + SHIFT) - 1)


def regularizer(h: Tensor, beta: float) -> Tensor:
    """Returns `sum(1 - |2h - 1|^beta)`, zero where every h is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


@dataclass(frozen=True)
class Annealing:
    """The exponent of the regularizer over the iterations: none during the warm-up, then linear from `first` to `last`."""

    iterations: int
    warmup: float = 0.2
    first: float = 20.0
    last: float = 2.0

    def active(self, step: int) -> bool:
        """Whether the regularizer counts at this iteration."""
        return step >= self.warmup * self.iterations

    def beta(self, step: int) -> float:
        """Returns the exponent at this iteration, 0 <= step <= iterations."""
        begin = self.warmup * self.iterations
        done = min(max((step - begin) / max(self.iterations - begin, 1), 0.0), 1.0)
        return self.first + (self.last - self.first) * done


class SoftRounding(nn.Module):
    """Replaces a weight's quantizer while its rounding is learned: `scale * (clip(floor(w / scale) + h(v), qmin, qmax))`.

    It starts at the float weight (unless the grid clips it).

    Args:
        quantizer: The fitted quantizer.
        weight: The float weight.

    Source: Nagel et al. 2020 (arXiv 2004.10568), equations 22-24.
    """

    def __init__(self, quantizer: LearnedRounding, weight: Tensor) -> None:
        super().__init__()
        self.shape, self.quantizer = weight.shape, [quantizer]  # in a list: not a submodule
        rows, _ = quantizer.rows(weight.detach().float())
        position = rows / quantizer.scale
        self.floor = position.floor()
        self.v = nn.Parameter(start(position - self.floor))
        self.scale, self.zero_point = quantizer.scale, quantizer.zero_point
        self.qmin, self.qmax = (
            torch.as_tensor(q, device=rows.device, dtype=rows.dtype) - self.zero_point for q in quantizer.limits
        )

    def h(self) -> Tensor:
        """Returns the fraction of a step that each weight lies above its floor, in 0..1."""
        return rectified_sigmoid(self.v)

    def forward(self, weight: Tensor | None = None) -> Tensor:
        codes = torch.minimum(torch.maximum(self.floor + self.h(), self.qmin), self.qmax)
        return self.quantizer[0].corrected((codes * self.scale).reshape(self.shape))

    @torch.no_grad()
    def undecided(self) -> int:
        """Returns how many roundings are neither down nor up."""
        h = self.h()
        return int(((h > 0) & (h < 1)).sum())

    @torch.no_grad()
    def harden(self, weight: Tensor) -> None:
        """Gives the quantizer the codes of `v >= 0`."""
        codes = torch.minimum(torch.maximum(self.floor + (self.v >= 0), self.qmin), self.qmax) + self.zero_point
        self.quantizer[0].adopt(weight.detach(), codes.reshape(self.shape))
