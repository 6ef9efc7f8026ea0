"""torch's own checks of every operator: schema, gradient registration, shapes under fake tensors, compilation."""

import warnings

import pytest
import qexp_kernels as kernels
import torch
from qexp_kernels.library import REFERENCES

GRID = ("half_even", None)


def arguments(device) -> dict[str, tuple]:
    """Returns arguments of each operator; what it can differentiate requires a gradient."""

    def t(*shape, low=0.1, grad=False):
        return (torch.rand(shape, device=device) + low).requires_grad_(grad)

    x = t(2, 3, 4, 5, low=-0.5).to(memory_format=torch.channels_last).detach()
    leaf, s, z, levels = x.clone().requires_grad_(), t(3), t(3), torch.linspace(-1, 1, 5, device=device)
    learned = t(3, grad=True)
    limits = torch.stack([torch.zeros(3, device=device), torch.full((3,), 7.0, device=device)])
    codes = torch.randint(0, 4, (2, 3, 6, 7), device=device)
    uniform = (s, z, 0.0, 7.0, limits, 1)
    affine = (s, z, -z, 0.0, 15.0, None, 1)
    conv = ([1, 1], [1, 1], [1, 1], 1, 8, 4, "per_op", "half_even")
    return {
        "round_to": (leaf, *GRID),
        "fake_quantize": (leaf, *uniform, *GRID),
        "fake_quantize_backward": (x, x, *uniform),
        "quantize": (x, *uniform, *GRID),
        "lsq": (leaf, learned, z.clone().requires_grad_(), -4.0, 3.0, None, 1, "half_even", 0.5),
        "lsq_backward": (x, x, s, None, -4.0, 3.0, None, 1, "half_even", 0.5),
        "pact": (leaf, learned, 15.0, False, 1, "half_even"),
        "pact_backward": (x, x, s, True, 1),
        "dorefa_weight": (leaf, 15.0, False, True, "half_even"),
        "dorefa_weight_backward": (x, x, x.tanh(), x.tanh().abs().amax(), True),
        "gemmlowp": (leaf, *affine, "half_even", None),
        "gemmlowp_codes": (x, *affine, "half_even", None),
        "gemmlowp_backward": (x, x, *affine),
        "level_grid": (leaf, levels, learned, 1, True),
        "level_grid_backward": (x, x, levels, s, 1, True),
        "hysteresis": (x, x.sign(), 0.1),
        "rescale": (x, s.double(), s.double(), -9.0, 9.0, "half_even", torch.int8),
        "tensor_stats": (x, 1, s, s, s, 4, True),
        "fixed_point_conv2d": (leaf, t(6, 3, 3, 3, grad=True), t(6, grad=True), *conv),
        "winograd_conv2d": (codes, torch.randint(-3, 4, (2, 3, 3, 3), device=device), 4, True, 1, False),
    }


@pytest.mark.parametrize("name", REFERENCES)
def test_opcheck(implementation, device, name):
    with warnings.catch_warnings():
        # opcheck itself reads `.grad` of tensors that are not leaves.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        torch.library.opcheck(getattr(torch.ops.qexp, name).default, arguments(device)[name])


def test_functions_trace_into_one_graph(implementation, device):
    def step(x, s):
        return kernels.lsq(kernels.fake_quantize(x, s.detach(), s.detach() * 0, 0, 7), s, -4, 3).sum()

    x, s = torch.randn(3, 4, device=device, requires_grad=True), torch.tensor(0.3, device=device, requires_grad=True)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    want = torch.autograd.grad(step(x, s), (x, s))
    for one, two in zip(torch.autograd.grad(compiled(x, s), (x, s)), want, strict=True):
        torch.testing.assert_close(one, two)
