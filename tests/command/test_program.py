"""The program `qexp`: its commands, its way of being called, and where relative paths point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qexp.command import commands, program

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def started(*words: str, cwd: Path, program: tuple[str, ...] = ("-m", "qexp")) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *program, *words], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize("words", [("reprot", "runs"), ("mse",), ("qat", "quant=mse")])
def test_a_word_that_is_no_command_is_answered_with_those_there_are(words, capsys):
    assert program.main(words) == 2
    said = capsys.readouterr().err
    assert "there is no such command" in said and "use report, prepare, new" in said and said.count("\n") == 1
    assert ("did you mean 'report'?" in said) is (words[0] == "reprot")


def test_help_lists_the_commands_and_how_the_program_was_called(tmp_path):
    said = started("--help", cwd=tmp_path).stdout
    assert all(f"python -m qexp {name}" in said and c.does in said for name, c in commands.COMMANDS.items())
    assert "python run.py report" in started("--help", cwd=tmp_path, program=(str(ROOT / "run.py"),)).stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--help"], ["new", "--help"], ["report", "--help"]])
def test_help_answers_without_loading_torch(words, tmp_path):
    code = (
        "import sys; from qexp.command.program import main\n"
        f"sys.argv[1:] = {words}\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'pytorch_lightning', 'torchvision'} & set(sys.modules)))"
    )
    assert started(cwd=tmp_path, program=("-c", code)).stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("given", "count"), [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_wait_briefly_unless_the_environment_says_otherwise(given, count, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert program.main(["frobnicate"]) == 2
    assert os.environ.get("GOMP_SPINCOUNT") == count
    os.environ.pop("GOMP_SPINCOUNT", None)


def test_every_command_names_a_module_that_answers_help(tmp_path):
    for name in commands.COMMANDS:
        done = started(name, "--help", cwd=tmp_path)
        assert done.returncode == 0 and f"qexp {name}" in done.stdout, done


def test_mistakes_of_prepare_are_one_line(tmp_path):
    for words in (("dataset=digits",), ("dataset=digitz",), ("dataset=digits", "seed=-1")):
        done = started("prepare", *words, cwd=tmp_path)
        said = [
            line for line in done.stderr.splitlines() if "triton not found" not in line
        ]  # torch's, where it is not there
        assert done.returncode == 2 and said[0].startswith("error: ") and "Traceback" not in done.stderr, done


def test_relative_paths_mean_what_they_mean_where_the_user_stands(tmp_path, digits_weights):
    """Also with `hydra.job.chdir=true`, with which Hydra goes to another folder before the run."""
    (tmp_path / "float.safetensors").write_bytes(digits_weights.read_bytes())
    (tmp_path / "own_rule.py").write_text(
        "def everything(stats, grid, context):\n    return stats.min, stats.max\n"
        "class Whole:\n    needs_histogram = False\n    __call__ = staticmethod(everything)\n"
    )
    words = ["weights=float.safetensors", "model.net.width=8", "kernels=reference", "trainer=cpu", "max_samples=50"]
    own = "quant.input.range._target_=own_rule.Whole"
    done = started(*words, own, "study=s", "hydra.job.chdir=true", cwd=tmp_path, program=(str(ROOT / "run.py"),))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "s" / "results.csv").exists() and "  table  runs/s/results.csv" in done.stdout
    plan = next((tmp_path / "runs" / "s").glob("*/layers.csv"))
    again = [*words, f"plan={plan.relative_to(tmp_path)}", "study=t", "seed=0,1", "hydra.job.chdir=true"]
    done = started("-m", *again, cwd=tmp_path, program=(str(ROOT / "run.py"),))
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs" / "t").glob("*/metrics.json"))) == 2
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {"float.safetensors", "own_rule.py", "runs"}
