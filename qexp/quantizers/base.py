"""The contract of a quantizer: it sits on one tensor of a layer and maps it to codes and back."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.numerics.granularity import Granularity, PerGroup, PerTensor
from qexp.numerics.grid import UniformGrid
from qexp.ranges import Context, RangeRule
from qexp.statistics.collectors import Collector
from qexp.statistics.stats import TensorStats

ROUNDINGS = ("half_even", "half_up", "half_away", "floor", "trunc", "stochastic")
_LOST_BY_ROUNDING = {  # a level an ulp short of its code falls to the next one, and errors reach a whole step
    "floor": frozenset({"half_step", "idempotent"}),
    "trunc": frozenset({"half_step", "idempotent"}),
    "stochastic": frozenset({"half_step", "idempotent", "monotone"}),
}


class Quantizer(nn.Module):
    """Maps a tensor to integer codes and back: `forward(x) == dequantize(codes(x))`, same shape and dtype as `x`.

    A method is a subclass in a file of its own. It sets the class attributes below, makes its buffers and parameters in the
    constructor (shapes are known there), derives them from statistics in `fit`, and writes `codes` and `dequantize`; `forward` only
    where one fused operation does both.

    Attributes:
        properties: What the method promises and the contract tests check: `idempotent`, `monotone`, `half_step` (inside the range the
            error is at most half a step), `needs_calibration` (forward raises before `fit` or a loaded checkpoint).
        sites: Tensors it makes sense for.
        bits_allowed: Least and greatest width.
        collectors: What calibration shall collect for it beside the summary every tensor gets; found in `stats.extra`.
        level_counts: By how much the documented number of levels may differ from 2^bits.
        correctable: Whether `forward` and `dequantize` apply the gain and offset of a corrected weight.
        scale: Real value of one code, in the shape that broadcasts against the tensor.
        zero_point: The code of zero, same shape.
        latent_decay: Weight decay of the float weight behind the quantizer while it trains; None takes the schedule's.
        ready: Whether the quantizer knows its range; saved with it.
        gain, offset: Of a corrected weight, one a channel: the values are `gain * x^ + offset`, off the integer grid; None otherwise.
        name: Layer and site, for messages; set when the quantizer is attached.

    Args:
        bits: Width; 32 and more never reach a quantizer (the tensor stays float).
        shape: Shape of the tensor; for activations with any batch size.
        granularity: Who shares a scale.
        rounding: How ties and remainders are rounded.
    """

    properties: frozenset[str] = frozenset({"idempotent", "monotone", "half_step", "needs_calibration"})
    sites: frozenset[str] = frozenset({"input", "weight", "bias", "output"})
    bits_allowed: tuple[int, int] = (1, 16)
    collectors: tuple[Collector, ...] = ()
    latent_decay: float | None = None
    level_counts: tuple[int, ...] = (0, -1)
    correctable: bool = False

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        granularity: Granularity | None = None,
        rounding: str = "half_even",
    ) -> None:
        super().__init__()
        low, high = self.bits_allowed
        if isinstance(bits, bool) or not (isinstance(bits, int) and low <= bits <= high):
            raise QexpError(
                f"{type(self).__name__}: bits={bits!r}; allowed are {low}..{high} (32 leaves the tensor in float)"
            )
        if rounding not in ROUNDINGS:
            raise QexpError(f"{type(self).__name__}: rounding={rounding!r}; allowed are {', '.join(ROUNDINGS)}")
        self.bits, self.shape, self.rounding = bits, tuple(shape), rounding
        self.properties = self.properties - _LOST_BY_ROUNDING.get(rounding, frozenset())
        self.granularity = granularity or PerTensor()
        self.name = type(self).__name__
        self.register_buffer("ready", torch.tensor("needs_calibration" not in self.properties))
        self._ready = bool(self.ready)  # the same, without asking the device in every forward
        self.register_buffer("gain", None)
        self.register_buffer("offset", None)

    # -- what a method writes ------------------------------------------------------------------------------------------

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        """Sets scale and zero point from what was seen of the tensor; a method without a range need not write it.

        Args:
            stats: Summary of the tensor, by this quantizer's granularity.
            followed_by_relu: Whether the tensor goes straight into a ReLU.
        """
        self.mark_ready()

    def codes(self, x: Tensor) -> Tensor:
        """Returns the integer codes of `x`, as float32 or int32 of the same shape."""
        raise NotImplementedError

    def dequantize(self, codes: Tensor) -> Tensor:
        """Returns the real values of integer codes, float32."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.require_ready()
        return self.dequantize(self.codes(x)).to(x.dtype)

    def attach(self, layer: nn.Module, sources: tuple[tuple[nn.Module, str], ...]) -> None:
        """Learns whose quantizer it is, once the network carries all of them; a method that needs no other tensor's need not write it.

        Args:
            layer: The layer.
            sources: Where the layer's input may have passed a quantizer, nearest first: layers and their sites.
        """

    def on_training_start(self, latent: Tensor | None, total_steps: int) -> None:
        """Prepares a method's memory or schedule, given the float tensor it quantizes and the optimizer steps of the whole training.

        Called again when training resumes, with the state restored.
        """

    def on_optimizer_step(self, latent: Tensor | None) -> None:
        """Advances a method's memory, once after each optimizer step, given the float tensor it quantizes (None for activations)."""

    def must_stay_positive(self) -> Tensor | None:
        """What the method learns and cannot live without, less the least value it may have; watched while training, None = nothing."""
        return None

    @property
    def limits(self) -> tuple[Any, Any]:
        """Least and greatest code."""
        raise NotImplementedError

    @property
    def levels(self) -> int:
        """The number of distinct values this quantizer can return (the most of any group)."""
        qmin, qmax = self.limits
        return int(torch.as_tensor(qmax - qmin).max()) + 1

    def describe(self) -> dict[str, Any]:
        """Returns what the plan says of this quantizer: signed, granularity, range rule."""
        qmin, _ = self.limits
        return {
            "quantizer": type(self).__name__.lower(),
            "bits": self.bits,
            "signed": bool(torch.as_tensor(qmin).min() < 0),
            "granularity": str(self.granularity),
            "range": "",
            "rounding": self.rounding,
            "levels": self.levels,
        }

    # -- what every method shares --------------------------------------------------------------------------------------

    def mark_ready(self) -> None:
        """Declares the range known, after checking that no scale is zero, negative or non-finite; drops a correction made for another."""
        scale = getattr(self, "scale", None)
        if scale is not None and not bool(torch.isfinite(scale).all() & (scale > 0).all()):
            bad = int((~(torch.isfinite(scale) & (scale > 0))).sum())
            raise QexpError(
                f"{self.name}: {bad} of {scale.numel()} scales are zero, negative or not finite after calibration"
            )
        self.gain = self.offset = None
        self.ready.fill_(True)
        self._ready = True

    def require_ready(self) -> None:
        """Raises if the quantizer is used before it knows its range."""
        if not self._ready:
            raise QexpError(
                f"{self.name}: used before calibration; call calibrate(model, batches) first, or load a checkpoint that holds its scale"
            )

    def correct(self, gain: Tensor, offset: Tensor) -> None:
        """Makes the values `gain * x^ + offset` from now on, the codes staying as they are.

        Args:
            gain: Factor, in a shape that broadcasts against the tensor, such as `[O, 1, 1, 1]`.
            offset: Real value added, likewise.
        """
        if not self.correctable:
            raise QexpError(f"{self.name}: {type(self).__name__} cannot carry a correction of its values")
        self.gain, self.offset = gain.detach().float().clone(), offset.detach().float().clone()

    def corrected(self, values: Tensor) -> Tensor:
        """Returns dequantized values after the correction, if there is one."""
        return values if self.gain is None else values * self.gain + self.offset

    def rows(self, x: Tensor) -> tuple[Tensor, int | None]:
        """Returns the tensor and the axis of its scales as the kernels want them (groups become rows of axis 0)."""
        if isinstance(self.granularity, PerGroup):
            return self.granularity.rows(x), 0
        return x, self.granularity.axis

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name in ("gain", "offset"):  # a corrected weight's checkpoint brings them along
            saved = state_dict.get(prefix + name)
            setattr(self, name, None if saved is None else torch.zeros_like(saved, device=self.ready.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ready = bool(self.ready)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, granularity={self.granularity}, ready={self._ready}"


class AffineQuantizer(Quantizer):
    """A quantizer on a uniform grid whose signedness may follow the data: shared by every method with integer codes.

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
        granularity: Granularity | None = None,
        rounding: str = "half_even",
    ) -> None:
        super().__init__(bits, shape, granularity=granularity, rounding=rounding)
        if signed not in (True, False, "auto"):
            raise QexpError(f"{type(self).__name__}: signed={signed!r}; allowed are true, false, auto")
        self.signed, self.narrow, self.grid = signed, narrow, UniformGrid(bits, signed=False)
        self.register_buffer("qmin", torch.zeros(1))
        self.register_buffer("qmax", torch.zeros(1))
        self.take_sign(signed is True)

    def set_grid(self, grid: UniformGrid) -> None:
        """Takes a grid's limits over into the saved buffers and their copy outside the device."""
        self.grid = grid
        shape = self.granularity.scale_shape(self.shape) if isinstance(grid.bits, Tensor) else (1,)
        for name, value in (("qmin", grid.qmin), ("qmax", grid.qmax)):
            setattr(
                self, name, torch.as_tensor(value, dtype=torch.float32, device=self.qmin.device).reshape(shape).clone()
            )
        self._limits = (grid.qmin, grid.qmax) if self.qmin.numel() == 1 else None

    def choose_sign(self, stats: TensorStats) -> None:
        """Settles `signed: auto` by what was seen, and refuses an unsigned grid for a tensor that has negative values."""
        negative = bool((stats.min < 0).any())
        if self.signed == "auto":
            self.take_sign(negative)
        elif self.signed is False and negative:
            self.refuse_negative(float(stats.min.min()))

    def take_sign(self, signed: bool) -> None:
        """Takes over the signed or the unsigned grid of this width; the error names the layer where there is none."""
        if signed and isinstance(self.grid.bits, int) and self.grid.bits == 1:
            raise QexpError(
                f"{self.name}: bits=1 leaves a signed tensor no positive level; allowed are 2..{self.bits_allowed[1]} bits there, "
                "or a binary method such as quant=dorefa for weights"
            )
        self.set_grid(UniformGrid(self.grid.bits, signed, self.narrow and signed))

    def range_key(self) -> Hashable | None:
        """Returns what, besides class, grid and symmetry, the way from a range to a scale depends on; None where searches are not shared.

        Two quantizers that agree in it get the same range from the same rule and statistics, which is then searched once.
        """
        return None

    def refuse_negative(self, least: float) -> None:
        """Raises: an unsigned quantizer saw negative values."""
        raise QexpError(
            f"{self.name}: an unsigned quantizer saw negative values (least {least:.4g}) in calibration; "
            "use signed: auto or true, or leave this tensor in float with a rule"
        )

    @property
    def limits(self) -> tuple[Any, Any]:
        return self._limits if self._limits is not None else (self.qmin, self.qmax)  # buffers, which follow the device

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name in ("qmin", "qmax"):  # channels may have widths of their own in the checkpoint
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
    """Returns the mean magnitude that a tensor has where all that was seen of it is zeros: what learned steps start from there.

    A weight `[O, I, ...]` gets that of fresh weights, `sqrt(2/pi) / sqrt(fan_in)`, so that its first steps away from zero are seen; other
    tensors that of a unit normal.
    """
    fan_in = math.prod(shape[1:]) if len(shape) > 1 and shape[0] > 1 and signed else 1
    return math.sqrt(2 / math.pi / max(fan_in, 1))


def fit_range(
    quantizer: AffineQuantizer, rule: RangeRule, stats: TensorStats, context: Context
) -> tuple[Tensor, Tensor]:
    """Returns a rule's range `(low, high)`, float64 `[G]`, with an error that names the layer where it is not finite."""
    low, high = _searched(quantizer, rule, stats, context)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise QexpError(f"{quantizer.name}: the range rule {type(rule).__name__} gave a range that is not finite")
    return low, high


def _searched(
    quantizer: AffineQuantizer, rule: RangeRule, stats: TensorStats, context: Context
) -> tuple[Tensor, Tensor]:
    """Returns the rule's answer, found once for the same statistics, rule, grid and way from range to scale."""
    made_of = quantizer.range_key()
    plain = is_dataclass(rule) and type(rule).__hash__ is not None and isinstance(quantizer.grid.bits, int)
    if made_of is None or not plain:
        return rule(stats, quantizer.grid, context)
    try:
        key = (rule, quantizer.grid, context.symmetric, context.followed_by_relu, type(quantizer), made_of)
        hash(key)
    except TypeError:  # a rule that holds something mutable
        return rule(stats, quantizer.grid, context)
    low, high = stats.remember(key, lambda: rule(stats, quantizer.grid, context))
    return low.clone(), high.clone()
