"""A small detector through the whole pipeline: every method of the shelf calibrates, trains where it learns, and is scored."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qexp.run import pipeline
from qexp.run.saved_network import load
from qexp.run.settings import read
from tests.darknet import write_cfg
from tests.loaded import evaluated
from tests.shelf import METHODS, own


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Zips of noise with a bright rectangle on each image, a `.cfg`, and the runs of this file."""
    root = tmp_path_factory.mktemp("detectors")
    write_cfg(root, side=64, classes=20)
    random = np.random.default_rng(0)
    for name, n in (("one", 10), ("two", 4)):
        rows = ["image,xmin,ymin,xmax,ymax,class"]
        with zipfile.ZipFile(root / f"{name}.zip", "w") as archive:
            for i in range(n):
                pixels = random.integers(0, 90, (64, 64, 3), dtype=np.uint8)
                x, y = random.integers(0, 34, 2)
                pixels[y : y + 30, x : x + 30, i % 2] = 250
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                archive.writestr(f"{i}.png", file.getvalue())
                rows.append(f"{i}.png,{x + 1},{y + 1},{x + 30},{y + 30},{('cat', 'dog')[i % 2]}")
        (root / f"{name}_boxes.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def detect(compose, folder):
    """Call with overrides; runs one point of the small detector and returns its metrics."""

    def one(*overrides: str) -> dict:
        return pipeline.run(
            read(
                compose(
                    *(
                        "model=darknet",
                        f"model.cfg={folder}/tiny.cfg",
                        "model.input_size=[3,64,64]",
                        "model.first=null",
                    ),
                    *(
                        "model.last=layers.8.conv",
                        "dataset=voc_sample",
                        f"dataset.data.root={folder}",
                        "dataset.data.train=one",
                    ),
                    *("dataset.data.test=two", "dataset.data.calibration_size=4", "dataset.data.batch_size=3"),
                    *(
                        "dataset.epochs.float=1",
                        "dataset.epochs.qat=1",
                        "n_calibrate=4",
                        "trainer=cpu",
                        "kernels=reference",
                    ),
                    *("trainer.enable_progress_bar=false", f"runs_dir={folder}/runs", *overrides),
                )
            )
        )

    return one


@pytest.mark.parametrize("method", ["minmax", "lsq"])
def test_a_detector_is_quantized_as_any_network(detect, folder, method):
    metrics = detect(f"quant={method}", "bits=w4a4")
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["metric"] == "map_voc07" and metrics["n_eval"] == 4 and metrics["interval"].startswith("bootstrap")
    assert 0 <= metrics["ci_low"] <= metrics["ci_high"] <= 100 and 0 <= metrics["map_area"] <= 100
    kept = folder / "runs" / metrics["study"] / metrics["point"]
    with np.load(kept / "outcomes.npz") as outcomes:
        assert outcomes["positives"].sum() == 4 and outcomes["box"].shape == (len(outcomes["image"]), 4)
    assert not (kept / "correct.npy").exists()
    names = {row.split(",")[0] for row in (kept / "layers.csv").read_text().splitlines()[1:]}
    assert {"layers.0.conv", "layers.8.conv"} <= names


@pytest.mark.parametrize("method", ["mse", "lsq"])
def test_a_detector_is_loaded_back_bit_for_bit(detect, folder, monkeypatch, method):
    images = torch.rand(2, 3, 64, 64)
    metrics, outputs = evaluated(monkeypatch, images, lambda: detect(f"quant={method}", "bits=w4a4", "study=loaded"))
    with torch.no_grad():
        assert torch.equal(load(folder / "runs" / "loaded" / metrics["point"])(images), outputs)


def test_training_lowers_the_loss_and_keeps_the_best_by_its_own_measure(detect, folder):
    metrics = detect(
        "schedule=float", "dataset.epochs.float=4", "n_calibrate=0", "+callbacks.curves.every=1", "study=trained"
    )
    assert metrics["status"] == "ok", metrics["error"]
    curves = max((folder / "runs" / ".cache" / "float").glob("*/curves.csv"), key=lambda p: p.stat().st_size)
    values = [float(line.split(",")[3]) for line in curves.read_text().splitlines() if ",train_loss," in line]
    assert len(values) == 8 and values[-1] < values[0]
    assert ",val_map_voc07," in curves.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_shelf_runs_on_a_detector(detect, method):
    metrics = detect(f"quant={method}", "study=shelf", "dataset.lr.qat=1e-5", *own(method))
    assert metrics["status"] == "ok", metrics["error"]
    assert np.isfinite(metrics["value"]) and np.isfinite(metrics["map_area"])
