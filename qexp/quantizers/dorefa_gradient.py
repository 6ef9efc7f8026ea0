"""DoReFa gradients: each sample's gradient on a grid of its own range, with noise that removes the bias of rounding."""

from __future__ import annotations

import zlib
from typing import Any, Literal

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.ops import round_to
from qexp.quantizers.base import Quantizer


class DoReFaGradient(Quantizer):
    """`2m (round(clip(g/(2m) + 1/2 + u/n, 0, 1) n)/n - 1/2)` with `m = max|g|` of each sample and `n = 2^bits - 1`.

    It quantizes the gradient with respect to a layer's result, before the layer computes the gradients of its input and weight; the
    forward pass is unchanged. Levels: 2^bits over [-m, m] without zero, so a small gradient becomes +-m/n; the noise u ~ U(-1/2, 1/2)
    makes the mean correct. A sample without gradient (m = 0) passes unchanged. Half to even. No calibration. With noise it is neither
    idempotent nor monotone, and the error is up to a whole step instead of half a step. Saved: the number of noise draws. The next noise
    depends on this number, the seed and the layer's name, so that a resumed training draws the same noise.

    Args:
        bits, shape, rounding: See `Quantizer`.
        granularity: Only `tensor`; the range is computed per sample.
        noise: `uniform`, or `none`.
        seed: Seed of the noise.

    Source: Zhou et al. 2016 (arXiv 1606.06160), equation 12.

    >>> q = DoReFaGradient(4, (1, 4), noise="none")
    >>> [round(v, 4) for v in q(torch.tensor([[0.3, -0.1, 0.05, -0.4]]))[0].tolist()]
    [0.2933, -0.08, 0.0267, -0.4]
    """

    properties = frozenset()
    sites = frozenset({"grad_output"})
    granularities = ("tensor",)

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        noise: Literal["uniform", "none"] = "uniform",
        seed: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        if noise not in ("uniform", "none"):
            raise QexpError(f"DoReFaGradient: noise={noise!r}; allowed are uniform, none")
        self.noise, self.seed = noise, int(seed)
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self._draws = (
            0  # a copy on the host: reading the buffer in every backward pass would synchronise with the device
        )
        self._range = torch.ones(1)

    @property
    def limits(self) -> tuple[int, int]:
        return 0, 2**self.bits - 1

    @property
    def scale(self) -> Tensor:
        """Real value of one code of the last gradient, one per sample."""
        return 2 * self._range / self.limits[1]

    @property
    def zero_point(self) -> Tensor:
        """The position of zero among the codes: half of the last code."""
        return torch.full_like(self._range, self.limits[1] / 2)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        y = self.dequantize(self.codes(x))
        return torch.where(self._range == 0, x, y.to(x.dtype))

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        n = self.limits[1]
        g = x.float()
        self._range = g.abs().amax(tuple(range(1, g.ndim)), keepdim=True) if g.numel() else g.new_zeros(1)
        unit = g / (2 * torch.where(self._range == 0, 1.0, self._range)) + 0.5
        if self.noise == "uniform":
            unit = unit + self._uniform(g) / n
        return round_to(unit.clamp(0, 1) * n, self.rounding)

    def dequantize(self, codes: Tensor) -> Tensor:
        return 2 * self._range * (codes.float() / self.limits[1] - 0.5)

    def _uniform(self, like: Tensor) -> Tensor:
        """Returns the next noise, U(-1/2, 1/2), of the shape of a tensor."""
        generator = torch.Generator(like.device)
        generator.manual_seed(zlib.crc32(f"{self.seed} {self.name} {self._draws}".encode()))
        self._draws += 1
        self.draws.add_(1)
        return torch.rand(like.shape, generator=generator, device=like.device) - 0.5

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"signed": True, "range": f"max of each sample, noise {self.noise}"}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._draws = int(self.draws)
