"""Exports of a finished run: each is compared with the run and leaves the existing record unchanged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qexp.integer import caq_files, torch_file
from qexp.integer.verify import Compared, Verdict
from qexp.run import export_finished, integer_proof


@pytest.fixture
def proven(run, tmp_path: Path):
    """A run at 4 bits, proven on 48 images, and its folder."""
    metrics = run("quant=mse", "bits=w4a4", "study=s", "verify=48")
    return metrics, tmp_path / "runs" / "s" / metrics["point"]


def test_a_smaller_proof_leaves_the_larger_one_in_the_record(run, proven):
    metrics, folder = proven
    table = (folder / "integer.csv").read_text()
    again = run("export=verify", f"weights={folder}", "verify=16")
    assert again["verify_images"] == 48 and (folder / "integer.csv").read_text() == table
    packaged = run("export=package", f"weights={folder}", "verify=16")
    assert packaged["verify_images"] == 48 and packaged["package_bytes"] > 0
    assert {k: packaged[k] for k in metrics if k.startswith("verify")} == {
        k: metrics[k] for k in metrics if k.startswith("verify")
    }
    assert packaged["value_integer"] == metrics["value_integer"]
    torch_ = run("export=torch", f"weights={folder}", "verify=16")
    assert torch_["package_bytes"] == packaged["package_bytes"] and torch_["verify_images"] == 48
    larger = run("export=verify", f"weights={folder}", "verify=64")
    assert larger["verify_images"] == 64 and larger["torch_bytes"] == torch_["torch_bytes"]
    assert pd.read_csv(folder / "integer.csv").codes.sum() > pd.read_csv(folder / "integer.csv").differ.sum() == 0
    assert json.loads((folder / "metrics.json").read_text())["verify_images"] == 64


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_what_an_export_needs_is_said_before_any_work(run, tmp_path, monkeypatch, missing):
    metrics = run("quant=mse", "study=s")
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(export_finished, "load_data", lambda *_: pytest.fail("the run is evaluated again"))
    again = run("export=onnx", f"weights={tmp_path / 'runs' / 's' / metrics['point']}")
    assert again["status"] == "failed" and "pip install onnx onnxruntime" in again["error"]


@pytest.mark.parametrize(
    ("change", "stands"),
    [
        ({}, True),
        ({"verify_images": 20}, False),
        ({"verify": "different"}, False),
        ({"program": "damaged"}, False),
        ({"program": "another"}, False),
    ],
)
def test_when_an_earlier_proof_stands(change, stands, quantize, tmp_path):
    from qexp.integer.files import save
    from qexp.integer.lowering import lower
    from qexp.results.run_folder import Record
    from tests.networks import Residual

    model, images = quantize(Residual())
    program = lower(model, images[:1])
    save(program.program, tmp_path / "integer")
    if change.get("program") == "damaged":
        (tmp_path / "integer" / "program.json").write_text("{")
    if change.get("program") == "another":
        save(lower(model, images[:1], {"seed": 1}).program, tmp_path / "integer")
    found = Verdict(images=20, integer={"x": Compared(total=9)})
    earlier = {"verify": "equal", "verify_images": 30} | {k: v for k, v in change.items() if k != "program"}
    assert integer_proof._stands(earlier, found, program, Record(tmp_path)) is stands
    assert not integer_proof._stands({}, found, program, Record(tmp_path))


def test_a_run_goes_to_torch_whether_or_not_it_has_integers(run, tmp_path: Path):
    metrics = run("quant=exponential", "bits=w4a4", "study=s")
    folder = tmp_path / "runs" / "s" / metrics["point"]
    refused = run("export=verify", f"weights={folder}", "verify=8")
    assert refused["status"] == "failed" and "cannot be lowered" in refused["error"]
    taken = run("export=torch", f"weights={folder}", "verify=100")
    assert taken["status"] == "ok", taken["error"]
    assert taken["torch_images"] == 100 and taken["torch_predictions_differ"] == 0 and "verify" not in taken
    assert taken["torch_bytes"] == (folder / "torch" / torch_file.ARCHIVE).stat().st_size


def test_a_run_goes_to_the_fpga_tool(run, tmp_path: Path):
    metrics = run("quant=inq", "bits=w4a8", "schedule=ptq", "study=s")
    folder = tmp_path / "runs" / "s" / metrics["point"]
    taken = run("export=fpga", f"weights={folder}")
    assert taken["status"] == "ok", taken["error"]
    files = [p for p in (folder / "fpga").rglob("*") if p.is_file()]
    assert taken["fpga_bytes"] == sum(p.stat().st_size for p in files)
    assert 0 < taken["fpga_weight_bytes"] < metrics["weight_bytes_float"]
    names = (folder / "fpga" / "layers.txt").read_text().split()
    vectors = [caq_files.read_exponents(folder / "fpga" / "channel_q" / "digits_cnn" / name) for name in names]
    assert names[0] == "data" and len(names) > 2
    assert caq_files.read_exponents(folder / "fpga" / "digits_cnn_q") == [e for vector in vectors for e in vector]
    first = caq_files.read_feature(folder / "fpga" / "features" / "digits_cnn" / "data.bin", (1, 8, 8)).numpy()
    assert (first >= 0).all() and first.max() > 0
    assert np.fromfile(folder / "fpga" / "param.bin", "<f4").size > metrics["weight_bytes_float"] / 4, "biases too"
    assert (folder / "fpga" / "weights" / "conv1.bin").read_bytes()[1:2] == b"\0"


def test_what_the_fpga_tool_cannot_read_is_refused(run, proven):
    _, folder = proven
    refused = run("export=fpga", f"weights={folder}")
    assert refused["status"] == "failed"
    assert "export=fpga: " in refused["error"] and "are not INQ weights; the FPGA tool reads" in refused["error"]
    assert json.loads((folder / "metrics.json").read_text())["status"] == "ok", "the run's own record stays"


@pytest.mark.parametrize("quant", ["inq", "caq_shift"])
def test_the_remedies_for_the_fpga_tool_work(run, tmp_path: Path, quant: str):
    metrics = run(f"quant={quant}", "bits=w4a8", "schedule=ptq", "study=s")
    taken = run("export=fpga", f"weights={tmp_path / 'runs' / 's' / metrics['point']}")
    assert taken["status"] == "ok", taken["error"]


def test_a_proof_that_cannot_be_is_refused_before_training(run, monkeypatch):
    from qexp.run import stages

    monkeypatch.setattr(stages, "train", lambda *_: pytest.fail("the network is trained first"))
    refused = run("quant=exponential", "bits=w4a4", "schedule=qat", "schedule.epochs=1", "verify=8")
    assert refused["status"] == "failed" and "cannot be lowered to integers" in refused["error"]
