"""Runs a program fast and bit-exact: 8-bit dot products or floating point if provably exact, or else integers.

A sum of integer products whose every partial sum stays below 2^24 is exact in float32 for any order of addition, below 2^53 in
float64. The executor chooses one of the two per layer in advance, from the weights and the possible input codes. The same holds for a
requantization, whose product of accumulator and multiplier is exact in float64 below 2^53. If the tensors between them are not watched, a
convolution's bias, clamp and requantization are one pass over its sums.
"""

from __future__ import annotations

from collections.abc import Callable, Container

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qexp.integer.fast_steps import STEPS, fused
from qexp.integer.machine import Machine
from qexp.integer.op import Op
from qexp.integer.program import (
    Add,
    Clamp,
    Conv,
    IntegerProgram,
    Linear,
    Requantize,
)
from qexp.integer.register import Accumulator


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
        super().__init__(program, accumulator, device)
        self.watched = watched
        self.steps: list[tuple[tuple[str, ...], str, Callable[..., Tensor]]] = []  # inputs, output, what makes it
        done: set[str] = set()
        for op in program.ops:
            if op.output not in done:
                chain = self._chain(op)
                whole = fused(self, chain) if len(chain) > 1 else None
                chain = chain if whole is not None else chain[:1]
                done |= {link.output for link in chain}
                self.steps.append((op.inputs, chain[-1].output, whole or STEPS[type(op)](self, op)))
        self.last = {name: i for i, (inputs, _, _) in enumerate(self.steps) for name in inputs}

    @torch.inference_mode()
    def run(self, codes: NDArray[np.int64] | Tensor, keep: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Returns the codes of the scores.

        `keep` is called with name and codes (whole numbers, any dtype) of the watched tensors, at least.
        """
        codes = torch.as_tensor(codes)
        tensors = {self.program.input: codes.to(self.device, torch.float32)}
        if keep:
            keep(self.program.input, codes)
        for i, (inputs, output, step) in enumerate(self.steps):
            y = step(*(tensors[name] for name in inputs))
            tensors[output] = y
            if keep:
                keep(output, y)
            for name in inputs:
                if self.last[name] == i and name != self.program.output:
                    tensors.pop(name, None)
        return tensors[self.program.output].long()

    def _chain(self, op: Op) -> list[Op]:
        """Returns a layer or sum with the clamp and requantization behind it, if nothing else reads or watches the tensors between."""
        if not isinstance(op, Conv | Linear | Add) or getattr(op, "unit", None) or self.accumulator is not None:
            return [op]
        chain = [op]
        for kind in (Clamp,) if isinstance(op, Add) else (Clamp, Requantize):
            readers = [later for later in self.program.ops if chain[-1].output in later.inputs]
            seen = self.watched is None or chain[-1].output in self.watched or chain[-1].output == self.program.output
            if not seen and len(readers) == 1 and isinstance(readers[0], kind):
                chain.append(readers[0])
        return chain if isinstance(op, Add) or isinstance(chain[-1], Requantize) else [op]
