"""Quantizers as a recipe makes them: from the YAML, for one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from qexp.calibration.site_stats import SiteStats
from qexp.numerics.granularity import PerChannel, granularity
from qexp.quantizers.base import Quantizer
from qexp.statistics.stats import TensorStats
from qexp.system.objects import make

Make = Callable[..., Quantizer]


def _build(spec: dict[str, Any], bits: int, x: Tensor, site: str, **changes: Any) -> Quantizer:
    spec = {**spec, **changes}
    axis = 0 if site in ("weight", "bias") else 1
    shape = tuple(x.shape) if axis == 0 else (1, *x.shape[1:])
    shared = granularity(spec.pop("granularity", "tensor"), axis)
    return make(spec, as_partial=True)(bits=bits, shape=shape, granularity=shared)


def _fit(quantizer: Quantizer, x: Tensor, site: str) -> Quantizer:
    if site in ("weight", "bias"):
        quantizer.fit(TensorStats.of(x, quantizer.granularity))
        return quantizer
    seen = SiteStats(channel=TensorStats(PerChannel(1), 512))
    seen.update(x, quantizer.collectors)
    stats = seen.tensor if quantizer.granularity.axis is None else seen.channel
    stats.extra = seen.extra
    quantizer.fit(stats)
    return quantizer


@pytest.fixture(scope="session")
def build() -> Make:
    """Call with (spec, bits, tensor, site, **changes); returns the quantizer for that tensor, not yet fitted."""
    return _build


@pytest.fixture(scope="session")
def fitted() -> Make:
    """Like `build`, and fitted on the tensor as calibration would."""
    return lambda spec, bits, x, site, **changes: _fit(_build(spec, bits, x, site, **changes), x, site)
