"""What was once wrong and must stay right: caches that tell networks apart, devices, sweeps over studies, gradients."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qexp.layers import baked_weights
from qexp.layers.swap import evaluating, swap
from qexp.quantizers.dorefa import DoReFaWeight
from qexp.quantizers.uniform import Uniform
from qexp.statistics.stats import TensorStats

ROOT = Path(__file__).parents[2]


def test_baked_weights_follow_the_layer_to_its_device() -> None:
    layer = torch.nn.Linear(4, 3)
    quantizer = Uniform(4, (3, 4))
    quantizer.fit(TensorStats.of(layer.weight.detach()))
    swap(layer, {"weight": quantizer})
    with baked_weights(layer):
        assert layer.to("meta").quantized_weight().device.type == "meta"
        assert "baked_weight" not in layer.state_dict()
    assert "baked_weight" not in dict(layer.named_buffers())


def test_frozen_modules_stay_frozen() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()).train()
    model[0].eval()
    with evaluating(model):
        assert not model[1].training
    assert model.training and model[1].training and not model[0].training


def test_the_restored_magnitude_of_dorefa_has_its_gradient() -> None:
    """With rounding replaced by its gradient, max|tanh| * tanh / max|tanh| is tanh: the largest weight is no exception."""
    w = torch.randn(50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantizer = DoReFaWeight(8, (50,), rescale="max")
    upstream = torch.randn(50, generator=torch.Generator().manual_seed(1))
    (quantizer(w) * upstream).sum().backward()
    expected = upstream * (1 - torch.tanh(w.detach()) ** 2)
    # the maximum also scales the rounding error: at 8 bits that is small beside the straight-through part
    assert torch.allclose(w.grad, expected, atol=0.1)


def test_a_quantizer_may_run_twice_before_backward() -> None:
    w = torch.randn(3, 3, requires_grad=True)
    quantizer = DoReFaWeight(4, (3, 3), rescale="max")
    (quantizer(w) @ quantizer(w)).sum().backward()
    assert torch.isfinite(w.grad).all()


def test_float_scores_tell_networks_with_the_same_weights_apart() -> None:
    from qexp.calibration.cache import behaviour
    from qexp.models.cifar_resnet import CifarResNet

    one = CifarResNet(depth=20, shortcut="A", num_classes=10, post_add_relu=True)
    other = CifarResNet(depth=20, shortcut="A", num_classes=10, post_add_relu=False)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert [behaviour(m) for m in one.modules()] != [behaviour(m) for m in other.modules()]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["ptq", "qat", "qat_scratch", "float"])
def test_debug_fast_runs_with_every_schedule(schedule: str, tmp_path: Path) -> None:
    command = [sys.executable, "run.py", "debug=fast", f"schedule={schedule}", f"runs_dir={tmp_path}"]
    done = subprocess.run([*command, "trainer.enable_progress_bar=false"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "debug" / "dashboard.html").exists()


@pytest.mark.slow
def test_a_sweep_over_studies_ends_with_a_page_each(tmp_path: Path) -> None:
    command = [sys.executable, "run.py", "-m", "debug=fast", "study=one,two", f"runs_dir={tmp_path}"]
    done = subprocess.run([*command, "trainer.enable_progress_bar=false"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["one", "two"]
    for study in ("one", "two"):
        assert (tmp_path / study / "dashboard.html").exists() and (tmp_path / study / "results.csv").exists()
