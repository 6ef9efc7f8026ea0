"""pytorch-playground's quantizers: published vectors, gradients, zeros and constants."""

import math

import pytest
import torch

from qexp.calibration.site_stats import SiteStats
from qexp.errors import QexpError
from qexp.numerics.granularity import PerChannel
from qexp.quantizers.playground import LogLevels, MinMaxLevels, TanhLevels
from qexp.statistics.collectors import LeastMagnitude
from qexp.statistics.stats import TensorStats


def fitted(kind: type, x: torch.Tensor, bits: int, **options):
    q = kind(bits, tuple(x.shape), **options)
    q.fit(TensorStats.of(x))
    return q


def test_minmax_as_published():
    x = torch.tensor([-1, -0.2, 0.1, 0.5, 2])
    y = fitted(MinMaxLevels, x, 3)(x)
    torch.testing.assert_close(y, torch.tensor([-1, -0.142857, 0.285714, 0.714286, 2]), rtol=0, atol=1e-6)


def test_tanh_as_published():
    y = TanhLevels(4)(torch.tensor([-0.6, -0.1, 0.3, 0.9]))
    torch.testing.assert_close(y, torch.tensor([-0.693147, -0.066766, 0.346574, 0.935901]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_tanh_is_its_formula_and_finite_at_the_ends(bits):
    q, n = TanhLevels(bits), 2**bits - 1
    x = torch.linspace(-2, 2, 1001).double()
    v = (2 * torch.floor(n * (torch.tanh(x) + 1) / 2 + 0.5) / n - 1).clamp(-1 + 1 / n, 1 - 1 / n)
    torch.testing.assert_close(q(x.float()).double(), torch.atanh(v), rtol=1e-5, atol=1e-6 if bits < 16 else 1e-4)
    assert q(torch.tensor([-50.0, 50.0])).tolist() == pytest.approx([-math.atanh(1 - 1 / n), math.atanh(1 - 1 / n)])


def test_minmax_gradient_and_ties():
    q = fitted(MinMaxLevels, torch.tensor([0.0, 3.0]), 2)
    x = torch.tensor([-0.1, 0.0, 0.5, 1.5, 3.0, 3.1], requires_grad=True)
    y = q(x)
    assert y.tolist() == [0, 0, 1, 2, 3, 3], "ties go up"
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_tanh_gradient_in_closed_form():
    q, x = TanhLevels(4), torch.tensor([-3.0, -0.6, 0.1, 0.9, 3.0], requires_grad=True)
    y = q(x)
    y.sum().backward()
    want = (1 - torch.tanh(x) ** 2) / (1 - torch.tanh(y) ** 2)
    want[[0, -1]] = 0
    torch.testing.assert_close(x.grad, want.detach())


def test_log_levels_are_even_in_the_logarithm():
    x = torch.tensor([2.0**-k for k in range(7)] + [-1.0, 0.0])
    q = fitted(LogLevels, x, 4)
    assert q.levels == 15 and torch.equal(q(x), x), "seven powers of two are just its magnitudes"
    y = q(torch.tensor([1.4, 2.0**-0.49, 2.0**-0.51, 2.0**-7.1, -(2.0**-6.9)]))
    assert y.tolist() == [1.0, 1.0, 0.5, 0.0, -(2.0**-6)]


def test_log_gradient_is_the_ratio_inside():
    q = fitted(LogLevels, torch.tensor([0.01, 1.0]), 4)
    x = torch.tensor([0.001, 0.01, -0.3, 1.0, 1.1], requires_grad=True)
    y = q(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0, 1, (y[2] / x[2]).item(), 1, 0]))


def test_zeros_of_the_source_spend_its_levels():
    x = torch.tensor([0.0, 0.5, -1.0, 0.25])
    own, source = fitted(LogLevels, x, 4), fitted(LogLevels, x, 4, zero="source")
    assert torch.equal(own(x)[:3], x[:3]) and own.levels == 15
    assert source.levels == 17 and source(x)[0] == 0
    assert source.magnitudes[0].item() == pytest.approx(1e-20)
    step = math.log(1e20) / 7
    assert source(x)[3].item() == pytest.approx(math.exp(-round(math.log(4) / step) * step))


def test_fixed_point_spacing_has_levels_at_powers_of_e():
    x = torch.tensor([0.02, 0.5, -3.0])
    q = fitted(LogLevels, x, 6, spacing="fixed_point")  # |ln| below 4: sf 2, five bits, steps of 1/4
    steps = torch.log(q(x).abs().double()) * 4
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
    assert steps.round().tolist() == [math.floor(4 * math.log(v) + 0.5) for v in (0.02, 0.5, 3.0)]


def test_activations_take_the_least_magnitude_that_was_collected():
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).relu()
    seen = SiteStats(channel=TensorStats(PerChannel(1), 0))
    seen.update(x, (LeastMagnitude(),))
    seen.tensor.extra = seen.extra
    q = LogLevels(8, (1, 3, 5, 5))
    q.fit(seen.tensor)
    torch.testing.assert_close(q.magnitudes[0], x[x > 0].min())
    assert torch.equal(q(x) == 0, x == 0)


@pytest.mark.parametrize("kind", [MinMaxLevels, LogLevels])
@pytest.mark.parametrize("value", [0.0, 0.37, -1.3, 1e-30])
def test_constant_tensors_pass(kind, value):
    x = torch.full((5,), value)
    y = fitted(kind, x, 4)(x)
    assert torch.equal(y, x) or (kind is LogLevels and value == 1e-30), "below 1e-20 there is no logarithm"


def test_nan_stays_nan():
    x = torch.tensor([0.5, torch.nan])
    for q in (fitted(MinMaxLevels, torch.ones(2), 4), fitted(LogLevels, torch.ones(2), 4), TanhLevels(4)):
        assert q(x).isnan().tolist() == [False, True]


def test_what_has_no_meaning_is_refused():
    for kind in (LogLevels, TanhLevels):
        with pytest.raises(QexpError, match=r"bits=1; allowed are 2\.\.16"):
            kind(1)
        with pytest.raises(QexpError, match="half_up"):
            kind(4, rounding="half_even")
    with pytest.raises(QexpError, match="granularity=channel is not allowed; use tensor"):
        MinMaxLevels(4, (3, 2), granularity=PerChannel(0))
    for options in ({"spacing": "even"}, {"zero": "none"}):
        with pytest.raises(QexpError, match="allowed are"):
            LogLevels(4, **options)


@pytest.mark.parametrize("name", ["minmax", "log", "tanh"])
def test_the_recipes_run(run, name):
    metrics = run(f"quant=sources/playground/{name}", "bits=w8a8")
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["drop"] < 5
