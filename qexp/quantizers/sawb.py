"""SAWB: the clip of a weight is computed from two of its moments at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qexp.quantizers.base import GridQuantizer

COEFFICIENTS = {2: (3.12, 2.064), 3: (7.509, 6.892), 4: (12.68, 12.80), 5: (17.74, 18.64)}


class SAWB(GridQuantizer):
    """Even levels from -a to a, with `a = c1 sqrt(E[w^2]) - c2 E|w|` of the current weight; c1 and c2 are published for each width.

    Levels: 2^bits, `a (2 code / n - 1)` with `n = 2^bits - 1`, none of them zero; ties to the even code. Gradient: 1 where `|w| <= a`, else
    0; none through a. No calibration: the moments are computed from the tensor. Not idempotent, since the levels have other moments. a is
    limited to `E|w|` .. `max|w|`, which matters for tensors that are not bell-shaped. Saved: the step as last used.

    Args:
        bits: 2..5, the widths whose coefficients minimise the squared error over bell-shaped distributions.
        shape, granularity, rounding: See `Quantizer`.

    Source: Choi et al. 2019, "Accurate and efficient 2-bit quantized neural networks" (SysML), section 3.
    Differs from the paper: the gradient stops at the clip; a is limited; the moments are per channel or group if the granularity is.

    >>> q = SAWB(2, (4,))
    >>> [round(v, 4) for v in q(torch.tensor([-1.0, -0.2, 0.1, 0.6])).tolist()]
    [-0.872, -0.2907, 0.2907, 0.872]
    """

    properties = frozenset({"monotone", "half_step"})
    sites = frozenset({"weight"})
    bits_allowed = (2, 5)
    symmetric = False

    def __init__(self, bits: int, shape: tuple[int, ...] = (1,), **common: Any) -> None:
        super().__init__(bits, shape, **common)
        self.hold_scale(zero_point=(2**bits - 1) / 2)

    @property
    def limits(self) -> tuple[int, int]:
        return 0, 2**self.bits - 1

    @torch.no_grad()
    def scale_and_zero(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if rows.numel():
            w, (c1, c2) = self.granularity.rows(rows.float()), COEFFICIENTS[self.bits]
            mean, most = w.abs().mean(1), w.abs().amax(1)
            clip = (c1 * w.square().mean(1).sqrt() - c2 * mean).clamp(mean, most)
            self.put(scale=(2 * clip / self.limits[1]).clamp_min(torch.finfo(torch.float32).tiny))
        return self.scale.clone(), self.zero_point  # a copy: the next call changes the buffer

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"signed": True, "range": "two moments"}
