"""The experiments of PACT-Quantization and Quantized_ResNet from end to end on a few real images."""

from __future__ import annotations

import os

import pytest

from qexp.run import pipeline
from qexp.run.settings import read

FEW = ("debug=fast", "trainer=cpu", "trainer.enable_progress_bar=false", "kernels=reference", "n_calibrate=8")
NAMES = (
    "toynet_cfg1",
    "toynet_cfg1s",
    "toynet_cfg2",
    "toynet_cfg3",
    "mobilenetv2_cfg1s",
    "resnet20_uniform",
    "one_bit",
)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("QEXP_DATA_DIR"), reason="QEXP_DATA_DIR names no folder with CIFAR-10")
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(compose, tmp_path, name):
    metrics = pipeline.run(read(compose(f"experiment={name}", *FEW, f"runs_dir={tmp_path}")))
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["n_eval"] == 64 and metrics["bn"] == "keep"
