"""The real detector, on real images: the mean average precision measured elsewhere on these files."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("QEXP_DATA_DIR", "none"))
WEIGHTS = DATA / "weights" / "MobileNetV2-YOLOv3-Nano-voc.weights"


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(
    not WEIGHTS.is_file() or not (DATA / "voc").is_dir(), reason=f"no {WEIGHTS.name} or voc/ in QEXP_DATA_DIR"
)
@pytest.mark.parametrize(("dataset", "area", "images"), [("voc_sample", 62.1, 13), ("voc_sample100", 84.2, 100)])
def test_the_float_detector_is_as_precise_as_it_was_measured(run, dataset, area, images):
    metrics = run("model=darknet", f"dataset={dataset}", f"weights={WEIGHTS}", "bits=float")
    assert metrics["n_eval"] == images and metrics["map_area"] == pytest.approx(area, abs=0.06)
    assert metrics["value"] == pytest.approx(metrics["value_float"]) and metrics["metric"] == "map_voc07"
