"""Measures the effect of narrower accumulators on a network: score and overflows by width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from qexp.integer.arithmetic import OVERFLOWS
from qexp.integer.fast import Fast
from qexp.integer.program import IntegerProgram
from qexp.integer.register import Accumulator
from qexp.results.judging import Judge, Judging

Batches = Callable[[], Iterable[tuple[Tensor, Any]]]


def study(
    program: IntegerProgram,
    batches: Batches,
    widths: Sequence[int],
    overflows: Sequence[str] = OVERFLOWS,
    progress: bool = True,
    judge: Judge | None = None,
) -> pd.DataFrame:
    """Returns one row for each width and kind of overflow: images, score, sums that did not fit and their share, worst layer.

    `value` is the score of the network's task, a share in percent; None if the task cannot judge outputs alone.

    The register holds the sum of products of a convolution or linear layer and overflows at the end of the sum (for a wrapping
    register the point makes no difference). The bias is added outside. `qexp.integer.reference` has registers that overflow at each
    addition.

    Args:
        program: The network.
        batches: Function called once per row; yields images `[N, C, H, W]` and targets.
        widths: Bits, sign included.
        overflows: `saturate`, `wrap`.
        progress: Show a bar.
        judge: The network's task.
    """
    rows = []
    cases = [(bits, overflow) for bits in widths for overflow in overflows]
    for bits, overflow in tqdm(cases, desc="accumulators", unit="width", leave=False, disable=not progress):
        register = Accumulator(bits, overflow)
        fast, seen, judging = Fast(program, register), 0, Judging(judge)
        for images, targets in batches():
            scores = fast.run(torch.from_numpy(program.encode(images.cpu().numpy())))
            judging.add(torch.from_numpy(program.decode(scores.numpy())), targets)
            seen += len(images)
        sums = seen * sum(_sums(program))
        worst = max(register.overflows, key=register.overflows.get, default="")
        lost = sum(register.overflows.values())
        rows.append(
            {
                "bits": bits,
                "overflow": overflow,
                "images": seen,
                "value": judging.stored,
                "overflows": lost,
                "share": 100 * lost / max(sums, 1),
                "worst_layer": worst if lost else "",
            }
        )
    return pd.DataFrame(rows)


def _sums(program: IntegerProgram) -> Iterable[int]:
    """Yields how many sums each layer has for one image."""
    for op in program.ops:
        if op.kind in ("conv", "linear"):
            size = 1
            for n in program.tensors[op.output].shape:
                size *= n
            yield size
