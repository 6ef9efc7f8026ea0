"""Fixtures of the kernel tests: where they run, on which implementation, and one case an operator."""

from collections.abc import Callable

import pytest
import qexp_kernels as kernels
import torch
from torch import Tensor


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request) -> torch.device:
    """The CPU, and a CUDA device where there is one (`test_cuda.py` says so where there is none)."""
    return torch.device(request.param)


@pytest.fixture
def compiled(device) -> str:
    """The compiled implementation for the device; the references again afterwards."""
    which = "cuda" if device.type == "cuda" else "cpp"
    try:
        kernels.load(which)
    except kernels.KernelError as error:
        pytest.skip(str(error))
    yield which
    kernels.load("reference")


@pytest.fixture(params=["reference", "compiled"])
def implementation(request, device) -> str:
    """Each implementation in turn."""
    if request.param == "compiled":
        return request.getfixturevalue("compiled")
    kernels.load("reference")
    return "reference"


Case = Callable[[Tensor, Callable[[list[float]], Tensor]], Tensor]  # of x [?, 6, ?, ?] and of a maker of parameters


def _channels(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / 5 for i in range(6)]


SCALES, ZEROS = _channels(0.1, 0.9), [0.0, 1, 2, 3, 2, 1]
LEVELS = [-1.0, -0.5, -0.25, 0, 0.25, 0.5, 1]

CASES = {
    "round_half_even": lambda x, p: kernels.round_to(x, "half_even"),
    "round_half_up": lambda x, p: kernels.round_to(x, "half_up"),
    "round_half_away": lambda x, p: kernels.round_to(x, "half_away"),
    "round_stochastic": lambda x, p: kernels.round_to(x, "stochastic", _generator(x)),
    "fake_quantize": lambda x, p: kernels.fake_quantize(x, p([0.3]).detach(), p([3.0]).detach(), 0, 15),
    "fake_quantize_channels": lambda x, p: kernels.fake_quantize(
        x, p(SCALES).detach(), p(ZEROS).detach(), 0, 7, axis=1
    ),
    "fake_quantize_bits_differ": lambda x, p: kernels.fake_quantize(
        x, p(SCALES).detach(), p([0.0]).detach(), 0, p([1.0, 3, 7, 15, 0, 255]).detach(), axis=1
    ),
    "fake_quantize_stochastic": lambda x, p: kernels.fake_quantize(
        x, p([0.3]).detach(), p([3.0]).detach(), 0, 15, rounding="stochastic", generator=_generator(x)
    ),
    "lsq": lambda x, p: kernels.lsq(x, p([0.3]), -4, 3, grad_scale=0.1),
    "lsq_channels": lambda x, p: kernels.lsq(x, p(SCALES), -4, 3, axis=1, grad_scale=0.1),
    "lsq_offset": lambda x, p: kernels.lsq(x, p([0.3]), 0, 7, offset=p([-0.2])),
    "lsq_offset_channels": lambda x, p: kernels.lsq(x, p(SCALES), 0, 7, axis=1, offset=p(ZEROS), rounding="half_up"),
    "pact": lambda x, p: kernels.pact(x, p([1.5]), 15),
    "pact_channels": lambda x, p: kernels.pact(x, p(SCALES), 3, axis=1),
    "mpact": lambda x, p: kernels.mpact(x, p([-1.5]), 7),
    "mpact_channels": lambda x, p: kernels.mpact(x, p(SCALES), 7, axis=1),
    "dorefa": lambda x, p: kernels.dorefa_weight(x, 15),
    "dorefa_symmetric": lambda x, p: kernels.dorefa_weight(x, 7, True),
    "dorefa_rescaled": lambda x, p: kernels.dorefa_weight(x, 15, rescale=True),
    "gemmlowp": lambda x, p: kernels.gemmlowp(x, p([0.27]).detach(), p([7.0]).detach(), p([0.0]).detach(), 0, 15),
    "gemmlowp_channels": lambda x, p: kernels.gemmlowp(
        x, p(SCALES).detach(), p([0.0]).detach(), p(ZEROS).detach(), 0, 7, axis=1, rounding="half_away"
    ),
    "gemmlowp_noise": lambda x, p: kernels.gemmlowp(
        x,
        p([0.27]).detach(),
        p([1.0]).detach(),
        p([-0.3]).detach(),
        0,
        p([1.0, 3, 7, 15, 0, 255]).detach(),
        axis=1,
        noise="uniform",
        generator=_generator(x),
    ),
    "level_grid": lambda x, p: kernels.level_grid(x, p(LEVELS).detach(), p([1.3])),
    "level_grid_channels": lambda x, p: kernels.level_grid(
        x, p(LEVELS).detach(), p(SCALES), axis=1, clip_gradient=False
    ),
}


def _generator(x: Tensor) -> torch.Generator:
    return torch.Generator(x.device).manual_seed(5)


def _layouts(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    return {
        "contiguous": lambda: x,
        "channels_last": lambda: x.to(memory_format=torch.channels_last),
        "permuted": lambda: x.permute(3, 1, 0, 2),
        "sliced_rows": lambda: x[:, :, ::2],
        "sliced_columns": lambda: x[..., 1::3],
        "sliced_channels_last": lambda: x.to(memory_format=torch.channels_last)[:, :, ::2, ::3],
        "expanded": lambda: x[:1].expand(3, -1, -1, -1),
        "one_a_channel": lambda: x[:1, :, :1, :1],
    }


def _sample() -> Tensor:
    """Returns normal numbers, a third of them replaced by ties and exact steps of the scales in use."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4, 6, 33, 10, generator=g)
    ties = torch.randint(-20, 20, x.shape, generator=g) * 0.15
    return torch.where(torch.rand(x.shape, generator=g) < 0.3, ties, x)


@pytest.fixture(params=[torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def dtype(request) -> torch.dtype:
    """Every dtype the operators take."""
    return request.param


@pytest.fixture(params=list(_layouts(torch.empty(0))))
def x(request, device, dtype) -> Tensor:
    """A tensor [?, 6, ?, ?] of each memory layout and dtype."""
    return _layouts(_sample().to(device, dtype))[request.param]()


@pytest.fixture
def plain_x(device) -> Tensor:
    """A contiguous float32 tensor [4, 6, 33, 10]."""
    return _sample().to(device)


@pytest.fixture(params=list(CASES))
def case(request) -> Case:
    """Each operator in each of its forms."""
    return CASES[request.param]


@pytest.fixture
def evaluate() -> Callable[[Case, Tensor], tuple[Tensor, list[Tensor]]]:
    """Returns the output of a case and the gradients of x and the parameters for a fixed upstream gradient."""

    def run(case: Case, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        made: list[Tensor] = []

        def parameter(values: list[float]) -> Tensor:
            made.append(torch.tensor(values, device=x.device).requires_grad_())
            return made[-1]

        leaf = x.detach().requires_grad_()
        y = case(leaf, parameter)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        gradients = torch.autograd.grad(y, [leaf, *made], upstream, allow_unused=True)
        return y.detach(), [g for g in gradients if g is not None]

    return run
