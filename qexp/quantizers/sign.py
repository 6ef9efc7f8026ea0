"""Binary activations: the sign, with a selectable surrogate gradient."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.quantizers.base import Quantizer
from qexp.quantizers.surrogate import Sloped, sign
from qexp.statistics.stats import TensorStats

_LEAST_STD = 1e-6


def _deviation(x: Tensor) -> Tensor:
    """Returns the standard deviation of each sample of `x` `[N, ...]`, in a shape that broadcasts against it."""
    values = x.float().flatten(1)
    found = values.std(1, correction=min(1, values.shape[1] - 1)).clamp_min(_LEAST_STD)
    return found.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


class Sign(Sloped, Quantizer):
    """`sign(x)` with sign(0) = +1; for a tensor without negative values `1[x > 1/2]`.

    Levels: 2, at -1 and +1 (at 0 and 1 for the one-sided tensor), so 1 bit only. Gradient: `g h(u)` with `u = x` (`2x - 1` where
    one-sided) and h the surrogate's slope; for `ste` that is 1 where `|x| <= 1` (`0 <= x <= 1`), else 0. With `normalize` u is first
    divided by its standard deviation in each sample; this changes no sign, only the width of h. The division is part of the gradient.
    Calibration decides the form of an `auto` tensor. No error bound: half a step is 1, but a value may be arbitrarily large. Saved: the
    form, and the step and number of steps of `ede`.

    Args:
        bits, shape, granularity, rounding: See `Quantizer`; 1 bit, the same for every channel, nothing is rounded.
        signed: True is the sign; it raises for a tensor without negative values, whose sign is constant. False uses 0 and 1. `auto`
            decides from calibration.
        gradient: `ste` (XNOR-Net), `approx` (Bi-Real Net), `ede` (IR-Net) or `identity` (see `surrogate.slope`).
        tmin, tmax: Sharpness of `ede` at the first step and after the last.
        normalize: `train` divides by the standard deviation only in training (ReCU); or `always`, or `none`.

    Source: Rastegari et al. 2016 (arXiv 1603.05279), section 3.2; `normalize` Xu et al. 2021 (arXiv 2103.12369), section 3.
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
        signed: bool | Literal["auto"] = "auto",
        gradient: Literal["ste", "approx", "ede", "identity"] = "ste",
        tmin: float = 0.1,
        tmax: float = 10.0,
        normalize: Literal["none", "train", "always"] = "none",
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        if signed not in (True, False, "auto"):
            raise QexpError(f"Sign: signed={signed!r}; allowed are true, false, auto")
        if normalize not in ("none", "train", "always"):
            raise QexpError(f"Sign: normalize={normalize!r} is not allowed; use none, train or always")
        self.signed, self.normalize = signed, normalize
        self.take_slope(gradient, tmin, tmax)
        self.register_buffer("two_sided", torch.tensor(signed is not False))
        self._two_sided = (
            signed is not False
        )  # a copy on the host: reading the buffer in every forward would synchronise with the device

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        negative = bool((stats.min < 0).any())
        if self.signed is True and not negative:
            raise QexpError(
                f"{self.name}: never negative in calibration, so its sign is constant; use signed: auto, "
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
        """One half where the levels are -1 and +1; zero where they are 0 and 1."""
        return torch.full((1,), 0.5 if self._two_sided else 0.0, device=self.ready.device)

    def forward(self, x: Tensor) -> Tensor:
        signs = 2.0 * self.codes(x) - 1
        u = x if self._two_sided else 2 * x - 1
        if self.normalize == "always" or (self.normalize == "train" and self.training):
            u = u / _deviation(u)
        y = sign(u, self.gradient, self.t, signs)
        return y if self._two_sided else (y + 1) / 2

    def codes(self, x: Tensor) -> Tensor:
        self.require_ready()
        return (x.detach() >= 0 if self._two_sided else x.detach() > 0.5).int()

    def dequantize(self, codes: Tensor) -> Tensor:
        return 2.0 * codes - 1 if self._two_sided else codes.float()

    def on_training_start(self, latent: Tensor | None, total_steps: int) -> None:
        self.begin(total_steps)

    def on_optimizer_step(self, latent: Tensor | None) -> None:
        self.advance()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"signed": self._two_sided, "range": "sign" if self._two_sided else "above 1/2"}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._take(bool(self.two_sided))
        self.read_progress()
