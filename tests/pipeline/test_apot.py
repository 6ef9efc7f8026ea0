"""APoT's weight normalisation is part of the method: without it, and with the paper's first clip, training at 3 bits fails."""

from __future__ import annotations

import os

import pytest

PUBLISHED = ("quant=apot", "bits=w3a3", "schedule=qat", "quant.weight.alpha_init=3.0")


def test_without_normalisation_a_digits_network_loses_much(run):
    steps = ("schedule.epochs=1", "trainer.limit_train_batches=20", "trainer.limit_val_batches=1")
    whole = run(*PUBLISHED, *steps, "study=s")
    without = run(*PUBLISHED, *steps, "study=s", "quant.weight.normalize=false")
    assert whole["status"] == without["status"] == "ok"
    assert whole["drop"] < 5 < 20 < without["drop"], (whole["drop"], without["drop"])


@pytest.mark.slow
@pytest.mark.data
def test_without_normalisation_resnet20_collapses(compose, tmp_path):
    """Twenty steps on CIFAR-10 from the real weights."""
    from qexp import pipeline

    weights = f"{os.environ['QEXP_DATA_DIR']}/weights/cifar10_resnet20-12fca82f.th"
    few = (
        "schedule.epochs=1",
        "trainer.limit_train_batches=20",
        "trainer.limit_val_batches=1",
        "max_samples=500",
        "n_calibrate=128",
    )
    common = ("model=resnet20", "dataset=cifar10", f"weights={weights}", *few, "trainer=cpu", f"runs_dir={tmp_path}")
    found = {}
    for normalize in ("true", "false"):
        options = (*PUBLISHED, *common, f"quant.weight.normalize={normalize}", "trainer.enable_progress_bar=false")
        metrics = pipeline.run(compose(*options))
        assert metrics["status"] == "ok", metrics["error"]
        found[normalize] = metrics["value"]
    assert found["true"] > 60 > 30 > found["false"], found
