"""A stored weight computes and lowers as the method that made it, which would quantize its own result otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.integer.grids import integer_weight
from qexp.numerics.granularity import PerChannel, PerTensor
from qexp.quantizers.dorefa import DoReFaWeight
from qexp.quantizers.irnet import IRNet
from qexp.quantizers.stored import Stored
from qexp.quantizers.uniform import Uniform
from qexp.statistics.stats import TensorStats


def methods():
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 3) * torch.linspace(0.2, 2, 6).reshape(-1, 1, 1, 1) + 0.1
    corrected = Uniform(4, (6, 4, 3, 3), granularity=PerChannel(0), symmetric=True)
    corrected.fit(TensorStats.of(weight, PerChannel(0)))
    corrected.correct(torch.full((6, 1, 1, 1), 1.1), torch.full((6, 1, 1, 1), 0.01))
    yield weight, DoReFaWeight(8, (6, 4, 3, 3), granularity=PerTensor())
    yield weight, IRNet(1, (6, 4, 3, 3), granularity=PerChannel(0))
    yield weight, corrected


@pytest.mark.parametrize("number", range(3))
def test_it_keeps_values_codes_and_integers(number):
    weight, method = list(methods())[number]
    method.eval()
    value = method(weight).detach()
    stored = Stored(method.bits, tuple(weight.shape), granularity=method.granularity)
    stored.adopt(value, method, method.codes(weight))
    assert torch.equal(stored(value), value)
    assert torch.equal(stored.dequantize(stored.codes(value)), value)
    for mine, theirs in zip(
        integer_weight(value, stored, "w", 255), integer_weight(weight, method, "w", 255), strict=True
    ):
        assert (mine == theirs).all()
    fresh = Stored(method.bits, tuple(weight.shape), granularity=method.granularity)
    nn.ModuleDict({"q": fresh}).load_state_dict(nn.ModuleDict({"q": stored}).state_dict(), strict=True)
    assert torch.equal(fresh.codes(value), stored.codes(value))


@pytest.mark.parametrize("number", [0, 2])
def test_a_method_that_would_move_its_own_result_is_why_it_is_there(number):
    weight, method = list(methods())[number]
    value = method.eval()(weight).detach()
    assert not torch.equal(copy.deepcopy(method)(value), value)


def test_a_weight_that_was_changed_has_no_codes():
    weight, method = next(methods())
    value = method.eval()(weight).detach()
    stored = Stored(8, tuple(weight.shape))
    stored.adopt(value)
    with pytest.raises(QexpError, match="no longer the one that was stored"):
        stored.codes(value + 0.001)
