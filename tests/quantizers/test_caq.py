"""CAQ activations: published vectors of exponents and factors, their limits by the layer's mean, clips and saturation."""

import pytest
import torch

from qexp.calibration.site_stats import SiteStats
from qexp.errors import QexpError
from qexp.numerics.granularity import PerChannel
from qexp.quantizers.caq import CAQShift, CAQSimple, channel_exponents, limit_exponents
from qexp.statistics.collectors import MaxMap
from qexp.statistics.stats import TensorStats


def fitted(x: torch.Tensor, **options) -> CAQShift:
    """Returns the quantizer of an activation `[N, C, H, W]`, fitted on it."""
    seen = SiteStats()
    seen.update(x, (MaxMap(),))
    seen.channel.extra = seen.extra
    q = CAQShift(options.pop("bits", 8), (1, *x.shape[1:]), granularity=PerChannel(1), **options)
    q.fit(seen.channel)
    return q


def maxima(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(1, -1, 1, 1)


def test_exponents_as_published():
    magnitude = torch.tensor([0, 0.5, 1, 2, 16, 90, 128, 300])
    assert channel_exponents(magnitude).tolist() == [0, 7, 6, 5, 2, 0, -1, -2]
    assert channel_exponents(torch.tensor([0.5, 1, 16]), formula="round128").tolist() == [8, 7, 3]


def test_codes_as_published():
    x = torch.tensor([3.0, 6, -2, 8, 10, -16, 5]).reshape(1, 1, 7, 1)
    q = fitted(x, exponent_formula="round128")
    assert q.exponents.tolist() == [3]
    assert q.codes(x).flatten().tolist() == [24, 48, -16, 64, 80, -128, 40]


@pytest.mark.parametrize(
    "rule, given, limited",
    [
        ("cap", (3, 5, 4, 4, 2), (3, 3, 3, 3, 2)),
        ("pull", (3, 5, 4, 4, 2), (3, 3, 3, 3, 2)),
        ("cap", (-2, -1, -3), (-2, -2, -3)),
        ("pull", (-2, -1, -3), (-2, -1, -2)),
        ("pull", (3, -1, -2, -1), (0, 0, 0, 0)),  # mean -0.25: 3 falls to -1, which then rises to 0 as the others do
        ("pull", (1, -5, -5), (-3, -3, -3)),  # mean -3: nothing is left below it
        ("pull", (2, -3, -3, -1), (-1, -1, -1, -1)),  # mean -1.25: 2 falls to -2, then rises to -1
        ("none", (-2, 9, 3), (-2, 9, 3)),
    ],
)
def test_limits_by_the_mean_as_published(rule, given, limited):
    assert limit_exponents(torch.tensor(given, dtype=torch.float64), rule).tolist() == list(limited)


def test_activation_mean_as_published():
    x = torch.tensor([0.1, 0.2, 0.9, 0.4]).reshape(1, 1, 2, 2)
    q = fitted(x, exponent_mean="activation_mean")
    assert q.exponents.tolist() == [8] and fitted(x, exponent_mean="none").exponents.tolist() == [7]
    assert q.codes(x).flatten().tolist() == [26, 51, 102, 102], "beyond the mean of the maxima is clipped to it"


@pytest.mark.parametrize("rule, saturates", [("cap", False), ("none", False), ("pull", True)])
def test_pull_alone_saturates_wide_channels(rule, saturates):
    q = fitted(maxima(0.9, 300.0, 3000.0), exponent_mean=rule)
    codes = q.codes(maxima(0.9, 300.0, 3000.0)).flatten()
    assert (codes.max().item() == 127) == saturates


def test_a_dead_channel_and_a_dead_layer_stay_zero():
    x = maxima(0.0, 2.0)
    q = fitted(x, exponent_mean="none")
    assert q.exponents.tolist() == [0, 5] and torch.equal(q(x), x)
    dead = fitted(torch.zeros(1, 3, 2, 2))
    assert dead.exponents.tolist() == [0, 0, 0]


def test_a_zero_channel_has_a_say_in_the_mean_only_where_it_counts():
    x = maxima(0.0, 0.0, 2.0, 0.5)  # exponents 0, 0, 5, 7
    assert fitted(x).exponents.tolist() == [0, 0, 5, 6]
    assert fitted(x, zero_channels="count").exponents.tolist() == [0, 0, 3, 3]


def test_what_a_relu_drops_does_not_count():
    x = torch.tensor([[-100.0, 0.5], [3.0, -0.25]]).reshape(2, 2, 1, 1)
    seen = SiteStats()
    seen.update(x)

    def exponents(relu: bool, **options) -> list[int]:
        q = CAQShift(8, (1, 2, 1, 1), granularity=PerChannel(1), exponent_mean="none", **options)
        q.fit(seen.channel, followed_by_relu=relu)
        return q.exponents.tolist()

    assert exponents(True) == [5, 7]
    assert exponents(False) == exponents(True, before_relu="all") == [0, 7]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_the_rule_without_saturation_holds_at_every_width(bits):
    x = (
        torch.randn(64, 5, 3, 3, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-3, 0.1, 1, 7, 900])[:, None, None]
    )
    q = fitted(x, bits=bits, exponent_mean="none")
    inside = (x / q.scale).abs().amax((0, 2, 3))
    assert (inside <= 2 ** (bits - 1) - 1).all() and (inside * 2 > 2 ** (bits - 1) - 1).all()


@pytest.mark.parametrize("greatest, factor", [(0.5, 254), (3.3, 38), (300.0, 1), (0.0, 1)])
def test_integer_factors_as_published(greatest, factor, caplog):
    q = CAQSimple(8, (1,), integer_scale=True)
    with caplog.at_level("WARNING"):
        q.fit(TensorStats.of(torch.tensor([greatest])))
    assert q.factors.item() == factor
    assert ("round to 0" in caplog.text) == (greatest == 300.0)


def test_the_greatest_value_takes_the_greatest_code():
    x = maxima(0.3, 5.0, 700.0)
    seen = SiteStats()
    seen.update(x)
    q = CAQSimple(8, (1, 3, 1, 1), granularity=PerChannel(1))
    q.fit(seen.channel)
    assert q.codes(x).flatten().tolist() == [127, 127, 127]
    torch.testing.assert_close(q.factors, 127 / x.flatten())


def test_gradient_is_one_inside_and_at_the_limits():
    q = fitted(maxima(1.9), bits=3, exponent_mean="none")  # Q = 0: steps of 1, -4..3
    x = torch.tensor([-4.1, -4.0, 0.2, 3.0, 3.1], requires_grad=True)
    q(x.reshape(5, 1, 1, 1)).sum().backward()
    assert q.exponents.tolist() == [0] and x.grad.tolist() == [0, 1, 1, 1, 0]


def test_unknown_options_are_refused():
    for options in (
        {"exponent_formula": "ceil"},
        {"exponent_mean": "median"},
        {"before_relu": "no"},
        {"zero_channels": "drop"},
    ):
        with pytest.raises(QexpError, match="allowed are"):
            CAQShift(8, **options)
    with pytest.raises(QexpError, match=r"allowed are 2\.\.16"):
        CAQShift(1)
