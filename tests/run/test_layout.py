"""How a run lays out tensors and multiplies on a GPU: chosen by the device or the settings, recorded, and no other point."""

from __future__ import annotations

import pytest
import torch

import qexp
from qexp.errors import QexpError
from qexp.run import devices
from qexp.run.settings.trainer import TrainerOptions

TRAINER = {"_target_": "pytorch_lightning.Trainer"}


@pytest.fixture
def products():
    """Restores how products are computed."""
    yield
    devices.set_products(TrainerOptions.of(TRAINER))


@pytest.mark.parametrize("quant", ["minmax", "lsq"])
def test_channels_last_gives_the_same_point_and_loads_back(run, tmp_path, quant):
    steps = ("trainer.limit_train_batches=2", "schedule.epochs=1") if quant == "lsq" else ()
    row = run("study=s", f"quant={quant}", "bits=w8a8", "verify=20", "trainer.channels_last=true", *steps)
    assert row["status"] == "ok", row["error"]
    assert row["precision"] == "32-true" and row["tf32"] is False
    again = run("study=s", f"quant={quant}", "bits=w8a8", "verify=20", *steps)
    assert again["point"] == row["point"], "the layout in memory changes no result, so it makes no other point"
    network = qexp.load(tmp_path / "runs" / "s" / row["point"])
    images = torch.rand(4, 1, 8, 8)
    assert torch.isfinite(network(images)).all()


def test_images_and_weights_arrive_with_their_channels_innermost(run, monkeypatch):
    seen = {}
    lay_out = devices.lay_out_weights

    def watched(model, trainer):
        lay_out(model, trainer)
        seen.update(
            {
                name: p.is_contiguous(memory_format=torch.channels_last)
                for name, p in model.named_parameters()
                if p.ndim == 4
            }
        )

    monkeypatch.setattr(devices, "lay_out_weights", watched)
    assert run("study=s", "trainer.channels_last=true")["status"] == "ok"
    assert seen and all(seen.values())


def test_float32_products_are_those_of_float32_unless_tf32_is_chosen(products):
    devices.set_products(TrainerOptions.of(TRAINER))
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    devices.set_products(TrainerOptions.of(TRAINER | {"tf32": True}))
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


def test_tf32_makes_another_point(run):
    """On a CPU it changes nothing, but the record of a GPU must not be mistaken for one without."""
    plain, rounded = run("study=s"), run("study=s", "trainer.tf32=true")
    assert plain["point"] != rounded["point"] and rounded["tf32"] is True


@pytest.mark.parametrize("key", ["channels_last", "tf32"])
def test_values_are_checked(key):
    with pytest.raises(QexpError, match=f"trainer.{key}=5 is not allowed"):
        TrainerOptions.of(TRAINER | {key: 5})
