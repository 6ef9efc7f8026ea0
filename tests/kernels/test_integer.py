"""Operators on integers: Winograd convolution."""

import pytest
import qexp_kernels as kernels
import torch
import torch.nn.functional as F
from qexp_kernels.winograd import MATRICES


@pytest.mark.parametrize("outputs", MATRICES)
def test_matrices_satisfy_the_convolution_identity(outputs):
    m = MATRICES[outputs]
    for i in range(outputs):
        for j in range(3):
            for line in range(outputs + 2):
                total = sum(m.at[i][k] * m.g[k][j] * m.bt[k][line] for k in range(outputs + 2))
                assert total == (m.divisor if line == i + j else 0)


@pytest.mark.parametrize("outputs", MATRICES)
@pytest.mark.parametrize("two_d", [False, True])
@pytest.mark.parametrize("size, padding", [((3, 3), 0), ((7, 9), 1), ((8, 5), 0), ((12, 11), 2), ((1, 1), 1)])
def test_winograd_equals_direct_convolution_bit_for_bit(implementation, device, outputs, two_d, size, padding):
    g = torch.Generator().manual_seed(outputs)
    x = torch.randint(-128, 128, (2, 3, *size), generator=g)
    w = torch.randint(-127, 128, (4, 3, 3, 3), generator=g)
    accumulators, saturated = kernels.winograd_conv2d(
        x.to(device, torch.int8), w.to(device, torch.int8), outputs=outputs, two_d=two_d, padding=padding
    )
    assert torch.equal(accumulators.cpu(), F.conv2d(x.double(), w.double(), padding=padding).to(torch.int64))
    assert saturated.tolist() == [0, 0]


def test_winograd_2d_published_vector(implementation, device):
    g = torch.tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]], device=device)
    d = torch.tensor([[1, 2, 0, -1], [0, 3, 1, 2], [4, -2, 1, 0], [1, 1, 2, 3]], device=device)
    y, _ = kernels.winograd_conv2d(d[None, None], g[None, None], outputs=2, two_d=True)
    assert y.flatten().tolist() == [2, 3, 4, -5]


@pytest.mark.parametrize("outputs, two_d, lossless", [(4, False, True), (4, True, False), (5, True, False)])
def test_int16_saturation_is_counted(implementation, device, outputs, two_d, lossless):
    g = torch.Generator().manual_seed(0)
    x, w = (127 - 254 * torch.randint(0, 2, s, generator=g).to(device) for s in ((1, 2, 18, 18), (8, 2, 3, 3)))
    y, saturated = kernels.winograd_conv2d(x, w, outputs=outputs, two_d=two_d, clamp_int16=True)
    exact, _ = kernels.winograd_conv2d(x, w, outputs=outputs, two_d=two_d)
    assert (saturated.sum().item() == 0) == lossless == torch.equal(y, exact)


def test_saturated_winograd_equals_the_reference(compiled, device):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-128, 128, s, generator=g).to(device) for s in ((2, 5, 13, 9), (6, 5, 3, 3)))
    got = kernels.winograd_conv2d(x, w, outputs=5, two_d=True, padding=1, clamp_int16=True)
    kernels.load("reference")
    want = kernels.winograd_conv2d(x, w, outputs=5, two_d=True, padding=1, clamp_int16=True)
    assert torch.equal(got[0], want[0]) and got[1].tolist() == want[1].tolist() and got[1].sum() > 0
