"""Batch norm as two integers per channel, as hardware applies it to an accumulator: multiply, add, shift, clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import QuantBatchNorm2d, Quantized
from qexp.numerics.fixed_type import FORMS, fixed_type, fraction_bits, shifted
from qexp.quantizers.base import ROUNDINGS, Quantizer


def bn_constants(
    bn: tuple[Tensor, Tensor, Tensor, Tensor, float],
    rescale: Tensor | float,
    s_out: Tensor | float,
    bit: int,
    intbit: int,
    form: str = "saturate",
) -> tuple[Tensor, Tensor]:
    """Returns the factor `k_q` and the summand `t_q` of each channel, `[C]` int64; the result's codes are `(acc k_q + t_q) / 2^f`.

    `k = rescale gamma / sqrt(var + eps)` and `t = s_out (beta - gamma mean / sqrt(var + eps))`, both as `fixed_type<bit, intbit>`.

    Args:
        bn: gamma, beta, mean, var `[C]` and eps.
        rescale: Output codes per unit of the accumulator.
        s_out: Output codes per 1.0.
        bit, intbit, form: See `fixed_type`.
    """
    gamma, beta, mean, var, eps = bn
    gamma, beta, mean, var = (t.detach().double() for t in (gamma, beta, mean, var))
    slope = gamma / torch.sqrt(var + eps)
    return fixed_type(rescale * slope, bit, intbit, form), fixed_type(s_out * (beta - slope * mean), bit, intbit, form)


_NEARLY_WHOLE = 0.25  # float32 sums of codes differ from whole numbers by less than this; sums of a float input do not


@dataclass(frozen=True)
class Steps:
    """Holds the quantizers from which a batch norm reads the steps of its input and of its result.

    Attributes:
        conv: The layer whose accumulator is the input; None where the input is a quantized tensor.
        arriving: Quantizer of that layer's input, or of the quantized tensor; None for a float input (a step of 1).
        leaving: The next quantizer of the result; None where the result stays wide.
    """

    conv: nn.Module | None
    arriving: Quantizer | None
    leaving: Quantizer | None


class IntegerBatchNorm2d(QuantBatchNorm2d):
    """Batch norm that computes `clip(round((acc k_q + t_q) / 2^f))` in evaluation, and ordinary batch norm in training.

    The accumulator is the input in units of its own step (input step times weight step of the convolution before). Where the result goes
    into one quantizer with zero point 0, possibly through a ReLU, the result is in that quantizer's codes. Otherwise the result stays
    wide: unclipped, in units of the input's step.

    Source: PACT-Quantization's integer inference (`<bit,intbit>` constants, batch norm with the rescale absorbed).
    Differs from the source: constants saturate as a whole (`form: split` is as in the source), and accumulators are exact in float64.
    """

    steps: Steps | None = None

    def configure(
        self,
        bit: int = 32,
        intbit: int = 10,
        form: Literal["saturate", "split"] = "saturate",
        rounding: str = "trunc",
        clamp: Literal["source", "match_training"] = "source",
        **options: Any,
    ) -> None:
        """Sets the type of the constants, and how results are rounded and clipped.

        Args:
            bit, intbit, form: See `fixed_type`.
            rounding: Rounding of the shift: `trunc` (toward zero) or any deterministic rounding of the quantizers.
            clamp: Lowest code of a signed grid: `source` uses `-2^(o-1)`, one code below the symmetric grid of the training;
                `match_training` uses the lowest code of the training.
        """
        super().configure(**options)
        fraction_bits(bit, intbit)
        for name, got, allowed in (
            ("form", form, FORMS),
            ("rounding", rounding, [r for r in ROUNDINGS if r != "stochastic"]),
            ("clamp", clamp, ("source", "match_training")),
        ):
            if got not in allowed:
                raise QexpError(f"integer batch norm: {name}={got!r} is not allowed; use {', '.join(allowed)}")
        self.bit, self.intbit, self.form, self.rounding, self.clamp = bit, intbit, form, rounding, clamp
        self.widest = 0.0
        self.constants: tuple[Tensor, Tensor] | None = None

    def take_steps(self, name: str, steps: Steps) -> None:
        """Sets the quantizers from which the steps are read; raises where the input has no step."""
        if steps.arriving is None and steps.conv is None:
            raise QexpError(
                f"{name}: the input is a float tensor, so the integer constants have no unit; quantize the layer before, or "
                "exclude this batch norm from the integer ones with a rule (compute: null)"
            )
        if steps.conv is not None and not isinstance(getattr(steps.conv, "weight_quantizer", None), Quantizer):
            raise QexpError(
                f"{name}: the weights of the layer before are float, so the integer constants have no unit; give them bits, or "
                "exclude this batch norm from the integer ones with a rule (compute: null)"
            )
        if steps.arriving is not None and torch.as_tensor(steps.arriving.scale).numel() != 1:
            raise QexpError(
                f"{name}: the input has one scale per channel, which no factor of the accumulator can undo; use one scale per tensor"
            )
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or self.training:
            return super().forward(x)
        if self.steps is None:
            raise QexpError(
                "an integer batch norm ran before it was linked to the quantizers around it; attach quantizers with "
                "qexp.recipe.plan.apply, or link layers that you swapped by hand with qexp.network.linking.link"
            )
        with torch.no_grad():
            y = self._integer(x)
            after = self.output_quantizer(y)
        below_its_grid = self.clamp == "source" and self.output_quantizer is self.steps.leaving
        # The values are on the grid already; only the source's lowest code lies outside the quantizer's grid.
        return y if below_its_grid else after

    def _integer(self, x: Tensor) -> Tensor:
        """Returns the result, as real numbers."""
        unit, bias, leaving = self._unit(), self._bias_before(), self.steps.leaving
        acc = (x.double() - bias.reshape(1, -1, 1, 1)) / unit.reshape(1, -1, 1, 1)
        whole = (acc - torch.round(acc)).abs().amax() < _NEARLY_WHOLE if acc.numel() else torch.tensor(True)
        acc = torch.where(whole.to(acc.device), torch.round(acc), acc)
        step = unit if leaving is None else torch.as_tensor(leaving.scale).detach().double().flatten()
        plain = torch.ones_like(bias), torch.zeros_like(bias)
        gamma, beta = (self.quantized_weight(), self.quantized_bias()) if self.affine else plain
        bn = (gamma, beta, self.running_mean.double() - bias, self.running_var, self.eps)
        k, t = bn_constants(bn, unit / step, 1 / step, self.bit, self.intbit, self.form)
        total = acc * k.reshape(1, -1, 1, 1) + t.reshape(1, -1, 1, 1)
        self.constants = k, t
        self.widest = max(self.widest, float(total.abs().amax())) if total.numel() else self.widest
        codes = shifted(total, self.bit - self.intbit, self.rounding)
        if leaving is not None:
            codes = codes.clamp(*self._limits(leaving))
        return (codes * step.reshape(1, -1, 1, 1)).to(x.dtype)

    def _unit(self) -> Tensor:
        """Returns the real value of one unit of the accumulator, `[C or 1]`."""
        unit = torch.ones(1, dtype=torch.float64, device=self.running_mean.device)
        for q in (self.steps.arriving, self.steps.conv and self.steps.conv.weight_quantizer):
            if q is not None:
                unit = unit * torch.as_tensor(q.scale).detach().double().flatten()
        return unit

    def _bias_before(self) -> Tensor:
        """Returns the bias that the convolution before adds to its accumulator, `[C]`."""
        bias = None if self.steps.conv is None else self.steps.conv.quantized_bias()
        return torch.zeros_like(self.running_mean).double() if bias is None else bias.detach().double()

    def _limits(self, leaving: Quantizer) -> tuple[float, float]:
        low, high = (float(v) for v in leaving.limits)
        return (-(2.0 ** (leaving.bits - 1)), high) if self.clamp == "source" and low < 0 else (low, high)

    def account(self) -> dict[str, int]:
        """Returns the widest accumulator so far in bits, and how many constants saturated or vanished."""
        if self.constants is None:
            return {}
        k, t = self.constants
        end = 2 ** (self.bit - 1) - 1
        return {
            "accumulator_bits": int(self.widest).bit_length() + 1,
            "bn_constants_saturated": int((k.abs() >= end).sum() + (t.abs() >= end).sum()),
            "bn_factors_vanished": int((k == 0).sum()),
        }


INTEGER_BN: dict[type[nn.Module], type[Quantized]] = {nn.BatchNorm2d: IntegerBatchNorm2d}
