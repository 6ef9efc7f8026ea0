"""Evenly spaced levels: the base of all methods that round `x / scale + zero_point` to a code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qexp.numerics.ops import dequantize, fake_quantize, quantize
from qexp.quantizers.contract import Quantizer


class GridQuantizer(Quantizer):
    """`codes = round(clip(x / scale + zero_point, *edges))`, `x^ = (codes - zero_point) * scale`, one scale per row of the tensor.

    A method holds `scale` and `zero_point` (`hold_scale` creates both) and implements `fit` and `limits`. A method that measures each
    tensor anew overrides `scale_and_zero`; a method with its own fused operation overrides `rounded`. This class handles shapes, groups,
    dtypes and corrections of weights.
    """

    def hold_scale(self, **first: float) -> None:
        """Creates the buffers `scale` and `zero_point`, for constructors; `first` gives initial values other than 1 and 0."""
        shape = self.granularity.scale_shape(self.shape)
        for name, value in ({"scale": 1.0, "zero_point": 0.0} | first).items():
            self.register_buffer(name, torch.full(shape, value))

    @torch.no_grad()
    def put(self, **found: Tensor) -> None:
        """Copies the values from `fit`, `[G]` each, into the buffers or parameters of these names."""
        for name, value in found.items():
            kept = getattr(self, name)
            kept.copy_(value.reshape(kept.shape))

    @property
    def edges(self) -> tuple[Any, Any]:
        """The limits, in codes, to which values are clipped before rounding."""
        return self.limits

    def scale_and_zero(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the scale and zero point for these rows; a method that measures each tensor computes and stores them here."""
        return self.scale, self.zero_point

    def prepared(self, x: Tensor) -> tuple[Tensor, int | None]:
        """Returns the values to round, in rows, and the axis of their scales."""
        self.require_ready()
        return self.rows(x if self._buffers["gain"] is None else x.float())

    def rounded(self, rows: Tensor, axis: int | None) -> Tensor:
        """Returns the rows rounded to levels, with the method's gradients, in one fused operation."""
        scale, zero_point = self.scale_and_zero(rows)
        return fake_quantize(rows, scale, zero_point, *self.edges, axis=axis, rounding=self.rounding)

    def level(self, rows: Tensor) -> Tensor:
        """Returns the values of codes in rows, float32."""
        return dequantize(rows, self.scale, self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        rows, axis = self.prepared(x)
        y = self.rounded(rows, axis)
        if y.shape != x.shape:
            y = y.reshape(x.shape)
        if (
            self._buffers["gain"] is not None
        ):  # asked of the dictionary: a buffer as an attribute takes ten times as long
            y = self.corrected(y)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        rows, axis = self.prepared(x.detach())
        scale, zero_point = (part.detach() for part in self.scale_and_zero(rows))
        codes = quantize(rows, scale, zero_point, *self.edges, axis=axis, rounding=self.rounding)
        return codes.reshape(x.shape)

    def dequantize(self, codes: Tensor) -> Tensor:
        rows, _ = self.rows(codes)
        return self.corrected(self.level(rows).reshape(codes.shape))
