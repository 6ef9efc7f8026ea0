"""A weight that is stored as it was quantized, by a method that would quantize its own result otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.quantizers.contract import Quantizer


class Stored(Quantizer):
    """The tensor is its own quantized value; its codes are those that the method gave these values.

    It takes the place of a method whose result for its own result is another one (a tanh before the rounding, signs of balanced weights,
    values corrected by channel), so that a stored network computes what it computed before, also in integers. Levels: those of the
    tensor, one set for all or one per channel. Training moves the tensor off its levels. Saved: the levels, their codes, scale and zero
    point.

    Args:
        bits, shape, granularity, rounding: As for every quantizer; the bits are those of the method it stands for.

    >>> q = Stored(2, (3,))
    >>> q.adopt(torch.tensor([0.5, -0.25, 0.5]))
    >>> q.codes(torch.tensor([0.5, -0.25, 0.5])).tolist(), q.dequantize(torch.tensor([0, 1])).tolist()
    ([1, 0, 1], [-0.25, 0.5])
    """

    properties = frozenset({"idempotent"})
    sites = frozenset({"weight"})
    granularities = ("tensor", "channel")

    def __init__(self, bits: int, shape: tuple[int, ...] = (1,), **common: Any) -> None:
        super().__init__(bits, shape, **common)
        ones = torch.ones(self.granularity.scale_shape(self.shape))
        self.register_buffer("known", torch.zeros(1, 1))
        self.register_buffer("numbers", torch.zeros(1, 1, dtype=torch.int32))
        self.register_buffer("scale", ones)
        self.register_buffer("zero_point", torch.zeros_like(ones))

    def adopt(self, x: Tensor, method: Quantizer | None = None, codes: Tensor | None = None) -> None:
        """Takes the tensor's values as levels.

        Args:
            x: The quantized tensor.
            method: The method that made it, whose scale and zero point the codes belong to.
            codes: Its codes of the tensor; used where each level has one code, and greater levels greater codes.
        """
        found = [row.unique(return_inverse=True) for row in self._by_row(x.detach())]
        most = max(len(levels) for levels, _ in found)
        self.known = torch.stack([_filled(levels, most) for levels, _ in found])
        self.numbers = torch.arange(most, dtype=torch.int32).repeat(len(found), 1)
        if method is None or codes is None or method.scale.numel() != self.scale.numel():
            return
        rows = self._by_row(codes.detach().to(torch.int32))
        numbers = [torch.zeros(len(v), dtype=torch.int32).scatter(0, at, row) for (v, at), row in zip(found, rows)]
        whole = all(torch.equal(n[at], row) for n, (_, at), row in zip(numbers, found, rows))
        if whole and all(bool((n.diff() > 0).all()) for n in numbers):
            self.numbers = torch.stack([_filled(n, most) for n in numbers])
            for name in ("scale", "zero_point"):
                value = torch.as_tensor(getattr(method, name)).detach().float()
                setattr(self, name, value.expand(method.scale.shape).reshape(self.scale.shape).clone())

    @property
    def limits(self) -> tuple[int, int]:
        return int(self.numbers.min()), int(self.numbers.max())

    @property
    def levels(self) -> int:
        return self.known.shape[1]

    def codes(self, x: Tensor) -> Tensor:
        rows = self._by_row(x)
        at = torch.searchsorted(self.known, rows).clamp(max=self.levels - 1)
        if not torch.equal(self.known.gather(1, at), rows):
            raise QexpError(f"{self.name}: the weight is no longer the one that was stored; quantize it with a method")
        return self.numbers.gather(1, at).reshape(x.shape)

    def dequantize(self, codes: Tensor) -> Tensor:
        at = torch.searchsorted(self.numbers, codes.reshape(len(self.known), -1).to(torch.int32))
        return self.known.gather(1, at.clamp(max=self.levels - 1)).reshape(codes.shape)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def _by_row(self, x: Tensor) -> Tensor:
        return x.reshape(len(x) if self.granularity.axis == 0 else 1, -1).contiguous()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name in ("known", "numbers"):
            saved = state_dict.get(f"{prefix}{name}")
            if saved is not None:
                setattr(self, name, torch.zeros_like(saved, device=self.known.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _filled(row: Tensor, count: int) -> Tensor:
    """Returns a row that is filled up with its last element."""
    return torch.cat([row, row[-1:].expand(count - len(row))])
