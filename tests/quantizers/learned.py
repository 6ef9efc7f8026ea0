"""What the tests of learned ranges share: a gradient with a fixed upstream, a fitted quantizer, a parameter set by hand."""

from __future__ import annotations

import numpy as np
import torch

from qexp.statistics.stats import TensorStats


def upstream(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(-8, 9, n) / 8.0  # exact in float32


def backward(q: torch.nn.Module, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the quantizer's values and the gradient of `sum(values * upstream)` to x; parameters get theirs."""
    t = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    y = q(t)
    (y * torch.tensor(upstream(x.size).reshape(x.shape), dtype=torch.float32)).sum().backward()
    return y.detach().double().numpy(), t.grad.double().numpy()


def fitted(q, *values: float):
    q.fit(TensorStats.of(torch.tensor(values), q.granularity))
    return q


def put(parameter: torch.Tensor, value) -> None:
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(value))
