"""The uniform quantizer beyond the contract: roundings, granularities, widths by channel, degenerate tensors."""

import pickle

import pytest
import torch

from qexp.errors import QexpError
from qexp.numerics import PerChannel, PerGroup, UniformGrid
from qexp.quantizers.base import ROUNDINGS
from qexp.quantizers.dorefa import DoReFaInput
from qexp.quantizers.gemmlowp import GEMMLOWP
from qexp.quantizers.lsq import LSQ
from qexp.quantizers.pact import PACT
from qexp.quantizers.tqt import TQT
from qexp.quantizers.uniform import Uniform
from qexp.statistics.stats import TensorStats

X = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(5))


def fitted(q, x=X):
    q.fit(TensorStats.of(x, q.granularity))
    return q


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_rounding_keeps_what_it_promises(rounding, symmetric):
    q = fitted(Uniform(4, X.shape, symmetric=symmetric, rounding=rounding))
    y = q(X)
    step = q.scale.item()
    assert ((X - y).abs() <= step * (0.5002 if rounding.startswith("half") else 1.0002)).all()
    assert ("half_step" in q.properties) == rounding.startswith("half")
    assert ("idempotent" in q.properties) == rounding.startswith("half")
    assert ("monotone" in q.properties) == (rounding != "stochastic")
    if "idempotent" in q.properties:
        assert torch.equal(q(y), y)


def test_an_unknown_rounding_is_refused():
    with pytest.raises(QexpError, match="rounding=up is not allowed; use half_even, half_up"):
        Uniform(4, rounding="up")
    for method in (PACT, LSQ):
        with pytest.raises(QexpError, match="rounding=floor is not allowed; use half_even"):
            method(4, rounding="floor")


@pytest.mark.parametrize("granularity", [PerChannel(0), PerGroup(9), PerGroup(54)])
def test_groups_are_quantized_as_if_alone(granularity):
    q = fitted(Uniform(3, X.shape, symmetric=False, granularity=granularity))
    rows = granularity.rows(X)
    alone = [fitted(Uniform(3, row.shape, symmetric=False), row)(row) for row in rows]
    assert torch.equal(granularity.rows(q(X)), torch.stack(alone))
    assert torch.equal(q(X.contiguous(memory_format=torch.channels_last)), q(X))


def by_channel(bits: list[int]) -> Uniform:
    q = Uniform(8, X.shape, signed=True, narrow=False, granularity=PerChannel(0))
    q.set_grid(UniformGrid(torch.tensor(bits), signed=True))
    return fitted(q)


def test_channels_may_have_widths_of_their_own():
    q = by_channel([2, 3, 4, 8])
    y = q(X)
    assert [len(row.unique()) <= 2**b for row, b in zip(y.flatten(1), (2, 3, 4, 8))] == [True] * 4
    for c, bits in enumerate((2, 3, 4, 8)):
        alone = fitted(Uniform(bits, X[c].shape, signed=True), X[c])
        assert torch.equal(alone(X[c]), y[c])
    fresh = Uniform(8, X.shape, signed=True, granularity=PerChannel(0))
    fresh.load_state_dict(q.state_dict())
    assert torch.equal(fresh(X), y) and fresh.grid.bits.flatten().tolist() == [2, 3, 4, 8]
    assert torch.equal(pickle.loads(pickle.dumps(q))(X), y)


def test_widths_of_channels_move_with_the_module():
    q = by_channel([2, 3, 4, 8]).to("meta")
    assert all(limit.device.type == "meta" for limit in q.limits)


def test_a_channel_of_zero_bits_is_the_constant_zero():
    y = by_channel([0, 2, 4, 8])(X)
    assert (y[0] == 0).all() and (y[1] != 0).any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.37, -1.3, 0.0, 1e-30, 3e38])
def test_constants_pass_unchanged(symmetric, value):
    x = torch.full((1, 3, 2, 2), value)
    q = fitted(Uniform(4, x.shape, symmetric=symmetric, narrow=True), x)
    torch.testing.assert_close(q(x), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", [Uniform, LSQ, PACT, DoReFaInput])
def test_one_bit_is_refused_only_for_signed_tensors(method):
    positive = X.abs() * 10
    q = method(1, X.shape, signed="auto")
    q.fit(TensorStats.of(positive))
    assert len(q(positive).unique()) == 2
    q = method(1, X.shape, signed="auto")
    q.name = "conv1 (input)"
    with pytest.raises(
        QexpError, match=r"conv1 \(input\): bits=1 leaves a signed tensor no positive level; allowed are 2"
    ):
        q.fit(TensorStats.of(X))


def test_an_unsigned_quantizer_refuses_negatives():
    for method in (Uniform, LSQ):
        q = method(4, X.shape, signed=False)
        q.name = "conv1 (input)"
        with pytest.raises(
            QexpError, match=r"conv1 \(input\): an unsigned quantizer received negative values \(least -"
        ):
            q.fit(TensorStats.of(X))


def test_auto_follows_the_data_and_is_saved():
    for x, qmin in ((X, -8), (X.abs(), 0)):
        q = fitted(Uniform(4, X.shape, signed="auto"), x)
        assert q.limits[0] == qmin
        fresh = Uniform(4, X.shape, signed="auto")
        fresh.load_state_dict(q.state_dict())
        assert fresh.limits == q.limits and fresh.grid == q.grid


def test_unscaled_dorefa_takes_its_codes_in_float32():
    q = fitted(DoReFaInput(8, X.shape, signed=False, range=0.1, unscale=False), X.abs())
    low = (X.abs() * 3).bfloat16()
    assert torch.equal(q.codes(low), q.codes(low.float()))
    assert q(low).dtype == torch.bfloat16 and torch.equal(q(low), q.dequantize(q.codes(low)).bfloat16())


@pytest.mark.parametrize("method", [Uniform, TQT, GEMMLOWP])
def test_a_number_is_no_range_rule(method):
    with pytest.raises(QexpError, match="range=3 is not allowed; use a mapping that makes a range rule"):
        method(4, (2,), range=3)
