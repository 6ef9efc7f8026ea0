"""An ONNX file computes what the program does, to the last code, in integers where runtimes have them; what cannot be so is refused."""

from __future__ import annotations

import collections
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qexp.integer.bounds import greatest_pair
from qexp.integer.lowering import lower
from qexp.integer.verify import verify
from qexp.models.modules import Add
from tests.integer.test_package import Everything
from tests.networks import Residual

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from qexp.integer import onnx_file  # noqa: E402 - needs both


def test_a_finished_run_goes_to_onnx(run, tmp_path: Path):
    metrics = run("quant=mse", "bits=w8a8", "deploy=int8", "study=s")
    assert metrics["status"] == "ok", metrics["error"]
    folder = tmp_path / "runs" / "s" / metrics["point"]
    exported = run("export=onnx", f"weights={folder}", "verify=100")
    assert exported["status"] == "ok", exported["error"]
    assert (folder / "model.onnx").stat().st_size == exported["onnx_bytes"]
    assert exported["onnx"] == "equal" and exported["verify"] == "equal"
    assert exported["onnx_predictions_differ"] == exported["onnx_codes_differ"] == exported["onnx_most"] == 0


def test_what_runtimes_cannot_compute_alike_is_refused_with_a_remedy_that_works(run, tmp_path: Path):
    metrics = run("quant=mse", "bits=w8a8", "study=s")
    folder = tmp_path / "runs" / "s" / metrics["point"]
    refused = run("export=onnx", f"weights={folder}", "verify=16")
    assert refused["status"] == "failed" and "its bias lies between two steps" in refused["error"]
    assert "run the point anew with deploy=int8" in refused["error"]
    assert not list(folder.glob("*.onnx"))


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


class Inverted(nn.Module):
    """ReLU6 and a sum of results that no activation follows, as in MobileNetV2; an average of seven by seven."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 2), nn.ReLU6()
        self.expand, self.act2, self.project = nn.Conv2d(8, 16, 1), nn.ReLU6(), nn.Conv2d(16, 8, 1)
        self.add, self.mean, self.fc = Add(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.stem(x) * 1)
        return self.fc(self.mean(self.add(self.project(self.act2(self.expand(x))), x)).flatten(1))


class Stacked(nn.Module):
    """A strided convolution, a pool and a linear layer on maps; SiLU, which becomes a table."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.pool = nn.Conv2d(3, 6, 3, 2, 1), nn.SiLU(), nn.AvgPool2d(2)
        self.b, self.relu, self.fc = nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.relu(self.b(self.pool(self.act(self.a(x))))).flatten(1))


