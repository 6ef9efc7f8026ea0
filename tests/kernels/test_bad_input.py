"""A wrong argument raises an error that names it; an unusual one gives the documented numbers."""

import re

import pytest
import qexp_kernels as kernels
import torch
from qexp_kernels.regrid import Step

NAN, INF = float("nan"), float("inf")
X = torch.arange(24.0).reshape(1, 4, 2, 3)
ONE, ZERO = torch.ones(1), torch.zeros(1)
ROWS, BYTES = torch.ones(6, 1, dtype=torch.float64), torch.zeros(256, dtype=torch.uint8)

MISTAKES = {
    "scale of zero": (lambda: kernels.fake_quantize(X, ZERO, ZERO, 0, 3), "scale"),
    "scale below zero": (lambda: kernels.lsq(X, -ONE, 0, 3), "scale"),
    "scale nan": (lambda: kernels.fake_quantize(X, ONE * NAN, ZERO, 0, 3), "scale"),
    "scale inf": (lambda: kernels.gemmlowp(X, ONE * INF, ZERO, ZERO, 0, 3), "scale"),
    "scale of zero, levels": (lambda: kernels.level_grid(X, torch.tensor([0.0, 1]), ZERO), "scale"),
    "scale nan, lsq": (lambda: kernels.lsq(X, ONE * NAN, 0, 3), "scale"),
    "one bad channel": (lambda: kernels.lsq(X, torch.tensor([1.0, 1, NAN, 1]), 0, 3, axis=1), "scale"),
    "channels of scale": (lambda: kernels.fake_quantize(X, torch.ones(3), ZERO, 0, 3, axis=1), "scale"),
    "channels without axis": (lambda: kernels.fake_quantize(X, torch.ones(4), ZERO, 0, 3), "scale"),
    "scale not a tensor": (lambda: kernels.fake_quantize(X, 1.0, ZERO, 0, 3), "scale"),
    "channels of zero point": (lambda: kernels.fake_quantize(X, ONE, torch.ones(2), 0, 3, axis=1), "zero_point"),
    "zero point nan": (lambda: kernels.fake_quantize(X, ONE, ONE * NAN, 0, 3), "zero_point"),
    "offset": (lambda: kernels.lsq(X, ONE, 0, 3, offset=torch.ones(2)), "offset"),
    "offset nan": (lambda: kernels.lsq(X, ONE, 0, 3, offset=ONE * NAN), "offset"),
    "limits reversed": (lambda: kernels.fake_quantize(X, ONE, ZERO, 3, 0), "qmin"),
    "limits nan": (lambda: kernels.fake_quantize(X, ONE, ZERO, NAN, 0), "qmin"),
    "channels of limits": (lambda: kernels.lsq(X, ONE, 0, torch.ones(3), axis=1), "qmax"),
    "codes beyond int32": (lambda: kernels.quantize(X, ONE, ZERO, 0, 2.0**32), "qmax"),
    "axis": (lambda: kernels.fake_quantize(X, ONE, ZERO, 0, 3, axis=4), "axis"),
    "axis of 0-dim": (lambda: kernels.fake_quantize(X[0, 0, 0, 0], ONE, ZERO, 0, 3, axis=0), "axis"),
    "rounding": (lambda: kernels.fake_quantize(X, ONE, ZERO, 0, 3, rounding="nearest"), "rounding"),
    "stochastic lsq": (lambda: kernels.lsq(X, ONE, 0, 3, rounding="stochastic"), "rounding"),
    "integers": (lambda: kernels.fake_quantize(X.long(), ONE, ZERO, 0, 3), "x"),
    "complex": (lambda: kernels.round_to(X * 1j), "x"),
    "list": (lambda: kernels.pact([1.0], ONE, 3), "x"),
    "alpha": (lambda: kernels.pact(X, -ONE, 3), "alpha"),
    "alpha inf": (lambda: kernels.pact(X, ONE * INF, 3), "alpha"),
    "channels of alpha": (lambda: kernels.mpact(X, torch.ones(3), 3, axis=1), "alpha"),
    "levels": (lambda: kernels.pact(X, ONE, 0), "levels"),
    "levels unsorted": (lambda: kernels.level_grid(X, torch.tensor([1.0, 0]), ONE), "levels"),
    "levels empty": (lambda: kernels.level_grid(X, torch.ones(0), ONE), "levels"),
    "shift": (lambda: kernels.gemmlowp(X, ONE, ZERO, ONE * NAN, 0, 3), "shift"),
    "channels of shift": (lambda: kernels.gemmlowp(X, ONE, ZERO, torch.ones(3), 0, 3, axis=1), "shift"),
    "noise": (lambda: kernels.gemmlowp(X, ONE, ZERO, ZERO, 0, 3, noise="gauss"), "noise"),
    "noise twice": (
        lambda: kernels.gemmlowp(X, ONE, ZERO, ZERO, 0, 3, noise="uniform", rounding="stochastic"),
        "noise",
    ),
    "affine codes beyond int32": (lambda: kernels.gemmlowp_codes(X, ONE, ZERO, ZERO, 0, 2.0**32), "qmax"),
    "factor": (lambda: kernels.rescale(X, torch.ones(5), torch.ones(1), 0, 9), "factor"),
    "output": (lambda: kernels.rescale(X, torch.ones(1), torch.ones(1), 0, 256, dtype=torch.uint8), "low, high"),
    "kind": (lambda: kernels.rescale(X, torch.ones(1), torch.ones(1), 0, 9, dtype=torch.int32), "dtype"),
    "noise there": (lambda: kernels.rescale(X, torch.ones(1), torch.ones(1), 0, 9, rounding="stochastic"), "rounding"),
    "no steps": (lambda: kernels.regrid([X], [], [torch.uint8], [ROWS]), "steps"),
    "kind of step": (lambda: kernels.regrid([X], [Step("ceil", 0, 1, 0)], [torch.uint8], [ROWS]), "kind"),
    "read early": (lambda: kernels.regrid([X], [Step("trunc", 2, 1, 0)], [torch.uint8], [ROWS]), "steps"),
    "written input": (lambda: kernels.regrid([X], [Step("trunc", 0, 0, 0)], [torch.uint8], [ROWS]), "steps"),
    "left open": (lambda: kernels.regrid([X], [Step("trunc", 0, 2, 0)], [torch.uint8], [ROWS]), "steps"),
    "bytes of values": (lambda: kernels.regrid([X], [Step("scaled", 0, 1, 0)], [torch.uint8], [ROWS]), "steps"),
    "second of bytes": (
        lambda: kernels.regrid([X, X.byte()], [Step("scaled", 0, 2, 0, 1)], [X.dtype], [ROWS]),
        "steps",
    ),
    "rows": (lambda: kernels.regrid([X], [Step("trunc", 0, 1, 0)], [torch.uint8], [ROWS[:5]]), "constants"),
    "no such rows": (lambda: kernels.regrid([X], [Step("trunc", 0, 1, 1)], [torch.uint8], [ROWS]), "steps"),
    "table of floats": (lambda: kernels.regrid([X], [Step("table", 0, 1, 0)], [torch.uint8], [], [BYTES]), "steps"),
    "dtype of result": (lambda: kernels.regrid([X], [Step("trunc", 0, 1, 0)], [torch.int8], [ROWS]), "dtypes"),
    "shapes differ": (lambda: kernels.regrid([X, X[:, :1]], [Step("trunc", 0, 2, 0)], [torch.uint8], [ROWS]), "xs"),
    "state": (lambda: kernels.hysteresis(X, torch.ones(3), 0.1), "state"),
    "tau": (lambda: kernels.hysteresis(X, X, -0.1), "tau"),
    "bins": (lambda: kernels.tensor_stats(X, bins=4), "bins"),
    "width": (lambda: kernels.tensor_stats(X, bins=4, first=ZERO, width=ZERO), "width"),
    "width inf": (lambda: kernels.tensor_stats(X, bins=4, first=ZERO, width=ONE * INF), "width"),
    "channels of first": (lambda: kernels.tensor_stats(X, axis=1, bins=4, first=torch.ones(3), width=ONE), "first"),
    "center": (lambda: kernels.tensor_stats(X, powers=False), "center"),
    "weight": (lambda: kernels.fixed_point_conv2d(X, torch.ones(2, 3, 1, 1), bits=8, fraction_bits=4), "weight"),
    "bias": (lambda: kernels.fixed_point_conv2d(X, torch.ones(2, 4, 1, 1), ONE, bits=8, fraction_bits=4), "bias"),
    "kernel too large": (lambda: kernels.fixed_point_conv2d(X, torch.ones(2, 4, 3, 3), bits=8, fraction_bits=4), "x"),
    "bits": (lambda: kernels.fixed_point_linear(X, torch.ones(2, 3), bits=1, fraction_bits=4), "bits"),
    "float codes": (lambda: kernels.winograd_conv2d(X, torch.ones(2, 4, 3, 3)), "x"),
    "tile": (lambda: kernels.winograd_conv2d(X.int(), torch.ones(2, 4, 3, 3).int(), outputs=3), "outputs"),
    "implementation": (lambda: kernels.load("fast"), "kernels"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_its_argument(implementation, mistake):
    call, argument = MISTAKES[mistake]
    with pytest.raises(kernels.KernelError, match=rf"^{re.escape(argument)}\b"):
        call()


@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda x: kernels.fake_quantize(x, ONE, ZERO.to(x.device), 0, 3), "scale"),
        (lambda x: kernels.fake_quantize(x, ONE.to(x.device), ZERO, 0, 3), "zero_point"),
        (lambda x: kernels.lsq(x, ONE, 0, 3), "scale"),
        (lambda x: kernels.pact(x, ONE, 3), "alpha"),
        (lambda x: kernels.level_grid(x, ONE, ONE.to(x.device)), "levels"),
        (lambda x: kernels.hysteresis(x, torch.ones(4), 0.1), "state"),
        (lambda x: kernels.mpact(x, ONE, 3), "alpha"),
        (lambda x: kernels.gemmlowp(x, ONE, ZERO, ZERO, 0, 3), "scale"),
        (lambda x: kernels.quantize(x, ONE, ZERO, 0, 3), "scale"),
        (lambda x: kernels.tensor_stats(x, bins=2, first=ONE, width=ONE), "first"),
        (lambda x: kernels.winograd_conv2d(x.int()[None, :, None, None], torch.ones(1, 4, 3, 3).int()), "weight"),
        (lambda x: kernels.fixed_point_linear(x, torch.ones(2, 4), bits=8, fraction_bits=4), "weight"),
    ],
)
def test_tensors_on_different_devices_name_the_argument(call, argument):
    with pytest.raises(kernels.KernelError, match=rf"^{argument}: is on cpu"):
        call(torch.ones(4, device="meta"))


