"""The two ends of a quantizer's range, in the units of its tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.quantizers.base import Quantizer


def ends(quantizer: Quantizer) -> tuple[float, float]:
    """Returns the least and the greatest value that the quantizer can represent, over all its channels or rows.

    Example:
        >>> from qexp.quantizers.uniform import Uniform
        >>> from qexp.statistics.stats import TensorStats
        >>> q = Uniform(4, (6,), symmetric=False)
        >>> q.fit(TensorStats.of(torch.tensor([-1, -0.4, 0, 0.25, 0.55, 2])))
        >>> ends(q)
        (-1.0, 2.0)
    """
    scale, zero = (_flat(v) for v in (quantizer.scale, quantizer.zero_point))
    least, most = (_flat(v) for v in quantizer.limits)
    return float(((least - zero) * scale).min()), float(((most - zero) * scale).max())


def _flat(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value).detach().float().flatten().cpu()
