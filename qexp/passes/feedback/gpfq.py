"""GPFQ: follows the float layer's result, one column after the other."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qexp.passes.feedback.feedback import Feedback, Problem
from qexp.passes.feedback.gptq import Quantize


def gpfq(w: Tensor, cross: Tensor, gram: Tensor, quantize: Quantize, by_size: bool = False) -> Tensor:
    """Returns the quantized values of weights `[rows, n]`: each is the level nearest to the remaining error along its input.

    `w^_t = Q((sum_{j<=t} G_tj w_j - sum_{j<t} H_tj w^_j) / H_tt)`.

    Args:
        w: Float weights, float64.
        cross: `G = X^ X'`, rows of the quantized network's inputs.
        gram: `H = X^ X^'`.
        quantize: Returns the values of a column, given its place.
        by_size: Columns in the order of falling `H_tt` instead of their own.
    """
    sizes = gram.diagonal()
    order = (
        torch.argsort(sizes, descending=True, stable=True) if by_size else torch.arange(len(gram), device=gram.device)
    )
    places = order.tolist()
    out = torch.zeros_like(w)
    # The remaining error along each column.
    behind = torch.zeros(w.shape[0], len(gram), dtype=w.dtype, device=w.device)
    for t in places:
        behind += w[:, t, None] * cross[:, t]
        if sizes[t] > 0:
            out[:, t] = quantize(behind[:, t] / sizes[t], t)
        else:
            out[:, t] = quantize(torch.zeros_like(out[:, t]), t)
        behind -= out[:, t, None] * gram[:, t]
    return out


class GPFQ(Feedback):
    """Rounds column by column, following `W X` of the float network with `W^ X^` of the network quantized so far.

    No matrix is inverted and nothing is damped; scales and zero points stay what calibration found.

    Args:
        order: `natural`, or `size` for falling sizes of the inputs.
        positions: Largest number of output positions per batch of images, drawn at random; None takes all.
        memory_mb: Limit of the activations kept in memory, in MiB; the rest goes to a file.

    Source: Zhang, Zhou, Saab 2022, "Post-training quantization for neural networks with provable guarantees" (arXiv 2201.11113),
    equation 8, after Lybrand, Saab 2020 (arXiv 2010.15979).
    Differs from the paper: a layer that ends worse than with nearest roundings keeps those.
    """

    def __init__(
        self, order: Literal["natural", "size"] = "natural", positions: int | None = None, memory_mb: float = 1024
    ) -> None:
        super().__init__(positions, memory_mb)
        self.choose(order=(order, order in ("natural", "size"), "natural, size"))
        self.order = order

    def solve(self, problem: Problem) -> Tensor:
        return gpfq(problem.w, problem.cross, problem.quantized, problem.quantize, self.order == "size")
