"""The notebooks run from their first cell to their last, in an empty folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[str]:
    """Returns the code of a notebook, cell by cell."""
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def executed(path: Path) -> dict[str, Any]:
    """Returns the names that a notebook leaves, after its cells ran in one namespace, each under its own file name for tracebacks."""
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, code in enumerate(cells(path), 1):
        exec(compile(code, f"{path.name}, cell {number}", "exec"), space)
    return space


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_ptq_of_your_network(tmp_path, capsys):
    path = next(p for p in NOTEBOOKS if p.stem == "ptq_of_your_network")
    assert len(cells(path)) == 10
    space = executed(path)
    assert space["proof"].equal and space["proof"].verdict.score.value > 0.9
    assert (tmp_path / "digits_package" / "weights.bin").is_file()
    assert capsys.readouterr().out.startswith("float")


def test_from_sweep_to_file(tmp_path):
    space = executed(next(p for p in NOTEBOOKS if p.stem == "from_sweep_to_file"))
    assert all(point["status"] == "ok" for point in space["points"]) and len(space["points"]) == 6
    assert space["chosen"]["drop"] < 1 and space["chosen"]["weight_bytes"] == space["good"]["weight_bytes"].min()
    assert space["proof"].equal and (tmp_path / "chosen_package" / "package.json").is_file()
    assert (tmp_path / "runs" / "choose" / "dashboard.html").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_outputs_are_kept(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
