"""Mid-tread bins: the vectors, half ranges, degenerate channels, legacy bounds, and the rate of the codes."""

import math

import pytest
import torch

from qexp.analysis.tensor_errors import tensor_errors
from qexp.errors import QexpError
from qexp.layers.swap import swap
from qexp.network.facts import facts
from qexp.numerics import PerChannel
from qexp.numerics.bins import bins
from qexp.passes.base import PassContext
from qexp.passes.rate import Rate, entropy
from qexp.quantizers.gemmlowp import GEMMLOWP
from qexp.quantizers.midtread import MidTread, clip_over_b
from qexp.statistics.stats import TensorStats

X = torch.tensor([-2.1, -0.9, -0.4, -0.1, 0, 0.2, 0.5, 0.8, 1.6, 3])


def fitted(x: torch.Tensor, bits: int, relu: bool = False, **options) -> MidTread:
    q = MidTread(bits, tuple(x.shape), **options)
    q.fit(TensorStats.of(x, q.granularity), followed_by_relu=relu)
    return q


def test_bins_and_clips():
    """V2.8-a, V2.8-b."""
    found = bins(torch.tensor([1, 2, 0.25]), 2)
    assert found.tolist() == pytest.approx([4.021109, 6.383113, 1.595778], abs=1e-6)
    assert found.round().tolist() == [4, 6, 2]
    expected = [1.04990889, 2.83068299, 5.02864014]
    assert clip_over_b(torch.tensor([1.0, 4, 16])).tolist() == pytest.approx(expected, abs=1e-8)


def test_the_vector():
    """V2.8-c."""
    q = fitted(X, 3, target=math.log2(6))
    assert q.scale.item() == pytest.approx(1.1162321, abs=1e-6) and q.limits == (-3, 3)
    assert q.codes(X).tolist() == [-2, -1, 0, 0, 0, 0, 0, 1, 1, 3] and q.levels == 7
    assert entropy(q.codes(X)) == pytest.approx(1.9609640, abs=1e-6)
    assert tensor_errors(q, X)["entropy"] == pytest.approx(1.9609640, abs=1e-6)


def test_half_range_starts_at_zero_and_reaches_mean_plus_clip():
    q = fitted(X, 3, relu=True, target=math.log2(6))
    mean, b = X.mean().item(), (X - X.mean()).abs().mean().item()
    k = clip_over_b(torch.tensor([12.0])).item()
    assert q.limits == (0, 6) and q.scale.item() == pytest.approx((mean + k * b) / 6, abs=1e-6)
    assert (q(X)[X <= 0] == 0).all()


def test_legacy_bounds_leave_the_grid():
    q = fitted(X, 3, target=math.log2(6), bounds="legacy")
    delta = q.scale.item()
    low, high = (0.26 / delta + side * 3 for side in (-1, 1))
    assert q.qmin.item() == pytest.approx(low, abs=1e-5) and q.qmax.item() == pytest.approx(high, abs=1e-5)
    far = torch.tensor([-50.0, 0.3, 50.0], requires_grad=True)
    y = q(far)
    assert y.tolist() == pytest.approx([low * delta, 0, high * delta], abs=1e-5)
    assert torch.equal(q.dequantize(q.codes(far)), y)
    y.sum().backward()
    assert far.grad.tolist() == [0, 1, 0] and "idempotent" not in q.properties
    half = fitted(X, 3, relu=True, target=math.log2(6), bounds="legacy")
    assert half.qmax.item() == pytest.approx(0.26 / half.scale.item() + 6, abs=1e-5) and half.qmin.item() == 0


@pytest.mark.parametrize("shift", [0.0, -0.5, -1.5, -4.0])
def test_legacy_half_ranges_reach_omega_bins_beyond_a_mean_that_is_not_below_zero(shift):
    x = X + shift
    q = fitted(x, 3, relu=True, target=math.log2(6), bounds="legacy")
    mean, b = x.mean().item(), (x - x.mean()).abs().mean().item()
    step = (max(mean, 0) + clip_over_b(torch.tensor([12.0])).item() * b) / 6
    assert q.scale.item() == pytest.approx(step, rel=1e-6)
    assert q.qmax.item() == pytest.approx(max(mean, 0) / step + 6, rel=1e-6) and q.qmin.item() == 0


