"""Qronos: the first column compensates the error of the inputs; the other columns follow GPTQ."""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.passes.feedback.feedback import Feedback, Problem
from qexp.passes.feedback.gptq import Quantize, spread_errors, upper_of_inverse


def qronos(w: Tensor, cross: Tensor, gram: Tensor, quantize: Quantize, damp: float = 1e-6) -> Tensor:
    """Returns the quantized values of weights `[rows, n]`.

    The first is `Q((sum_j G_1j w_j - sum_{j>1} H_1j w_j) / H_11)`; the others are then the least-squares weights given it, which are
    rounded as GPTQ does.

    Args:
        w: Float weights, float64.
        cross: `G = X^ X'`, rows of the quantized network's inputs.
        gram: `H = X^ X^'`.
        quantize: Returns the values of a column, given its place.
        damp: Share of H's largest eigenvalue that is added to the diagonals of both.
    """
    h, g, w = gram.clone(), cross.clone(), w.clone()
    dead = h.diagonal() == 0
    w[:, dead] = 0
    h.diagonal()[dead] = 1
    first = (w @ g[0] - w[:, 1:] @ h[0, 1:]) / h[0, 0]
    out = torch.empty_like(w)
    out[:, 0] = quantize(first, 0)
    if w.shape[1] == 1:
        return out
    extra = damp * torch.linalg.eigvalsh(h)[-1] if damp else 0.0
    h.diagonal().add_(extra)
    g.diagonal().add_(extra)
    wanted = w @ g[1:].T - out[:, :1] * h[0, 1:]
    rest = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(h[1:, 1:])).T
    out[:, 1:] = spread_errors(rest, upper_of_inverse(h[1:, 1:]), quantize, first=1)
    return out


class Qronos(Feedback):
    """Rounds column by column, after a correction for the difference between the float and the quantized network's inputs.

    Where the inputs are the same it is GPTQ. Scales and zero points stay what calibration found.

    Args:
        damp: Share of the largest eigenvalue of `X^ X^'` that is added to the diagonal.
        positions: Largest number of output positions per batch of images, drawn at random; None takes all.
        memory_mb: Limit of the activations kept in memory, in MiB; the rest goes to a file.

    Source: Zhang, Zhang, Colbert, Saab 2025, "Qronos" (arXiv 2505.11695), algorithm 1.
    Differs from the paper: columns in their own order; a layer that ends worse than with nearest roundings keeps those.
    """

    def __init__(self, damp: float = 1e-6, positions: int | None = None, memory_mb: float = 1024) -> None:
        super().__init__(positions, memory_mb)
        self.choose(damp=(damp, damp > 0, "more than 0"))
        self.damp = damp

    def solve(self, problem: Problem) -> Tensor:
        return qronos(problem.w, problem.cross, problem.quantized, problem.quantize, self.damp)
