"""A convolution of bytes with the pass behind it: the sums are those of the definition, whatever the shape of tiles and blocks."""

import pytest
import qexp_kernels as kernels
import torch
import torch.nn.functional as F
from qexp_kernels.fused_conv import fused_conv, products
from qexp_kernels.regrid import Pass, Step

SUMS = Pass(
    [Step("none", 0, 1, 0)], [torch.float64], [torch.tensor([1.0, 0, -(2.0**40), 2.0**40, 0, 0]).double()[:, None]]
)
EACH = [
    (1, 3, 1),
    (5, 3, 1),
    (31, 3, 2),
    (32, 3, 1),
    (70, 3, 2),
    (200, 3, 1),
    (33, 5, 2),
    (64, 1, 1),
]  # channels, kernel, stride


def bytes_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def weights_of(*shape: int) -> torch.Tensor:
    weight = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(1)).to(torch.int8)
    weight[0] = -128  # the greatest sums
    return weight


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
@pytest.mark.parametrize(
    "inputs, outputs", [(1, 1), (3, 7), (4, 16), (8, 17), (20, 33), (64, 70), (12, 130), (260, 64)]
)
def test_windows_of_one_pixel(implementation, device, inputs, outputs, stride, layout):
    x, weight = bytes_of(3, inputs, 9, 7).to(device, memory_format=layout), weights_of(outputs, inputs, 1, 1).to(device)
    got = fused_conv(x, products(weight, 113, stride, wide=True), SUMS)[0]
    assert torch.equal(got, F.conv2d(x.double() - 113, weight.double(), None, stride))
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels, kernel, stride", EACH)
@pytest.mark.parametrize("dilation", [1, 2])
def test_each_channel_by_itself(implementation, device, channels, kernel, stride, dilation):
    x, weight = bytes_of(2, channels, 11, 8).to(device), weights_of(channels, 1, kernel, kernel).to(device)
    window = (stride, 1), (kernel // 2, 2), (dilation, 1)
    x[:, 0] = 255
    got = fused_conv(x, products(weight, 200, *window, channels), SUMS)[0]
    assert torch.equal(got, F.conv2d(x.double() - 200, weight.double(), None, *window, channels))


@pytest.mark.parametrize("channels", [8, 40])
@pytest.mark.parametrize("wide", [False, True])
def test_what_follows_is_the_pass_of_regrid(implementation, device, channels, wide):
    x, other = bytes_of(5, channels, 23, 9).to(device), bytes_of(5, 50, 23, 9, seed=2).to(device)
    weight = weights_of(50, channels, 1, 1).to(device)
    g = torch.Generator().manual_seed(3)
    rows = [
        torch.rand(50, generator=g) * 0.01,
        torch.rand(50, generator=g) * 99,
        *torch.tensor([[0.0], [255], [0], [0]]).expand(4, 50),
    ]
    lines = [
        torch.stack(rows).double().to(device),
        torch.tensor([1.2, -20, 0, 255, 0, 0.7]).double()[:, None].to(device),
    ]
    behind = Pass([Step("half_even", 0, 3, 0), Step("half_even", 3, 2, 1, 1)], [torch.uint8] * 2, lines)
    got = fused_conv(x, products(weight, 7, wide=wide), behind, [other])
    sums = F.conv2d(x.double() - 7, weight.double())
    for one, two in zip(got, behind([sums if wide else sums.float(), other]), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 32, 33, 63, 64, 65, 96, 97, 128, 144, 161])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 5), (13, 40)])
def test_blocks_of_channels_and_runs_of_pixels(implementation, device, channels, size):
    """Windows wider than the image, rows that end in the middle of a tile, blocks of channels that are cut."""
    x, weight = bytes_of(2, channels, *size).to(device), weights_of(channels, 1, 3, 3).to(device)
    for padding, dilation, zero in (((1, 1), (1, 1), 255), ((4, 6), (2, 3), 0)):
        window = (1, 1), padding, dilation
        got = fused_conv(x, products(weight, zero, *window, channels), SUMS)[0]
        assert torch.equal(got, F.conv2d(x.double() - zero, weight.double(), None, *window, channels))


