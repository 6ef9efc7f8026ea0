"""A function call and the module that stands for it compute the same, to the bit."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qexp.layers.forms import form

CALLS = {
    "sum": lambda x, y: x + y,
    "sum of a function": lambda x, y: torch.add(x, other=y),
    "sum in place": lambda x, y: x.__iadd__(y),
    "number plus": lambda x, y: 3 + x,
    "number minus": lambda x, y: 1 - x,
    "difference": lambda x, y: x - y,
    "product": lambda x, y: x * y,
    "gate": lambda x, y: x * y.mean((2, 3), keepdim=True),
    "third": lambda x, y: x / 3,
    "side by side": lambda x, y: torch.cat((x, y), dim=1),
    "relu": lambda x, y: F.relu(x),
    "relu in place": lambda x, y: x.clone().relu_(),
    "relu6": lambda x, y: F.relu6(x),
    "hardswish": lambda x, y: F.hardswish(x),
    "hardsigmoid": lambda x, y: F.hardsigmoid(x),
    "sigmoid": lambda x, y: x.sigmoid(),
    "silu": lambda x, y: F.silu(x),
    "gelu": lambda x, y: F.gelu(x, approximate="tanh"),
    "clamp": lambda x, y: x.clamp(-0.5, 0.7),
    "clamp in place": lambda x, y: x.clone().clamp_(-0.5, 0.7),
    "clamp from below": lambda x, y: torch.clamp(x, min=-0.3),
    "clamp from above": lambda x, y: torch.clip(x, max=0.3),
    "least": lambda x, y: x.clamp_min(0.1),
    "hardtanh": lambda x, y: F.hardtanh(x, max_val=2),
    "celu": lambda x, y: F.celu(x, 0.5),
    "selu": lambda x, y: torch.selu(x),
    "softsign": lambda x, y: F.softsign(x),
    "log sigmoid": lambda x, y: F.logsigmoid(x),
    "threshold": lambda x, y: F.threshold(x, 0.2, -1.0),
    "shrinks": lambda x, y: F.hardshrink(x, 0.3),
    "absolute": lambda x, y: abs(x),
    "square": lambda x, y: x**2,
    "power": lambda x, y: torch.pow(x, exponent=3),
    "exponential": lambda x, y: x.exp(),
    "negative": lambda x, y: -x,
    "unflatten": lambda x, y: x.unflatten(1, (2, -1)),
    "unshuffle": lambda x, y: F.pixel_unshuffle(x, 2),
    "channel shuffle": lambda x, y: F.channel_shuffle(x, 2),
    "leaky": lambda x, y: F.leaky_relu(x, 0.2),
    "mean": lambda x, y: x.mean([2, 3]),
    "mean of a function": lambda x, y: torch.mean(x, dim=(-2, -1), keepdim=True),
    "pool": lambda x, y: F.adaptive_avg_pool2d(x, (2, 1)),
    "average pool": lambda x, y: F.avg_pool2d(x, 2),
    "greatest": lambda x, y: F.max_pool2d(x, 3, stride=2, padding=1),
    "flatten": lambda x, y: x.flatten(1),
    "reshape": lambda x, y: x.reshape(len(x), -1),
    "permute": lambda x, y: x.permute(0, 2, 3, 1),
    "transpose": lambda x, y: x.transpose(1, 2),
    "chunk": lambda x, y: x.chunk(2, dim=1),
    "split": lambda x, y: torch.split(x, [1, 3], 1),
    "part": lambda x, y: x[:, 1:3, ::2],
    "interpolate": lambda x, y: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
    "interpolate to a size": lambda x, y: F.interpolate(x, size=(5, 7)),
    "shuffle": lambda x, y: F.pixel_shuffle(x, 2),
    "border": lambda x, y: F.pad(x, (1, 0, 2, 1), value=0.5),
    "softmax": lambda x, y: x.softmax(1),
    "matmul": lambda x, y: x @ y.transpose(-1, -2),
    "einsum": lambda x, y: torch.einsum("bcij,bckj->bcik", x, y),
    "einsum of columns": lambda x, y: torch.einsum("b c j i, b c k j -> b c k i", x, y),
    "layer norm": lambda x, y: F.layer_norm(x, (6,), torch.arange(6.0), None, 1e-6),
    "group norm": lambda x, y: F.group_norm(x, 2, torch.arange(4.0), torch.ones(4), 1e-6),
    "batch norm": lambda x, y: F.batch_norm(x, torch.arange(4.0), torch.ones(4) * 3, torch.ones(4) * 2, None),
    "linear": lambda x, y: F.linear(x, torch.arange(12.0).reshape(2, 6)),
    "conv": lambda x, y: F.conv2d(x, torch.arange(16.0).reshape(4, 4, 1, 1), torch.ones(4), 2, groups=1),
    "grouped conv": lambda x, y: F.conv2d(x, torch.arange(8.0).reshape(4, 2, 1, 1), groups=2, padding="same"),
    "nothing": lambda x, y: F.dropout(x, 0.5, False),
}


class Last(TorchFunctionMode):
    """Keeps the last call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.call = (func.__name__, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_a_module_computes_what_the_call_computes(name):
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    with Last() as last:
        expected = CALLS[name](x.clone(), y)
    found = form(*last.call)
    operands = [t.clone() for t in found.operands]
    if name in ("sum in place", "relu in place", "clamp in place"):
        operands = [x.clone(), y][: len(operands)]
    got = found.module()(*operands)
    for a, b in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (expected, got)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.add(x, x, alpha=2),
        lambda x: torch.add(x, x, out=torch.empty_like(x)),
        lambda x: x.mean(),
        lambda x: F.dropout(x, 0.5, True),
        lambda x: torch.div(x, 3, rounding_mode="floor"),
        lambda x: F.max_pool2d(x, 2, return_indices=True),
        lambda x: x[x > 0],
        lambda x: x.clamp(1, 0),
        lambda x: x.clamp(min=torch.zeros(4)),
        lambda x: 2**x,
        lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
        lambda x: torch.einsum("bchw,bchw->bchw", x, x),
    ],
)
def test_a_call_with_arguments_that_no_module_has_is_no_module(call):
    with Last() as last:
        call(torch.ones(1, 4, 4, 4))
    assert form(*last.call) is None


def test_a_weight_of_the_call_is_the_module_s():
    weight = nn.Parameter(torch.ones(2, 3))
    made = form("linear", (torch.ones(1, 3), weight), {}).module()
    assert made.weight is weight and made.bias is None


def test_a_batch_norm_of_the_call_holds_no_tensor_without_memory():
    mean, var = torch.zeros(3), torch.ones(3)
    made = form("batch_norm", (torch.ones(1, 3, 2, 2), mean, var), {}).module()
    assert made.running_mean is mean and all(tensor.device.type == "cpu" for tensor in made.state_dict().values())
