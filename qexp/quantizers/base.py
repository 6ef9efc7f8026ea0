"""Base classes of quantizers: the contract, the evenly spaced grid, and the integer grid that may be signed or unsigned by the data."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.grid import UniformGrid
from qexp.quantizers.contract import ROUNDINGS, Quantizer
from qexp.quantizers.grid import GridQuantizer
from qexp.ranges import Context, RangeRule
from qexp.statistics.stats import TensorStats

__all__ = ["ROUNDINGS", "AffineQuantizer", "GridQuantizer", "Quantizer", "fit_range", "usual_magnitude"]


class AffineQuantizer(GridQuantizer):
    """A quantizer on a uniform grid that can be signed or unsigned depending on the data; the base of methods with integer codes.

    Args:
        bits, shape, granularity, rounding: As for every quantizer.
        signed: True, False, or `auto`: signed where calibration saw negative values.
        narrow: Leave out the least code of a signed grid, so that it is symmetric.
    """

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        signed: bool | Literal["auto"] = "auto",
        narrow: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        if signed not in (True, False, "auto"):
            raise QexpError(f"{type(self).__name__}: signed={signed!r}; allowed are true, false, auto")
        self.signed, self.narrow, self.grid = signed, narrow, UniformGrid(bits, signed=False)
        self.register_buffer("qmin", torch.zeros(1))
        self.register_buffer("qmax", torch.zeros(1))
        self._take_limits(self._grid_of(signed is True))

    def set_grid(self, grid: UniformGrid) -> None:
        """Replaces the grid; writes its limits into the saved buffers and into their copy on the host."""
        self._take_limits(grid)

    def _take_limits(self, grid: UniformGrid) -> None:
        self.grid = grid
        shape = self.granularity.scale_shape(self.shape) if isinstance(grid.bits, Tensor) else (1,)
        for name, value in (("qmin", grid.qmin), ("qmax", grid.qmax)):
            setattr(
                self, name, torch.as_tensor(value, dtype=torch.float32, device=self.qmin.device).reshape(shape).clone()
            )
        self._limits = (grid.qmin, grid.qmax) if self.qmin.numel() == 1 else None

    def choose_sign(self, stats: TensorStats) -> None:
        """Decides `signed: auto` from the statistics; raises for an unsigned grid on a tensor that has negative values."""
        negative = bool((stats.min < 0).any())
        if self.signed == "auto":
            self.take_sign(negative)
        elif self.signed is False and negative:
            self.refuse_negative(float(stats.min.min()))

    def take_sign(self, signed: bool) -> None:
        """Sets the signed or the unsigned grid of this width; where there is none, the error names the layer."""
        self.set_grid(self._grid_of(signed))

    def follow_sign(self, stats: TensorStats, followed_by_relu: bool) -> None:
        """Decides `signed: auto`: signed where the statistics have negative values that no ReLU removes directly after."""
        if self.signed == "auto":
            self.take_sign(bool((stats.min < 0).any()) and not followed_by_relu)

    def _grid_of(self, signed: bool) -> UniformGrid:
        if signed and isinstance(self.grid.bits, int) and self.grid.bits == 1:
            raise QexpError(
                f"{self.name}: bits=1 leaves a signed tensor no positive level; allowed are 2..{self.bits_allowed[1]} bits, "
                "or a binary method such as quant=dorefa for weights"
            )
        return UniformGrid(self.grid.bits, signed, self.narrow and signed)

    def range_key(self) -> Hashable | None:
        """Returns all that a scale depends on besides range, class, grid and symmetry; None where searches are not shared.

        Two quantizers with equal keys get the same range from the same rule and statistics, so that the search runs once.
        """
        return None

    def refuse_negative(self, least: float) -> None:
        """Raises an error: an unsigned quantizer received negative values."""
        raise QexpError(
            f"{self.name}: an unsigned quantizer received negative values (least {least:.4g}) in calibration; "
            "use signed: auto or true, or leave this tensor in float with a rule"
        )

    @property
    def limits(self) -> tuple[Any, Any]:
        return self._limits if self._limits is not None else (self.qmin, self.qmax)  # buffers, which follow the device

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name in ("qmin", "qmax"):  # in the checkpoint each channel may have its own width
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != getattr(self, name).shape:
                setattr(self, name, torch.zeros_like(saved, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        qmin, qmax = self.qmin, self.qmax
        self._limits = (int(qmin), int(qmax)) if qmin.numel() == 1 else None
        signed = bool((qmin < 0).any())
        bits = (
            self.bits
            if qmin.numel() == 1
            else torch.log2(qmax - qmin + 1 + float(self.narrow and signed)).round().int()
        )
        self.grid = UniformGrid(bits, signed, self.narrow and signed)


def usual_magnitude(shape: tuple[int, ...], signed: bool = True) -> float:
    """Returns the mean magnitude to assume for a tensor with only zeros in calibration; learned steps start from it.

    For a weight `[O, I, ...]` it is that of freshly initialised weights, `sqrt(2/pi) / sqrt(fan_in)`, so that small first changes are
    not rounded to zero. For other tensors it is that of a unit normal distribution.
    """
    fan_in = math.prod(shape[1:]) if len(shape) > 1 and shape[0] > 1 and signed else 1
    return math.sqrt(2 / math.pi / max(fan_in, 1))


def fit_range(
    quantizer: AffineQuantizer, rule: RangeRule, stats: TensorStats, context: Context
) -> tuple[Tensor, Tensor]:
    """Returns a rule's range `(low, high)`, float64 `[G]`; raises an error with the layer's name where it is not finite."""
    low, high = _searched(quantizer, rule, stats, context)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise QexpError(f"{quantizer.name}: the range rule {type(rule).__name__} returned a range that is not finite")
    return low, high


def _searched(
    quantizer: AffineQuantizer, rule: RangeRule, stats: TensorStats, context: Context
) -> tuple[Tensor, Tensor]:
    """Returns the rule's range; equal statistics, rule, grid and range key share one search."""
    made_of = quantizer.range_key()
    plain = is_dataclass(rule) and type(rule).__hash__ is not None and isinstance(quantizer.grid.bits, int)
    if made_of is None or not plain:
        return rule(stats, quantizer.grid, context)
    try:
        key = (rule, quantizer.grid, context.symmetric, context.followed_by_relu, type(quantizer), made_of)
        hash(key)
    except TypeError:  # a rule with mutable fields has no hash
        return rule(stats, quantizer.grid, context)
    low, high = stats.remember(key, lambda: rule(stats, quantizer.grid, context))
    return low.clone(), high.clone()
