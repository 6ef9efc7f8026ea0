"""A file is there whole or not at all: two processes, many threads, a full disk, a writer that is killed or raises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qexp.calibration.cache import save_stats
from qexp.calibration.site_stats import Calibration
from qexp.callbacks.whole_checkpoints import WholeCheckpoints
from qexp.errors import QexpError
from qexp.models.weights import save_weights
from qexp.results.receipts import Receipt, leave
from qexp.system import whole_files
from qexp.system.whole_files import whole, write_bytes, write_text
from tests.system.test_disk import small_files

ROOT = Path(__file__).parents[2]
WRITING = """
import sys
from pathlib import Path
from qexp.system.whole_files import write_text
for _ in range(30):
    write_text(Path(sys.argv[1]), sys.argv[2] * 300_000)
"""
DYING = """
import os, sys
from pathlib import Path
from qexp.system.whole_files import whole
with whole(Path(sys.argv[1])) as part:
    part.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def process(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_two_processes_write_one_file_and_readers_see_one_or_the_other(tmp_path):
    path = tmp_path / "done.json"
    write_text(path, "a" * 300_000)
    writers = [process(WRITING, path, letter) for letter in "bc"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        text = path.read_text()
        assert len(text) == 300_000 and len(set(text)) == 1
        seen.add(text[0])
    assert [writer.wait() for writer in writers] == [0, 0] and seen & {"b", "c"}
    for writer in writers:
        writer.stdin.close(), writer.stdout.close()
    assert names(tmp_path) == ["done.json"]


def test_threads_of_one_process_have_a_part_each(tmp_path):
    path, both = tmp_path / "x", threading.Barrier(2)

    def write(letter: str) -> None:
        with whole(path) as part:
            parts.append(part)
            part.write_text(letter)
            both.wait(10)
            assert part.read_text() == letter

    parts: list[Path] = []
    threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(parts)) == 2 and path.read_text() in "ab" and names(tmp_path) == ["x"]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 50_000),
        lambda path: write_bytes(path, b"x" * 50_000),
        lambda path: torch.save(torch.ones(50_000), path),
        lambda path: save_file({"w": torch.ones(50_000)}, path),
        lambda path: WholeCheckpoints().save_checkpoint({"w": torch.ones(50_000)}, path),
        lambda path: save_weights(torch.nn.Linear(300, 300), path),
    ],
    ids=["text", "bytes", "torch", "safetensors", "checkpoint", "weights"],
)
def test_a_full_disk_leaves_the_file_before_and_nothing_beside_it(tmp_path, write):
    path = write_text(tmp_path / "kept", "before")
    with small_files(10_000), pytest.raises((OSError, RuntimeError, SafetensorError, QexpError)), whole(path) as part:
        write(part)
    assert path.read_text() == "before" and names(tmp_path) == ["kept"]


def test_a_disk_that_notices_its_end_when_arrays_are_flushed_leaves_nothing(tmp_path):
    with small_files(10_000), pytest.raises(OSError), whole(tmp_path / "a.npz") as part, part.open("wb") as file:
        np.savez(file, a=np.arange(50_000))
    assert not names(tmp_path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_writer_that_raises_in_the_middle_leaves_the_file_before(tmp_path, error):
    path = write_text(tmp_path / "kept", "before")
    with pytest.raises(error), whole(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "before" and names(tmp_path) == ["kept"]


def test_what_a_killed_writer_left_goes_once_it_is_old(tmp_path):
    path = write_text(tmp_path / "kept", "before")
    writer = process(DYING, path)
    assert writer.stdout.readline() == "writing\n"
    (part,) = [p for p in tmp_path.iterdir() if p != path]
    os.utime(part, (time.time() - 100,) * 2)
    whole_files.remove_leftovers.__wrapped__(tmp_path)
    assert part.exists(), "its writer lives"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdin.close(), writer.stdout.close()
    assert path.read_text() == "before" and part.exists()
    whole_files.remove_leftovers.__wrapped__(tmp_path)
    assert names(tmp_path) == ["kept"]


def test_a_part_of_which_nobody_knows_the_writer_stays(tmp_path):
    pack = tmp_path / "train.pack.part"  # pixels so far, with which packing goes on
    pack.write_text("pixels")
    os.utime(pack, (1e9, 1e9))
    whole_files.remove_leftovers.__wrapped__(tmp_path)
    assert pack.exists()


def test_a_name_as_long_as_a_file_system_allows_and_a_suffix_of_any_kind(tmp_path):
    for name in ("x" * 250, "ä" * 120, "a.tar.gz", ".hidden"):
        assert write_text(tmp_path / "new" / name, name).read_text(encoding="utf-8") == name
    with whole(tmp_path / "a.npz") as part, part.open("wb") as file:
        np.savez_compressed(file, a=np.arange(3))
    assert np.load(tmp_path / "a.npz")["a"].tolist() == [0, 1, 2]
    assert not list(tmp_path.rglob("*.part"))


def test_text_that_utf8_cannot_hold_is_written_all_the_same(tmp_path):
    assert write_text(tmp_path / "x", "name \udcff").read_text(encoding="utf-8") == "name ?"


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order, sync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("disk"), sync(number))[1])
    monkeypatch.setattr(Path, "replace", lambda part, path: (order.append("name"), replace(part, path))[1])
    save_stats(Calibration({}, {}), tmp_path / "a" / "stats.safetensors")
    leave(tmp_path / "b", 3, Receipt("s", "p", "ok", "fine"))
    assert order == ["disk", "name"] * 2
    assert (tmp_path / "b" / "3.json").exists() and load_file(tmp_path / "a" / "stats.safetensors") == {}


def test_no_module_renames_files_by_itself():
    own = {
        "qexp/system/whole_files.py",
        "qexp/data/pack.py",
        "qexp/run/exporters.py",
    }  # of these two grows, one is proved
    text = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "qexp").rglob("*.py")}
    assert {name for name, code in text.items() if "part.replace(" in code or "temporary.replace(" in code} <= own
