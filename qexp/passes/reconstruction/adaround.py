"""AdaRound: learns the roundings of each layer so that its output changes least."""

from __future__ import annotations

from collections.abc import Sequence

from qexp.passes.reconstruction.learn import Options
from qexp.passes.reconstruction.reconstruct import Reconstruction, Sweep


class AdaRound(Reconstruction):
    """Learns up or down for each weight, layer by layer: `|phi(W x) - phi(W~ x~)|^2 + strength * sum(1 - |2h - 1|^beta)`.

    x~ comes from the network quantized so far, weights and activations; phi is the ReLU that follows, if one does.

    Args:
        units: `layers`, `blocks`, or names of modules that are to be units.
        iterations: Largest number of iterations per unit; a unit ends earlier when every rounding is decided. The paper takes 10,000.
        batch: Images per iteration.
        lr: Adam's learning rate.
        strength: Factor of the regularizer (lambda).
        warmup: Share of the iterations without regularizer.
        beta: Its exponent, from the first to the last iteration that has it.
        loss: `mse` or `fisher_diag`.
        memory_mb: Limit of the activations kept in memory, in MiB; the rest goes to a file.

    Source: Nagel et al. 2020, "Up or down? Adaptive rounding" (arXiv 2004.10568), equations 21-25.
    Differs from the paper: fewer iterations at ten times the learning rate by default; a layer that ends worse than it began keeps its
    nearest roundings.
    """

    def __init__(
        self,
        units: str | Sequence[str] = "layers",
        iterations: int = 1000,
        batch: int = 32,
        lr: float = 1e-2,
        strength: float = 0.01,
        warmup: float = 0.2,
        beta: tuple[float, float] = (20.0, 2.0),
        loss: str = "mse",
        memory_mb: float = 1024,
    ) -> None:
        options = Options(iterations, batch, lr, strength, warmup, tuple(beta))
        super().__init__([Sweep("roundings", options, loss=loss)], units, memory_mb)
