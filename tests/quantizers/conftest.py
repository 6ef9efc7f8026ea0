"""Quantizers as a recipe makes them: from the YAML, for one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from qexp.command.contracts import quantizer as contract
from qexp.quantizers.base import Quantizer

Make = Callable[..., Quantizer]


def _build(spec: dict[str, Any], bits: int, x: Tensor, site: str, **changes: Any) -> Quantizer:
    return contract.built({**spec, **changes}, bits, x, site)


def _fit(quantizer: Quantizer, x: Tensor, site: str) -> Quantizer:
    contract.fit(quantizer, x, site)
    return quantizer


@pytest.fixture(scope="session")
def build() -> Make:
    """Call with (spec, bits, tensor, site, **changes); returns the quantizer for that tensor, not yet fitted."""
    return _build


@pytest.fixture(scope="session")
def fitted() -> Make:
    """Like `build`, and fitted on the tensor as calibration would."""
    return lambda spec, bits, x, site, **changes: _fit(_build(spec, bits, x, site, **changes), x, site)
