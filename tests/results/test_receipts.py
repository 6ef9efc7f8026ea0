"""What points that ran elsewhere leave behind, and the lines the process that started them prints of it."""

import time
from pathlib import Path

import pytest

from qexp.results.receipts import Receipt, Watch, found, leave
from qexp.results.remaining import Remaining

POINT = {
    "status": "ok", "point": "abc", "model": "net", "quant": "mse", "schedule": "ptq", "layer_wbit": 4, "layer_abit": 8,
    "metric": "top1", "value": 88.594,
}  # fmt: skip


def test_a_receipt_comes_back_as_it_was_left(tmp_path: Path) -> None:
    good, bad = Receipt.of(tmp_path / "s", 0, POINT), Receipt.of(tmp_path / "s", 1, {})
    assert good == Receipt(str(tmp_path / "s"), "s/abc", "ok", "net mse ptq W4A8: top-1 88.59 %")
    assert (bad.name, bad.status, bad.result) == ("s/job 1", "failed", "s/job 1: failed")
    assert Receipt.of(tmp_path / "s", 2, POINT | {"value": None}).result.endswith("W4A8: ok")
    leave(tmp_path, 0, good)
    leave(tmp_path, 1, bad)
    (tmp_path / "2.json").write_text('{"study": ')
    assert found(tmp_path) == {"0": good, "1": bad, "2": None}
    assert found(tmp_path / "nowhere") == {}


def test_each_point_gets_one_line_as_it_ends(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    watch = Watch(tmp_path, Remaining(3), every=0.01)
    leave(tmp_path, 0, Receipt.of(Path("s"), 0, POINT))
    said, end = "", time.monotonic() + 20
    while not said and time.monotonic() < end:
        time.sleep(0.01)
        said = capsys.readouterr().out
    assert said.startswith("point 1 of 3, ") and said.endswith(" left: net mse ptq W4A8: top-1 88.59 %\n")
    watch.every = 60
    leave(tmp_path, 1, Receipt.of(Path("s"), 1, POINT))
    leave(tmp_path, 2, Receipt.of(Path("s"), 2, {}))
    watch.close()
    said = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in said] == ["point 2 of 3", "point 3 of 3"], (
        "those of the last moment too, once"
    )
