"""Disks that are full, read-only or without locks: one sentence, nothing torn, and results that need no disk are there."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from qexp_kernels import build
from safetensors.torch import save_file

from qexp.callbacks.whole_checkpoints import WholeCheckpoints
from qexp.errors import QexpError
from qexp.system import disk
from qexp.system.locks import locked
from qexp.tasks.base import Score


@contextmanager
def small_files(size: int):
    """Inside, no file can grow beyond a size: what a disk that fills does to a writer."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path):
    path, io = tmp_path / "best.ckpt", WholeCheckpoints()
    io.save_checkpoint({"epoch": 1, "w": torch.ones(3)}, path)
    with small_files(20_000), pytest.raises((OSError, RuntimeError)) as caught:
        io.save_checkpoint({"epoch": 2, "w": torch.ones(100_000)}, path)
    assert disk.trouble(caught.value) is not None
    assert io.load_checkpoint(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["best.ckpt"]


def test_a_training_run_on_a_disk_that_is_full_fails_in_one_sentence(run, monkeypatch, caplog):
    def full(self, checkpoint, path, storage_options=None):
        with Path("/dev/full").open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", full)
    metrics = run("schedule=qat", "schedule.epochs=1", "quant=lsq")
    assert metrics["status"] == "failed" and "the disk is full; make room" in metrics["error"]
    (record,) = [r for r in caplog.records if " failed: " in r.getMessage()]
    assert not record.exc_info


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x/last.ckpt")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (full_disk(), "x/last.ckpt: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "the file system is read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "cache"), "cache: the folder or file may not be written"),
        (
            RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"),
            "could not be written to its end",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_troubles_of_disks_are_known_by_their_errors(error, words):
    assert words in disk.trouble(error)
    outer = RuntimeError("while saving")
    outer.__context__ = error
    assert words in disk.trouble(outer)


@pytest.mark.parametrize(
    "error", [ValueError("x"), FileNotFoundError(errno.ENOENT, "No such file"), RuntimeError("shape")]
)
def test_other_errors_are_none_of_a_disk(error):
    assert disk.trouble(error) is None


def test_a_score_that_cannot_be_kept_is_no_failure(tmp_path, caplog):
    (tmp_path / "scores").write_text("in the way")
    Score("top1", 0.9, 0.88, 0.92, "wilson", 10, outcomes={"correct": np.ones(3)}).save(tmp_path / "scores" / "a.npz")
    assert "the score could not be kept" in caplog.text
    score = Score("top1", 0.9, 0.88, 0.92, "wilson", 10, outcomes={"correct": np.random.default_rng(0).random(100_000)})
    with small_files(5_000):
        score.save(tmp_path / "b.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["scores"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "runs").write_text("in the way")
    with (
        pytest.raises(QexpError, match=r"runs/study: cannot be made or written to"),
        locked(tmp_path / "runs" / "study"),
    ):
        pass


def test_kernels_are_built_where_there_are_no_locks(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with (tmp_path / "x.lock").open("w") as lock, build._held(lock):
        pass


def test_safetensors_on_a_full_disk_is_known(tmp_path):
    with small_files(1_000), pytest.raises(Exception) as caught:
        save_file({"w": torch.ones(10_000)}, tmp_path / "w.safetensors")
    assert disk.trouble(caught.value) is not None
