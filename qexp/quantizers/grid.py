"""Evenly spaced levels: what every method has that rounds `x / scale + zero_point` to a code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qexp.numerics.ops import dequantize, fake_quantize, quantize
from qexp.quantizers.contract import Quantizer


class GridQuantizer(Quantizer):
    """`codes = round(clip(x / scale + zero_point, *edges))`, `x^ = (codes - zero_point) * scale`, one scale per row of the tensor.

    A method keeps `scale` and `zero_point` (`hold_scale` makes both) and writes `fit` and `limits`. One that measures each tensor anew
    writes `scale_and_zero`; one with a fused operation of its own writes `rounded`. Shapes, groups, dtypes and corrections of
    weights are looked after here.
    """

    def hold_scale(self, **first: float) -> None:
        """Makes the buffers `scale` and `zero_point`, once, in the constructor; `first` gives other values than 1 and 0."""
        shape = self.granularity.scale_shape(self.shape)
        for name, value in ({"scale": 1.0, "zero_point": 0.0} | first).items():
            self.register_buffer(name, torch.full(shape, value))

    @torch.no_grad()
    def put(self, **found: Tensor) -> None:
        """Copies what `fit` has found, `[G]` each, into the buffers or parameters of these names."""
        for name, value in found.items():
            kept = getattr(self, name)
            kept.copy_(value.reshape(kept.shape))

    @property
    def edges(self) -> tuple[Any, Any]:
        """Where values, in codes, are clipped before they are rounded."""
        return self.limits

    def scale_and_zero(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scale and zero point for these rows: those it has, or, of a method that measures each tensor, what it then keeps."""
        return self.scale, self.zero_point

    def prepared(self, x: Tensor) -> tuple[Tensor, int | None]:
        """Returns what is rounded, in rows, and the axis of its scales."""
        self.require_ready()
        return self.rows(x if self.gain is None else x.float())

    def rounded(self, rows: Tensor, axis: int | None) -> Tensor:
        """Returns the levels that rows fall on, with the method's gradients: one fused operation."""
        scale, zero_point = self.scale_and_zero(rows)
        return fake_quantize(rows, scale, zero_point, *self.edges, axis=axis, rounding=self.rounding)

    def level(self, rows: Tensor) -> Tensor:
        """Returns the values of codes in rows, float32."""
        return dequantize(rows, self.scale, self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rounded(*self.prepared(x))
        y = y if y.shape == x.shape else y.reshape(x.shape)
        return self.corrected(y).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        rows, axis = self.prepared(x.detach())
        scale, zero_point = (part.detach() for part in self.scale_and_zero(rows))
        codes = quantize(rows, scale, zero_point, *self.edges, axis=axis, rounding=self.rounding)
        return codes.reshape(x.shape)

    def dequantize(self, codes: Tensor) -> Tensor:
        rows, _ = self.rows(codes)
        return self.corrected(self.level(rows).reshape(codes.shape))
