"""A weight that is stored as it was quantized, by a method that would quantize its own result otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.quantizers.contract import Quantizer


class Stored(Quantizer):
    """The tensor is its own quantized value; its code is its place among the values that occur.

    It takes the place of a method whose result for its own result is another one (a tanh before the rounding, signs of balanced weights,
    values corrected by channel), so that a stored network computes what it computed before. Levels: those of the tensor, one set for all
    or one per channel. Training moves the tensor off its levels. Saved: the levels.

    Args:
        bits, shape, granularity, rounding: As for every quantizer; the bits are those of the method it stands for.
    """

    properties = frozenset({"idempotent"})
    sites = frozenset({"weight"})
    granularities = ("tensor", "channel")

    def __init__(self, bits: int, shape: tuple[int, ...] = (1,), **common: Any) -> None:
        super().__init__(bits, shape, **common)
        self.register_buffer("known", torch.zeros(1, 1))
        ones = torch.ones(self.granularity.scale_shape(self.shape))
        self.register_buffer("scale", ones, persistent=False)
        self.register_buffer("zero_point", torch.zeros_like(ones), persistent=False)

    def adopt(self, x: Tensor) -> None:
        """Takes the tensor's values as levels."""
        found = [row.unique() for row in self._by_row(x.detach())]
        most = max(map(len, found))
        self.known = torch.stack([torch.cat([row, row[-1:].expand(most - len(row))]) for row in found])

    @property
    def limits(self) -> tuple[int, int]:
        return 0, self.known.shape[1] - 1

    def codes(self, x: Tensor) -> Tensor:
        rows = self._by_row(x)
        at = torch.searchsorted(self.known, rows).clamp(max=self.known.shape[1] - 1)
        if not torch.equal(self.known.gather(1, at), rows):
            raise QexpError(f"{self.name}: the weight is no longer the one that was stored; quantize it with a method")
        return at.reshape(x.shape).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        return self.known.gather(1, codes.reshape(len(self.known), -1).long()).reshape(codes.shape)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def _by_row(self, x: Tensor) -> Tensor:
        return x.reshape(len(x) if self.granularity.axis == 0 else 1, -1).contiguous()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}known")
        if saved is not None:
            self.known = torch.zeros_like(saved, device=self.known.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
