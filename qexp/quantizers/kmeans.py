"""k-means: each weight of a layer is replaced by the nearest of a few cluster centres (the codebook)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from qexp_kernels import level_grid
from sklearn.cluster import KMeans as Lloyd
from torch import Tensor

from qexp.errors import QexpError
from qexp.quantizers.base import Quantizer
from qexp.statistics.stats import TensorStats


def centres(values: np.ndarray, counts: np.ndarray, k: int, seed: int, n_init: int) -> np.ndarray:
    """Returns up to k ascending centres of `values` `[n]`, each counted `counts` times; the values themselves if there are at most k.

    Runs Lloyd's algorithm from `n_init` seeded k-means++ starts and keeps the best result.
    """
    values, index = np.unique(values, return_inverse=True)
    counts = np.bincount(index, weights=counts)
    if len(values) <= k:
        return values
    unit = np.abs(values).max()  # squares of tiny weights would underflow
    fit = Lloyd(k, init="k-means++", n_init=n_init, random_state=seed).fit(values[:, None] / unit, sample_weight=counts)
    return np.sort(fit.cluster_centers_[:, 0]) * unit


class KMeans(Quantizer):
    """Each weight becomes the nearest of up to 2^bits centres found by clustering the layer's weights.

    Levels: 2^bits; fewer where the tensor has fewer distinct values, which then pass unchanged. A value half-way between two centres
    goes to the one of smaller magnitude. Gradient: 1 between the outermost centres (included), else 0; the centres are not trained.
    Codes are indices into the codebook. Its levels are not evenly spaced, so there is no error bound of half a step; `scale` and
    `zero_point` only describe its ends and mean spacing. Saved: the codebook.

    Args:
        bits, shape, granularity, rounding: See `Quantizer`; one codebook per tensor, rounding to the nearest centre.
        seed: Seed of the starts.
        n_init: Number of starts; the best result is kept.

    Source: the k-means models of cnn-quantization; Han et al. 2015 (arXiv 1510.00149), section 3.
    Differs from the source: clustering uses the exact weights of tensors up to 4 million elements, and a histogram of larger tensors.

    >>> w = torch.tensor([-1.02, -0.98, -0.3, -0.28, 0.01, 0, 0.5, 0.52])
    >>> q = KMeans(2, (8,))
    >>> q.fit(TensorStats.of(w))
    >>> [round(c, 4) for c in q.centres.tolist()]
    [-1.0, -0.29, 0.005, 0.51]
    """

    properties = frozenset({"idempotent", "monotone", "needs_calibration"})
    sites = frozenset({"weight"})
    bits_allowed = (1, 8)
    correctable = True
    granularities = ("tensor",)
    roundings = ("half_even",)

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        seed: int = 0,
        n_init: int = 10,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        if n_init < 1:
            raise QexpError(f"KMeans: n_init={n_init}; allowed is at least 1 start")
        self.seed, self.n_init = seed, n_init
        self.register_buffer("codebook", torch.zeros(2**bits))  # if there are fewer centres, the last one is repeated
        self.register_buffer("used", torch.tensor(1))
        self._used = 1

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        values, counts = (t[0].numpy() for t in stats.density.points())
        seen = counts > 0
        found = centres(values[seen], counts[seen], 2**self.bits, self.seed, self.n_init)
        found = torch.from_numpy(found).float().unique()
        self.codebook.copy_(torch.cat([found, found[-1:].expand(len(self.codebook) - len(found))]))
        self.used.fill_(len(found))
        self._used = len(found)
        self.mark_ready()

    @property
    def centres(self) -> Tensor:
        """The distinct levels, ascending."""
        return self.codebook[: self._used]

    @property
    def limits(self) -> tuple[int, int]:
        return 0, self._used - 1

    @property
    def scale(self) -> Tensor:
        """Mean spacing of the centres, `[1]`; 1 for a single one."""
        spacing = (self.centres[-1:] - self.centres[:1]) / max(self._used - 1, 1)
        return torch.where(spacing > 0, spacing, 1.0).clamp_min(torch.finfo(torch.float32).tiny)

    @property
    def zero_point(self) -> Tensor:
        """The position of zero if the centres were evenly spaced, `[1]`."""
        return -self.centres[:1] / self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.corrected(self._nearest(x.float())).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        return torch.searchsorted(self.centres.contiguous(), self._nearest(x.detach().float()).contiguous()).int()

    def dequantize(self, codes: Tensor) -> Tensor:
        return self.corrected(self.centres[codes.long()])

    def _nearest(self, x: Tensor) -> Tensor:
        self.require_ready()
        return level_grid(x, self.centres, torch.ones((), device=x.device))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"range": "k-means", "signed": bool((self.centres < 0).any())}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._used = int(self.used)