def test_nan_stays_and_infinities_saturate(case, implementation, plain_x, dtype, evaluate):
    x = plain_x.to(dtype)
    x[0, :, 0, 0], x[0, :, 0, 1], x[0, :, 0, 2] = NAN, INF, -INF
    y, gradients = evaluate(case, x)
    kernels.load("reference")
    want, want_gradients = evaluate(case, x)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
    assert y[0, :, 0, 0].isnan().all()
    for one, two in zip(gradients, want_gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-4, equal_nan=True)


def test_infinities_reach_the_outermost_levels(implementation, device):
    x = torch.tensor([INF, -INF, NAN], device=device)
    y = kernels.fake_quantize(x, x.new_tensor(0.5), x.new_tensor(2.0), 0, 7)
    assert y[:2].tolist() == [2.5, -1.0] and y[2].isnan()
    codes = kernels.quantize(x, x.new_tensor(0.5), x.new_tensor(2.0), 0, 7)
    assert codes.tolist() == [7, 0, -(2**31)]


def test_statistics_say_what_is_not_finite(implementation, device):
    x = torch.tensor([1.0, NAN, INF, 0, -INF], device=device)
    s = kernels.tensor_stats(x, first=x.new_tensor(0.0), width=x.new_tensor(1.0), bins=3)
    assert s.nonfinite.item() == 3 and s.zeros.item() == 1 and s.histogram.tolist() == [[0, 1, 0]]
    assert s.minimum.isnan() and s.maximum.isnan() and s.sum.isnan()


