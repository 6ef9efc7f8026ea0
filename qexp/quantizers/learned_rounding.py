"""Uniform quantization whose roundings were learned: each code may lie a step off the nearest one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.quantizers.contract import ROUNDINGS
from qexp.quantizers.uniform import Uniform
from qexp.statistics.stats import TensorStats


class _Moved(torch.autograd.Function):
    """Returns the second tensor; the gradient goes to the first: moving a code does not change what the clip lets through."""

    @staticmethod
    def forward(ctx: Any, nearest: Tensor, moved: Tensor) -> Tensor:
        return moved.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class LearnedRounding(Uniform):
    """`codes = clip(round(w / scale + zero_point) + shift, qmin, qmax)`, `shift` one small integer a weight, learned by a pass.

    Until a pass has learned them the shifts are absent and this is `Uniform`. The float weight stays what it was, so `quantizers_off`
    still gives the float model; should training move it, the code follows and keeps its shift. Levels as `Uniform`. Saved: scale,
    zero_point, the grid's limits, shift. Learned roundings are not idempotent (a shift would apply twice), not monotone (neighbours move
    apart), and may miss by more than half a step, so these are not promised; like every range it needs calibration.

    Args:
        bits, shape, granularity, rounding, signed, narrow, symmetric, range, pow2_scale: See `Uniform`.

    Source: the result of Nagel et al. 2020 (arXiv 2004.10568), equation 22, and of what builds on it; the learning is in
    `qexp.passes.reconstruction`.
    """

    properties = frozenset({"needs_calibration"})
    sites = frozenset({"weight"})
    roundings = tuple(rounding for rounding in ROUNDINGS if rounding != "stochastic")  # which has no nearest code

    def __init__(self, bits: int, shape: tuple[int, ...] = (1,), **options: Any) -> None:
        super().__init__(bits, shape, **options)
        self.register_buffer("shift", None)

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        self.shift = None
        super().fit(stats, followed_by_relu)

    def adopt(self, w: Tensor, codes: Tensor) -> None:
        """Makes `codes`, of the grid and in the shape of `w`, the codes of `w` from now on."""
        shift = codes.float() - super().codes(w).float()
        if not bool((shift.abs() <= 127).all()):
            raise QexpError(f"{self.name}: a learned code lies {int(shift.abs().max())} steps off the nearest one")
        self.shift = shift.to(torch.int8)

    @property
    def moved(self) -> int:
        """How many codes are not the nearest ones."""
        return 0 if self.shift is None else int((self.shift != 0).sum())

    def forward(self, x: Tensor) -> Tensor:
        nearest = super().forward(x)
        if self.shift is None:
            return nearest
        return _Moved.apply(nearest, self.dequantize(self.codes(x)).to(x.dtype))

    def codes(self, x: Tensor) -> Tensor:
        nearest = super().codes(x)
        if self.shift is None:
            return nearest
        if self.shift.shape != x.shape:
            raise QexpError(f"{self.name}: roundings were learned for {list(self.shift.shape)}, got {list(x.shape)}")
        rows, _ = self.rows((nearest + self.shift.to(nearest.dtype)).detach())
        qmin, qmax = (torch.as_tensor(limit, device=rows.device, dtype=rows.dtype) for limit in self.limits)
        return torch.minimum(torch.maximum(rows, qmin), qmax).reshape(x.shape)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "shift")
        self.shift = None if saved is None else torch.zeros_like(saved, device=self.ready.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
