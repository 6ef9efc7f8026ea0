"""Layers that carry quantizers; `swap` makes them from float layers, in place."""

from qexp.layers.quantized import Quantized, quantized_layers, quantizers
from qexp.layers.swap import bake, baked_weights, check_all_ran, quantizers_off, swap, unswap

__all__ = [
    "Quantized",
    "bake",
    "baked_weights",
    "check_all_ran",
    "quantized_layers",
    "quantizers",
    "quantizers_off",
    "swap",
    "unswap",
]
