"""The check of a machine with a GPU: it keeps what it has found, goes on where it stopped, and starts in a fresh clone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qexp_kernels import gpu_check
from qexp_kernels.examples import arguments
from qexp_kernels.library import REFERENCES

HEAD = {"gpu": "none"}


def test_every_operator_is_compared():
    assert set(arguments(torch.device("cpu"))) == set(REFERENCES)
    found = gpu_check.differences(torch.device("cpu"), images=2, size=4)
    assert set(found) == set(REFERENCES)
    assert all(one["unequal"] == 0 for results in found.values() for one in results)
    assert all(results[0]["elements"] > 0 for results in found.values())


def test_a_difference_is_counted_and_measured():
    nan = float("nan")
    found = gpu_check._difference(torch.tensor([1.0, nan, 3, 4]), torch.tensor([1.0, nan, 3.5, nan]))
    assert found["elements"] == 4 and found["unequal"] == 2


def test_the_file_is_written_after_every_part_and_a_second_start_goes_on(tmp_path):
    out, calls = tmp_path / "new" / "gpu.json", []

    def fails():
        assert json.loads(out.read_text()) == HEAD | {"first": {"a": 1}}  # written before the second part ends
        calls.append("fails")
        raise RuntimeError("the device went away")

    parts = {"first": lambda: calls.append("first") or {"a": 1}, "second": fails}
    result = gpu_check.run(out, parts, HEAD)
    assert result["second"]["error"] == "RuntimeError: the device went away"
    assert json.loads(out.read_text()) == result
    parts["second"] = lambda: calls.append("second") or {"b": 2}
    assert gpu_check.run(out, parts, HEAD)["second"] == {"b": 2}
    assert calls == ["first", "fails", "second"]  # the first is kept, the one that failed is tried again
    gpu_check.run(out, parts, HEAD, again=True)
    gpu_check.run(out, parts, {"gpu": "another"})
    assert calls[3:] == ["first", "second"] * 2


def test_it_starts_in_a_fresh_clone(tmp_path):
    root = Path(gpu_check.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a clone")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{root}", str(clone)], check=True)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CUDA_HOME")}
    command = [sys.executable, "-m", "qexp_kernels.gpu_check", "--help"]
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "--again" in done.stdout, done.stderr


def test_the_table_has_a_row_for_everything_that_was_checked():
    differ = {"elements": 4, "unequal": 1, "largest_difference": 1.0}
    result = {
        "differences": {"lsq": [differ], "pact": [{**differ, "unequal": 0}]},
        "tests": {"status": 0, "tail": ["12 passed"]},
        "bandwidth": {"forward_share": 0.9, "backward_share": 0.8, "copy_gb_per_s": 1.0},
        "memory": {"kernel": 1.0, "materialised": 20.0},
        "figures": [
            {"name": "a", "baseline_name": "b", "ratio": 0.5, "goal": 1.25},
            {"name": "c", "baseline_name": "d", "ratio": 2, "goal": None},
        ],
        "steps, resnet18": {"training step": {"float": {"ms": 1, "float": 1}, "lsq": {"ms": 1, "float": 1.1}}},
        "steps, resnet50": {"left out": ["no module hydra"]},
        "sweep of 36 points": {"error": "RuntimeError: gone"},
    }
    text = gpu_check.table(result)
    for row in (
        "| CUDA against the CPU | 1 of 2 operators differ: lsq | 0 |",
        "| tests on CUDA | 12 passed | exit status 0: 0 |",
        "| least share of copy bandwidth | 0.80 | >= 0.85 |",
        "| memory | kernel 1.0, materialised 20.0 | |",
        "| a / b | 0.5 | <= 1.25 |",
        "| resnet18, lsq: training step / float | 1.10 | <= 1.15 |",
        "| steps, resnet50 | left out: no module hydra | |",
        "| sweep of 36 points | failed: RuntimeError: gone | |",
    ):
        assert row in text.splitlines(), row
