"""Biases in whole steps of the products they are added to, as integer accumulators hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qexp.quantizers.base import Quantizer
from qexp.statistics.stats import TensorStats

MOST = 2**30  # largest bias in steps, so that a bias plus the sum of products fits 32 bits


class AccumulatorBias(Quantizer):
    """`codes = round(b / step)` with `step = scale of the input * scale of the weight`, one per output where the weight has one.

    Levels: 2^31 - 1, the signed 32 bits of runtimes minus one bit for the sum of products. Ties to even. Gradient: 1. Nothing is saved:
    the step is computed from the layer's scales at each use, so it follows learned scales. A bias of more than 2^30 steps (in a channel
    with almost zero weights) uses a step that is larger by a power of two. Where the weights are not multiples of one step (corrected
    weights, k-means, powers of two), the bias passes unchanged, and the integer program rounds it to a separate step.

    Args:
        bits: 31.
        shape: `[O]`.
        granularity: Ignored: the step is that of the products.
        rounding: As for every quantizer.

    Source: Jacob et al. 2018 (arXiv 1712.05877), equation 11.

    >>> q = AccumulatorBias(31, (2,))
    >>> q.steps = lambda: torch.tensor([0.5, 0.25], dtype=torch.float64)
    >>> q.codes(torch.tensor([1.3, 1.3])).tolist(), q(torch.tensor([1.3, 1.3])).tolist()
    ([3, 5], [1.5, 1.25])
    """

    properties = frozenset({"half_step", "monotone"})
    sites = frozenset({"bias"})
    bits_allowed = (31, 31)

    def __init__(
        self,
        bits: int = 31,
        shape: tuple[int, ...] = (1,),
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        self._layer: tuple[
            nn.Module, ...
        ] = ()  # in a tuple, so that the layer does not become a submodule of its own quantizer
        self._sources: tuple[tuple[nn.Module, str], ...] = ()
        self._even: bool | None = None  # whether the weights are multiples of one step; computed at first use

    def attach(self, layer: nn.Module, sources: tuple[tuple[nn.Module, str], ...]) -> None:
        self._layer, self._sources, self._even = (layer,), sources, None

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        self._even = None
        self.mark_ready()

    def steps(self) -> Tensor | None:
        """Returns the scale of the products, float64, one or one per output; None where the products are not multiples of one step."""
        found = [module.site(site) for module, site in self._sources if isinstance(module.site(site), Quantizer)]
        if not found or not self._layer or not isinstance(self._layer[0].weight_quantizer, Quantizer):
            return None
        weight = self._layer[0].weight_quantizer
        if self._even is None:
            self._even = _even(self._layer[0].weight, weight)
        scale = torch.as_tensor(getattr(found[0], "scale", torch.zeros(0))).detach().double().flatten()
        scale = scale[:1] if scale.numel() and bool((scale == scale[0]).all()) else scale
        if not self._even or scale.numel() != 1:
            return None
        return scale * weight.scale.detach().double().flatten()

    def raised(self, x: Tensor) -> Tensor | None:
        """Returns the step of each output, float64, such that no bias has more than 2^30 steps."""
        step = self.steps()
        if step is None:
            return None
        step = step.to(x.device).expand(x.shape)
        return step * torch.exp2(raise_by(x.detach().double().abs() / step))

    @property
    def scale(self) -> Tensor:
        """The scale of the products; 1 where they have none."""
        step = self.steps()
        return torch.ones(1) if step is None else step.float()

    @property
    def zero_point(self) -> Tensor:
        return torch.zeros(1)

    @property
    def limits(self) -> tuple[int, int]:
        return -MOST, MOST

    def codes(self, x: Tensor) -> Tensor:
        step = self.raised(x)
        return torch.zeros_like(x, dtype=torch.int32) if step is None else torch.round(x.detach().double() / step).int()

    def dequantize(self, codes: Tensor) -> Tensor:
        step = self.steps()
        return codes.float() if step is None else (codes.double() * step.to(codes.device)).float()

    def forward(self, x: Tensor) -> Tensor:
        step = self.raised(x)
        if step is None:
            return x
        return x + ((torch.round(x.detach().double() / step) * step).to(x.dtype) - x.detach())

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"range": "input * weight"}


def raise_by(steps: Any) -> Any:
    """Returns the power of two by which a step must grow so that magnitudes in steps stay within 2^30."""
    return torch.ceil(torch.log2((steps / MOST).clamp_min(1)))


@torch.no_grad()
def _even(weight: Tensor, quantizer: Quantizer) -> bool:
    """Returns whether a quantized weight is `(codes - zero point)` times one scale per output or per tensor."""
    scale = getattr(quantizer, "scale", None)
    axis = quantizer.granularity.axis or 0  # 1 for a transposed convolution
    if quantizer.gain is not None or not isinstance(scale, Tensor) or scale.numel() not in (1, weight.shape[axis]):
        return False
    spread = [-1 if k == axis else 1 for k in range(weight.ndim)]
    zero = torch.as_tensor(quantizer.zero_point, dtype=torch.float32)
    step, zero = (v.detach().to(weight.device).flatten().reshape(spread) for v in (scale, zero))
    return bool((((quantizer.codes(weight) - zero) * step - quantizer(weight)).abs() <= 1e-4 * step).all())
