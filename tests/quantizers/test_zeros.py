"""A weight that is zero throughout (the last convolution of a zero-initialised residual branch) starts with a step it can learn from."""

import pytest
import torch

from qexp.numerics.granularity import PerChannel
from qexp.quantizers.apot import APoTWeight
from qexp.quantizers.lsq import LSQ
from qexp.quantizers.lsq_plus import LSQPlus
from qexp.quantizers.tqt import TQT
from qexp.statistics.stats import TensorStats

SHAPE = (16, 16, 3, 3)
MAKERS = {
    "lsq": lambda **o: LSQ(4, SHAPE, **o),
    "lsq, signed": lambda **o: LSQ(4, SHAPE, signed=True, **o),
    "lsq+": lambda **o: LSQPlus(4, SHAPE, offset=False, signed=True, **o),
    "tqt": lambda **o: TQT(4, SHAPE, signed=True, **o),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("channel", [False, True], ids=["tensor", "channel"])
def test_the_first_step_is_that_of_fresh_weights(name, channel):
    torch.manual_seed(0)
    options = {"granularity": PerChannel(0)} if channel else {}
    zeros, fresh = MAKERS[name](**options), MAKERS[name](**options)
    zeros.fit(TensorStats.of(torch.zeros(SHAPE), zeros.granularity))
    w = torch.randn(SHAPE) / 12  # 1 / sqrt(fan_in)
    fresh.fit(TensorStats.of(w.abs() if name == "lsq" else w, fresh.granularity))
    ratio = torch.as_tensor(zeros.scale).detach() / torch.as_tensor(fresh.scale).detach()
    assert ratio.min() > 0.4 and ratio.max() < 2.5
    assert not zeros(torch.zeros(SHAPE)).any()
    small = zeros(torch.full(SHAPE, 1 / 12))
    assert small.all()  # a step of 1 would give zeros, and no weight would ever be seen to move


@pytest.mark.parametrize("name", MAKERS)
def test_a_channel_of_zeros_starts_like_the_others(name):
    torch.manual_seed(0)
    w = torch.randn(SHAPE) * 0.01
    w[3] = 0
    q = MAKERS[name](granularity=PerChannel(0))
    q.fit(TensorStats.of(w.abs() if name == "lsq" else w, q.granularity))
    scale = torch.as_tensor(q.scale).detach().flatten()
    assert scale.min() * 4.1 > scale.max() and scale.max() < 0.05


@pytest.mark.parametrize("first", ["mse", 3.0])
def test_apot_counts_in_deviations(first):
    q = APoTWeight(4, SHAPE, range=first)
    q.fit(TensorStats.of(torch.zeros(SHAPE)))
    assert 1 < float(q.alpha.detach()) < 6
    torch.manual_seed(0)
    w = torch.randn(SHAPE) * 1e-3
    assert ((q(w) - w).norm() / w.norm()) < 0.3
