"""A last training batch of one image is left out where a batch norm could not normalise it."""

import logging

import pytest
import torch
from torch import nn

from qexp.data.digits import Digits
from qexp.data.single import norm_of_vectors, spare_single_image
from qexp.errors import QexpError


def digits(batch_size: int, **options) -> Digits:
    return Digits(batch_size=batch_size, eval_batch_size=100, mean=[0.3], std=[0.4], calibration_size=200, **options)


def vectors(norm: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), norm or nn.BatchNorm2d(4))


def test_the_single_image_is_left_out_with_a_word(caplog):
    data = digits(8)
    n = len(data.train_part)
    data.batch_size = n - 1  # one image over
    with caplog.at_level(logging.INFO, "qexp"):
        spare_single_image(vectors(), data)
    assert [len(y) for _, y in data.train_dataloader()] == [n - 1]
    assert len(caplog.records) == 1 and "last training batch" in caplog.text and "3 cannot normalise" in caplog.text


@pytest.mark.parametrize("case", ["maps", "fits", "two over"])
def test_other_batches_stay(case, caplog):
    data = digits(8)
    n = len(data.train_part)
    data.batch_size = {"maps": n - 1, "fits": n, "two over": n - 2}[case]
    with caplog.at_level(logging.INFO, "qexp"):
        spare_single_image(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)) if case == "maps" else vectors(), data)
    assert sum(len(y) for _, y in data.train_dataloader()) == n and not caplog.records


def test_batches_of_one_are_refused():
    with pytest.raises(QexpError, match="batch_size=1 is not allowed here: 3 normalises vectors"):
        spare_single_image(vectors(), digits(1))


def test_the_norm_is_found_without_a_trace():
    net, x = vectors(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4))), torch.randn(1, 1, 8, 8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert norm_of_vectors(net, x) == "3.1" and net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
