"""LSQ: the step size is a parameter that is learned with the weights."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.numerics.ops import lsq
from qexp.quantizers.base import AffineQuantizer, fit_range, usual_magnitude
from qexp.ranges import Context, RangeRule
from qexp.statistics.stats import TensorStats

_LEAST_SCALE = 1e-8


class LSQ(AffineQuantizer):
    """`x^ = round(clip(x / s, -QN, QP)) * s` with a learned step s.

    Levels: 2^bits (signed `-2^(b-1)..2^(b-1)-1`, unsigned `0..2^b-1`). Gradients: to x, 1 strictly inside the limits; to s,
    `round(x/s) - x/s` inside, `-QN` and `QP` outside, times `1/sqrt(N * QP)` with N the number of elements per scale. The step starts
    from a range rule, or as in the paper at `2 E|x| / sqrt(QP)`. Saved: the step, the grid's limits. An optimizer step at most halves the
    step, which stays above 1e-8.

    Args:
        bits, shape, granularity, rounding, signed, narrow: See `AffineQuantizer`.
        range: `paper`, or a range rule that gives the first step.
        scale_numel: Meaning of N for activations: the elements of one sample (`features`, as in the paper) or of the batch (`batch`).

    Source: Esser et al. 2019 (arXiv 1902.08153), equations 1-3 and section 2.2.
    Differs from the paper: per channel, N is the number of elements of a channel. The default first step of the shipped recipe is the one
    with the least squared error, since the paper's keeps 2-bit networks near 40 % for epochs. A step is at most halved at a time: the
    gradient of a value on the limit is the whole limit, 127 at 8 bits. With few values per scale (27 per channel of a first layer), one
    optimizer step was three times the step size, which became negative.

    >>> q = LSQ(3, (6,), signed=True, range="paper")
    >>> q.fit(TensorStats.of(torch.tensor([-1.2, -0.4, 0.1, 0.35, 0.9, 2.0])))
    >>> round(q.scale.item(), 6)
    0.952628
    """

    roundings = ("half_even",)

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        signed: bool | Literal["auto"] = "auto",
        narrow: bool = False,
        range: Literal["paper"] | RangeRule = "paper",
        scale_numel: Literal["features", "batch"] = "features",
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, signed=signed, narrow=narrow, **common)
        if scale_numel not in ("features", "batch"):
            raise QexpError(f"LSQ: scale_numel={scale_numel!r}; allowed are features, batch")
        self.range, self.scale_numel = range, scale_numel
        self.scale = nn.Parameter(torch.ones(self.granularity.scale_shape(self.shape)))
        self.register_buffer("numel", torch.ones(()))
        self._numel = 1.0
        self._before: Tensor | None = None  # the step before the optimizer's next one

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        self.choose_sign(stats)
        if self.range == "paper":
            scale = self.first_scale(stats)
        else:
            low, high = fit_range(self, self.range, stats, Context(True, followed_by_relu, self._parameters_of))
            scale, _ = self._parameters_of(low, high)
        alive = (
            scale > 0
        )  # an all-zero channel starts at the median of the others, an all-zero tensor as if freshly initialised
        start = scale[alive].median() if bool(alive.any()) else self.step_of_zeros()
        scale = torch.where(alive, scale, start)
        self.put(scale=scale.clamp_min(torch.finfo(torch.float32).tiny))
        self.count_elements(stats)
        self.mark_ready()

    def range_key(self) -> tuple[()]:
        return ()

    def first_scale(self, stats: TensorStats) -> Tensor:
        """Returns the paper's first step, `[G]`."""
        return 2 * stats.mean_abs / math.sqrt(float(self.limits[1]))

    def step_of_zeros(self) -> Tensor:
        """Returns the first step of an all-zero tensor: the paper's step for the tensor's usual magnitude."""
        return torch.tensor(2 * usual_magnitude(self.shape) / math.sqrt(float(torch.as_tensor(self.limits[1]).max())))

    def count_elements(self, stats: TensorStats) -> None:
        """Stores N, the number of elements per scale."""
        self.numel.fill_(self._elements(stats))
        self._numel = float(self.numel)

    def _parameters_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        qmin, qmax = self.limits
        scale = torch.maximum(high / qmax, low / qmin) if qmin else high / qmax
        return scale, torch.zeros_like(scale)

    def _elements(self, stats: TensorStats) -> float:
        """Returns N, the number of elements per scale, of a weight or of one sample of an activation."""
        axis = self.granularity.axis
        if axis == 0 or len(self.shape) < 2 or stats.shape == self.shape:
            return math.prod(self.shape) / self.scale.numel()
        return stats.features / self.scale.numel()

    @property
    def zero_point(self) -> Tensor:
        return torch.zeros_like(self.scale.detach())

    @property
    def grad_scale(self) -> float:
        """The factor on the step's gradient, `1 / sqrt(N * QP)`."""
        return 1.0 / math.sqrt(self._numel * float(self.limits[1]))

    def step_gradient(self, x: Tensor) -> float:
        """The factor on the gradients of this tensor's learned parameters."""
        return self.grad_scale / math.sqrt(len(x)) if self.scale_numel == "batch" else self.grad_scale

    def rounded(self, rows: Tensor, axis: int | None) -> Tensor:
        return lsq(rows, self.scale, *self.edges, axis=axis, grad_scale=self.step_gradient(rows))

    def on_training_start(self, latent: Tensor | None, total_steps: int) -> None:
        self._before = self.scale.detach().clone()

    @torch.no_grad()
    def on_optimizer_step(self, latent: Tensor | None) -> None:
        if self._before is not None:  # infinity and NaN stay, so that `must_stay_positive` reports them
            halved = torch.maximum(self.scale, self._before / 2)
            self.scale.copy_(torch.where(self.scale.isfinite(), halved, self.scale))
            self._before = self.scale.detach().clone()
        self.scale.clamp_min_(_LEAST_SCALE)

    def must_stay_positive(self) -> Tensor:
        return self.scale.detach() - _LEAST_SCALE

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"range": f"learned from {self.range_name()}"}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._numel = float(self.numel)