def test_gradient_is_one_within_the_limits():
    q = fitted(X, 3, target=math.log2(6))
    x = torch.tensor([-3.4, -3.3, 1.0, 3.3, 3.4], requires_grad=True)
    q(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_channels_get_shares_of_all_bins():
    torch.manual_seed(0)
    x = torch.randn(4, 1000) * torch.tensor([[1.0], [8.0], [1e-4], [1.0]])
    x[3] = 0.7
    q = fitted(x, 4, granularity=PerChannel(0), clip=False)
    omega = bins(x.double().std(1), 4).round()
    y = q(x)
    assert omega[2] == 0 and (y[2] == 0).all(), "a channel without bins is zero"
    assert omega[3] == 0 and (y[3] == 0).all(), "one without spread has none"
    for c in (0, 1):
        step = (x[c].max() - x[c].min()) / omega[c]
        assert (y[c] - x[c]).abs().max() <= 0.5001 * step, "nothing is clipped"
        assert len(y[c].unique()) <= omega[c] + 1
    fresh = MidTread(4, (4, 1000), granularity=PerChannel(0), clip=False)
    fresh.load_state_dict(q.state_dict())
    assert torch.equal(fresh(x), y)


@pytest.mark.parametrize("value", [0.37, -1.3, 0.0])
@pytest.mark.parametrize("clip", [True, False])
def test_constant_tensors_pass_unchanged(value, clip):
    x = torch.full((6,), value)
    q = fitted(x, 4, clip=clip)
    assert torch.equal(q(x), x) and torch.equal(q(q(x)), x)


def test_a_fractional_target_lies_between_its_neighbours():
    torch.manual_seed(0)
    x = torch.distributions.Laplace(0.0, 1.0).sample((64, 8, 10))
    errors = {}
    for target in (5, 5.3, 6):
        q = MidTread(5, (1, 8, 10), granularity=PerChannel(1), target=target)
        seen = TensorStats(PerChannel(1), 0)
        seen.update(x)
        q.fit(seen)
        errors[target] = (q(x) - x).square().mean().item()
    assert errors[6] < errors[5.3] < errors[5]


@pytest.mark.parametrize("options", [{"target": 0}, {"target": 17.0}, {"prior": "x"}, {"bounds": "y"}])
def test_wrong_options_are_refused(options):
    with pytest.raises(QexpError, match="MidTread"):
        MidTread(4, **options)


def test_entropy_of_the_vector_and_of_a_constant():
    """V0.7-c."""
    assert entropy(torch.tensor([0, 0, 1, 1, 2, 2, 2, 5])) == pytest.approx(1.9056391, abs=1e-7)
    assert entropy(torch.zeros(5, dtype=torch.int32)) == 0


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_rate_is_weighted_by_elements(per_channel):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 8, 3)
    net = torch.nn.Sequential(layer).eval()
    images = [torch.randn(4, 3, 8, 8)]
    context = PassContext(facts(net, images[0]), images, {})
    y = net(images[0]).detach()
    swap(
        layer,
        {
            "weight": MidTread(3, (8, 3, 3, 3), granularity=PerChannel(0), clip=False),
            "output": GEMMLOWP(4, (1, 8, 6, 6)),
        },
    )
    layer.weight_quantizer.fit(TensorStats.of(layer.weight, PerChannel(0)))
    layer.output_quantizer.fit(TensorStats.of(y))
    Rate(per_channel).on_fitted(net, context)
    codes = layer.weight_quantizer.codes(layer.weight)
    expected = sum(entropy(c) for c in codes) / 8 if per_channel else entropy(codes)
    assert context.findings["rate_weight"] == pytest.approx(expected, abs=1e-4)
    assert 0 < context.findings["rate_activation"] <= 4
    assert not layer.output_quantizer._forward_hooks
