"""BRECQ: learns the roundings of each block, weighting its output by the loss gradient; then the activation steps."""

from __future__ import annotations

from collections.abc import Sequence

from qexp.passes.reconstruction.learn import Options
from qexp.passes.reconstruction.reconstruct import Reconstruction, Sweep


class BRECQ(Reconstruction):
    """Learns the roundings block by block with float activations, then, block by block, the steps of the quantized activations.

    Args:
        units: `blocks`, `layers`, or names of modules that are to be units.
        iterations: Largest number of iterations per unit for its roundings; the paper takes 20,000.
        batch, lr, strength, warmup, beta: As for `AdaRound`.
        loss: `fisher_diag` weights each output value by its squared gradient; `mse` weights all equally.
        step_iterations: Largest number of iterations per unit for its activation steps; the paper takes 5,000.
        step_lr: Adam's learning rate of the steps, falling to zero on a cosine.
        step_exponent: Exponent of the error in the loss of the steps.
        memory_mb: Limit of the activations kept in memory, in MiB; the rest goes to a file.
        join: Pairs of neighbouring units that are learned as one (see `Reconstruction`).

    Source: Li et al. 2021, "BRECQ" (arXiv 2102.05426), equation 10 and section 4.
    Differs from the paper: fewer iterations at ten times the learning rate by default; squared gradients are those of the divergence
    from the float network's class probabilities, divided by their mean in each image, half of the weight spread evenly; a block that
    ends worse than it began stays as it was.
    """

    def __init__(
        self,
        units: str | Sequence[str] = "blocks",
        iterations: int = 1000,
        batch: int = 32,
        lr: float = 1e-2,
        strength: float = 0.01,
        warmup: float = 0.2,
        beta: tuple[float, float] = (20.0, 2.0),
        loss: str = "fisher_diag",
        step_iterations: int = 500,
        step_lr: float = 4e-4,
        step_exponent: float = 2.4,
        memory_mb: float = 1024,
        join: int = 0,
    ) -> None:
        roundings = Options(iterations, batch, lr, strength, warmup, tuple(beta))
        steps = Options(step_iterations, batch, step_lr=step_lr, exponent=step_exponent)
        sweeps = [
            Sweep("roundings", roundings, activations=False, loss=loss),
            Sweep("steps", steps, roundings=False, steps=True),
        ]
        super().__init__(sweeps, units, memory_mb, join)
