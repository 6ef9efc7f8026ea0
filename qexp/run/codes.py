"""Evaluation on integer codes (`evaluate=codes`): when it happens, and what the record says of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qexp.integer.on_codes import on_codes
from qexp.layers.quantized import quantized_layers
from qexp.run.settings import Settings

log = logging.getLogger(__name__)


@contextmanager
def products(settings: Settings, model: nn.Module, example: Tensor) -> Iterator[None]:
    """Computes the products of a quantized network on codes inside the block, if the settings ask for it; prints which."""
    if settings.integers.evaluate == "float" or not any(True for _ in quantized_layers(model)):
        yield
        return
    with on_codes(model, example) as found:
        log.info("evaluate=codes: %s", found.line())
        yield


def finding(settings: Settings, model: nn.Module, example: Tensor) -> dict[str, Any]:
    """Returns what the record says: nothing for an evaluation in float, else the share of products on codes, in percent."""
    if settings.integers.evaluate == "float":
        return {}
    with on_codes(model, example) as found:
        return {"evaluate": "codes", "products_on_codes": round(100 * found.share, 2)}
