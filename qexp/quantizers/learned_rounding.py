"""Uniform quantization with learned roundings: each code may differ from the nearest one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.quantizers.contract import ROUNDINGS
from qexp.quantizers.uniform import Uniform
from qexp.statistics.stats import TensorStats


class _Moved(torch.autograd.Function):
    """Returns the second tensor; the gradient goes to the first, because a moved code does not change which values are clipped."""

    @staticmethod
    def forward(ctx: Any, nearest: Tensor, moved: Tensor) -> Tensor:
        return moved.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class LearnedRounding(Uniform):
    """`codes = clip(round(w / scale + zero_point) + shift, qmin, qmax)`; `shift` is one small integer per weight, learned by a pass.

    Before a pass has learned the shifts, there are none, and this is `Uniform`. The float weight is unchanged, so `quantizers_off` still
    gives the float model. If training changes the weight, the code follows and keeps its shift. Levels: as for `Uniform`. Saved: scale,
    zero_point, the grid's limits, shift. Learned roundings are not idempotent (a shift would apply twice), not monotone (neighbours move
    apart), and may be off by more than half a step. Calibration is needed.

    Args:
        bits, shape, granularity, rounding, signed, narrow, symmetric, range, pow2_scale: See `Uniform`.

    Source: the result of Nagel et al. 2020 (arXiv 2004.10568), equation 22, and of methods based on it; `qexp.passes.reconstruction`
    learns the shifts.
    """

    properties = frozenset({"needs_calibration"})
    sites = frozenset({"weight"})
    roundings = tuple(
        rounding for rounding in ROUNDINGS if rounding != "stochastic"
    )  # stochastic rounding has no nearest code

    def __init__(self, bits: int, shape: tuple[int, ...] = (1,), **options: Any) -> None:
        super().__init__(bits, shape, **options)
        self.register_buffer("shift", None)

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        self.shift = None
        super().fit(stats, followed_by_relu)

    def adopt(self, w: Tensor, codes: Tensor) -> None:
        """Makes `codes` (on the grid, in the shape of `w`) the codes of `w` from now on."""
        shift = codes.float() - super().codes(w).float()
        far = bool((shift.abs() > 127).any())  # only with wide codes, where the inputs determine each weight poorly
        self.shift = shift.to(torch.int16 if far else torch.int8)

    @property
    def moved(self) -> int:
        """Number of codes that are not the nearest ones."""
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
