"""The representable values: the integer codes of a uniform grid, or an explicit list of levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.errors import QexpError


@dataclass(frozen=True)
class UniformGrid:
    """The integer codes `qmin..qmax` of `bits` bits.

    Unsigned: `0..2^b-1`; signed (two's complement): `-2^(b-1)..2^(b-1)-1`; signed and narrow (symmetric): `-(2^(b-1)-1)..2^(b-1)-1`,
    one level less. `bits` may be a tensor with one width per channel; 0 bits is the single code 0.

    >>> grid = UniformGrid(4, signed=True, narrow=True)
    >>> grid.qmin, grid.qmax, grid.levels
    (-7, 7, 15)
    """

    bits: int | Tensor
    signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        least = 2 if self.signed and self.narrow else 1
        if isinstance(self.bits, int) and not (self.bits == 0 or least <= self.bits <= 31):
            raise QexpError(
                f"bits={self.bits} has no {'narrow signed ' if least == 2 else ''}uniform grid; allowed are {least}..31"
                + (" (a symmetric grid of 1 bit would only hold zero)" if least == 2 else "")
            )

    @property
    def qmin(self) -> int | Tensor:
        if not self.signed:
            return self._each(lambda b: 0)
        return self._each(lambda b: 0 if b == 0 else -(2 ** (b - 1)) + int(self.narrow))

    @property
    def qmax(self) -> int | Tensor:
        return self._each(lambda b: 2**b - 1 if not self.signed else (0 if b == 0 else 2 ** (b - 1) - 1))

    @property
    def levels(self) -> int | Tensor:
        """The number of distinct codes."""
        return self.qmax - self.qmin + 1

    def _each(self, f) -> int | Tensor:
        if isinstance(self.bits, Tensor):
            flat = [float(f(int(b))) for b in self.bits.flatten().tolist()]
            return torch.tensor(flat, device=self.bits.device).reshape(self.bits.shape)
        return f(self.bits)


@dataclass(frozen=True)
class LevelGrid:
    """An explicit, ascending list of levels (power of two, APoT, k-means codebook, binary); codes are indices into it."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values or list(self.values) != sorted(set(self.values)):
            raise QexpError(f"a level grid needs distinct ascending levels, got {self.values[:8]}")

    @property
    def qmin(self) -> int:
        return 0

    @property
    def qmax(self) -> int:
        return len(self.values) - 1

    @property
    def levels(self) -> int:
        return len(self.values)

    @property
    def signed(self) -> bool:
        return self.values[0] < 0
