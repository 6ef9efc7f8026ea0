"""The four verbs in Python: what they return, what they refuse, and that they compute what a run computes."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qexp
from qexp.errors import QexpError
from qexp.models.digits_cnn import DigitsCNN
from qexp.models.weights import load_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def network(digits_weights) -> DigitsCNN:
    model = DigitsCNN(width=8)
    load_weights(model, digits_weights)
    return model.eval()


@pytest.fixture(scope="module")
def parts():
    """Calibration images, and test images with labels."""
    from qexp.data.digits import Digits

    data = Digits()
    images, labels = next(iter(data.test_dataloader()))
    return data.calibration_batches(64, 32, 0), images[:200], labels[:200]


def test_quantize_computes_what_a_run_computes(network, parts, run, tmp_path):
    metrics = run("quant=mse", "bits=w4a4", "n_calibrate=64")
    loaded = qexp.load(tmp_path / "runs" / metrics["study"] / metrics["point"])
    found = qexp.quantize(network, parts[0], "mse", "w4a4")
    assert torch.equal(found(parts[1]), loaded(parts[1]))


def test_the_network_at_hand_stays_float_unless_asked(network, parts):
    before = copy.deepcopy(network.state_dict())
    found = qexp.quantize(network, parts[0], "minmax", "w2a2")
    assert type(network.conv1) is nn.Conv2d and found.network is not network
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    own = copy.deepcopy(network)
    assert qexp.quantize(own, parts[0], in_place=True).network is own


def test_what_comes_back_holds_the_objects(network, parts):
    found = qexp.quantize(network, parts[0], "mse", "w4a8", "ends_bit=6", "quant.weight.granularity=tensor")
    table = found.table.set_index(["layer", "site"])
    assert table.loc[("conv1", "weight"), "bits"] == 6 and table.loc[("conv2", "weight"), "bits"] == 4
    assert set(table["granularity"]) == {"tensor"}
    assert ("conv2", "input") in found.calibration and found.calibration["conv2", "input"].tensor.count.sum() > 0
    assert found.facts.order[0] == "conv1" and repr(found) == "QuantizedNetwork(DigitsCNN, 10 quantizers)"


def test_passes_and_recipes_of_ones_own_are_taken(network, parts):
    edited = qexp.quantize(network, parts[0], "mse", "w4a8", "passes=bias_correction")
    plain = qexp.quantize(network, parts[0], "mse", "w4a8")
    assert not torch.equal(edited.network.conv2.bias, plain.network.conv2.bias)
    uniform = {"_target_": "qexp.quantizers.uniform.Uniform", "granularity": "tensor"}
    own = qexp.quantize(network, parts[0], qexp.Recipe(sites={"weight": uniform}, wbit=3))
    assert {e.bits for e in own.plan if e.spec} == {3}


@pytest.mark.parametrize("form", ["tensor", "list", "loader", "pairs", "bare"])
def test_images_come_in_any_usual_form(network, parts, form):
    images = torch.cat(parts[0])
    labels = torch.zeros(len(images), dtype=torch.long)
    given = {
        "tensor": images,
        "list": list(images.split(16)),
        "loader": DataLoader(TensorDataset(images, labels), batch_size=20),
        "pairs": [(images[:30], labels[:30]), (images[30:], labels[30:])],
        "bare": DataLoader(TensorDataset(images), batch_size=20),
    }[form]
    found = qexp.quantize(network, given, "mse", "w4a8")
    assert sum(map(len, found.images)) == 64
    wanted = qexp.quantize(network, images, "mse", "w4a8")
    assert torch.allclose(found.network.conv2.input_quantizer.scale, wanted.network.conv2.input_quantizer.scale)
    assert sum(map(len, qexp.quantize(network, given, n_calibrate=24).images)) == 24


def test_verify_returns_the_proof_its_counts_and_the_program(network, parts):
    found = qexp.quantize(network, parts[0], "mse", "w4a8", "deploy=integer")
    proof = qexp.verify(found, [(parts[1], parts[2])])
    assert proof.equal and proof.counts["verify_codes_differ"] == 0 and proof.counts["verify_images"] == 200
    assert proof.counts["verify_codes"] == proof.table["codes"].sum() > 10_000
    outputs = proof.program.decode(_integers(proof, parts[1]))
    right = float((torch.from_numpy(outputs).max(1).indices == parts[2]).float().mean())
    assert proof.verdict.score.value == pytest.approx(right)
    assert qexp.verify(found, parts[1], most=7).counts["verify_images"] == 7


def _integers(proof, images):
    from qexp.integer.reference import Reference

    return Reference(proof.program).run(proof.program.encode(images.numpy()))


def test_a_finished_run_is_verified_and_exported(run, parts, tmp_path):
    metrics = run("quant=mse", "bits=w4a8", "deploy=integer")
    network = qexp.load(tmp_path / "runs" / metrics["study"] / metrics["point"])
    assert qexp.verify(network, parts[1]).equal
    written = qexp.export(network, "package", tmp_path / "out" / "digits", images=parts[1][:20])
    assert (written.path / "weights.bin").is_file() and written.images == 20 and written.found["package_bytes"] > 0
    again = qexp.export(network, "package", tmp_path / "out" / "digits", images=parts[1][:20])
    assert again.found == written.found and [p.name for p in (tmp_path / "out").iterdir()] == ["digits"]


def test_an_exported_archive_computes_what_the_network_computes(network, parts, tmp_path):
    found = qexp.quantize(network, parts[0], "mse", "w4a8")
    written = qexp.export(found, "torch", tmp_path / "archive")
    again = torch.export.load(written.path / "model.pt2").module()(parts[1])
    assert torch.allclose(again, found(parts[1]), atol=1e-4)


def test_an_onnx_file_is_exact(network, parts, tmp_path):
    pytest.importorskip("onnxruntime")
    found = qexp.quantize(network, parts[0], "mse", "w8a8", "deploy=int8")
    assert found.as_runtimes
    written = qexp.export(found, "onnx", tmp_path / "digits.onnx", images=[(parts[1][:50], parts[2][:50])])
    assert written.found["onnx"] == "equal" and written.found["onnx_codes_differ"] == 0 and written.path.is_file()
    assert list(tmp_path.iterdir()) == [written.path]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x, t: qexp.quantize(m, x, "mes"), "no choice 'mes' .did you mean 'mse'"),
        (lambda m, x, t: qexp.quantize(m, x, bits="w4b8"), "no choice 'w4b8'"),
        (
            lambda m, x, t: qexp.quantize(m, x, "mse", "w4a8", "ends_bits=4"),
            "there is no key 'ends_bits' .did you mean 'ends_bit'",
        ),
        (lambda m, x, t: qexp.quantize(m, x, "mse", "w4a8", "dataset=cifar10"), "the images are the second argument"),
        (lambda m, x, t: qexp.quantize(m, x, "mse", "w4a8", "model=resnet20"), "the network is the first argument"),
        (lambda m, x, t: qexp.quantize(m, x, "mse", "w4a8", "quant.rules.x={layers: conv9, weight: null}"), "conv9"),
        (lambda m, x, t: qexp.quantize("resnet18", x), "give a torch.nn.Module"),
        (lambda m, x, t: qexp.quantize(m, x[0][0]), r"a batch is torch.float32 \[1, 8, 8\]"),
        (lambda m, x, t: qexp.quantize(m, (x[0] * 9).byte()), r"a batch is torch.uint8 .*must be floating point"),
        (lambda m, x, t: qexp.quantize(m, []), "images: got none"),
        (lambda m, x, t: qexp.quantize(m, "folder"), "images=str is not allowed"),
        (lambda m, x, t: qexp.verify(m, x), "has no quantizers; quantize it first"),
        (lambda m, x, t: qexp.verify(qexp.quantize(m, x, "mse", "w4a32"), x), "cannot be lowered to integers"),
        (lambda m, x, t: qexp.export(m, "onxx", t), "did you mean 'onnx'"),
        (lambda m, x, t: qexp.export(m, "package", t / "p"), "needs some, to compare the files on"),
        (lambda m, x, t: qexp.export(qexp.quantize(m, x), "torch", t), "holds other files; name a new folder"),
    ],
)
def test_what_is_wrong_is_named(network, parts, tmp_path, call, words):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(QexpError, match=words):
        call(network, parts[0], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_verbs_are_named_and_light():
    assert {"Recipe", "export", "load", "quantize", "verify"} <= set(dir(qexp))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qexp.quantise  # noqa: B018 - the name is the test
    code = (
        "import sys, qexp; qexp.Recipe\n"
        "print([m for m in ('pytorch_lightning', 'torchvision', 'bokeh', 'hydra') if m in sys.modules])\n"
        "import qexp.verbs\nprint([m for m in ('torchvision', 'bokeh') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"], done.stdout + done.stderr
