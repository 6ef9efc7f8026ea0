"""A value that is not allowed is one sentence on the command line, said before torch is loaded, and leaves no folder."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TELLING = """
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules))
from qexp.command.program import main
main()
"""


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("seed=-1", "seed=-1 is not allowed; use a whole number from 0 to 4294967295"),
        ("layer_wbit=abc", "layer_wbit: got 'abc'; allowed are whole numbers of bits 1..16, or 32 for float"),
        ("layer_abit=[8,...,4]", "layer_abit[1]: got '...'"),
        ("+quant.rules.first={layers: conv1, weight: {bits: 40}}", "quant.rules.first.weight.bits: got 40"),
        ("plan=nowhere/layers.csv", "plan=nowhere/layers.csv: cannot be read"),
        ("weights=nowhere/net.pth", "weights=nowhere/net.pth: no such file"),
        ("study=../elsewhere", "study='../elsewhere' is not allowed"),
    ],
)
def test_a_single_run_ends_with_the_sentence_alone(tmp_path: Path, asked: str, words: str):
    command = [sys.executable, "-c", TELLING, asked, f"runs_dir={tmp_path / 'runs'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    assert words in done.stderr.strip().splitlines()[-1]
    assert done.stdout.strip() == "False", "torch was loaded before the value was refused"
    assert not [path for path in tmp_path.glob("runs/*") if path.name != ".cache"]
