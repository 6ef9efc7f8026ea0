"""Points that are removed: their folders, their rows, their place on the page; and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from qexp.report.__main__ import main
from qexp.report.forget import forget, mistakes
from qexp.system.locks import locked


@pytest.fixture
def few(tmp_path: Path, write_point: Callable[..., Path]) -> Path:
    """A study of two points and one that failed."""
    study = tmp_path / "runs" / "s"
    for method in ("mse", "lsq"):
        write_point(study, method, 4, 4, plain=True)
    write_point(study, "pact", 2, 2, plain=True, status="failed", error="QexpError: no", value=None, mistake=True)
    return study


def points(study: Path) -> set[str]:
    return set(pd.read_csv(study / "results.csv").point)


def test_the_failed_go_and_the_table_and_the_page_with_them(few: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["forget", str(few), "--failed"]) == 0
    assert "1 point forgotten: pact-w2a2-s0" in capsys.readouterr().out
    assert points(few) == {"mse-w4a4-s0", "lsq-w4a4-s0"} == {p.parent.name for p in few.glob("*/metrics.json")}
    assert "pact" not in (few / "dashboard.html").read_text().split('id="qexp-data"')[1].split("</script>")[0]


@pytest.mark.parametrize("said", ["lsq-w4a4-s0", "ls", "{study}/lsq-w4a4-s0", "{study}/lsq-w4a4-s0/"])
def test_a_point_is_named_by_its_folder_or_the_start_of_its_name(few: Path, said: str) -> None:
    assert main(["forget", str(few), said.format(study=few)]) == 0
    assert points(few) == {"mse-w4a4-s0", "pact-w2a2-s0"}


@pytest.mark.parametrize("said", [["nothing"], [""], ["../s"], [".."], ["."], []])
def test_what_names_no_point_removes_nothing(few: Path, said: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["forget", str(few), *said]) == 2
    assert capsys.readouterr().err.startswith("error: ") and len(list(few.glob("*/metrics.json"))) == 3


def test_the_start_of_two_names_is_refused(few: Path, write_point: Callable[..., Path], capsys) -> None:
    write_point(few, "lsq", 4, 8, plain=True)
    assert main(["forget", str(few), "lsq"]) == 2 and "means 2 points" in capsys.readouterr().err


def test_a_point_that_is_being_computed_stays(few: Path) -> None:
    with locked(few / "lsq-w4a4-s0"), pytest.raises(Exception, match="a process is working on this point"):
        forget(few, ["lsq-w4a4-s0", "mse-w4a4-s0"])
    assert len(list(few.glob("*/metrics.json"))) == 3


def test_the_last_point_takes_table_and_page_along(few: Path) -> None:
    main([str(few), "--quiet"])
    forget(few, [p.parent.name for p in few.glob("*/metrics.json")])
    assert not list(few.iterdir())


def test_mistakes_are_failures_of_what_was_asked(few: Path, write_point: Callable[..., Path]) -> None:
    write_point(few, "aciq", 2, 2, plain=True, status="failed", error="OSError: disk full", value=None)
    (few / "odd").mkdir()
    (few / "odd" / "metrics.json").write_text(json.dumps(["no", "mapping"]))
    assert mistakes(few) == ["pact-w2a2-s0"]
