"""ACIQ and the clip kinds on a tensor seen after its ReLU: the prior before it is what counts."""

import pytest
import torch

from qexp.numerics import PerChannel, UniformGrid
from qexp.quantizers.uniform import Uniform
from qexp.ranges import ACIQ, MSE, Clip, Context
from qexp.statistics.stats import TensorStats


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("prior", ["laplace", "gauss"])
def test_the_analytic_clip_of_a_rectified_tensor_is_near_the_best(bits: int, prior: str) -> None:
    torch.manual_seed(0)
    x = torch.distributions.Laplace(0.0, 1.0).sample((100_000,)) if prior == "laplace" else torch.randn(100_000)
    x = x.relu()[None]
    stats = TensorStats()
    stats.update(x)
    errors = {}
    for name, rule in {"aciq": ACIQ(prior=prior), "mse": MSE()}.items():
        quantizer = Uniform(bits, (1,), symmetric=False, range=rule)
        quantizer.fit(stats)
        errors[name] = float((quantizer(x) - x).square().mean())
    assert errors["mse"] <= errors["aciq"] * 1.001
    assert errors["aciq"] <= errors["mse"] * (1.06 if bits > 2 else 1.12)  # the analytic model counts one step too many


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize(
    "kind, rule",
    [
        ("laplace", ("laplace",)),
        ("gauss", ("gauss",)),
        ("exact", ("laplace", "exact")),
        ("exact:gauss", ("gauss", "exact")),
    ],
)
def test_a_clip_kind_gives_what_its_prior_gives(kind: str, rule: tuple[str, ...], observed: bool) -> None:
    torch.manual_seed(0)
    x = torch.distributions.Laplace(0.2, 1.0).sample((4, 3, 5000)) * torch.tensor([0.5, 1, 4])[:, None]
    context = Context(symmetric=False)
    for tensor in (x.relu(), x.abs() + 0.1, x):  # after its ReLU, positive throughout, of both signs
        stats = TensorStats(PerChannel(1), 0)
        stats.update(tensor)
        for bits in (2, 4, 8):
            grid = UniformGrid(bits, signed=False)
            found = Clip(kind, clip_to_observed=observed)(stats, grid, context)
            for end, wanted in zip(found, ACIQ(*rule, clip_to_observed=observed)(stats, grid, context)):
                torch.testing.assert_close(end, wanted)
