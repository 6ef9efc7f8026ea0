"""A value that is not allowed is one sentence on the command line, and one point of a sweep."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_single_run_ends_with_the_sentence_alone(tmp_path: Path):
    command = [sys.executable, "run.py", "seed=-1", f"runs_dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    assert (
        done.stderr.strip().splitlines()[-1].endswith("seed=-1 is not allowed; use a whole number from 0 to 4294967295")
    )
    assert not list(tmp_path.glob("*/*/metrics.json"))
