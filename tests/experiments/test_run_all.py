"""The script that runs every study: an interrupt ends all of it, and it runs on apart from the terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUDY = """#!{python}
import os, sys, time
print(os.getpriority(os.PRIO_PROCESS, 0), *sys.argv[2:], flush=True)
try:
    time.sleep({seconds})
except KeyboardInterrupt:
    sys.exit(130)
"""


def started(tmp_path: Path, seconds: float, **more: str) -> subprocess.Popen:
    """Starts the script with studies that only wait."""
    python = tmp_path / "python"
    python.write_text(STUDY.format(python=sys.executable, seconds=seconds))
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "STUDIES": "first second"} | more
    command = ["bash", str(ROOT / "experiments/run_all.sh"), "seed=3"]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=hears_interrupts
    )


def hears_interrupts() -> None:
    """Undoes what a shell does to a command behind `&`, this test among them: it ignores interrupts, and so would the script."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_ends_the_study_that_runs_and_starts_no_other(tmp_path: Path) -> None:
    script = started(tmp_path, 60)
    line = ""
    while "seed=3" not in line:
        line = script.stdout.readline()
    script.send_signal(signal.SIGINT)
    rest = script.communicate(timeout=30)[0]
    assert script.returncode == 130 and "first" in line and "second" not in rest


def test_in_the_background_it_runs_behind_other_work(tmp_path: Path) -> None:
    log = tmp_path / "log"
    said = started(tmp_path, 0.01, BACKGROUND="1", THREADS="2", LOG=str(log)).communicate(timeout=30)[0]
    end = time.monotonic() + 30
    while time.monotonic() < end and not (log.exists() and "second" in log.read_text() and said):
        time.sleep(0.05)
    lines = [line.split() for line in log.read_text().splitlines() if "seed=3" in line]
    assert lines[0] == ["19", "-m", "experiment=first", "trainer.threads=2", "seed=3"], lines
