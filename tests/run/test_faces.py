"""A small face network through the whole pipeline: every method of the shelf calibrates, trains where it learns, and is judged by pairs."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qexp.report.point_pages import write_point_pages
from qexp.run import pipeline
from qexp.run.saved_network import load
from qexp.run.settings import read
from tests.loaded import evaluated
from tests.people import PEOPLE, write_people
from tests.shelf import METHODS, own


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """People, their pairs, and the runs of this file."""
    return write_people(tmp_path_factory.mktemp("faces"))


@pytest.fixture
def verify(compose, folder):
    """Call with overrides; runs one point of the small face network and returns its metrics."""

    def one(*overrides: str) -> dict:
        settings = [
            "model=mobilefacenet", "model.input_size=[3,32,32]",
            "+model.net.settings=[[2,64,2,2],[2,64,1,2],[2,64,1,1]]", "model.groups=null", "trainer=cpu", "kernels=reference",
            f"dataset.data.root={folder / 'images'}", f"dataset.data.pairs={folder / 'pairs.csv'}", "dataset.data.held_out=4",
            "dataset.task.identities=20", "trainer.enable_progress_bar=false", f"runs_dir={folder / 'runs'}",
            "schedule.pretrain.epochs=2", "study=faces",
        ]  # fmt: skip
        return pipeline.run(read(compose(*settings, *overrides)))

    return one


def test_a_face_network_is_trained_quantized_and_judged(verify, folder):
    metrics = verify("quant=mse", "bits=w8a8", "+dataset.task.show_images=true")
    assert metrics["status"] == "ok", metrics["error"]
    assert (
        metrics["metric"] == "lfw_accuracy"
        and metrics["n_eval"] == 2 * PEOPLE
        and metrics["interval"] == "Wilson over pairs"
    )
    assert abs(metrics["drop"]) < 30 and metrics["tar_far_0.1"] >= 0
    kept = folder / "runs" / "faces" / metrics["point"]
    table = pd.read_csv(kept / "pairs.csv")
    assert len(table) == 2 * PEOPLE and table["shift"].abs().is_monotonic_decreasing
    np.testing.assert_allclose(table["shift"], table.cosine - table.cosine_float, atol=2e-6)
    assert write_point_pages(kept) == ["verification.html"]
    page = (kept / "verification.html").read_text()
    assert "Pairs whose cosine shifted most" in page and "data:image/jpeg" in page
    assert len(np.load(kept / "correct.npy")) == 2 * PEOPLE and json.loads((kept / "metrics.json").read_text())


def test_a_face_network_is_loaded_back_bit_for_bit(verify, folder, monkeypatch):
    images = torch.rand(2, 3, 32, 32)
    metrics, outputs = evaluated(monkeypatch, images, lambda: verify("quant=mse", "bits=w4a4"))
    with torch.no_grad():
        assert torch.equal(load(folder / "runs" / "faces" / metrics["point"])(images), outputs)


@pytest.mark.parametrize("quant", ["lsq", "pact"])
def test_a_face_network_learns_with_quantizers(verify, quant, folder):
    metrics = verify(f"quant={quant}", "bits=w4a4", "schedule.epochs=1")
    assert metrics["status"] == "ok", metrics["error"]
    write_point_pages(folder / "runs" / "faces" / metrics["point"])
    page = (folder / "runs" / "faces" / metrics["point"] / "verification.html").read_text()
    assert "data:image/jpeg" not in page  # real people are not shown by default


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_shelf_runs_on_faces(verify, method):
    metrics = verify(f"quant={method}", "study=shelf", *own(method))
    assert metrics["status"] == "ok", metrics["error"]
    assert np.isfinite(metrics["value"]) and np.isfinite(metrics["tar_far_0.1"])


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.timeout(1800)  # 1,583 crops and their mirror images, in float and again through the plan
def test_the_published_network_on_two_folds(compose, tmp_path):
    root = Path(os.environ["QEXP_DATA_DIR"])
    weights = root / "weights" / "lfw_mobilefacenet_068.ckpt"
    if not weights.is_file() or not (root / "lfw").is_dir():
        pytest.skip("the face weights or the crops are not at hand")
    metrics = pipeline.run(
        read(compose("model=mobilefacenet", "dataset=lfw_sample", f"weights={weights}", "bits=float", "n_calibrate=0",
                     "dataset.data.held_out=0", "trainer=cpu", "trainer.enable_progress_bar=false",
                     f"runs_dir={tmp_path}"))
    )  # fmt: skip
    assert metrics["status"] == "ok", metrics["error"]
    assert round(metrics["value_float"], 2) == 98.67 and metrics["n_eval"] == 1200
