"""Quantization methods, one file each. `contract.py` defines the interface that they implement."""

from qexp.quantizers.base import Quantizer

__all__ = ["Quantizer"]
