"""Bits for each channel: channels with a wide range get more bits, others fewer; the mean stays the same."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import quantizers, weight_of
from qexp.numerics.bins import bins
from qexp.numerics.grid import UniformGrid
from qexp.passes.base import Pass, PassContext
from qexp.quantizers.base import AffineQuantizer, Quantizer
from qexp.statistics.stats import TensorStats

log = logging.getLogger(__name__)
_PASSES = 10
_CLOSE = 0.01  # bits
_ALMOST = 1e-9  # differences this small are rounding errors: a tie


def allocate(
    spread: Tensor,
    bits: float,
    *,
    rounding: Literal["round", "ceil"] = "round",
    target: Literal["fixed", "plain"] = "fixed",
    guard: Literal["remainder", "none"] = "remainder",
    most: int = 8,
) -> Tensor:
    """Returns the bits of each channel, int64 `[C]`, in `0..most`.

    `plain` rounds `log2(bins)`. `fixed` moves the requested budget by half the miss, up to ten times, until the mean is within 0.01
    of `bits`; this may oscillate. The guard `remainder` then adds (removes) one bit at a time at the channel with the largest
    (smallest) `log2(bins) - bits`, ties to the lower index, until the sum is `floor(C * bits)`: the budget is met and never
    exceeded. The guard `none` returns the last of the ten results.

    Args:
        spread: Standard deviation or mean absolute deviation of each channel, `[C]`.
        bits: Mean bits per channel; may be fractional.
        rounding: How `log2(bins)` is rounded.
        target: See above.
        guard: See above.
        most: Greatest width of a channel.

    >>> allocate(torch.tensor([2.82845653294, 1.0]), 4).tolist()
    [5, 3]
    """

    def rounded(asked: float) -> Tensor:
        exact = torch.log2(bins(spread, asked))
        return (exact.round() if rounding == "round" else exact.ceil()).clamp(0, most)

    if target == "plain":
        return rounded(bits).long()
    asked, budget = bits, math.floor(len(spread) * bits + _ALMOST)
    for _ in range(_PASSES):
        found = rounded(asked)
        miss = bits - float(found.mean())
        if abs(miss) < _CLOSE:
            break
        asked += miss / 2
    if guard == "none" or (abs(miss) < _CLOSE and found.sum() <= budget):
        return found.long()
    return _meet(torch.log2(bins(spread, bits)), rounded(bits), budget, most).long()


def _meet(exact: Tensor, given: Tensor, budget: int, most: int) -> Tensor:
    """Returns `given` with single bits added or removed until the sum is the budget, or until no channel can change."""
    while (missing := budget - int(given.sum())) != 0:
        step = 1 if missing > 0 else -1
        free = given < most if step > 0 else given > 0
        if not bool(free.any()):
            break
        want = torch.where(free, step * (exact.clamp_min(-1e6) - given), -torch.inf)
        given[int((want >= want.max() - _ALMOST).int().argmax())] += step
    return given


class BitAllocation(Pass):
    """Gives each channel of weights and activations its own width; the mean is the tensor's width in the plan.

    It changes quantizers per channel on an unsigned uniform grid (quant=gemmlowp and the aciq family). A channel of 0 bits becomes a
    constant. For activations, integer hardware needs one scale per input channel; without that support, the result is for
    simulation only.

    Args:
        sites: Tensors to allocate.
        bits: Mean width per site, if it differs from the plan's, such as `{output: 3.5}`.
        widest: Tensors wider than this in the plan keep one width (the source allocates up to 4 bits); null includes all tensors.
        rounding, target, guard, most: See `allocate`.
        prior: Spread of activations: `gauss` uses their standard deviation, `laplace` their b.

    Source: Banner et al. 2019 (arXiv 1810.05723), section 4.
    Differs from the paper: the spread is the standard deviation (or b), as in their code, not the clip range; the guard.
    """

    def __init__(
        self,
        sites: Sequence[str] = ("weight", "output"),
        bits: Mapping[str, float] | None = None,
        widest: int | None = 4,
        rounding: Literal["round", "ceil"] = "round",
        prior: Literal["gauss", "laplace"] = "gauss",
        target: Literal["fixed", "plain"] = "fixed",
        guard: Literal["remainder", "none"] = "remainder",
        most: int = 8,
    ) -> None:
        choices = {"rounding": ("round", "ceil"), "prior": ("gauss", "laplace"), "target": ("fixed", "plain")}
        given = {"rounding": rounding, "prior": prior, "target": target, "guard": guard}
        for name, allowed in (choices | {"guard": ("remainder", "none")}).items():
            if given[name] not in allowed:
                raise QexpError(f"BitAllocation({name}={given[name]!r}) is not allowed; use {' or '.join(allowed)}")
        wrong = [s for s in [*sites, *(bits or {})] if s not in ("weight", "input", "output")]
        if wrong or not all(0 < b <= most for b in (bits or {}).values()) or not 1 <= most <= 16:
            raise QexpError(
                f"BitAllocation(sites={list(sites)}, bits={dict(bits or {})}, most={most}) is not allowed; use the sites weight, "
                "input, output, bits above 0 and up to `most`, and `most` of 1..16"
            )
        self.sites, self.bits, self.widest, self.prior = tuple(sites), dict(bits or {}), widest, prior
        self.options = {"rounding": rounding, "target": target, "guard": guard, "most": most}

    def on_statistics(self, model: nn.Module, context: PassContext) -> None:
        """Sets the widths; reports the mean width of each site and the tensors that missed their target."""
        elements: dict[str, list[tuple[float, int]]] = {}
        missed, seen = [], set()
        for name, site, q in quantizers(model):
            if site.split(".")[0] not in self.sites or (self.widest is not None and q.bits > self.widest):
                continue
            if not (isinstance(q, AffineQuantizer) and q.granularity.axis is not None and q.signed is False):
                continue
            if id(q) in seen:
                raise QexpError(f"{name} ({site}): bit allocation cannot change a quantizer that several tensors share")
            seen.add(id(q))
            bits = self.bits.get(site.split(".")[0], q.bits)
            found = allocate(self._spread(model, context, name, site, q), bits, **self.options)
            q.set_grid(UniformGrid(found.reshape(q.granularity.scale_shape(q.shape)), signed=False))
            mean = float(found.double().mean())
            if abs(mean - bits) > max(_CLOSE, 1 / len(found)):
                missed.append(f"{name} ({site})")
            elements.setdefault(site, []).append((mean, math.prod(context.facts.shapes[name][site])))
            log.info("%s (%s): bits of channels %s", name, site, _brief(found))
        if not elements and not self._too_wide(model):
            raise QexpError(
                f"bit allocation found no {' or '.join(self.sites)} to change; it needs quantizers per channel on an unsigned grid "
                "(quant=gemmlowp with granularity: channel, or quant=ladder/aciq/alloc)"
            )
        for site, found in elements.items():
            total = sum(n for _, n in found)
            context.findings[f"allocated_bits_{site}"] = round(sum(b * n for b, n in found) / total, 4)
        if elements:
            context.findings["allocation_missed"] = missed

    def _too_wide(self, model: nn.Module) -> bool:
        return any(self.widest is not None and q.bits > self.widest for _, s, q in quantizers(model) if s in self.sites)

    def _spread(self, model: nn.Module, context: PassContext, name: str, site: str, q: Quantizer) -> Tensor:
        weight = weight_of(model.get_submodule(name), site)
        if weight is not None:
            return TensorStats.of(weight, q.granularity).std
        stats = context.calibration[name, site].channel
        return stats.std if self.prior == "gauss" else stats.b


def _brief(found: Tensor) -> str:
    widths, counts = found.unique(return_counts=True)
    return ", ".join(f"{n} x {w}" for w, n in zip(widths.tolist(), counts.tolist()))
