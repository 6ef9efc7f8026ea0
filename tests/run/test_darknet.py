"""The real detector, on real images: the mean average precision measured elsewhere on these files."""

import os
from pathlib import Path

import pytest

from qexp.run import pipeline
from qexp.run.settings import read

DATA = Path(os.environ.get("QEXP_DATA_DIR", "none"))
WEIGHTS = DATA / "weights" / "MobileNetV2-YOLOv3-Nano-voc.weights"
pytestmark = [
    pytest.mark.data,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (WEIGHTS.is_file() and (DATA / "voc").is_dir()), reason=f"{WEIGHTS} or voc/ beside it is not there"
    ),
]


@pytest.fixture
def detect(compose, tmp_path):
    """Call with overrides; returns the metrics of the float detector."""
    quiet = (
        "trainer=cpu",
        "kernels=reference",
        "trainer.enable_progress_bar=false",
        f"runs_dir={tmp_path}",
        "n_calibrate=0",
    )
    own = ("model=darknet", f"weights={WEIGHTS}", "schedule=float", "schedule.epochs=0", *quiet)
    return lambda *overrides: pipeline.run(read(compose(*own, *overrides)))


@pytest.mark.parametrize(("dataset", "area", "images"), [("voc_sample", 62.1, 13), ("voc_sample100", 84.2, 100)])
def test_the_float_detector_is_as_precise_as_it_was_measured(detect, dataset, area, images):
    metrics = detect(f"dataset={dataset}")
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["n_eval"] == images and metrics["map_area"] == pytest.approx(area, abs=0.06)
    assert metrics["ci_low"] < metrics["value"] < metrics["ci_high"] and metrics["metric"] == "map_voc07"


def test_planes_in_the_wrong_order_cost_precision(detect):
    metrics = detect("dataset=voc_sample", "model.preprocessing.channel_order=bgr")
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["map_area"] < 60.0
