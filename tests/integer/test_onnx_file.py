"""An ONNX file computes what the program does up to a step, in integers where runtimes have them, and says what it cannot hold."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.integer.lowering import lower
from qexp.integer.reference import Reference
from tests.integer.conftest import UNIFORM
from tests.integer.test_package import Everything, everything_rules
from tests.networks import Residual

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from qexp.integer import onnx_file  # noqa: E402 - needs both

EIGHT = UNIFORM | {"bits": 8}
EVERYWHERE = {"runtime": {"types": ["Add", "MaxPool2d", "AdaptiveAvgPool2d"], "optional": True, "input": EIGHT}}


def test_a_finished_run_goes_to_onnx(run, tmp_path: Path):
    metrics = run("quant=mse", "bits=w8a8", "study=s")
    folder = tmp_path / "runs" / "s" / metrics["point"]
    exported = run("export=onnx", f"weights={folder}", "verify=100")
    assert exported["status"] == "ok", exported["error"]
    assert (folder / "model.onnx").stat().st_size == exported["onnx_bytes"]
    assert exported["onnx_predictions_differ"] <= 2


@pytest.mark.parametrize("network", [Residual, Everything])
def test_onnx_computes_the_same_up_to_a_step(network, quantize, tmp_path):
    torch.manual_seed(0)
    model, images = quantize(network(), rules=everything_rules() if network is Everything else None)
    program = lower(model, images[:1]).program
    onnx_file.write(program, tmp_path / "m.onnx")
    got = onnx_file.session(tmp_path / "m.onnx", 1).run(None, {"images": images.numpy()})[0]
    scores = program.decode(Reference(program).run(program.encode(images.numpy())))
    assert np.abs(got - scores).max() < 0.1 * np.abs(scores).max()
    assert np.abs(got - scores).mean() < 0.01 * np.abs(scores).max()


@pytest.mark.parametrize("network", [Residual, Everything])
def test_codes_differ_by_one_at_most_and_seldom(network, quantize, tmp_path):
    torch.manual_seed(0)
    model, images = quantize(network(), rules=everything_rules() if network is Everything else EVERYWHERE)
    program = lower(model, images[:1]).program
    onnx_file.write(program, tmp_path / "m.onnx")
    found = onnx_file.compare(program, tmp_path / "m.onnx", images.numpy())
    assert found["codes"] > 20_000 and found["most"] <= 2 and found["differ"] < 0.02 * found["codes"]


def test_integers_take_no_more_than_their_bytes(quantize, tmp_path):
    network = Residual()
    network.conv, network.fc = nn.Conv2d(8, 400, 3, stride=2), nn.Linear(400, 5)
    model, images = quantize(network, 4, 8)
    program = lower(model, images[:1]).program
    size = onnx_file.write(program, tmp_path / "m.onnx")["bytes"]
    held = {i.name: i for i in onnx.load(tmp_path / "m.onnx").graph.initializer}
    place, op = next((i, op) for i, op in enumerate(program.ops) if op.kind == "conv" and op.layer == "conv")
    weight = held[f"conv.{place}.weight"]
    assert len(weight.raw_data) == 400 * 72 / 2 and size < 45_000
    assert np.array_equal(onnx.numpy_helper.to_array(weight).astype(np.int64), op.weight)


def optimized(path: Path) -> collections.Counter[str]:
    """Returns how many nodes of each type onnxruntime makes of a model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".run.onnx")), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


class Pooled(Residual):
    """With a pool between stem and block, as networks for large images have."""

    def __init__(self) -> None:
        super().__init__()
        self.pool1 = nn.MaxPool2d(3, 2, padding=1)

    def forward(self, x):
        x = self.pool1(self.relu1(self.bn1(self.stem(x))))
        y = self.bn3(self.grouped(self.relu2(self.bn2(self.depthwise(x)))))
        x = self.relu3(self.add(y, x))
        return self.fc(self.pool(self.conv(x)).flatten(1))


def test_runtimes_compute_in_integers_where_every_tensor_has_8_bits(quantize, tmp_path):
    torch.manual_seed(0)
    model, images = quantize(Pooled(), rules=EVERYWHERE)
    program = lower(model, images[:1]).program
    onnx_file.write(program, tmp_path / "m.onnx")
    made = optimized(tmp_path / "m.onnx")
    assert made["QLinearConv"] == 4 and made["Conv"] == 0, made
    assert made["QLinearAdd"] == 1 and made["Add"] == 0 and made["Relu"] == 0, made
    assert made["QGemm"] == 1 and made["Gemm"] == 0, made


def test_a_tensor_is_put_on_a_grid_once(quantize, tmp_path):
    """The block's input goes to a convolution and to the sum, on the same grid."""
    model, images = quantize(Residual(), rules=EVERYWHERE)
    program = lower(model, images[:1]).program
    requantized = [
        op.inputs[0] for op in program.ops if op.kind == "requantize" and program.tensors[op.output].bits <= 8
    ]
    assert len(requantized) > len(set(requantized)), "the program does it for each reader"
    onnx_file.write(program, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    arguments = [tuple(node.input) for node in graph.node if node.op_type == "QuantizeLinear"]
    values = {i.name: onnx.numpy_helper.to_array(i).tobytes() for i in graph.initializer}
    alike = [(x, values[scale], values[zero]) for x, scale, zero in arguments]
    assert len(alike) == len(set(alike))


def test_a_bias_beyond_32_bits_is_refused(quantize, tmp_path):
    network = Residual()
    model, images = quantize(network)
    with torch.no_grad():
        network.conv.bias[3] = 3e5
    program = lower(model, images[:1]).program
    with pytest.raises(QexpError, match="export=onnx: conv: its bias needs more than the 32 bits that runtimes take"):
        onnx_file.write(program, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
    with torch.no_grad():
        network.conv.bias[3] = 3e13
    with pytest.raises(
        QexpError, match=r"conv.bias: .* the bias of channel 3 is .* steps of its accumulator; check the weights"
    ):
        lower(model, images[:1])
