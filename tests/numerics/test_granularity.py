"""Who shares a scale."""

import pytest
import torch

from qexp.errors import QexpError
from qexp.numerics import PerChannel, PerGroup, PerTensor
from qexp.numerics.granularity import granularity

X = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(PerTensor(), (1,)), (PerChannel(0), (2, 1, 1, 1)), (PerChannel(1), (1, 3, 1, 1)), (PerGroup(10), (12, 1))],
)
def test_scale_shape_rows_and_reduce_agree(kind, shape):
    assert kind.scale_shape(tuple(X.shape)) == shape
    rows = kind.rows(X)
    assert rows.shape == (kind.groups(tuple(X.shape)), X.numel() // kind.groups(tuple(X.shape)))
    assert torch.equal(rows.flatten().sort().values, X.flatten())
    assert torch.equal(kind.reduce(X, torch.amax).flatten(), rows.amax(1))


def test_rows_are_the_channels():
    assert torch.equal(PerChannel(1).rows(X)[2], X[:, 2].flatten())
    assert torch.equal(PerGroup(10).rows(X)[1], X.flatten()[10:20])


def test_names_of_the_configuration():
    assert granularity("tensor", 1) == PerTensor()
    assert granularity("channel", 1) == PerChannel(1)
    assert granularity("group:4", 0) == PerGroup(4)
    assert granularity(PerChannel(0), 1) == PerChannel(0)
    assert [str(g) for g in (PerTensor(), PerChannel(0), PerGroup(4))] == ["tensor", "channel", "group:4"]
    for bad in ("chanel", "group:", "group:0", "group:x"):
        with pytest.raises(QexpError, match="allowed are tensor, channel, group:N"):
            granularity(bad, 0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(QexpError, match="does not divide the 60 weights"):
        PerGroup(7).rows(X)
    with pytest.raises(QexpError, match="needs dimension 1"):
        PerChannel(1).scale_shape((5,))