def test_a_scale_that_is_not_positive_never_gives_a_number(implementation, device):
    x = torch.randn(2, 3, device=device)
    for bad in (0.0, -1.0, INF, NAN):
        scale = torch.tensor([1.0, bad, 1.0], device=device)
        y = torch.ops.qexp.fake_quantize(x, scale, x.new_zeros(1), 0.0, 3.0, None, 1, "half_even", None)
        assert y[:, 1].isnan().all() and y[:, ::2].isfinite().all()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 6, 2, 2), (2, 6, 0, 2), (1, 1, 1, 1)], ids=str)
def test_unusual_shapes(case, implementation, device, shape, evaluate):
    x = torch.full(shape, 0.4, device=device)
    y_of = {}
    try:
        y_of[implementation] = evaluate(case, x)
    except kernels.KernelError as error:  # per-channel cases of tensors without six channels
        assert re.match(r"(axis|scale|alpha|delta|qmax|zero_point|x)\b", str(error))
        return
    y, gradients = y_of[implementation]
    assert y.shape == x.shape and y.isfinite().all() and gradients[0].shape == x.shape
    kernels.load("reference")
    assert torch.equal(y, evaluate(case, x)[0])


def test_empty_statistics(implementation, device):
    s = kernels.tensor_stats(
        torch.empty(0, device=device), first=torch.zeros(1, device=device), width=torch.ones(1, device=device), bins=2
    )
    assert [v.item() for v in s[:14]] == [0, 0, 0, INF, -INF, *[0] * 9] and s.histogram.tolist() == [[0, 0]]
    assert kernels.tensor_stats(torch.empty(0, 3, device=device), axis=1).count.tolist() == [0, 0, 0]


def test_arguments_are_not_changed(case, implementation, plain_x, evaluate):
    before = plain_x.clone()
    y, _ = evaluate(case, plain_x)
    assert torch.equal(plain_x, before) and y.data_ptr() != plain_x.data_ptr()


def test_autocast_changes_nothing(implementation, device):
    x = torch.randn(50, device=device)
    scale, zero = x.new_tensor(0.1), x.new_tensor(0.0)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(kernels.fake_quantize(x, scale, zero, -8, 7), (x / scale).clamp(-8, 7).round() * scale)
