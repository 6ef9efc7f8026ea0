"""Maps sums and codes to the codes of the next layers: several results of one pass over the same elements."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import KernelError
from ..library import constant, define
from . import reference
from .reference import FORMS, GRID, KINDS, SCALED, TABLE

INPUTS = (torch.float32, torch.float64, torch.uint8)
MOST = 4  # inputs, results and tensors in between, each
STEPS = 8

define(
    "regrid(Tensor[] xs, Tensor[] constants, Tensor[] tables, int[] steps, int[] forms) -> Tensor[]",
    reference.forward,
    lambda xs, constants, tables, steps, forms: [torch.empty_like(xs[0], dtype=FORMS[f]) for f in forms],
)
constant("regrid")


class Step(NamedTuple):
    """One step of a pass.

    Places are numbered: the inputs first, then the results, then up to four tensors in between: float32 where a
    `scaled` step writes, else bytes.

    Attributes:
        kind: A rounding (see `round_to`), `none`, `float32` (what runtimes do), `grid` (what `quantize` does), `scaled` (what a
            layer on codes does with its sums), or `table`.
        source: Place that is read.
        target: Place that is written.
        at: Number of the step's constants or of its table.
        other: Second place that is read: of bytes, or of float32 for `scaled`.
    """

    kind: str
    source: int
    target: int
    at: int
    other: int = -1


def regrid(
    xs: Sequence[Tensor],
    steps: Sequence[Step],
    dtypes: Sequence[torch.dtype],
    constants: Sequence[Tensor] = (),
    tables: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Returns tensors of the shape of the inputs; no gradient.

    A step with constants gives `clip(round(x * factor + other * factor of other + summand), low, high) + after`, in float64. With
    `float32`, number and product are rounded to float32 first, as runtimes do; other and summand are not used. With `grid`, it is
    `round(clip(x / factor + summand, low, high)) + after`, in float32. With `scaled`, it is
    `clip(x * factor of other * factor + summand + other, low, high)`, each operation in float32. A step with a table gives `table[x]` or
    `table[256 * x + other]` of bytes.

    Args:
        xs: `[N, C, ...]`, up to four of one shape, float32, float64 or uint8. The results have the memory layout of the first.
        steps: What is computed, in order.
        dtypes: Dtype of each result: float32, float64 or uint8, which must hold its values.
        constants: Float64 `[6, C]` or `[6, 1]`: factor, summand, low, high, after, factor of other; one column or one per channel.
        tables: uint8, 256 or 65,536 entries.

    Raises:
        KernelError: An argument does not fit the others.
    """
    return Pass(steps, dtypes, constants, tables)(xs)


class Pass:
    """Steps that are run many times: `Pass(steps, dtypes, constants, tables)(xs)` is `regrid(xs, steps, ...)`.

    What it is made of is checked once for each combination of dtypes and channels.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        dtypes: Sequence[torch.dtype],
        constants: Sequence[Tensor] = (),
        tables: Sequence[Tensor] = (),
    ) -> None:
        self.steps, self.dtypes = list(steps), list(dtypes)
        self.constants, self.tables = list(constants), list(tables)
        self.forms = [FORMS.index(d) if d in FORMS else -1 for d in dtypes]
        kinds = [KINDS.index(s.kind) if s.kind in KINDS else -1 for s in steps]
        self.flat = [n for kind, s in zip(kinds, steps) for n in (kind, s.source, s.other, s.target, s.at)]
        self._suited: set[tuple] = set()  # channels and dtypes of inputs that are known to fit

    def __call__(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Returns the results for tensors of one shape."""
        if not xs or any(x.shape != xs[0].shape or x.device != xs[0].device for x in xs):
            raise KernelError("xs: expected one to four tensors of one shape and on one device")
        self.check(xs[0].shape[1] if xs[0].dim() > 1 else 1, *[x.dtype for x in xs])
        return torch.ops.qexp.regrid.default(list(xs), self.constants, self.tables, self.flat, self.forms)

    def check(self, channels: int, *inputs: torch.dtype) -> None:
        """Checks that steps, constants and tables fit inputs of some channels and dtypes.

        Raises:
            KernelError: They do not.
        """
        if (channels, inputs) not in self._suited:
            _check(self, channels, inputs)
            self._suited.add((channels, inputs))


def _check(given: Pass, channels: int, inputs: Sequence[torch.dtype]) -> None:
    steps, dtypes, constants, tables = given.steps, given.dtypes, given.constants, given.tables
    for name, found, most in (("xs", inputs, MOST), ("dtypes", dtypes, MOST), ("steps", steps, STEPS)):
        if not 1 <= len(found) <= most:
            raise KernelError(f"{name}: got {len(found)}, expected 1 to {most}")
    if -1 in given.forms:
        raise KernelError(f"dtypes: got {dtypes}, expected float32, float64 or uint8")
    if any(dtype not in INPUTS for dtype in inputs):
        raise KernelError("xs: expected float32, float64 or uint8")
    if any(
        c.dtype != torch.float64 or c.dim() != 2 or c.shape[0] != 6 or c.shape[1] not in (1, channels)
        for c in constants
    ):
        raise KernelError(f"constants: expected float64 [6, 1] or [6, {channels}]")
    if any(t.dtype != torch.uint8 or t.numel() not in (256, 65536) for t in tables):
        raise KernelError("tables: expected uint8 of 256 or 65,536 entries")
    kinds = [*inputs, *dtypes, *[torch.uint8] * MOST]
    written = set(range(len(inputs)))
    for s in steps:
        if s.kind not in KINDS:
            raise KernelError(f"kind: got {s.kind!r}, expected one of {', '.join(KINDS)}")
        reads = {s.source} | ({s.other} if s.other >= 0 else set())
        if not reads <= written or not len(inputs) <= s.target < len(kinds):
            raise KernelError(f"steps: {s} reads what is not there yet, or writes where it cannot")
        if s.kind == TABLE:
            wide = 256 if s.other < 0 else 65536
            if any(kinds[p] != torch.uint8 for p in {*reads, s.target}) or not (
                0 <= s.at < len(tables) and tables[s.at].numel() == wide
            ):
                raise KernelError(f"steps: {s} needs bytes and a table of {wide:,} entries")
        elif not 0 <= s.at < len(constants):
            raise KernelError(f"steps: {s} needs constants")
        elif s.other >= 0 and not _reads_two(s.kind, kinds[s.source], kinds[s.other]):
            raise KernelError(
                f"steps: {s} needs bytes and a kind that rounds once, or `scaled` and a second place of float32"
            )
        elif s.kind == SCALED and s.target >= len(inputs) + len(dtypes):
            kinds[s.target] = torch.float32
        if s.kind == SCALED and kinds[s.target] != torch.float32:
            raise KernelError(f"steps: {s} gives float32")
        written.add(s.target)
    if not set(range(len(inputs), len(inputs) + len(dtypes))) <= written:
        raise KernelError("steps: a result is not written")


def _reads_two(kind: str, first: torch.dtype, second: torch.dtype) -> bool:
    """Returns whether a step of a kind can read two places of these dtypes."""
    if kind == SCALED:
        return second == torch.float32
    return kind not in ("float32", GRID) and first == second == torch.uint8
