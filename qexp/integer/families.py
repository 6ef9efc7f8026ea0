"""Layers with a special way to compute, and the unit of the program that does the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from qexp.integer.grids import cannot
from qexp.integer.hardware.shift import drop
from qexp.layers.per_product import PerProduct
from qexp.layers.quantized import QUANTIZED, Quantized
from qexp.layers.shift import Shift
from qexp.layers.winograd import Winograd

Options = dict[str, Any]


def unit(layer: nn.Module, name: str) -> Options:
    """Returns the properties of a layer's unit that need no integers yet; empty for an ordinary layer."""
    if isinstance(layer, Winograd):
        tiles = {"outputs": layer._outputs, "two_d": layer._two_d, "clamp_int16": layer._clamp}
        return {"name": "winograd", **tiles} if isinstance(layer, nn.Conv2d) and layer._clamp else {}
    if isinstance(layer, Shift):
        return {} if layer._negative_shift == "exact" else {"name": "shift", "negative": layer._negative_shift}
    if isinstance(layer, PerProduct):
        return {} if layer._accum == "exact" else {"name": "fixed_point", "accumulate": layer._accum}
    if isinstance(layer, Quantized) and type(layer) not in QUANTIZED.values():
        raise cannot(
            name, f"{type(layer).__name__} scales its sums by real numbers", "set compute: null for this layer"
        )
    return {}


def shift_options(layer: Shift, how: Options, unit: np.ndarray) -> Options:
    """Returns the unit of a shift layer, given the real value `[O]` of 1 in the program's sums."""
    outputs = len(layer.weight)
    after = np.exp2(-layer._qout(outputs).double().numpy().reshape(-1))
    return how | {"drop": drop(unit, after, layer._inflation, outputs)}
