"""A finished run's network is loaded back bit for bit for every kind of run; missing or changed files are named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qexp.data.digits import Digits
from qexp.errors import QexpError
from qexp.run import pipeline
from qexp.run.datasets import load_data
from qexp.run.saved_network import FILE, load
from qexp.run.settings import read
from tests.loaded import evaluated as watched
from tests.networks import FunctionalDigits


@pytest.fixture
def evaluated(run, monkeypatch, tmp_path):
    """Call with overrides; returns the run's folder and what its network made of test images when it was evaluated."""
    images = next(iter(Digits(max_samples=100).test_dataloader()))[0]

    def one(*overrides: str) -> tuple[Path, torch.Tensor, torch.Tensor]:
        metrics, scores = watched(monkeypatch, images, lambda: run("study=s", *overrides))
        return tmp_path / "runs" / "s" / metrics["point"], images, scores

    return one


@pytest.mark.parametrize(
    "overrides",
    [
        ("quant=mse", "bits=w4a4"),
        ("quant=minmax", "bits=w8a8", "bn=keep"),
        ("quant=ladder/aciq/full", "bits=w4a4"),
        ("quant=minmax", "bits=w4a4", "passes=[equalize,bias_correction]"),
        ("quant=lsq", "bits=w3a3", "schedule=qat", "schedule.epochs=1", "trainer.limit_train_batches=3"),
        ("quant=one_bit", "bits=w1a2", "schedule=qat_scratch", "schedule.epochs=1", "trainer.limit_train_batches=3"),
        ("quant=caq_shift", "bits=w8a8"),
        ("quant=mpact_integer_bn", "bits=w8a8", "bn=keep", "schedule=ptq"),
        ("quant=inq_shift", "bits=w4a8", "quant.passes.integer=null"),
        ("quant=kmeans", "bits=w4a8"),
        ("quant=adaround", "bits=w3a8", "quant.passes.reconstruct.iterations=5", "quant.passes.reconstruct.batch=4"),
    ],
    ids=lambda o: " ".join(o),
)
def test_a_run_is_loaded_back_bit_for_bit(evaluated, overrides):
    folder, images, scores = evaluated(*overrides)
    with torch.no_grad():
        assert torch.equal(load(folder)(images), scores)


FUNCTIONAL = (
    "model.net._target_=tests.networks.FunctionalDigits",
    *("~model.net.width", "model.groups=null", "model.first=null", "model.last=null"),
)


@pytest.mark.parametrize(
    "overrides",
    [
        ("quant=minmax", "bits=w4a4", "deploy=integer", "verify=32"),
        ("quant=minmax", "bits=w8a8", "deploy=int8", "passes=[equalize]"),
        (
            "quant=lsq",
            "bits=w3a3",
            "deploy=integer",
            "schedule=qat",
            "schedule.epochs=1",
            "trainer.limit_train_batches=3",
        ),
        ("quant=adaround", "bits=w3a8", "quant.passes.reconstruct.iterations=5", "quant.passes.reconstruct.batch=4"),
    ],
    ids=lambda o: " ".join(o),
)
def test_a_network_of_functions_is_quantized_and_loaded_back(evaluated, overrides, tmp_path):
    torch.manual_seed(0)
    save_file(FunctionalDigits().state_dict(), tmp_path / "float.safetensors")
    folder, images, scores = evaluated(*FUNCTIONAL, f"weights={tmp_path / 'float.safetensors'}", *overrides)
    model = load(folder)
    with torch.no_grad():
        assert torch.equal(model(images), scores)
    if "deploy=integer" in overrides:
        plan = (folder / "layers.csv").read_text()
        assert "left.add,input.0" in plan and "adaptive_avg_pool2d,input" in plan
        assert any(name == "left.add.input_0_quantizer.scale" for name in model.state_dict())


def test_a_calibrated_point_holds_no_weights(evaluated):
    folder, *_ = evaluated("quant=minmax", "bits=w8a8")
    with safe_open(folder / FILE, "pt") as file:
        names = list(file.keys())
    assert names and all("_quantizer." in name for name in names)


def test_a_float_network_that_was_trained_first_is_found_again(evaluated):
    folder, images, scores = evaluated("weights=null", "schedule.pretrain.epochs=1", "model.net.width=4")
    assert torch.equal(load(folder)(images), scores)


def test_what_is_missing_changed_or_damaged_is_said(evaluated, tmp_path, digits_weights):
    from safetensors.torch import load_file, save_file

    own = tmp_path / "own.safetensors"
    own.write_bytes(digits_weights.read_bytes())
    folder, *_ = evaluated("quant=minmax", f"weights={own}")
    with pytest.raises(QexpError, match=r"state\.safetensors is missing"):
        load(tmp_path)
    state = load_file(own)
    save_file({name: t + 1 if t.is_floating_point() else t for name, t in state.items()}, own)
    with pytest.raises(QexpError, match=r"differ from the run.s first weights"):
        load(folder)
    own.unlink()
    with pytest.raises(QexpError, match=r"own\.safetensors"):
        load(folder)
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(QexpError, match="is damaged"):
        load(folder)


@pytest.mark.data
@pytest.mark.slow
def test_resnet20_on_real_images(compose, tmp_path, monkeypatch):
    weights = Path(os.environ["QEXP_DATA_DIR"]) / "weights" / "cifar10_resnet20-12fca82f.th"
    settings = read(
        compose(
            *("model=resnet20", "dataset=cifar10", f"weights={weights}", "quant=mse", "bits=w4a4", "study=s"),
            *("max_samples=500", "trainer=cpu", "trainer.enable_progress_bar=false", f"runs_dir={tmp_path}"),
        )
    )
    images = torch.cat([x for x, _ in load_data(settings.data.module).test_dataloader()])
    metrics, scores = watched(monkeypatch, images, lambda: pipeline.run(settings))
    folder = tmp_path / "s" / metrics["point"]
    with torch.no_grad():
        assert torch.equal(load(folder)(images), scores)
    assert (folder / FILE).stat().st_size < 100_000, "scales, and no weights"


def test_the_folder_of_a_run_that_trained_nothing_gives_the_float_weights_it_used(run, tmp_path):
    first = run("study=s", "quant=minmax", "bits=w4a4")
    folder = tmp_path / "runs" / "s" / first["point"]
    assert not list(folder.glob("checkpoints/*.ckpt"))
    again = run("study=t", f"weights={folder}", "quant=minmax", "bits=w4a4")
    assert again["status"] == "ok", again["error"]
    assert (again["value_float"], again["value"]) == (first["value_float"], first["value"])