NETWORKS = {
    "residual": (Residual, {}),
    "batch norm that stays": (Residual, {"fold": False}),
    "pooled": (Pooled, {}),
    "everything": (Everything, {}),
    "table": (Stacked, {}),
    "4 bits": (Pooled, {"wbit": 4, "abit": 4}),
    "3 and 5 bits": (Residual, {"wbit": 3, "abit": 5}),
    "per tensor": (Residual, {"weight": {"_target_": "qexp.quantizers.uniform.Uniform", "granularity": "tensor"}}),
    "k-means": (
        Residual,
        {"weight": {"_target_": "qexp.quantizers.kmeans.KMeans", "granularity": "tensor"}, "wbit": 3},
    ),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_onnxruntime_computes_the_codes_of_the_program(case, deployed, tmp_path):
    torch.manual_seed(0)
    network, options = NETWORKS[case]
    lowered, model, images = deployed(network(), **options, shape=(128, 3, 8, 8))
    assert verify(model, lowered, [(images, None)], progress=False).equal
    onnx_file.write(lowered.program, tmp_path / "m.onnx")
    found = onnx_file.compare(lowered.program, tmp_path / "m.onnx", images.numpy())
    assert found.codes > 50_000 and found.equal and found.images == 128, found.line()


def test_a_file_of_another_program_is_told_apart(deployed, tmp_path):
    lowered, model, images = deployed(Residual())
    onnx_file.write(lowered.program, tmp_path / "m.onnx")
    model.conv.bias.data[2] += 0.5
    other = lower(model, images[:1], as_runtimes=True).program
    found = onnx_file.compare(other, tmp_path / "m.onnx", images.numpy())
    assert not found.equal and found.differ and found.first in other.tensors and "DIFFERENT" in found.line()


def test_biases_in_steps_of_the_sums_are_what_the_network_is_evaluated_with(deployed):
    lowered, model, _ = deployed(Residual())
    op = next(op for op in lowered.program.ops if op.kind == "conv" and op.layer == "conv")
    codes = model.conv.bias_quantizer.codes(model.conv.bias)
    assert op.align == 0 and np.array_equal(codes.numpy(), op.bias) and np.abs(op.bias).max() > 50
    step = model.conv.input_quantizer.scale.double() * model.conv.weight_quantizer.scale.double().flatten()
    assert torch.equal(model.conv.quantized_bias(), (codes * step).float())


def test_integers_take_no_more_than_their_bytes(deployed, tmp_path):
    network = Residual()
    network.conv, network.fc = nn.Conv2d(8, 400, 3, stride=2), nn.Linear(400, 5)
    program = deployed(network, 4, 8)[0].program
    place, op = next((i, op) for i, op in enumerate(program.ops) if op.kind == "conv" and op.layer == "conv")
    for int4, each in ((False, 1), (True, 0.5)):
        onnx_file.write(program, tmp_path / "m.onnx", int4)
        held = {i.name: i for i in onnx.load(tmp_path / "m.onnx").graph.initializer}
        weight = held[f"conv.{place}.weight"]
        assert len(weight.raw_data) == 400 * 72 * each
        assert np.array_equal(onnx.numpy_helper.to_array(weight).astype(np.int64), op.weight)


def optimized(path: Path) -> collections.Counter[str]:
    """Returns how many nodes of each type onnxruntime makes of a model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".run.onnx")), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize("bits", [8, 4])
def test_runtimes_compute_in_integers_where_every_tensor_has_8_bits(bits, deployed, tmp_path):
    torch.manual_seed(0)
    program = deployed(Pooled(), bits, bits)[0].program
    onnx_file.write(program, tmp_path / "m.onnx")
    made = optimized(tmp_path / "m.onnx")  # four convolutions and the average
    assert made["QLinearConv"] == 5 and made["Conv"] == made["FusedConv"] == 0, made
    assert made["QLinearAdd"] == 1 and made["Add"] == made["Div"], made  # an odd zero point of the images takes both
    assert made["QGemm"] == 1 and made["Gemm"] == 0, made


def test_a_tensor_is_put_on_a_grid_once(deployed, tmp_path):
    """The block's input goes to a convolution and to the sum, on the same grid."""
    program = deployed(Residual())[0].program
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


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("bias", [3e5, -3e13])
def test_a_dead_channel_counts_its_bias_in_larger_steps(fold, bias, deployed, quantize, tmp_path):
    """A channel whose weights are next to nothing beside its bias; in every way to deploy, and in the network that is evaluated."""
    network = Residual()
    with torch.no_grad():
        network.conv.weight[3] *= 1e-12
        network.conv.bias[3] = bias * 1e-12
        if not fold:
            network.bn1.weight[2], network.bn1.bias[2] = 1e-12, 0.3
    lowered, model, images = deployed(network, fold=fold)
    op = next(op for op in lowered.program.ops if op.kind == "conv" and op.layer == "conv")
    assert all(np.abs(op.bias).max() <= 2**30 for op in lowered.program.ops if op.kind == "conv")
    verdict = verify(model, lowered, [(images, None)], progress=False)
    assert verdict.equal and verdict.share < 1, verdict.line()
    assert torch.allclose(
        model.conv.quantized_bias()[3].double(), torch.tensor(op.bias[3] * lowered.program.tensors[op.output].unit[3])
    )
    onnx_file.write(lowered.program, tmp_path / "m.onnx")
    assert onnx_file.compare(lowered.program, tmp_path / "m.onnx", images.numpy()).equal


def test_seven_bits_never_saturate_where_pairs_are_added_in_16_bits(deployed):
    rng = np.random.default_rng(0)
    for bits, layers in ((7, False), (8, True)):
        program = deployed(Residual(), bits, 8)[0].program
        assert bool(onnx_file.saturating(program)) is layers
        for op in (op for op in program.ops if op.kind == "conv" and op.weight[0].size > 1):
            rows = op.weight.reshape(len(op.weight), -1)
            pairs = np.stack([rng.permuted(rows, axis=1)[:, :2] for _ in range(200)])
            codes = rng.integers(0, 256, pairs.shape)
            bound = greatest_pair(op)
            assert np.abs((pairs * codes).sum(-1)).max() <= bound and (bound <= 2**15 - 1 or bits == 8)


def test_a_run_for_old_processors(run, tmp_path: Path):
    metrics = run("quant=minmax", "bits=w7a8", "deploy=int8", "study=s")
    exported = run("export=onnx", f"weights={tmp_path / 'runs' / 's' / metrics['point']}", "verify=32")
    assert exported["status"] == "ok", exported["error"]
    assert exported["onnx_saturates_without_vnni"] == 0 and metrics["mean_wbit"] == 7


def test_numbers_beside_a_tie_are_encoded_as_the_program_does(deployed, tmp_path):
    """Of a number next to a tie, float32 holds only the tie once the zero point is added, whether that is odd or even."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    lowered, _, _ = deployed(model)
    program = lowered.program
    grid = program.tensors[program.input]
    for zero in (128, 127):
        grid = replace(grid, zero_point=np.array([zero]))
        program.tensors[program.input] = grid
        program.ops[0] = replace(program.ops[0], zero=np.array([zero]))
        ties = (np.arange(-60, 60) + 0.5).astype(np.float32)
        beside = np.nextafter(ties, np.float32(0)), ties, np.nextafter(ties, ties + ties)
        images = np.resize(np.concatenate(beside), (4, 3, 8, 8)).astype(np.float32) * np.float32(grid.unit[0])
        onnx_file.write(program, tmp_path / "n.onnx")
        found = onnx_file.compare(program, tmp_path / "n.onnx", images)
        assert found.equal, f"zero {zero}: {found.line()}"
