"""INQ: weights become powers of two or zero; they are frozen in parts while the rest is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.quantizers.base import Quantizer
from qexp.statistics.stats import TensorStats

SOURCE_FRACTIONS = (0.3, 0.6, 0.8, 0.9, 1.0)
_LEAST = -126  # exponent of the smallest normal float32


def nearest_exponent(magnitude: Tensor) -> Tensor:
    """Returns `floor(log2(4|w|/3))`, int32: the e with `0.75 * 2^e <= |w| < 1.5 * 2^e`, exactly; for zero a very low exponent.

    >>> nearest_exponent(torch.tensor([0.74, 0.75, 1.49, 1.5])).tolist()
    [-1, 0, 0, 1]
    """
    mantissa, exponent = torch.frexp(magnitude.float())
    exponent = exponent - (mantissa < 0.75).to(exponent.dtype)
    return torch.where(magnitude > 0, exponent, -1000)


class INQ(Quantizer):
    """`w^ = sign(w) * 2^e` with `e = floor(log2(4|w|/3))` between n2 and n1, or zero: powers of two by arithmetic midpoints.

    `n1 = floor(log2(4 max|w| / 3))`, `n2 = n1 - E + 1` with E exponents. Levels: 2E + 1, zero among them. Ties go to the greater power.
    Gradient: 1 where `|w| < 1.5 * 2^n1`, else 0. While training, weights that are not frozen yet stay float, with gradient 1.
    Calibration sets n1. Without training every weight is quantized. With training, the weights of largest magnitude (the first share in
    `fractions`) are set to their level and frozen, and the rest trains on. At each further fraction more weights are frozen, at equal
    distances over the training; n1 does not change. A frozen weight is restored after each optimizer step, so momentum and weight decay
    do not change it. Saved: the exponents n1 (as `scale` 2^n1), the mask of frozen weights, their values, the number of steps done.
    There is no error bound of half a step, since the distance of levels grows with them.

    Args:
        bits: 2..7.
        shape, granularity: As for every quantizer.
        rounding: half_even only; midpoints are part of the method.
        exponents: E: `source` 2^(bits-1) - 1 (7 at 4 bits), `paper` 2^(bits-2), or a number of at most 2^(bits-1) - 1.
        underflow: Below the smallest level a weight is zero under `source` 0.75 * 2^n2, or `paper` 0.5 * 2^n2.
        fractions: Cumulative shares of frozen weights, ascending; the last is 1.

    Source: Zhou et al. 2017 (arXiv 1702.03044), equations 1-5 and section 2.2; TF2-Engine's compression for the defaults.
    Differs from the paper: the fractions are spread evenly over one training with one schedule; the paper trains once per fraction.

    >>> q = INQ(4, (7,))
    >>> w = torch.tensor([0.9, -0.31, 0.12, 0.02, 0.01, 0.2, -0.05])
    >>> q.fit(TensorStats.of(w))
    >>> q(w).tolist()
    [1.0, -0.25, 0.125, 0.015625, 0.0, 0.25, -0.0625]
    """

    properties = frozenset({"idempotent", "monotone", "needs_calibration"})
    sites = frozenset({"weight", "bias"})
    bits_allowed = (2, 7)
    roundings = ("half_even",)

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        exponents: str | int = "source",
        underflow: str = "source",
        fractions: Sequence[float] = SOURCE_FRACTIONS,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        named = {"source": 2 ** (bits - 1) - 1, "paper": 2 ** (bits - 2)}
        self.count = named.get(exponents, exponents)
        if isinstance(self.count, bool) or not isinstance(self.count, int) or not 1 <= self.count <= named["source"]:
            raise QexpError(
                f"INQ: exponents={exponents!r}; allowed are source, paper, 1..{named['source']} at {bits} bits"
            )
        if underflow not in ("source", "paper"):
            raise QexpError(f"INQ: underflow={underflow!r}; allowed are source, paper")
        self.fractions = tuple(float(f) for f in fractions)
        if list(self.fractions) != sorted(self.fractions) or not self.fractions[0] > 0 or self.fractions[-1] != 1:
            raise QexpError(
                f"INQ: fractions={list(fractions)} is not allowed; use ascending shares above 0 that end at 1"
            )
        self.underflow = underflow
        scale_shape = self.granularity.scale_shape(self.shape)
        self.register_buffer("scale", torch.ones(scale_shape))
        self.register_buffer("zero_point", torch.zeros(scale_shape))
        self.register_buffer("frozen", torch.zeros(self.shape, dtype=torch.bool))
        self.register_buffer("held", torch.zeros(self.shape))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("training_steps", torch.zeros((), dtype=torch.int64))
        self._partial = False  # whether some weights are still trained in float
        # Steps done, steps planned and weights frozen, as numbers: reading the buffers would wait for the device after each step.
        self._counts: tuple[int, int, int] | None = None

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        greatest = torch.maximum(stats.min.abs(), stats.max.abs()).float()
        n1 = nearest_exponent(greatest).clamp_min(self.count - 1 + _LEAST)  # so that the lowest level is a float32
        self.scale.copy_(torch.exp2(n1.double()).float().reshape(self.scale.shape))
        self.mark_ready()

    @property
    def n1(self) -> Tensor:
        """Greatest exponents, int32, in the shape of the scale."""
        return torch.frexp(self.scale).exponent - 1

    @property
    def limits(self) -> tuple[int, int]:
        return -self.count, self.count

    def codes(self, x: Tensor) -> Tensor:
        """Returns `±(e - n2 + 1)`, zero for zero, int32."""
        self.require_ready()
        rows, _ = self.rows(x.detach().float())
        n1 = self.n1.to(rows.device)
        n2 = n1 - self.count + 1
        magnitude = rows.abs()
        if self.underflow == "paper":  # from half of the smallest level on, a weight becomes that level
            least = torch.exp2(n2.double()).float()
            magnitude = torch.where((magnitude >= least / 2) & (magnitude < least), least, magnitude)
        index = torch.minimum(nearest_exponent(magnitude), n1) - n2 + 1
        codes = torch.where(rows < 0, -1, 1).int() * index.clamp_min(0)
        return codes.reshape(x.shape)

    def dequantize(self, codes: Tensor) -> Tensor:
        rows, _ = self.rows(codes)
        n2 = self.n1.to(rows.device) - self.count + 1
        values = torch.exp2((rows.abs() - 1 + n2).double()).float() * torch.sign(rows)
        return values.reshape(codes.shape).float()

    def forward(self, x: Tensor) -> Tensor:
        self.require_ready()
        if self._partial:  # a frozen weight already holds its level
            return torch.where(self.frozen, self.held, x.float()).to(x.dtype)
        rows, _ = self.rows(x)
        inside = (rows.abs().float() < 1.5 * self.scale).reshape(x.shape)
        return _Straight.apply(x, self.dequantize(self.codes(x)), inside)

    # -- freezing ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_training_start(self, latent: Tensor | None, total_steps: int) -> None:
        if int(self.steps) == 0 and not bool(self.frozen.any()):
            self.training_steps.fill_(total_steps)
            self.freeze(latent, self.fractions[0])
        self._counts = self._read_counts()

    def _read_counts(self) -> tuple[int, int, int]:
        return int(self.steps), int(self.training_steps), int(self.frozen.sum())

    @torch.no_grad()
    def on_optimizer_step(self, latent: Tensor | None) -> None:
        done, planned, frozen = self._counts or self._read_counts()
        if not planned:
            return
        latent.copy_(torch.where(self.frozen, self.held.to(latent.dtype), latent))
        self.steps += 1
        self._counts = done + 1, planned, frozen
        phase = (done + 1) * len(self.fractions) // planned
        share = self.fractions[min(phase, len(self.fractions) - 1)]
        if round(share * latent.numel()) > frozen:
            self.freeze(latent, share)
            self._counts = self._read_counts()

    @torch.no_grad()
    def freeze(self, latent: Tensor, share: float) -> None:
        """Freezes the largest weights that are still free, in place, until `share` of all are frozen."""
        wanted = round(share * latent.numel()) - int(self.frozen.sum())
        if wanted > 0:
            free = torch.where(self.frozen, -1.0, latent.detach().abs().float()).flatten()
            self.frozen.view(-1)[free.topk(wanted).indices] = True
            levels = self.dequantize(self.codes(latent))
            self.held.copy_(torch.where(self.frozen, torch.where(self.held != 0, self.held, levels), self.held))
            latent.copy_(torch.where(self.frozen, self.held.to(latent.dtype), latent))
        self._partial = not bool(self.frozen.all())

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"signed": True, "range": f"{self.count} exponents"}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._partial = bool(self.frozen.any()) and not bool(self.frozen.all())
        self._counts = None


class _Straight(torch.autograd.Function):
    """Replaces `x` by a given value; the gradient passes where `inside`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None
