"""Fixed-point convolution with rounded products: published vectors, a naive loop, and compiled = reference."""

import itertools

import pytest
import qexp_kernels as kernels
import torch
import torch.nn.functional as F


def naive(x, weight, bias, bits, fraction_bits, accumulate, stride, padding, dilation, groups):
    """Returns the convolution by materialising every product, in float64."""
    one, low, high = 2.0**fraction_bits, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1

    def q(v):
        return torch.clamp(torch.round(v * one), low, high) / one

    outputs = []
    for part, w in zip(x.double().chunk(groups, 1), weight.double().chunk(groups, 0), strict=True):
        size = [(part.shape[d] + 2 * padding - dilation * (w.shape[d] - 1) - 1) // stride + 1 for d in (2, 3)]
        columns = F.unfold(part, w.shape[2:], dilation, padding, stride)  # [N, K, L]
        products = q(w.flatten(1)[None, :, :, None] * columns[:, None])
        if accumulate == "per_add":
            total = torch.zeros_like(products[:, :, 0])
            for k in range(products.shape[2]):
                total = q(total + products[:, :, k])
        else:
            total = q(products.sum(2))
        outputs.append(total.unflatten(2, size))
    y = torch.cat(outputs, 1)
    return (y if bias is None else q(y + bias.double()[:, None, None])).to(x.dtype)


def test_products_below_half_a_step_vanish(implementation, device):
    x, w = torch.full((1, 9), 0.02, device=device), torch.full((1, 9), 0.3, device=device)
    assert kernels.fixed_point_linear(x, w, bits=8, fraction_bits=6).item() == 0
    x, w = x.view(1, 1, 3, 3), w.view(1, 1, 3, 3)
    assert kernels.fixed_point_conv2d(x, w, bits=8, fraction_bits=6).item() == 0


def test_products_and_sums_saturate_before_the_bias(implementation, device):
    x, w = torch.ones(1, 3, device=device), torch.full((1, 3), 0.9, device=device)
    y = kernels.fixed_point_linear(x, w, torch.tensor([-0.9], device=device), bits=8, fraction_bits=6)
    assert y.item() == 69 / 64


SHAPES = {
    "plain": {"x": (2, 3, 9, 7), "w": (5, 3, 3, 3)},
    "wide": {"x": (2, 20, 9, 7), "w": (40, 20, 3, 3), "padding": 1},
    "strided": {"x": (1, 4, 11, 9), "w": (33, 4, 3, 5), "stride": 2, "padding": 2},
    "dilated": {"x": (2, 4, 11, 12), "w": (3, 4, 3, 3), "dilation": 2, "padding": 1},
    "grouped": {"x": (2, 6, 8, 8), "w": (9, 2, 3, 3), "groups": 3, "padding": 1},
    "depthwise": {"x": (2, 7, 12, 11), "w": (7, 1, 3, 3), "groups": 7, "padding": 1},
    "pointwise": {"x": (2, 17, 5, 5), "w": (19, 17, 1, 1)},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "bits, fraction_bits, accumulate",
    [(8, 5, "per_op"), (16, 12, "per_op"), (24, 20, "per_op"), (4, 1, "per_op"), (8, -2, "per_op"), (8, 5, "per_add")],
)
def test_equals_the_materialised_products(
    implementation, device, shape, channels_last, bits, fraction_bits, accumulate
):
    if accumulate == "per_add" and shape == "wide":
        pytest.skip("a sum a term: slow, and the other shapes show it")
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **SHAPES[shape]}
    g = torch.Generator().manual_seed(bits)
    x = torch.randn(options.pop("x"), generator=g).mul(8).round().div(8)  # many products are ties
    w = torch.randn(options.pop("w"), generator=g).mul(4).round().div(4)
    bias = torch.randn(w.shape[0], generator=g)
    x = x * 2.0 ** (2 - fraction_bits / 2)
    want = naive(x, w, bias, bits, fraction_bits, accumulate, **options)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    got = kernels.fixed_point_conv2d(
        *(t.to(device) for t in (x, w, bias)),
        bits=bits,
        fraction_bits=fraction_bits,
        accumulate=accumulate,
        **options,
    )
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("rounding", ["half_up", "half_away", "floor", "trunc"])
def test_other_roundings_equal_the_reference(compiled, device, rounding):
    x, w = (torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in ((2, 5, 6, 6), (18, 5, 3, 3)))
    results = []
    for which in (compiled, "reference"):
        kernels.load(which)
        results.append(
            kernels.fixed_point_conv2d(x.to(device), w.to(device), bits=6, fraction_bits=3, rounding=rounding)
        )
    assert torch.equal(*results)


def test_products_are_rounded_once(implementation, device):
    """The exact product lies just above a tie that its float32 rounding would fall on."""
    x = torch.tensor([[1 + 2.0**-12]], device=device)
    w = torch.tensor([[0.5 * (1 - 2.0**-12) + 2.0**-25]], device=device)
    product = x.double().item() * w.double().item()
    assert product != float(torch.tensor(product, dtype=torch.float32))
    y = kernels.fixed_point_linear(x, w, bits=8, fraction_bits=0)
    assert y.item() == round(product)


def test_nan_and_infinities_are_those_of_the_reference(compiled, device):
    x = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(1)).to(device)
    w = torch.ones(20, 2, 3, 3, device=device)
    results = []
    for bad, which in itertools.product((float("nan"), float("inf")), (compiled, "reference")):
        kernels.load(which)
        x[0, 0, 0, 0] = bad
        results.append(kernels.fixed_point_conv2d(x, w, bits=8, fraction_bits=4))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)
    assert results[0][0, :, 0, 0].isnan().all() and results[0][0, :, 1, 1].isfinite().all()
    assert torch.equal(results[2], results[3]) and results[2].isfinite().all()


def test_gradient_is_that_of_the_float_convolution(implementation, device):
    x, w, b = (torch.randn(s, device=device, requires_grad=True) for s in ((2, 4, 6, 6), (8, 2, 3, 3), (8,)))
    g = torch.randn(2, 8, 3, 3, device=device)
    options = {"stride": 2, "padding": 1, "groups": 2}
    got = torch.autograd.grad(kernels.fixed_point_conv2d(x, w, b, bits=8, fraction_bits=4, **options), (x, w, b), g)
    want = torch.autograd.grad(F.conv2d(x, w, b, **options), (x, w, b), g)
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two)
