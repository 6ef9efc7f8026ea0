"""What is timed beside others takes as long as alone; threads that work meanwhile are noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from experiments.ruler import APART, ROOT, apart, interleaved

pytest.importorskip("onnxruntime")

# Times a network in PyTorch on one thread, alone or beside onnxruntime on two.
SCRIPT = """
import json, sys, tempfile
from pathlib import Path
import torch
from torch import nn
from experiments.integers.onnx_speed import evaluation, float_file, session
from experiments.ruler import interleaved

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()).eval()
images = torch.randn(4, 3, 32, 32)
steps = {"PyTorch": evaluation(model, images)}
if sys.argv[1] != "alone":
    path = Path(tempfile.mkdtemp()) / "float.onnx"
    float_file(model, images, path)
    other = session(path, 2)
    steps["onnxruntime"] = lambda: other.run(None, {"images": images.numpy()})
print(json.dumps(interleaved(steps, 60, ("PyTorch",))["PyTorch"]))
"""


def test_a_ratio_is_the_median_within_rounds_and_the_order_is_drawn():
    seen: list[str] = []
    steps = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    found = interleaved(steps, 9, ("a",))
    rounds = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert len(rounds) == 11 and all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 1
    assert found["a"]["a"] == 1 and found["b"]["processor_ms"] <= found["b"]["ms"] + 1


def timed(beside: str) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, beside], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_network_takes_as_long_beside_onnxruntime_as_alone():
    by_itself = timed("alone")
    assert 1 / APART < apart(timed("beside"), by_itself) < APART


def test_a_thread_that_works_meanwhile_is_noticed():
    x, over = torch.randn(400, 400), threading.Event()

    def work() -> None:
        while not over.is_set():
            x @ x  # without the interpreter's lock, as a library's threads are

    by_itself = interleaved({"product": lambda: [x @ x for _ in range(5)]}, 12, ())["product"]
    thread = threading.Thread(target=work)
    thread.start()
    try:
        beside = interleaved({"product": lambda: [x @ x for _ in range(5)]}, 12, ())["product"]
    finally:
        over.set()
        thread.join()
    assert apart(beside, by_itself) > APART