@pytest.mark.parametrize("inputs, outputs", [(1, 1), (3, 17), (16, 33), (7, 50), (20, 130)])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 1), (2, 7), (1, 1)])
@pytest.mark.parametrize(
    "window",
    [((1, 1), (1, 1), (1, 1)), ((2, 3), (0, 5), (2, 1)), ((1, 2), (3, 2), (1, 2)), ((1, 1), (0, 0), (3, 3))],
    ids=str,
)
def test_windows_of_all_channels(implementation, device, inputs, outputs, kernel, window):
    """Rows of many widths, so that pixels are left over; windows wider than the image; borders on all sides."""
    weight = weights_of(outputs, inputs, *kernel).to(device)
    for size in ((9, 31), (7, 18), (5, 1)):
        x = bytes_of(2, inputs, *size).to(device)
        _, (ph, pw), (dh, dw) = window
        if size[0] + 2 * ph <= dh * (kernel[0] - 1) or size[1] + 2 * pw <= dw * (kernel[1] - 1):
            continue
        got = fused_conv(x, products(weight, 113, *window, wide=True), SUMS)[0]
        assert torch.equal(got, F.conv2d(x.double() - 113, weight.double(), None, *window))
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_sums_up_to_31_bits(implementation, device):
    """The sum of products alone comes close to 2^31, the zero point takes it to the other side."""
    inputs = 66_308
    x = torch.full((1, inputs, 1, 2), 255, dtype=torch.uint8, device=device)
    x[..., 1] = 0
    weight = torch.full((3, inputs, 1, 1), 127, dtype=torch.int8, device=device)
    weight[1], weight[2, ::2] = -127, -127
    for zero in (0, 128, 255):
        got = fused_conv(x, products(weight, zero, wide=True), SUMS)[0]
        whole = (x.long() - zero)[0, :, 0].T @ weight[:, :, 0, 0].T.long()
        assert torch.equal(got[0, :, 0].T.long(), whole.clamp(-(2**40), 2**40))


@pytest.mark.parametrize("channels", [3, 16, 40])
@pytest.mark.parametrize("kernel", [1, 3])
def test_values_and_codes_of_one_pass(implementation, device, channels, kernel):
    """Scales, bias, another tensor and limits are float32's, one operation after the other; codes are those of the values."""
    x, other = bytes_of(3, 16, 12, 20).to(device), torch.randn(3, channels, 12, 20).to(device)
    weight, g = weights_of(channels, 16, kernel, kernel).to(device), torch.Generator().manual_seed(3)
    scales, bias = torch.rand(channels, generator=g) * 0.01, torch.randn(channels, generator=g)
    rows = [scales, bias, *torch.tensor([[0.0], [6], [0], [0.037]]).expand(4, channels)]
    grid = torch.tensor([0.05, 3.0, 0, 15, 8, 0]).double()[:, None].to(device)
    between = 5
    steps = [
        Step("scaled", 0, 2, 0, 1),
        Step("grid", 2, 3, 1),
        Step("scaled", 0, between, 0),
        Step("grid", between, 4, 1),
    ]
    lines = [torch.stack(rows).double().to(device), grid]
    behind = Pass(steps, [torch.float32, torch.uint8, torch.uint8], lines)
    values, codes, second = fused_conv(x, products(weight, 7, padding=(kernel // 2,) * 2), behind, [other])
    sums = F.conv2d(F.pad(x.double() - 7, (kernel // 2,) * 4), weight.double()).float()
    first = (
        sums * torch.tensor(0.037, device=device) * scales.to(device)[:, None, None] + bias.to(device)[:, None, None]
    )
    for added, found in ((first + other, codes), (first, second)):
        clipped = added.clamp(0, 6)
        grids = (clipped / torch.tensor(0.05, device=device) + 3).clamp(0, 15).round() + 8
        assert torch.equal(found, grids.to(torch.uint8))
    assert torch.equal(values, (first + other).clamp(0, 6))


def test_windows_of_many_taps(implementation, device):
    """More taps than one dot product adds, and fewer."""
    for kernel, channels in (((1, 2), 70), ((1, 4), 33), ((7, 7), 40), ((2, 4), 5), ((1, 9), 64), ((9, 1), 31)):
        x, weight = bytes_of(2, channels, 12, 11).to(device), weights_of(channels, 1, *kernel).to(device)
        got = fused_conv(x, products(weight, 3, (1, 2), (2, 1), (1, 1), channels, wide=True), SUMS)[0]
        assert torch.equal(got, F.conv2d(x.double() - 3, weight.double(), None, (1, 2), (2, 1), (1, 1), channels))


def test_no_images_and_what_does_not_fit(implementation, device):
    weight, x = weights_of(6, 4, 1, 1).to(device), bytes_of(0, 4, 5, 5).to(device)
    assert fused_conv(x, products(weight, 0), SUMS)[0].shape == (0, 6, 5, 5)
    alone = products(weights_of(4, 1, 3, 3).to(device), 9, padding=(1, 1), groups=4)
    assert fused_conv(x, alone, SUMS)[0].shape == (0, 4, 5, 5)
    for wrong in (
        lambda: products(weights_of(6, 4, 3, 3), 0, groups=2),
        lambda: fused_conv(bytes_of(1, 9, 5, 5).to(device), products(weights_of(6, 4, 3, 3).to(device), 0), SUMS),
        lambda: products(weight, 256),
        lambda: fused_conv(bytes_of(1, 9, 5, 5).to(device), products(weight, 0), SUMS),
        lambda: fused_conv(bytes_of(1, 4, 5, 5).to(device), products(weight, 0), SUMS, [x]),
        lambda: fused_conv(bytes_of(1, 4, 5, 5).float().to(device), products(weight, 0), SUMS),
    ):
        with pytest.raises(kernels.KernelError):
            wrong()
