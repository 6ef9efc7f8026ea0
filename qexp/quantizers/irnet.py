"""IR-Net: signs of weights that are standardised per filter, times a power of two."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.quantizers.surrogate import BinaryWeight

_LEAST = 1e-12  # standard deviation of a filter without spread


class IRNet(BinaryWeight):
    """`w^ = s sign(z)` with `z = (w - mean) / std` of each filter and `s = 2^round(log2 mean|z|)`.

    Levels: 2, at -s and +s, so 1 bit only; sign(0) = +1. Gradient: with `dz = g s h(z)`, h the surrogate's slope, n weights in a filter,
    `dw_i = (dz_i - mean(dz) - z_i sum_j dz_j z_j / (n - 1)) / std`; none through s. The sharpness of `ede` goes from `tmin` to `tmax` over
    the optimizer steps of the training. No calibration: mean and std are computed from the tensor. Not idempotent, not monotone (the
    statistics move with each weight), and without an error bound of half a step: the levels are those of the standardised weight. Saved:
    s as last used, the step and the number of steps of `ede`.

    Args:
        bits, shape, granularity, rounding, gradient, tmin, tmax: See `BinaryWeight`.
        balance: `centre_std` subtracts the filter's mean and divides by its standard deviation; `centre` only subtracts the mean;
            `none` does neither.
        scale_by: `pow2`, `mean` (`mean|z|`) or `none` (1).

    Source: Qin et al. 2020, "Forward and backward information retention" (arXiv 1909.10788), equations 6-9 and 13.
    Differs from the paper: `ede` advances with each optimizer step instead of each epoch; a filter whose weights are all equal raises
    an error when training starts; the authors' code divides by zero there.

    >>> q = IRNet(1, (6,))
    >>> q(torch.tensor([0.5, -0.2, 0.3, -1.4, 0.1, 0.4])).tolist()
    [1.0, -1.0, 1.0, -1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        bits: int = 1,
        shape: tuple[int, ...] = (1,),
        *,
        balance: Literal["centre_std", "centre", "none"] = "centre_std",
        scale_by: Literal["pow2", "mean", "none"] = "pow2",
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        for name, got, allowed in (
            ("balance", balance, ("centre_std", "centre", "none")),
            ("scale_by", scale_by, ("pow2", "mean", "none")),
        ):
            if got not in allowed:
                raise QexpError(f"IRNet: {name}={got!r} is not allowed; use {', '.join(allowed)}")
        self.balance, self.scale_by = balance, scale_by

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor, None]:
        z = rows if self.balance == "none" else rows - rows.mean(1, keepdim=True)
        if self.balance == "centre_std":
            z = z / rows.std(1, correction=min(1, rows.shape[1] - 1), keepdim=True).clamp_min(_LEAST)
        magnitude = z.detach().abs().mean(1, keepdim=True).clamp_min(_LEAST)
        if self.scale_by == "pow2":
            return z, torch.exp2(torch.round(torch.log2(magnitude))), None
        return z, magnitude if self.scale_by == "mean" else torch.ones_like(magnitude), None

    def on_training_start(self, latent: Tensor | None, total_steps: int) -> None:
        super().on_training_start(latent, total_steps)
        if self.balance != "none":
            self.refuse_equal_weights(latent)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"range": f"{self.balance}, scale {self.scale_by}"}
