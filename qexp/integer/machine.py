"""Device and number types of a fast executor: types that hold codes and sums exactly."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qexp.integer import int8
from qexp.integer.op import Op
from qexp.integer.program import Conv, IntegerProgram, channels
from qexp.integer.register import Accumulator

SINGLE = 2**24  # below it float32 holds every integer
DOUBLE = 2**53  # below it float64 holds every integer


class Machine:
    """A program, the register of its sums, and a device.

    Args:
        program: The program to run.
        accumulator: A narrower register; None is one that never overflows.
        device: Where.
    """

    def __init__(self, program: IntegerProgram, accumulator: Accumulator | None, device: str | torch.device) -> None:
        self.program, self.accumulator, self.device = program, accumulator, torch.device(device)

    def exact(self, *tensors: str, most: int = 0) -> torch.dtype:
        """Returns the narrowest floating type that holds all codes of some tensors, or integers up to `most`."""
        specs = [self.program.tensors[t] for t in tensors]
        most = max([most, *(max(abs(s.low), abs(s.high)) for s in specs)])
        if most < SINGLE:
            return torch.float32
        return torch.float64 if most < DOUBLE else torch.int64

    def codes_type(self, name: str) -> torch.dtype:
        """Returns uint8 for a tensor that only 8-bit convolutions read, else the narrowest floating type that holds its codes."""
        spec = self.program.tensors[name]
        readers = [op for op in self.program.ops if name in op.inputs]
        small = spec.low >= 0 and spec.high <= 255 and name != self.program.output
        return torch.uint8 if small and readers and all(map(self.in_bytes, readers)) else self.exact(name)

    def in_bytes(self, op: Op) -> bool:
        """Returns whether an operation is a convolution that runs on 8-bit codes here."""
        if not isinstance(op, Conv) or op.unit or self.accumulator is not None or self.device.type != "cpu":
            return False
        source = self.program.tensors[op.inputs[0]]
        return int8.suits(op, source.low, source.high)

    def constant(self, values: NDArray, dtype: torch.dtype, ndim: int, axis: int = 0) -> Tensor:
        """Returns a constant that broadcasts against `[N, ...]`; its channels lie along `axis`, the batch not counted."""
        return torch.from_numpy(channels(np.array(values), ndim, axis)).to(self.device, dtype)

    def ndim(self, name: str) -> int:
        """Returns the dimensions of a tensor, the batch included."""
        return len(self.program.tensors[name].shape) + 1
