"""QDrop: roundings and activation steps of each block learned together, while activations are quantized at random."""

from __future__ import annotations

from collections.abc import Sequence

from qexp.passes.reconstruction.learn import Options
from qexp.passes.reconstruction.reconstruct import Reconstruction, Sweep


class QDrop(Reconstruction):
    """Learns as BRECQ, with each activation, element by element, quantized with probability `drop_prob` and float otherwise.

    Block inputs are mixed from the quantized and the float network; activations inside the block likewise. Afterwards everything is
    quantized. `drop_prob=1` is the method without dropping, `0` learns the roundings for float activations.

    Args:
        units: `blocks`, `layers`, or names of modules that are to be units.
        drop_prob: Probability that an element is quantized.
        iterations: Largest number of iterations per unit; the paper takes 20,000.
        batch, lr, strength, warmup, beta: As for `AdaRound`.
        loss: `mse` or `fisher_diag`.
        step_lr: Adam's learning rate of the activation steps, falling to zero on a cosine; 0 leaves them.
        memory_mb: Limit of the activations kept in memory, in MiB; the rest goes to a file.
        join: Pairs of neighbouring units that are learned as one (see `Reconstruction`).

    Source: Wei et al. 2022, "QDrop" (arXiv 2203.05740), equation 9 and algorithm 1.
    Differs from the paper: fewer iterations at ten times the learning rates by default; a block that ends worse than it began stays as
    it was.
    """

    def __init__(
        self,
        units: str | Sequence[str] = "blocks",
        drop_prob: float = 0.5,
        iterations: int = 1000,
        batch: int = 32,
        lr: float = 1e-2,
        strength: float = 0.01,
        warmup: float = 0.2,
        beta: tuple[float, float] = (20.0, 2.0),
        loss: str = "mse",
        step_lr: float = 4e-4,
        memory_mb: float = 1024,
        join: int = 0,
    ) -> None:
        options = Options(iterations, batch, lr, strength, warmup, tuple(beta), step_lr, drop_prob=drop_prob)
        super().__init__([Sweep("blocks", options, steps=step_lr > 0, loss=loss)], units, memory_mb, join)
