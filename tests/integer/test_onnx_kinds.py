"""Gates, norms behind concatenations, other map sizes and reshapings in an ONNX file: onnxruntime computes the program's codes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qexp.errors import QexpError
from qexp.integer import onnx_file
from qexp.integer.lowering import lower
from qexp.models import operations
from tests.integer.conftest import CHANNELS, INT8
from tests.integer.test_kinds import IMAGES, Calls, Net, Scaled, gate, joined, last_dimension, shuffled

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def rows(x: torch.Tensor, wide: nn.Module, narrow: nn.Module) -> torch.Tensor:
    return narrow(wide(x.permute(0, 2, 3, 1)).relu()).permute(0, 3, 1, 2)


def upsampled(x: torch.Tensor, small: nn.Module, large: nn.Module, out: nn.Module) -> torch.Tensor:
    """A map on its own grid, which a concatenation moves to a wider grid."""
    doubled = [F.interpolate(y, scale_factor=2.0) for y in (F.silu(small(x)), x)]
    return out(torch.cat([doubled[0], F.silu(3 * large(doubled[1]))], 1))


def read_twice(x: torch.Tensor, one: nn.Module, two: nn.Module, out: nn.Module) -> torch.Tensor:
    """Sums behind a clamp that a layer and a concatenation put on two grids."""
    y = one(x).relu()
    return out(torch.cat([y, torch.sigmoid(two(y)) * 3], 1))


KINDS = {
    "a grid after a grid": lambda: Calls(upsampled, *(nn.Conv2d(8, 4, 1) for _ in range(3))),
    "sigmoid gate": lambda: gate(nn.Sigmoid()),
    "hardsigmoid gate": lambda: gate(nn.Hardsigmoid()),
    "tables": lambda: Calls(lambda x: F.hardswish(x) + F.silu(x) * torch.sigmoid(x)),
    "slopes": lambda: nn.PReLU(8),
    "several grids": lambda: Calls(lambda x: x * torch.relu(x) - x),
    "concatenation": lambda: Calls(
        joined, nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(18), nn.Conv2d(18, 4, 1)
    ),
    "channel shuffle": lambda: Calls(shuffled),
    "matrices": lambda: Calls(lambda x: x.flatten(2).transpose(1, 2) @ x.flatten(2)),
    "last dimension": lambda: Calls(rows, nn.Linear(8, 16), nn.Linear(16, 6)),
    "multiples": lambda: Scaled(lambda x: x),
    "nearest": lambda: nn.Upsample(scale_factor=1.6),
    "doubled": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "pixel shuffle": lambda: nn.Sequential(nn.PixelShuffle(2), nn.ReflectionPad2d(1)),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, (2, 4), stride=2, groups=2, padding=(0, 1)),
    "averages": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_computes_the_program(kind, deployed, tmp_path):
    lowered, _, images = deployed(Net(KINDS[kind]()), shape=IMAGES)
    onnx_file.write(lowered.program, tmp_path / "m.onnx")
    found = onnx_file.compare(lowered.program, tmp_path / "m.onnx", images.numpy())
    assert found.equal and found.codes > 10_000, found.line()


def test_sums_that_two_grids_read_have_the_program_s_ties(quantize, tmp_path):
    """Steps whose ratio is a whole number of halves: added in float, one sum in a thousand falls to the other side of a tie."""
    layers = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)
    one_step = CHANNELS | {"granularity": "tensor"}
    model, images = quantize(Net(Calls(read_twice, *layers)), rules=INT8, shape=(64, 3, 8, 8), weight=one_step)
    first, *readers = model.body.layers
    step = float(first.input_quantizer.scale) * float(first.weight_quantizer.scale)
    for reader in readers:
        scale = reader.input_quantizer.scale
        scale.fill_(step * 2 * math.ceil(float(scale) / step / 2))
    program = lower(model, images[:1], as_runtimes=True).program
    onnx_file.write(program, tmp_path / "m.onnx")
    found = onnx_file.compare(program, tmp_path / "m.onnx", images.numpy())
    assert found.equal, found.line()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda: nn.GroupNorm(2, 8), r"export=onnx: body: runtimes compute norms .* in float, .*export=package"),
        (lambda: Calls(last_dimension, nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)), "body.layers.0: .* norms"),
        (lambda: operations.UnitLength(1), r"export=onnx: body: runtimes compute lengths of vectors in float"),
        (lambda: operations.Length((1,), True), r"export=onnx: body: runtimes compute lengths of vectors in float"),
        (
            lambda: Calls(lambda x: x / (x.relu().mean(1, keepdim=True) + 1)),
            r"export=onnx: body.div: runtimes compute quotients in float, .*export=package",
        ),
        (lambda: nn.Softmax(1), r"export=onnx: body: runtimes compute softmax in float, .*export=package"),
        (
            lambda: nn.Upsample((13, 9), mode="bilinear"),
            r"export=onnx: body: runtimes interpolate in float.*mode=nearest",
        ),
    ],
)
def test_what_runtimes_compute_in_float_is_refused(body, message, deployed, tmp_path):
    lowered, _, _ = deployed(Net(body()), shape=IMAGES)
    with pytest.raises(QexpError, match=message):
        onnx_file.write(lowered.program, tmp_path / "m.onnx")
