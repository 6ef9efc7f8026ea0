"""GPTQ: each column's rounding error is spread over the columns that are still to be rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from qexp.passes.feedback.feedback import Feedback, Problem

Quantize = Callable[[Tensor, int], Tensor]


def spread_errors(w: Tensor, upper: Tensor, quantize: Quantize, first: int = 0) -> Tensor:
    """Returns the quantized values of weights `[rows, n]`, column by column.

    Args:
        w: Float weights.
        upper: The upper Cholesky factor of the inverse of the inputs' Gram matrix, `[n, n]`.
        quantize: Returns the values of a column `[rows]`, given its place.
        first: Place of the first column, as `quantize` counts.
    """
    w, out = w.clone(), torch.empty_like(w)
    for i in range(w.shape[1]):
        out[:, i] = quantize(w[:, i], first + i)
        error = (w[:, i] - out[:, i]) / upper[i, i]
        w[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
    return out


def upper_of_inverse(h: Tensor) -> Tensor:
    """Returns U with `U' U = h^-1`, upper triangular."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


def gptq(w: Tensor, gram: Tensor, quantize: Quantize, damp: float = 0.01, by_size: bool = False) -> Tensor:
    """Returns the quantized values of weights `[rows, n]` for inputs with the Gram matrix `[n, n]`.

    Args:
        w: Float weights, float64.
        gram: `2 X X' / N`.
        quantize: Returns the values of a column, given its place.
        damp: Share of the mean diagonal that is added to the diagonal.
        by_size: Columns in the order of falling diagonals instead of their own.

    >>> w, x = torch.tensor([[0.83, -0.42]]).double(), torch.tensor([[1.0, 1.9], [0.5, 1.5]]).double()
    >>> gptq(w, x @ x.T, lambda column, _: 0.3 * torch.round(column / 0.3)).div(0.3).round().tolist()
    [[3.0, -2.0]]
    """
    h, w = gram.clone(), w.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    order = (
        torch.argsort(h.diagonal(), descending=True, stable=True) if by_size else torch.arange(len(h), device=h.device)
    )
    h, w = h[order][:, order], w[:, order]
    h.diagonal().add_(damp * h.diagonal().mean())
    places = order.tolist()
    out = spread_errors(w, upper_of_inverse(h), lambda column, i: quantize(column, places[i]))
    return out[:, torch.argsort(order)]


class GPTQ(Feedback):
    """Rounds column by column; `e = (w_i - w^_i) / U_ii` changes the later ones, `w_j -= e U_ij`, with U from the inputs' Gram matrix.

    Scales and zero points stay what calibration found.

    Args:
        damp: Share of the mean diagonal of `2 X X' / N` that is added to it.
        order: `natural`, or `size` for falling diagonals (act_order).
        input: `quantized` takes X from the network quantized so far, `float` from the float network.
        positions: Largest number of output positions per batch of images, drawn at random; None takes all.
        memory_mb: Limit of the activations kept in memory, in MiB; the rest goes to a file.

    Source: Frantar et al. 2022, "GPTQ" (arXiv 2210.17323), equations 2-3 and algorithm 1.
    Differs from the paper: convolutions too; a layer that ends worse than with nearest roundings keeps those.
    """

    def __init__(
        self,
        damp: float = 0.01,
        order: Literal["natural", "size"] = "natural",
        input: Literal["quantized", "float"] = "quantized",
        positions: int | None = None,
        memory_mb: float = 1024,
    ) -> None:
        super().__init__(positions, memory_mb)
        self.choose(damp=(damp, damp > 0, "more than 0"))
        self.choose(order=(order, order in ("natural", "size"), "natural, size"))
        self.choose(input=(input, input in ("quantized", "float"), "quantized, float"))
        self.damp, self.order, self.input = damp, order, input

    def solve(self, problem: Problem) -> Tensor:
        gram = problem.quantized if self.input == "quantized" else problem.floating
        gram = 2 * gram / max(problem.positions, 1)
        return gptq(problem.w, gram, problem.quantize, self.damp, self.order == "size")
