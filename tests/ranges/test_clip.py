"""Clip kinds: from alpha to a range, full and half, by each name."""

import pytest
import torch

from qexp.errors import QexpError
from qexp.numerics import PerChannel, UniformGrid
from qexp.quantizers.gemmlowp import GEMMLOWP
from qexp.ranges import ACIQ, KL, Clip, Context, MinMax
from qexp.ranges.aciq import exact_alpha
from qexp.ranges.alpha import alpha_range
from qexp.statistics.stats import TensorStats

GRID = UniformGrid(4, signed=False)
AFFINE = Context(symmetric=False)
RELU = Context(symmetric=False, followed_by_relu=True)


@pytest.fixture(scope="module")
def seen() -> TensorStats:
    """A shifted Laplace channel and a normal one, in four batches."""
    torch.manual_seed(0)
    laplace = torch.distributions.Laplace(0.3, 0.5)
    stats = TensorStats(PerChannel(1), 2048)
    for _ in range(4):
        stats.update(torch.stack([laplace.sample((8, 500)), torch.randn(8, 500)], dim=1))
    return stats


class Given:
    """Statistics with the numbers of the vectors."""

    mean, min, max, b, std = (torch.tensor([v], dtype=torch.float64) for v in (0.2, -1.1, 4.0, 0.5, 0.7))


def test_the_vectors():
    """V1.9-a, V1.9-b."""
    low, high = Clip("laplace")(Given, UniformGrid(4, signed=False), AFFINE)
    assert low.item() == pytest.approx(-1.1) and (high - low).item() == pytest.approx(5.02864014, abs=1e-6)
    low, high = Clip("laplace")(Given, UniformGrid(3, signed=False), RELU)
    assert low.item() == 0 and high.item() == pytest.approx(2.71432007, abs=1e-6)


def test_clip_to_observed_narrows_the_width():
    low, high = Clip("laplace", clip_to_observed=True)(Given, UniformGrid(8, signed=False), AFFINE)
    assert (low.item(), high.item()) == pytest.approx((-1.1, 4.0))
    low, high = Clip("laplace", clip_to_observed=True)(Given, UniformGrid(8, signed=False), RELU)
    assert (low.item(), high.item()) == (0, 4.0)


@pytest.mark.parametrize("context", [AFFINE, RELU])
def test_every_alpha_goes_through_the_same_two_forms(seen, context):
    half = context.followed_by_relu
    alphas = {
        "laplace": ACIQ("laplace").constant(4, half) * seen.b,
        "gauss": ACIQ("gauss").constant(4, half) * seen.std,
        "exact": exact_alpha("laplace", 4, half) * seen.b,
        "exact:gauss": exact_alpha("gauss", 4, half) * seen.std,
        "std:2.5": 2.5 * seen.std,
        "kld": KL()(seen, GRID, Context())[1],
    }
    for kind, alpha in alphas.items():
        expected = alpha_range(alpha, seen, half, (seen.min, seen.max))
        for found, wanted in zip(Clip(kind)(seen, GRID, context), expected):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "values, half, kind, low, high",
    [
        ([-1.0, 0.1, 0.2, 0.2, 2.0], False, "ratio:0.5", -1, 1),
        ([0.1, 0.5, 1.0, 2.0], "auto", "ratio:0.5", 0, 1),
        ([0.1, 0.5, 1.0, 2.0], "auto", "ratio:1.0", 0, 2),  # as min-max
        ([-4.0, 0.1, 0.2, 0.2, 2.0], False, "ratio:0.25", -1, 1),
    ],
)
def test_a_ratio_is_a_share_of_the_greatest_magnitude_around_zero(values, half, kind, low, high):
    given = TensorStats.of(torch.tensor([values]))
    found = Clip(kind, half=half)(given, GRID, AFFINE)
    assert tuple(v.item() for v in found) == (low, high)


