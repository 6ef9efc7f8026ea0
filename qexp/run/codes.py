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
def products(settings: Settings, model: nn.Module, example: Tensor) -> Iterator[dict[str, Any]]:
    """Computes the products of a quantized network on codes inside the block, if the settings ask for it; prints which.

    Yields what the record says: nothing for an evaluation in float, else the share of products on codes, in percent.
    """
    if settings.integers.evaluate == "float":
        yield {}
        return
    if not any(True for _ in quantized_layers(model)):
        yield {"evaluate": "codes", "products_on_codes": 0.0}
        return
    with on_codes(model, example) as found:
        log.info("evaluate=codes: %s", found.line())
        yield {"evaluate": "codes", "products_on_codes": round(100 * found.share, 2)}
