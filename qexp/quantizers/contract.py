"""The contract of a quantizer: it sits on one tensor of a layer and maps it to codes and back."""

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
_LOST_BY_ROUNDING = {  # a level an ulp short of its code falls to the next one, and errors reach a whole step
    "floor": frozenset({"half_step", "idempotent"}),
    "trunc": frozenset({"half_step", "idempotent"}),
    "stochastic": frozenset({"half_step", "idempotent", "monotone"}),
}


class Quantizer(nn.Module):
    """Maps a tensor to integer codes and back: `forward(x) == dequantize(codes(x))`, same shape and dtype as `x`.

    A method is a subclass in a file of its own. It sets the class attributes below, makes its buffers and parameters in the
    constructor (shapes are known there), derives them from statistics in `fit`, and writes `codes` and `dequantize`; `forward` only
    where one fused operation does both. A constructor with arguments of its own passes the rest on as `**common`.

    Attributes:
        properties: What the method promises and the contract tests check: `idempotent`, `monotone`, `half_step` (inside the range the
            error is at most half a step), `needs_calibration` (forward raises before `fit` or a loaded checkpoint).
        sites: Tensors it makes sense for.
        bits_allowed: Least and greatest width.
        granularities: Who may share a scale, of `tensor`, `channel` and `group`; the constructor refuses the others.
        roundings: The roundings it is defined for, the default first; the constructor refuses the others.
        symmetric: Whether code times scale is the value, without a zero point.
        dynamic: Whether the range is that of each batch, not that of calibration.
        noise: What is added before rounding; `none`, or a word of the method's.
        range: What picks the first range: a rule, a number, or a word of the method's; None where nothing is to choose.
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
        granularity: Who shares a scale; the whole tensor by default.
        rounding: How ties and remainders are rounded; the first of `roundings` by default.
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
        self._ready = bool(self.ready)  # the same, without asking the device in every forward
        self.register_buffer("gain", None)
        self.register_buffer("offset", None)

    def _require_declared(self, option: str, got: str, kind: str, allowed: tuple[str, ...]) -> None:
        if kind not in allowed:
            words = [f"{word}:N" if word == "group" else word for word in allowed]
            raise QexpError(f"{type(self).__name__}: {option}={got} is not allowed; use {', '.join(words)}")

    @classmethod
    def arguments(cls) -> tuple[str, ...]:
        """Returns the names of all arguments of the constructor, those included that it passes on to its bases."""
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
        """Raises where the constructor has no argument of such a name; says what a renamed one is called now."""
        allowed = cls.arguments()
        for name in names:
            if name not in allowed:
                if RENAMED.get(name) in allowed:
                    raise QexpError(f"{cls.__name__}: {name} is called {RENAMED[name]} now")
                raise QexpError(f"{cls.__name__} takes no argument {name!r}; allowed are {', '.join(allowed)}")

    @property
    def needs_histogram(self) -> bool:
        """Whether `fit` reads more than sums and ends of a tensor: what the range rule declares; a rule that declares nothing may.

        A method that needs none whatever its arguments are declares `needs_histogram = False`.
        """
        return bool(getattr(self.range, "needs_histogram", not isinstance(self.range, float | int)))

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

    def range_name(self) -> str:
        """Returns what picks the first range, in a word or a number: `minmax`, `paper`, `6.0`; nothing where nothing is to choose."""
        if self.range is None or isinstance(self.range, str | float | int):
            return "" if self.range is None else str(self.range)
        return type(self.range).__name__.lower()

    def describe(self) -> dict[str, Any]:
        """Returns what the plan says of this quantizer: signed, granularity, range rule."""
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
