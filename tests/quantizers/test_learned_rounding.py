"""Codes a pass has moved: the contract still holds, and a checkpoint brings them back."""

import copy

import pytest
import torch

from qexp.errors import QexpError
from qexp.numerics import PerChannel
from qexp.numerics.granularity import PerGroup, PerTensor
from qexp.quantizers.learned_rounding import LearnedRounding
from qexp.quantizers.uniform import Uniform
from qexp.statistics.stats import TensorStats

GRANULARITIES = (PerTensor(), PerChannel(0), PerGroup(9))


def moved(granularity, bits: int = 4, **options) -> tuple[LearnedRounding, torch.Tensor, torch.Tensor]:
    """Returns a quantizer with random roundings, its weight, and the codes it was given."""
    torch.manual_seed(0)
    w = torch.randn(6, 3, 3, 3)
    q = LearnedRounding(bits, tuple(w.shape), signed=True, granularity=granularity, **options)
    q.fit(TensorStats.of(w, granularity))
    rows, _ = q.rows(w)
    floor = (rows / q.scale + q.zero_point).floor().reshape(w.shape)
    codes = (floor + torch.randint(0, 2, w.shape)).clamp(*q.limits)
    q.adopt(w, codes)
    return q, w, codes


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_the_learned_ones_and_forward_is_their_value(granularity, symmetric):
    q, w, codes = moved(granularity, symmetric=symmetric)
    assert q.moved > 0
    assert torch.equal(q.codes(w).float(), codes)
    assert torch.equal(q(w), q.dequantize(q.codes(w)))


def test_before_learning_it_is_uniform():
    w = torch.randn(5, 4)
    ours, plain = (kind(3, (5, 4), signed=True, granularity=PerChannel(0)) for kind in (LearnedRounding, Uniform))
    for q in (ours, plain):
        q.fit(TensorStats.of(w, PerChannel(0)))
    assert torch.equal(ours(w), plain(w)) and ours.moved == 0


def test_state_and_copies_keep_the_codes():
    q, w, codes = moved(PerChannel(0))
    fresh = LearnedRounding(4, tuple(w.shape), signed=True, granularity=PerChannel(0))
    fresh.load_state_dict(q.state_dict())
    assert torch.equal(fresh(w), q(w)) and torch.equal(copy.deepcopy(q).codes(w).float(), codes)
    fresh.load_state_dict({k: v for k, v in q.state_dict().items() if k != "shift"})
    assert fresh.moved == 0, "a checkpoint without learned roundings takes them away"


def test_the_gradient_is_that_of_the_clip():
    q, w, _ = moved(PerTensor())
    plain = Uniform(4, tuple(w.shape), signed=True)
    plain.load_state_dict({k: v for k, v in q.state_dict().items() if k != "shift"})
    grads = []
    for quantizer in (q, plain):
        x = (w * 1.5).requires_grad_()  # some of it beyond the range
        (quantizer(x) * torch.arange(x.numel()).reshape(x.shape)).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads) and (grads[0] == 0).any()


def test_calibrating_again_forgets_and_other_shapes_are_refused():
    q, w, _ = moved(PerTensor())
    with pytest.raises(QexpError, match=r"learned for \[6, 3, 3, 3\], got \[2, 3, 3, 3\]"):
        q(w[:2])
    q.fit(TensorStats.of(w))
    assert q.moved == 0 and torch.equal(q(w[:2]), q(w)[:2])
    with pytest.raises(QexpError, match="stochastic"):
        LearnedRounding(4, rounding="stochastic")


def test_codes_far_from_the_nearest_ones_are_kept_too():
    w = torch.linspace(-1, 1, 9)
    q, other = (LearnedRounding(8, (9,), signed=True) for _ in range(2))
    q.fit(TensorStats.of(w))
    codes = torch.full((9,), 127.0)
    q.adopt(w, codes)
    other.load_state_dict(q.state_dict())
    assert torch.equal(q.codes(w), codes) and torch.equal(other.codes(w), codes)
