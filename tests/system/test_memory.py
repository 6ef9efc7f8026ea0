"""Memory that is used up: one sentence with a remedy, and the next point goes on."""

from __future__ import annotations

import pytest
import torch

from qexp.run import training
from qexp.system import memory


def used_up() -> Exception:
    """Returns the error of a request that no machine can serve."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    return caught.value


def test_the_sentence_names_what_was_used_up_and_what_to_do():
    assert "the memory of this machine was used up; take smaller batches" in memory.trouble(used_up())
    assert "the memory of this machine" in memory.trouble(MemoryError())
    assert "the GPU's memory was used up" in memory.trouble(torch.OutOfMemoryError("CUDA out of memory. Tried to ..."))
    assert memory.trouble(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_a_point_without_memory_is_recorded_and_the_next_one_runs(run, monkeypatch):
    evaluate = training.evaluate

    def exhausted(*args, **options):
        torch.empty(2**58)

    monkeypatch.setattr(training, "evaluate", exhausted)
    first = run("study=s", "quant=minmax", "bits=w4a4")
    assert first["status"] == "failed" and "the memory of this machine was used up" in first["error"]
    monkeypatch.setattr(training, "evaluate", evaluate)
    assert run("study=s", "quant=minmax", "bits=w8a8")["status"] == "ok"
