"""Binary activations: the sign, with the gradient of a clipped identity."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.granularity import Granularity
from qexp.quantizers.base import Quantizer
from qexp.statistics.stats import TensorStats


class _Binary(torch.autograd.Function):
    """The given values; the gradient passes where `low <= x <= 1`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, low: float) -> Tensor:
        ctx.save_for_backward((x >= low) & (x <= 1))
        return values.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None


class Sign(Quantizer):
    """`sign(x)`, with sign(0) = +1; for a tensor that is never negative `1[x > 1/2]`.

    Levels: 2, at -1 and +1 (at 0 and 1 for the one-sided tensor), so 1 bit alone. Gradient: 1 where `|x| <= 1` (`0 <= x <= 1`), else 0.
    Calibration settles which of the two forms an `auto` tensor takes. No error bound: half a step is 1, a value may lie anywhere
    beyond. Saved: the form.

    Args:
        bits, shape, granularity, rounding: See `Quantizer`; 1 bit, the same for every channel, nothing is rounded.
        signed: True is the sign, and refuses a tensor that never was negative, which it would make constant; False takes 0 and 1;
            `auto` goes by what calibration saw.

    Source: Rastegari et al. 2016 (arXiv 1603.05279), section 3.2.
    Differs from the paper: 0 and 1 for one-sided tensors, since the paper's blocks have no ReLU before the sign.

    >>> q = Sign(1, (3,))
    >>> q.fit(TensorStats.of(torch.tensor([-1.0, 2.0])))
    >>> q(torch.tensor([-0.3, 0.0, 5.0])).tolist()
    [-1.0, 1.0, 1.0]
    """

    properties = frozenset({"idempotent", "monotone", "needs_calibration"})
    sites = frozenset({"input", "output"})
    bits_allowed = (1, 1)

    def __init__(
        self,
        bits: int = 1,
        shape: tuple[int, ...] = (1,),
        *,
        granularity: Granularity | None = None,
        rounding: str = "half_even",
        signed: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(bits, shape, granularity=granularity, rounding=rounding)
        if signed not in (True, False, "auto"):
            raise QexpError(f"Sign: signed={signed!r}; allowed are true, false, auto")
        self.signed = signed
        self.register_buffer("two_sided", torch.tensor(signed is not False))
        self._two_sided = signed is not False  # the same, without asking the device in every forward

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        negative = bool((stats.min < 0).any())
        if self.signed is True and not negative:
            raise QexpError(
                f"{self.name}: never negative in calibration, so that its sign says nothing; use signed: auto, "
                "or put the batch norm (and no ReLU) right before this layer"
            )
        self._take(negative if self.signed == "auto" else bool(self.signed))
        self.mark_ready()

    def _take(self, two_sided: bool) -> None:
        self._two_sided = two_sided
        self.two_sided.fill_(two_sided)

    @property
    def limits(self) -> tuple[int, int]:
        return 0, 1

    @property
    def scale(self) -> Tensor:
        return torch.full((1,), 2.0 if self._two_sided else 1.0, device=self.ready.device)

    @property
    def zero_point(self) -> Tensor:
        """A half where the levels are -1 and +1, zero where they are 0 and 1."""
        return torch.full((1,), 0.5 if self._two_sided else 0.0, device=self.ready.device)

    def forward(self, x: Tensor) -> Tensor:
        return _Binary.apply(x, self.dequantize(self.codes(x)), -1.0 if self._two_sided else 0.0)

    def codes(self, x: Tensor) -> Tensor:
        self.require_ready()
        return (x.detach() >= 0 if self._two_sided else x.detach() > 0.5).int()

    def dequantize(self, codes: Tensor) -> Tensor:
        return 2.0 * codes - 1 if self._two_sided else codes.float()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"signed": self._two_sided, "range": "sign" if self._two_sided else "above 1/2"}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._take(bool(self.two_sided))
