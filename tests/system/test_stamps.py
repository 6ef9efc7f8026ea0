"""A stamp changes with every way in which files change, and only then."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from qexp.system.stamps import stamp


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "one.txt").write_text("one")
    (tmp_path / "a" / "__pycache__").mkdir()
    return tmp_path / "a"


def same_time(folder: Path) -> None:
    """Replaces a file by one of the same size and time of change, as `cp -p` does."""
    path = folder / "b" / "one.txt"
    other = folder.parent / "other"
    other.write_text("two")
    shutil.copystat(path, other)
    other.replace(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "b" / "one.txt").write_text("three"),
        lambda folder: os.utime(folder / "b" / "one.txt", ns=(1, 1)),
        lambda folder: (folder / "b" / "two.txt").touch(),
        lambda folder: (folder / "b" / "one.txt").rename(folder / "b" / "1.txt"),
        lambda folder: shutil.rmtree(folder),
        same_time,
    ],
)
def test_a_change_is_seen(change, folder):
    before = stamp([folder])
    change(folder)
    assert stamp([folder]).digest != before.digest


def test_nothing_changed_and_what_does_not_count(folder):
    before = stamp([folder])
    assert stamp([folder]) == before
    (folder / "__pycache__" / "x.pyc").touch()
    assert stamp([folder]) == before


def test_a_file_that_appears_is_seen(tmp_path):
    before = stamp([tmp_path / "x.npz"])
    assert before.changed == 0
    (tmp_path / "x.npz").touch()
    assert stamp([tmp_path / "x.npz"]).digest != before.digest


def test_a_link_to_itself_ends(folder):
    (folder / "b" / "round").symlink_to(folder)
    assert stamp([folder]).digest
