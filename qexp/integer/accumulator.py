"""What a narrower accumulator does to a network: accuracy and overflows against its width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from qexp.integer.arithmetic import OVERFLOWS
from qexp.integer.fast import Fast
from qexp.integer.program import IntegerProgram
from qexp.integer.register import Accumulator

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def study(
    program: IntegerProgram,
    batches: Batches,
    widths: Sequence[int],
    overflows: Sequence[str] = OVERFLOWS,
    progress: bool = True,
) -> pd.DataFrame:
    """Returns one row for each width and kind of overflow: images, top-1 in percent, sums that did not fit and their share, worst layer.

    The register holds the sum of products of a convolution or linear layer and overflows at its end (of a wrapping one the point makes
    no difference); the bias joins outside. See `qexp.integer.reference` for registers that overflow at each addition.

    Args:
        program: The network.
        batches: Called for each row; yields images `[N, C, H, W]` and labels `[N]`.
        widths: Bits, sign included.
        overflows: `saturate`, `wrap`.
        progress: Show a bar.
    """
    rows = []
    cases = [(bits, overflow) for bits in widths for overflow in overflows]
    for bits, overflow in tqdm(cases, desc="accumulators", unit="width", leave=False, disable=not progress):
        register = Accumulator(bits, overflow)
        fast, seen, right, sums = Fast(program, register), 0, 0, 0
        for images, labels in batches():
            guess = fast.run(torch.from_numpy(program.encode(images.cpu().numpy()))).argmax(1)
            seen, right = seen + len(images), right + int((guess == labels.cpu()).sum())
        sums = seen * sum(_sums(program))
        worst = max(register.overflows, key=register.overflows.get, default="")
        lost = sum(register.overflows.values())
        rows.append(
            {
                "bits": bits,
                "overflow": overflow,
                "images": seen,
                "top1": 100 * right / max(seen, 1),
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
