"""The numbers of the study: optimal clips, errors by analysis and by simulation, and what bits by channel save."""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.passes.bit_allocation import allocate
from qexp.quantizers.gemmlowp import GEMMLOWP
from qexp.ranges import Fixed
from qexp.ranges.aciq import analytic_alpha, analytic_error, exact_alpha, exact_error
from qexp.statistics.stats import TensorStats

BITS = tuple(range(2, 9))
PRIORS = {"gauss": "sigma", "laplace": "b"}
SAMPLES = 200_000
CHANNELS = 256


def samples(prior: str, seed: int = 0) -> Tensor:
    """Returns draws of the prior at unit scale, `[SAMPLES]`."""
    generator = torch.Generator().manual_seed(seed)
    if prior == "gauss":
        return torch.randn(SAMPLES, generator=generator)
    magnitude = torch.empty(SAMPLES).exponential_(1.0, generator=generator)
    return magnitude * torch.randint(0, 2, (SAMPLES,), generator=generator).mul(2).sub(1)


def simulated(x: Tensor, alpha: float, bits: int) -> float:
    """Returns the mean squared error of the real quantizer on `[-alpha, alpha]`."""
    quantizer = GEMMLOWP(bits, tuple(x.shape), range=Fixed(-alpha, alpha))
    quantizer.fit(TensorStats.of(x[:2]))
    return float((quantizer(x) - x).double().square().mean())


def optima() -> list[dict[str, float]]:
    """Returns a row for each width: both clips of both priors, and what the analytic one costs in true error, in percent."""
    rows = []
    for bits in BITS:
        row: dict[str, float] = {"bits": bits}
        for prior in PRIORS:
            analytic, exact = analytic_alpha(prior, bits), exact_alpha(prior, bits, False)
            row |= {f"{prior} analytic": analytic, f"{prior} exact": exact}
            cost = exact_error(prior, analytic, bits, False) / exact_error(prior, exact, bits, False) - 1
            row |= {f"{prior} wider": 100 * (analytic / exact - 1), f"{prior} cost": 100 * cost}
        rows.append(row)
    return rows


def curve(prior: str, bits: int, x: Tensor, points: int = 24) -> dict[str, list[float]]:
    """Returns alpha and the three errors along it: the model with 2^bits steps, the closed form of the real quantizer, the simulation."""
    best = analytic_alpha(prior, bits)
    alphas = torch.linspace(0.4 * best, 2.2 * best, points, dtype=torch.float64).tolist()
    return {
        "alpha": alphas,
        "model": [analytic_error(prior, a, bits) for a in alphas],
        "exact": [exact_error(prior, a, bits, False) for a in alphas],
        "simulated": [simulated(x, a, bits) for a in alphas],
    }


def allocation(spreads: list[float], bits: int = 4) -> list[dict[str, float]]:
    """Returns for each spread of channel scales the mean error with equal bits, and with bits by channel, over the former.

    Channels are normal with `sigma = exp(spread * z)`, z the quantiles of a normal distribution; each is clipped at its own optimum.
    """
    z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(CHANNELS) + 0.5) / CHANNELS).double()
    error = [1.0] + [exact_error("gauss", exact_alpha("gauss", b, False), b, False) for b in range(1, 9)]
    unit = torch.tensor(error, dtype=torch.float64)  # of a channel with sigma 1; one of 0 bits is its mean
    rows = []
    for spread in spreads:
        sigma = torch.exp(spread * z)
        own = allocate(sigma, bits)
        equal = float((sigma**2 * unit[bits]).mean())
        rows.append(
            {
                "spread": spread,
                "equal": equal,
                "allocated": float((sigma**2 * unit[own]).mean()),
                "mean": float(own.double().mean()),
            }
        )
    return rows


def tables() -> str:
    """Returns the study's two tables as markdown."""
    lines = ["| bits | Gauss a/sigma | exact | wider | error | Laplace a/b | exact | wider | error |", "|" + "---|" * 9]
    for row in optima():
        cells = [f"{row['bits']:.0f}"]
        for prior in PRIORS:
            cells += [f"{row[f'{prior} analytic']:.4f}", f"{row[f'{prior} exact']:.4f}"]
            cells += [f"{row[f'{prior} wider']:+.1f} %", f"{row[f'{prior} cost']:+.2f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| spread of log sigma | error, 4 bits each | error, 4 bits on average | ratio |", "|" + "---|" * 4]
    for row in allocation([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]):
        ratio = row["allocated"] / row["equal"]
        lines.append(f"| {row['spread']:.2f} | {row['equal']:.4g} | {row['allocated']:.4g} | {ratio:.3f} |")
    return "\n".join(lines)
