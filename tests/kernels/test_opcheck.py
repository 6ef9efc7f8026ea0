"""torch's own checks of every operator: schema, gradient registration, shapes under fake tensors, compilation."""

import warnings

import pytest
import qexp_kernels as kernels
import torch
from qexp_kernels.examples import arguments
from qexp_kernels.library import REFERENCES


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
