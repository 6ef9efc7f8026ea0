"""Runs a program fast and bit-exact: 8-bit dot products or floating point if provably exact, or else integers.

A sum of integer products whose every partial sum stays below 2^24 is exact in float32 for any order of addition, below 2^53 in
float64. The executor chooses one of the two per layer in advance, from the weights and the possible input codes. The same holds for a
requantization, whose product of accumulator and multiplier is exact in float64 below 2^53. Codes of 8 bits lie in memory as bytes, with
the channels innermost. What lies between two convolutions is one pass over the elements, if the tensors inside are not watched.
"""

from __future__ import annotations

from collections.abc import Callable, Container

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qexp.integer.fast_steps import STEPS, sums
from qexp.integer.fused import fused
from qexp.integer.machine import Machine
from qexp.integer.moves import Concat, Flatten, Permute, Reshape, Slice, StridedPad
from qexp.integer.op import Op
from qexp.integer.program import IntegerProgram, MaxPool
from qexp.integer.regions import Region, regions
from qexp.integer.register import Accumulator
from qexp.integer.reorder import narrow_first

Step = tuple[tuple[str, ...], list[str], Callable[..., list[Tensor]]]  # inputs, outputs, what makes them
AS_KEPT = (Concat, Flatten, MaxPool, Permute, Reshape, Slice, StridedPad)  # take bytes or floating point alike


class Fast(Machine):
    """Runs a program with PyTorch: `run(codes)` returns the codes of the scores, int64.

    Args:
        program: The program to run.
        accumulator: A narrower register, at the end of each sum (`point="end"`); by default one that never overflows.
        device: Device to run on.
        watched: Names of the tensors passed to `keep`; None is all.
    """

    def __init__(
        self,
        program: IntegerProgram,
        accumulator: Accumulator | None = None,
        device: str | torch.device = "cpu",
        watched: Container[str] | None = None,
    ) -> None:
        super().__init__(program if watched is None else narrow_first(program, watched), accumulator, device)
        self.watched = watched
        self.steps: list[Step] = []
        for part in self.program.ops if watched is None else regions(self, watched):
            whole = fused(self, part, sums) if isinstance(part, Region) else None
            if isinstance(part, Region) and whole is not None:
                self.steps.append((part.inputs, part.leaves, whole))
            else:
                self.steps += [self._single(op) for op in (part.ops if isinstance(part, Region) else [part])]
        self.last = {name: i for i, (inputs, _, _) in enumerate(self.steps) for name in inputs}

    @torch.inference_mode()
    def run(self, codes: NDArray[np.int64] | Tensor, keep: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Returns the codes of the scores.

        `keep` is called with name and codes (whole numbers, any dtype) of the watched tensors, at least.
        """
        codes = torch.as_tensor(codes)
        with torch.autocast(torch.device(self.device).type, enabled=False):  # which rounds sums in float32 to bfloat16
            tensors = {self.program.input: self._enters(codes)}
            if keep:
                keep(self.program.input, codes)
            for i, (inputs, outputs, step) in enumerate(self.steps):
                for output, y in zip(outputs, step(*(tensors[name] for name in inputs)), strict=True):
                    tensors[output] = y
                    if keep:
                        keep(output, self.codes(output, y))
                for name in inputs:
                    if self.last[name] == i and name != self.program.output:
                        tensors.pop(name, None)
            return tensors[self.program.output].long()

    def _enters(self, codes: Tensor) -> Tensor:
        """Returns the input as it is kept, with the channels innermost."""
        kept = self.kept(self.program.input, codes.to(self.device))
        return kept.contiguous(memory_format=torch.channels_last) if kept.dim() == 4 else kept

    def _single(self, op: Op) -> Step:
        """Returns the step of one operation, which takes and gives tensors as they are kept."""
        step = STEPS[type(op)](self, op)
        if isinstance(op, AS_KEPT) and len({self.stored(name) for name in (*op.inputs, op.output)}) == 1:
            return op.inputs, [op.output], lambda *kept: [step(*kept)]

        def run(*kept: Tensor) -> list[Tensor]:
            return [self.kept(op.output, step(*map(self.codes, op.inputs, kept)))]

        return op.inputs, [op.output], run
