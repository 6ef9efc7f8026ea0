"""The contract of a quantizer, which belongs to one tensor of a layer and maps the tensor to codes and back."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qexp.errors import RENAMED, QexpError
from qexp.numerics.granularity import Granularity, PerGroup, PerTensor
from qexp.ranges import RangeRule
from qexp.statistics.collectors import Collector
from qexp.statistics.stats import TensorStats

ROUNDINGS = ("half_even", "half_up", "half_away", "floor", "trunc", "stochastic")
GRANULARITIES = ("tensor", "channel", "group")
_LOST_BY_ROUNDING = {  # a level one ulp below its code falls to the next code, so that errors reach a whole step
    "floor": frozenset({"half_step", "idempotent"}),
    "trunc": frozenset({"half_step", "idempotent"}),
    "stochastic": frozenset({"half_step", "idempotent", "monotone"}),
}


class Quantizer(nn.Module):
    """Maps a tensor to integer codes and back: `forward(x) == dequantize(codes(x))`, same shape and dtype as `x`.

    A method is a subclass in its own file. It sets the class attributes below. It creates its buffers and parameters in the constructor
    (shapes are known there), computes their values from statistics in `fit`, and implements `codes` and `dequantize`. It overrides
    `forward` only where one fused operation does both. A constructor with further arguments passes the common ones on as `**common`.

    Attributes:
        properties: Properties that the method guarantees and the contract tests check: `idempotent`, `monotone`, `half_step` (inside the
            range the error is at most half a step), `needs_calibration` (forward raises before `fit` or a loaded checkpoint).
        sites: Tensors for which the method is made.
        bits_allowed: Least and greatest width.
        granularities: Supported granularities, of `tensor`, `channel` and `group`; the constructor refuses the others.
        roundings: Supported roundings, the default first; the constructor refuses the others.
        symmetric: Whether code times scale is the value, without a zero point.
        dynamic: Whether the range is computed from each batch, not from calibration.
        noise: Noise that is added before rounding: `none`, or a name that the method defines.
        range: Source of the first range: a rule, a number, or a name that the method defines; None where the method has no choice.
        collectors: Statistics that calibration collects for the method besides the summary of every tensor; see `stats.extra`.
        level_counts: Allowed differences between the documented number of levels and 2^bits.
        correctable: Whether `forward` and `dequantize` apply the gain and offset of a corrected weight.
        scale: Real value of one code, in the shape that broadcasts against the tensor.
        zero_point: The code of zero, same shape.
        latent_decay: Weight decay of the float weight while it trains; None uses that of the schedule.
        ready: Whether the range is set; saved with the quantizer.
        gain, offset: Correction of a weight, one per channel: the values are `gain * x^ + offset`, off the integer grid; None without one.
        name: Layer and site, for messages; set when the quantizer is attached.

    Args:
        bits: Width; below 32 (at 32 the tensor stays float).
        shape: Shape of the tensor; for activations with any batch size.
        granularity: Granularity of the scales; one per tensor by default.
        rounding: Rounding of ties and remainders; the first of `roundings` by default.
    """

    properties: frozenset[str] = frozenset({"idempotent", "monotone", "half_step", "needs_calibration"})
    sites: frozenset[str] = frozenset({"input", "weight", "bias", "output"})
    bits_allowed: tuple[int, int] = (1, 16)
    granularities: tuple[str, ...] = GRANULARITIES
    roundings: tuple[str, ...] = ROUNDINGS
    symmetric: bool = True
    dynamic: bool = False
    noise: str = "none"
    range: RangeRule | float | str | None = None
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
        rounding: str | None = None,
    ) -> None:
        super().__init__()
        low, high = self.bits_allowed
        if isinstance(bits, bool) or not (isinstance(bits, int) and low <= bits <= high):
            raise QexpError(
                f"{type(self).__name__}: bits={bits!r}; allowed are {low}..{high} (32 leaves the tensor in float)"
            )
        self.bits, self.shape = bits, tuple(shape)
        self.rounding = self.roundings[0] if rounding is None else rounding
        self.granularity = granularity or PerTensor()
        self._require_declared("rounding", self.rounding, self.rounding, self.roundings)
        self._require_declared("granularity", str(self.granularity), self.granularity.kind, self.granularities)
        self.properties = self.properties - _LOST_BY_ROUNDING.get(self.rounding, frozenset())
        self.name = type(self).__name__
        self.register_buffer("ready", torch.tensor("needs_calibration" not in self.properties))
        self._ready = bool(
            self.ready
        )  # a copy on the host: reading the buffer in every forward would synchronise with the device
        self.register_buffer("gain", None)
        self.register_buffer("offset", None)

    def _require_declared(self, option: str, got: str, kind: str, allowed: tuple[str, ...]) -> None:
        if kind not in allowed:
            words = [f"{word}:N" if word == "group" else word for word in allowed]
            raise QexpError(f"{type(self).__name__}: {option}={got} is not allowed; use {', '.join(words)}")

    @classmethod
    def arguments(cls) -> tuple[str, ...]:
        """Returns the names of all arguments of the constructor, including those of its bases."""
        names: dict[str, None] = {}
        for kind in cls.__mro__:
            if "__init__" not in vars(kind):
                continue
            parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
            names |= dict.fromkeys(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
        return tuple(names)

    @classmethod
    def require_arguments(cls, names: Iterable[str]) -> None:
        """Raises if the constructor has no argument of such a name; for a renamed argument the error gives the new name."""
        allowed = cls.arguments()
        for name in names:
            if name not in allowed:
                if RENAMED.get(name) in allowed:
                    raise QexpError(f"{cls.__name__}: {name} is now called {RENAMED[name]}")
                raise QexpError(f"{cls.__name__} takes no argument {name!r}; allowed are {', '.join(allowed)}")

    @property
    def needs_histogram(self) -> bool:
        """Whether `fit` reads more than sums and extremes of a tensor, as the range rule declares; True for a rule without declaration.

        A method that needs no histogram for any arguments declares `needs_histogram = False`.
        """
        return bool(getattr(self.range, "needs_histogram", not isinstance(self.range, float | int)))

    # -- what a method implements --------------------------------------------------------------------------------------

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        """Sets scale and zero point from the statistics of the tensor; a method without a range need not override it.

        Args:
            stats: Summary of the tensor, with this quantizer's granularity.
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
        """Receives the layer, after all quantizers are attached; only a method that reads other tensors' quantizers overrides it.

        Args:
            layer: The layer of this quantizer.
            sources: Layers and their sites where the layer's input may have passed a quantizer, nearest first.
        """

    def on_training_start(self, latent: Tensor | None, total_steps: int) -> None:
        """Prepares a method's memory or schedule for a training.

        When a training resumes, this is called again after the state has been restored.

        Args:
            latent: The float tensor that the method quantizes; None for activations.
            total_steps: Optimizer steps of the whole training.
        """

    def on_optimizer_step(self, latent: Tensor | None) -> None:
        """Advances a method's memory, once after each optimizer step, given the float tensor it quantizes (None for activations)."""

    def must_stay_positive(self) -> Tensor | None:
        """The learned parameter that must stay positive, minus its least allowed value; checked while training. None: no check."""
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

    def range_name(self) -> str:
        """Returns the source of the first range as text: `minmax`, `paper`, `6.0`; empty where the method has no choice."""
        if self.range is None or isinstance(self.range, str | float | int):
            return "" if self.range is None else str(self.range)
        return type(self.range).__name__.lower()

    def describe(self) -> dict[str, Any]:
        """Returns the entries of this quantizer in the plan: signed, granularity, range rule."""
        qmin, _ = self.limits
        return {
            "quantizer": type(self).__name__.lower(),
            "bits": self.bits,
            "signed": bool(torch.as_tensor(qmin).min() < 0),
            "granularity": str(self.granularity),
            "range": self.range_name(),
            "rounding": self.rounding,
            "levels": self.levels,
        }

    # -- shared by all methods -----------------------------------------------------------------------------------------

    def mark_ready(self) -> None:
        """Marks the range as set; raises if a scale is zero, negative or not finite. Removes the correction of an earlier range."""
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
        """Raises if the range is not set."""
        if not self._ready:
            raise QexpError(
                f"{self.name}: used before calibration; call calibrate(model, batches) first, or load a checkpoint that has its scale"
            )

    def correct(self, gain: Tensor, offset: Tensor) -> None:
        """Makes the values `gain * x^ + offset` from now on; the codes do not change.

        Args:
            gain: Factor, in a shape that broadcasts against the tensor, such as `[O, 1, 1, 1]`.
            offset: Real value added, likewise.
        """
        if not self.correctable:
            raise QexpError(f"{self.name}: {type(self).__name__} cannot carry a correction of its values")
        self.gain, self.offset = gain.detach().float().clone(), offset.detach().float().clone()

    def corrected(self, values: Tensor) -> Tensor:
        """Returns dequantized values after the correction, if there is one."""
        return values if self._buffers["gain"] is None else values * self.gain + self.offset

    def rows(self, x: Tensor) -> tuple[Tensor, int | None]:
        """Returns the tensor and the axis of its scales in the form that the kernels expect (groups become rows of axis 0)."""
        if isinstance(self.granularity, PerGroup):
            return self.granularity.rows(x), 0
        return x, self.granularity.axis

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name in ("gain", "offset"):  # the checkpoint of a corrected weight holds them
            saved = state_dict.get(prefix + name)
            setattr(self, name, None if saved is None else torch.zeros_like(saved, device=self.ready.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ready = bool(self.ready)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, granularity={self.granularity}, ready={self._ready}"
