"""The end of a study: its table is printed each time, its page is written only where something has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qexp.report.study import finish


@pytest.fixture
def page(tmp_path: Path, write_point: Callable[..., Path]) -> Path:
    write_point(tmp_path / "s", "mse", 4, 4, plain=True, point="a")
    finish(tmp_path / "s")
    return tmp_path / "s" / "dashboard.html"


def test_a_page_stays_while_nothing_changes(page, capsys):
    before = page.stat()
    finish(page.parent, ["a"])
    assert (page.stat().st_mtime_ns, page.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert "> mse" in capsys.readouterr().out


def edit(page: Path, write_point: Callable[..., Path]) -> None:
    metrics = page.parent / "a" / "metrics.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"value": 12.34}))


def add(page: Path, write_point: Callable[..., Path]) -> None:
    write_point(page.parent, "minmax", 4, 4, plain=True, point="b")


def lose(page: Path, write_point: Callable[..., Path]) -> None:
    page.unlink()


def damage(page: Path, write_point: Callable[..., Path]) -> None:
    page.write_text(page.read_text()[:1000])


@pytest.mark.parametrize("change", [edit, add, lose, damage])
def test_a_change_makes_the_page_anew(change, page, write_point):
    change(page, write_point)
    finish(page.parent)
    assert "</html>" in page.read_text()
    assert ("12.34" in page.read_text()) is (change is edit)
    assert ("minmax" in page.read_text().partition('id="qexp-data"')[2].partition("</script>")[0]) is (change is add)