def test_a_ratio_may_end_at_what_was_observed():
    given = TensorStats.of(torch.tensor([[-0.5, 0.1, 2.0]]))
    assert tuple(v.item() for v in Clip("ratio:0.5", clip_to_observed=True)(given, GRID, AFFINE)) == (-0.5, 1)
    given = TensorStats.of(torch.tensor([[-2.0, 0.1, 0.5]]))
    assert tuple(v.item() for v in Clip("ratio:0.5", clip_to_observed=True)(given, GRID, RELU)) == (0, 0.5)


def test_no_clip_takes_the_observed_extremes(seen):
    for over in ("all", "batches", "samples"):
        low, high = Clip("none", over=over)(seen, GRID, AFFINE)
        expected = MinMax(over)(seen, GRID, AFFINE)
        assert torch.equal(low, expected[0]) and torch.equal(high, expected[1])
        low, high = Clip("none", over=over)(seen, GRID, RELU)
        assert (low == 0).all() and torch.equal(high, expected[1])
    assert (Clip("none")(seen, GRID, AFFINE)[1] > Clip("none", over="batches")(seen, GRID, AFFINE)[1]).all()


@pytest.mark.parametrize("context", [AFFINE, RELU])
def test_mix_takes_the_least_measured_error_of_each_channel(seen, context):
    q = GEMMLOWP(4, (1, 2, 500), granularity=PerChannel(1))
    context = Context(False, context.followed_by_relu, q.parameters_of)
    found = Clip("mix")(seen, q.grid, context)
    errors = []
    for kind in ("none", "gauss", "laplace"):
        low, high = Clip(kind)(seen, q.grid, context)
        scale, zero = q.parameters_of(low, high)
        levels = (torch.arange(16)[None] - zero[:, None].double()) * scale[:, None].double()
        errors.append(seen.density.squared_error(levels))
    chosen = torch.stack(errors).argmin(0)
    for channel, best in enumerate(chosen.tolist()):
        kind = ("none", "gauss", "laplace")[best]
        low, high = Clip(kind)(seen, q.grid, context)
        assert found[0][channel] == low[channel] and found[1][channel] == high[channel]


def test_mix_prefers_laplace_for_laplace_and_gauss_for_normal(seen):
    q = GEMMLOWP(4, (1, 2, 500), granularity=PerChannel(1))
    context = Context(False, False, q.parameters_of)
    _, high = Clip("mix")(seen, q.grid, context)
    assert high[0] == Clip("laplace")(seen, q.grid, context)[1][0]
    assert high[1] == Clip("gauss")(seen, q.grid, context)[1][1]


def test_mix_fails_without_measured_errors(seen):
    moments_only = TensorStats(PerChannel(1), 0)
    moments_only.update(torch.randn(8, 2, 50))
    q = GEMMLOWP(4, (1, 2, 50), granularity=PerChannel(1), range=Clip("mix"))
    with pytest.raises(QexpError, match="histogram"):
        q.fit(moments_only)
    with pytest.raises(QexpError, match="computes a scale from a range"):
        Clip("mix")(seen, GRID, AFFINE)
    assert Clip("mix").needs_histogram and not Clip("laplace").needs_histogram


def test_channels_use_the_constant_of_their_own_width(seen):
    own = UniformGrid(torch.tensor([0, 6]), signed=False)
    for kind, scale in (("laplace", seen.b), ("gauss", seen.std)):
        _, high = Clip(kind)(seen, own, RELU)
        for channel, bits in enumerate((0, 6)):
            alpha = ACIQ(kind).constant(bits, True) * scale[channel]
            assert high[channel].item() == pytest.approx(float(alpha + seen.mean[channel].clamp_min(0)))
    assert torch.isfinite(Clip("exact")(seen, own, RELU)[1]).all()


@pytest.mark.parametrize(
    "kind", ["", "laplac", "std", "std:x", "std:-1", "std:nan", "none:2", "laplace:1", "exact:std", "mix:2"]
)
def test_unknown_kinds_are_refused(kind):
    with pytest.raises(QexpError, match="is not allowed; use none, laplace"):
        Clip(kind)


def test_unknown_options_are_refused():
    with pytest.raises(QexpError, match="half="):
        Clip("none", half="maybe")
    with pytest.raises(QexpError, match="over="):
        Clip("none", over="days")
