"""The methods: one file each. `base.py` is the contract they keep."""

from qexp.quantizers.base import Quantizer

__all__ = ["Quantizer"]
