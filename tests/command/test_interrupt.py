"""Ctrl-C: finished points are in the table and on the page, and one sentence explains how to continue."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]


def interrupted_when(holds: Callable[[str], object], folder: Path, *command: str) -> tuple[int, str]:
    """Starts a run into `folder`, interrupts it once `holds` of what it has printed, and returns its status and all of that."""
    words = [sys.executable, "run.py", *command, "study=s", f"runs_dir={folder}", "trainer.enable_progress_bar=false"]
    said, end = folder / "said", time.monotonic() + 200
    with said.open("w") as out:
        running = subprocess.Popen(
            words, cwd=ROOT, env=os.environ, stdout=out, stderr=subprocess.STDOUT, preexec_fn=_hears_interrupts
        )
    try:
        while not holds(said.read_text()) and running.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        return running.wait(120), said.read_text()
    finally:
        running.kill()


def _hears_interrupts() -> None:
    """Undoes what a shell's job in the background inherits: Python ignores the signal from its start there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_a_sweep_keeps_its_table(tmp_path):
    sweep = ("-m", "quant=minmax,mse", "layer_wbit=3,4,5,6")
    status, text = interrupted_when(lambda said: "point 2 of 8" in said, tmp_path, *sweep)
    assert status == 130, text
    assert re.search("interrupted after [2-7] of 8 points: run the same command again to continue", text)
    assert len(pd.read_csv(tmp_path / "s" / "results.csv")) >= 2
    assert (tmp_path / "s" / "dashboard.html").is_file()


@pytest.mark.slow
def test_a_training_says_so(tmp_path):
    training = ("quant=lsq", "schedule=qat", "schedule.epochs=500")
    status, text = interrupted_when(lambda _: list(tmp_path.glob("s/*/checkpoints/last.ckpt")), tmp_path, *training)
    assert status == 130, text
    assert "interrupted: run the same command again to continue" in text
    (log,) = (tmp_path / "s").glob("*/log.txt")
    assert "interrupted" in log.read_text()
