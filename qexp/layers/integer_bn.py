"""Batch norm as two integers a channel, as hardware applies it to an accumulator: multiply, add, shift, clip."""

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
    """Returns factor and summand of each channel, `k_q` and `t_q` `[C]` int64, with which the result's codes are `(acc k_q + t_q) / 2^f`.

    `k = rescale gamma / sqrt(var + eps)` and `t = s_out (beta - gamma mean / sqrt(var + eps))`, both as `fixed_type<bit, intbit>`.

    Args:
        bn: gamma, beta, mean, var `[C]` and eps.
        rescale: Codes of the result that one unit of the accumulator is worth.
        s_out: Codes of the result that 1.0 is worth.
        bit, intbit, form: See `fixed_type`.
    """
    gamma, beta, mean, var, eps = bn
    gamma, beta, mean, var = (t.detach().double() for t in (gamma, beta, mean, var))
    slope = gamma / torch.sqrt(var + eps)
    return fixed_type(rescale * slope, bit, intbit, form), fixed_type(s_out * (beta - slope * mean), bit, intbit, form)


_NEARLY_WHOLE = 0.25  # sums of codes in float32 are whole up to this; with a float input they are not


@dataclass(frozen=True)
class Steps:
    """Where a batch norm finds the steps of its input and of its result.

    Attributes:
        conv: The layer whose accumulator comes in; None where a quantized tensor does.
        arriving: Quantizer of that layer's input, or of the tensor; None for a float input (a step of 1).
        leaving: Quantizer that the result passes next, None where it stays wide.
    """

    conv: nn.Module | None
    arriving: Quantizer | None
    leaving: Quantizer | None


class IntegerBatchNorm2d(QuantBatchNorm2d):
    """Batch norm computed as `clip(round((acc k_q + t_q) / 2^f))` in evaluation; in training the ordinary one.

    The accumulator is the input counted in its own step (input step times weight step of the convolution before). Where the result goes
    into one quantizer (zero point 0), possibly past a ReLU, it comes out in that quantizer's codes. Where it does not, or the next
    quantizer has a zero point, it stays wide: counted in the step of the input, unclipped.

    Source: PACT-Quantization's integer inference (`<bit,intbit>` constants, batch norm with the rescale absorbed).
    Differs from the source: constants saturate as a whole (`form: split` is the source's), and accumulators are exact in float64.
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
        """Takes the type of the constants and how results are rounded and clipped.

        Args:
            bit, intbit, form: See `fixed_type`.
            rounding: Of the shift: `trunc` (toward zero), or another of the house's.
            clamp: `source` ends a signed grid at `-2^(o-1)`, one code below the symmetric grid of the training; `match_training` with it.
        """
        super().configure(**options)
        fraction_bits(bit, intbit)
        for name, got, allowed in (
            ("form", form, FORMS),
            ("rounding", rounding, [r for r in ROUNDINGS if r != "stochastic"]),
            ("clamp", clamp, ("source", "match_training")),
        ):
            if got not in allowed:
                raise QexpError(f"integer batch norm: {name}={got!r}; allowed are {', '.join(allowed)}")
        self.bit, self.intbit, self.form, self.rounding, self.clamp = bit, intbit, form, rounding, clamp
        self.widest = 0.0
        self.constants: tuple[Tensor, Tensor] | None = None

    def take_steps(self, name: str, steps: Steps) -> None:
        """Takes the places of its steps; raises where the input comes in no step at all."""
        if steps.arriving is None and steps.conv is None:
            raise QexpError(
                f"{name}: its input is a float, so its constants have no unit; quantize the layer before it, or leave it "
                "out of the integer batch norms with a rule (compute: null)"
            )
        if steps.conv is not None and not isinstance(getattr(steps.conv, "weight_quantizer", None), Quantizer):
            raise QexpError(
                f"{name}: the weights before it are float, so its constants have no unit; give them bits, or leave it out "
                "of the integer batch norms with a rule (compute: null)"
            )
        if steps.arriving is not None and torch.as_tensor(steps.arriving.scale).numel() != 1:
            raise QexpError(f"{name}: its input has a scale a channel, which no factor of the accumulator can undo")
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or self.training:
            return super().forward(x)
        if self.steps is None:
            raise QexpError(
                "an integer batch norm ran before it was linked to the quantizers around it; attach quantizers with "
                "qexp.recipe.plan.apply, or link what you swapped by hand with qexp.network.linking.link"
            )
        with torch.no_grad():
            y = self._integer(x)
            after = self.output_quantizer(y)
        below_its_grid = self.clamp == "source" and self.output_quantizer is self.steps.leaving
        # Codes already; only the source's lowest one is not of the quantizer's grid.
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
        """Returns what the convolution before adds to its accumulator, `[C]`."""
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
