"""The parts of the suite that run under the oldest torch leave nothing out."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def parts() -> list[str]:
    line = re.search(r"^PARTS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line is not None
    return shlex.split(line[1])


def test_every_test_belongs_to_one_part():
    named = [path for part in parts() for name in part.split() for path in sorted((ROOT / "tests").glob(name))]
    tests = {path for path in (ROOT / "tests").rglob("test_*.py") if "pycache" not in str(path)}
    inside = [test for path in named for test in ([path] if path.is_file() else path.rglob("test_*.py"))]
    assert sorted(inside) == sorted(tests)


@pytest.mark.parametrize("part", range(len(parts())))
def test_each_part_can_be_chosen(part):
    done = subprocess.run(
        ["make", "--dry-run", "oldest", f"PART={part}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    asked = re.search(r"set -- (.*); shift (\d+);", done.stdout)
    assert asked is not None and shlex.split(asked[1])[int(asked[2])] == parts()[part]


def test_without_a_choice_one_of_them_runs():
    done = subprocess.run(["make", "--dry-run", "oldest"], cwd=ROOT, capture_output=True, text=True, check=True)
    asked = re.search(r"shift (\d+);", done.stdout)
    assert asked is not None and int(asked[1]) < len(parts())
