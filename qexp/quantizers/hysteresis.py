"""One-bit weights with memory: a sign flips only when the float weight passes a threshold."""

from __future__ import annotations

from typing import Any, Literal

import torch
from qexp_kernels import hysteresis
from torch import Tensor

from qexp.errors import QexpError
from qexp.quantizers.base import Quantizer
from qexp.quantizers.bwn import scaled_signs


class Hysteresis(Quantizer):
    """`omega * q`: omega is mean|w| of the layer; q is a sign that persists from one optimizer step to the next.

    Levels: 2 with the rule `figure`, at -omega and +omega, at every step. q starts as sign(w), with sign(0) = +1. After each optimizer
    step, `figure`: +1 where `w >= tau`, -1 where `w <= -tau`, else unchanged. `legacy`, from the float weight w before and w' after the
    step: sign(w') where the sign is unchanged; +1 where it rose and `w' >= tau`; -1 where it fell and `w' <= -tau`. Everywhere else
    (crossed but not far enough, or a zero before or after) the weight is `omega * w'`, which is not 1-bit. `non_binary` counts these
    weights, `most_non_binary` is the maximum over all steps so far, and codes hold only their sign. Evaluation never changes q, nor do
    several backward passes before one step.

    Gradient: straight to the float weight, none through omega unless `omega_gradient`. No calibration: omega is computed from the tensor.
    Not idempotent, not monotone (two equal weights may have different histories), and no error bound of half a step. Saved: q, whether it
    has been started, omega as last used, `most_non_binary`, and for `legacy` the float weight's previous sign.

    Args:
        bits, shape, granularity, rounding: See `Quantizer`; 1 bit, one omega per layer, nothing is rounded.
        rule: `figure` or `legacy`.
        tau: Threshold, >= 0; 0 is the plain sign.
        tau_mode: Unit of tau: `absolute`, `omega` (mean magnitude) or `std` of the float weight, both computed at each step.
        omega_gradient: Also pass gradients through omega.
        weight_decay: Weight decay of the float weight; None uses that of the schedule.

    Source: Quantized_ResNet, "1-bit weights with hysteresis": its figure's rule and (`legacy`) its code's.
    Differs from the source: the first forward pass already uses signs, while the source uses float weights there; decay acts on the float
    weight instead of its quantized value, and is zero by default.

    >>> q, w = Hysteresis(1, (3,), tau=0.1), torch.tensor([-0.2, 0.3, 0.02])
    >>> q.on_training_start(w, total_steps=1)
    >>> moved = torch.tensor([0.05, -0.2, -0.02])
    >>> q.on_optimizer_step(moved)
    >>> q.codes(moved).tolist()
    [0, 0, 1]
    """

    properties = frozenset()
    sites = frozenset({"weight"})
    bits_allowed = (1, 1)
    granularities = ("tensor",)

    def __init__(
        self,
        bits: int = 1,
        shape: tuple[int, ...] = (1,),
        *,
        rule: Literal["figure", "legacy"] = "figure",
        tau: float = 0.1,
        tau_mode: Literal["absolute", "omega", "std"] = "absolute",
        omega_gradient: bool = False,
        weight_decay: float | None = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        for name, got, allowed in (
            ("rule", rule, ("figure", "legacy")),
            ("tau_mode", tau_mode, ("absolute", "omega", "std")),
        ):
            if got not in allowed:
                raise QexpError(f"Hysteresis: {name}={got!r}; allowed are {', '.join(allowed)}")
        if isinstance(tau, bool) or not (isinstance(tau, int | float) and 0 <= tau < float("inf")):
            raise QexpError(f"Hysteresis: tau={tau!r}; allowed is a number of at least 0")
        self.rule, self.tau, self.tau_mode = rule, float(tau), tau_mode
        self.omega_gradient, self.latent_decay = omega_gradient, weight_decay
        self.register_buffer("state", torch.ones(self.shape))
        self.register_buffer("omega", torch.ones(1))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("most_non_binary", torch.zeros((), dtype=torch.int64))
        self.register_buffer("before", torch.zeros(self.shape) if rule == "legacy" else None)
        self._started = (
            False  # a copy on the host: reading the buffer in every forward would synchronise with the device
        )

    # -- memory --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, latent: Tensor) -> None:
        """Initialises the memory with the signs of the float weight; does nothing if it is initialised already."""
        if self._started:
            return
        self.state.copy_(_sign(latent))
        if self.before is not None:
            self.before.copy_(torch.sign(latent))
        self.started.fill_(True)
        self._started = True

    def on_training_start(self, latent: Tensor | None, total_steps: int) -> None:
        self.start(latent)

    @torch.no_grad()
    def on_optimizer_step(self, latent: Tensor | None) -> None:
        self.start(latent)
        w = latent.detach().float()
        scaled = w / self._unit(w)
        if self.rule == "figure":
            signs, _ = hysteresis(scaled, self.state, self.tau)
            self.state.copy_(signs)
            return
        old, new = self.before, torch.sign(w)
        rose, fell = (old < 0) & (new > 0), (old > 0) & (new < 0)
        settled = ((old == new) & (new != 0)) | (rose & (scaled >= self.tau)) | (fell & (scaled <= -self.tau))
        self.state.copy_(_sign(w) if self.tau == 0 else torch.where(settled, _sign(w), w))
        self.before.copy_(new)
        self.most_non_binary.copy_(torch.maximum(self.most_non_binary, self.non_binary))

    def _unit(self, w: Tensor) -> Tensor | float:
        """Returns the unit of tau."""
        if self.tau_mode == "absolute":
            return 1.0
        unit = w.abs().mean() if self.tau_mode == "omega" else w.std(correction=min(1, w.numel() - 1))
        return unit.clamp_min(torch.finfo(torch.float32).tiny)

    def _signs(self, x: Tensor) -> Tensor:
        return self.state if self._started else _sign(x.detach().float())

    @property
    def non_binary(self) -> Tensor:
        """Number of weights that are neither -omega nor +omega, `[]`; 0 with the rule `figure`."""
        return (self.state.abs() != 1).sum()

    # -- the contract --------------------------------------------------------------------------------------------------

    @property
    def limits(self) -> tuple[int, int]:
        return 0, 1

    @property
    def scale(self) -> Tensor:
        return 2 * self.omega

    @property
    def zero_point(self) -> Tensor:
        """One half: the two codes lie on either side of zero."""
        return torch.full_like(self.omega, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.start(
                x
            )  # a training loop that never calls `on_training_start`: initialise the memory in its first forward
        self._measure(x)
        omega = self.omega.clone().reshape([1] * max(x.ndim, 1))
        signs = self._signs(x)
        return scaled_signs(x, signs, omega, "scale" if self.omega_gradient else "ste")

    def codes(self, x: Tensor) -> Tensor:
        self._measure(x)
        return (self._signs(x) >= 0).int()

    def dequantize(self, codes: Tensor) -> Tensor:
        signs = 2.0 * codes - 1
        if self._started and self.rule == "legacy" and codes.shape == self.state.shape:
            signs = torch.where(self.state.abs() == 1, signs, self.state)
        return signs * self.omega

    @torch.no_grad()
    def _measure(self, x: Tensor) -> None:
        if x.numel():
            self.omega.copy_(x.detach().float().abs().reshape(-1).mean())  # flat: the same order in any layout

    def describe(self) -> dict[str, Any]:
        text = f"{self.rule} tau={self.tau:g} {self.tau_mode}"
        if self.rule == "legacy":
            text += f", {int(self.non_binary)} of {self.state.numel()} weights not binary (most at a step: {int(self.most_non_binary)})"
        return super().describe() | {"signed": True, "range": text}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._started = bool(self.started)


def _sign(w: Tensor) -> Tensor:
    """Returns -1 or +1, with sign(0) = +1."""
    return torch.where(w.detach() >= 0, 1.0, -1.0)
