"""Operations as modules compute what the expressions they replace compute."""

import torch
from torch import nn

from qexp.models.modules import Add, Concat, StridedPad, conv_bn


def test_add_and_concat():
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(Add()(a, b), a + b)
    assert torch.equal(Concat()(a, b, a), torch.cat((a, b, a), 1))
    assert torch.equal(Concat(dim=0)(a, b), torch.cat((a, b), 0))


def test_strided_pad_keeps_every_second_pixel_between_zero_channels():
    x = torch.randn(2, 4, 6, 6)
    y = StridedPad(extra=5, stride=2)(x)
    assert y.shape == (2, 9, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 6:].any()


def test_conv_bn_keeps_the_size_at_stride_one():
    block = conv_bn(3, 5, 3)
    assert block(torch.randn(2, 3, 7, 7)).shape == (2, 5, 7, 7)
    assert block[0].bias is None and isinstance(block[1], nn.BatchNorm2d)
