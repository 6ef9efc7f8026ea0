"""LSQ+: the step size and the offset of an activation are parameters that are learned with the weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.numerics.ops import lsq, quantize
from qexp.quantizers.base import fit_range
from qexp.quantizers.lsq import LSQ
from qexp.ranges import MSE, Context, RangeRule
from qexp.statistics.stats import TensorStats

_FINEST = 2.0**-21  # least ratio of step to offset; below it, float32 cannot distinguish neighbouring levels


class LSQPlus(LSQ):
    """`x^ = round(clip((x - beta) / s, qmin, qmax)) * s + beta` with a learned step s and, for activations, a learned offset beta.

    Levels: 2^bits, unsigned codes where there is an offset. Gradients, with `v = (x - beta) / s`: to x, 1 strictly inside the limits; to
    s, `round(v) - v` inside, the limit outside; to beta, 0 inside, 1 outside; both times `1/sqrt(N * qmax)`. Saved: s, beta, the grid's
    limits. beta is a real number: zero need not be a level, so a padded zero stays the float 0, which has no code. With an offset far
    larger than the step, float32 rounds each level, so that the error bound of half a step does not hold.

    Args:
        bits, shape, granularity, rounding, signed, narrow, scale_numel: See `LSQ`; `signed` and `narrow` apply only without an offset.
        offset: Learn beta, with unsigned codes; False for weights.
        range: `paper` (with an offset, the range with the least squared error, else `max(|mean - 3 std|, |mean + 3 std|) / 2^(bits-1)`),
            or a range rule that gives the first step and offset.

    Source: Bhalgat et al. 2020 (arXiv 2004.09576), equations 3-9 and section 3.2.
    Differs from the paper: the first range comes from the calibration statistics, not from the first training batches.

    >>> from qexp.ranges import Fixed
    >>> q = LSQPlus(2, (5,), range=Fixed(-0.2, 0.7))
    >>> q.fit(TensorStats.of(torch.tensor([-0.2, 0.7])))
    >>> q.codes(torch.tensor([-0.5, 0.05, 0.8, 0.3, 2.2])).tolist()
    [0, 1, 3, 2, 3]
    """

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        signed: bool | Literal["auto"] = "auto",
        narrow: bool = False,
        offset: bool = True,
        range: Literal["paper"] | RangeRule = "paper",
        scale_numel: Literal["features", "batch"] = "features",
        **common: Any,
    ) -> None:
        if range != "paper" and not callable(range):
            raise QexpError(f"LSQPlus: range={range!r}; allowed are paper or a range rule")
        super().__init__(
            bits,
            shape,
            signed=False if offset else signed,
            narrow=narrow and not offset,
            range=range,
            scale_numel=scale_numel,
            **common,
        )
        self.beta = nn.Parameter(torch.zeros_like(self.scale)) if offset else None
        self.symmetric = not offset
        if offset:
            self.properties = self.properties - {"half_step"}

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        if self.beta is None:
            return super().fit(stats, followed_by_relu)
        rule = MSE() if self.range == "paper" else self.range
        low, high = fit_range(self, rule, stats, Context(False, followed_by_relu, self._affine))
        scale, _ = self._affine(low, high)
        self.put(scale=scale, beta=low)
        self.count_elements(stats)
        self.mark_ready()

    def first_scale(self, stats: TensorStats) -> Tensor:
        """Returns the paper's first step of a tensor without offset, `[G]`."""
        reach = torch.maximum((stats.mean - 3 * stats.std).abs(), (stats.mean + 3 * stats.std).abs())
        qmin, qmax = self.limits
        return reach / max(-qmin, qmax)

    def _affine(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the step and the (real) zero point of a range; for a constant tensor the step is 1, and level 0 is its value."""
        scale = (high - low) / self.limits[1]
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        scale = torch.maximum(scale, _FINEST * low.abs()).clamp_min(torch.finfo(torch.float32).tiny)
        return scale, -low / scale

    @property
    def zero_point(self) -> Tensor:
        """The position of zero among the codes; not an integer where there is an offset."""
        return super().zero_point if self.beta is None else -self.beta.detach() / self.scale.detach()

    def rounded(self, rows: Tensor, axis: int | None) -> Tensor:
        if self.beta is None:
            return super().rounded(rows, axis)
        step = self.step_gradient(rows)
        return lsq(rows, self.scale, *self.edges, axis=axis, grad_scale=step, offset=self.beta)

    def codes(self, x: Tensor) -> Tensor:
        if self.beta is None:
            return super().codes(x)
        rows, axis = self.prepared(x.detach().float())
        scale = self.scale.detach()
        codes = quantize(rows - self.beta.detach(), scale, torch.zeros_like(scale), *self.edges, axis=axis)
        return codes.reshape(x.shape)

    def level(self, rows: Tensor) -> Tensor:
        return super().level(rows) if self.beta is None else rows.float() * self.scale + self.beta

    def must_stay_positive(self) -> Tensor:
        if self.beta is None:
            return super().must_stay_positive()
        return torch.where(self.beta.detach().isfinite(), super().must_stay_positive(), torch.nan)

    def describe(self) -> dict[str, Any]:
        return super().describe() | ({} if self.beta is None else {"signed": bool((self.beta < 0).any())})
