"""Device and number types of a fast executor: types that hold codes and sums exactly."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qexp.integer import int8
from qexp.integer.op import Op
from qexp.integer.program import Conv, IntegerProgram, Linear, channels
from qexp.integer.register import Accumulator

SINGLE = 2**24  # below it float32 holds every integer
DOUBLE = 2**53  # below it float64 holds every integer


class Stored(NamedTuple):
    """How a tensor is kept: codes plus `offset`, in a dtype."""

    dtype: torch.dtype
    offset: int = 0


class Machine:
    """A program, the register of its sums, and a device.

    Args:
        program: The program to run.
        accumulator: A narrower register; None is one that never overflows.
        device: Where.
    """

    def __init__(self, program: IntegerProgram, accumulator: Accumulator | None, device: str | torch.device) -> None:
        self.program, self.accumulator, self.device = program, accumulator, torch.device(device)
        self.suited: dict[str, bool] = {}  # layers on bytes: whether their sums are exact on this machine

    def exact(self, *tensors: str, most: int = 0) -> torch.dtype:
        """Returns the narrowest floating type that holds all codes of some tensors, or integers up to `most`."""
        specs = [self.program.tensors[t] for t in tensors]
        most = max([most, *(max(abs(s.low), abs(s.high)) for s in specs)])
        if most < SINGLE:
            return torch.float32
        return torch.float64 if most < DOUBLE else torch.int64

    def stored(self, name: str) -> Stored:
        """Returns how a tensor is kept: bytes where its codes are 8 bits wide, else the narrowest floating type."""
        spec = self.program.tensors[name]
        offset = int8.offset(spec.low)
        if name != self.program.output and spec.high + offset <= 255:
            return Stored(torch.uint8, offset)
        return Stored(self.exact(name))

    def codes(self, name: str, kept: Tensor) -> Tensor:
        """Returns the codes of a tensor as it is kept, as floating-point numbers or int64."""
        offset = self.stored(name).offset
        if kept.dtype is not torch.uint8:
            return kept
        return kept.float().sub_(offset) if offset else kept.float()

    def kept(self, name: str, codes: Tensor) -> Tensor:
        """Returns codes of a tensor as it is kept."""
        dtype, offset = self.stored(name)
        codes = codes.to(dtype)  # bytes wrap around, so that the sum is right in them
        return codes + offset if offset else codes

    def in_bytes(self, op: Op) -> bool:
        """Returns whether the sums of an operation are computed on bytes here."""
        if not isinstance(op, Conv | Linear) or op.unit or self.accumulator is not None or self.device.type != "cpu":
            return False
        source = self.program.tensors[op.inputs[0]]
        if isinstance(op, Linear) and len(source.shape) > 1:  # several vectors per image
            return False
        if self.stored(op.inputs[0]).dtype is not torch.uint8:
            return False
        if op.output not in self.suited:
            self.suited[op.output] = int8.suits(op, source.low, source.high)
        return self.suited[op.output]

    def constant(self, values: NDArray, dtype: torch.dtype, ndim: int, axis: int = 0) -> Tensor:
        """Returns a constant that broadcasts against `[N, ...]`; its channels lie along `axis`, the batch not counted."""
        return torch.from_numpy(channels(np.array(values), ndim, axis)).to(self.device, dtype)

    def ndim(self, name: str) -> int:
        """Returns the dimensions of a tensor, the batch included."""
        return len(self.program.tensors[name].shape) + 1
