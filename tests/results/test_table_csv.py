"""results.csv equals the metrics.json files, also where some are damaged."""

import csv
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from qexp.errors import QexpError
from qexp.report.__main__ import main
from qexp.results import table_csv
from qexp.results.run_folder_read import read_correct
from qexp.results.table_csv import COLUMNS, collect, write_results
from qexp.system.whole_files import write_text


def test_one_row_a_point_with_stable_columns_first(study: Path) -> None:
    df = collect(study)
    assert tuple(df.columns[: len(COLUMNS)]) == COLUMNS
    assert {"top5"} <= set(df.columns[len(COLUMNS) :])
    assert len(df) == len(list(study.iterdir()))
    assert (df["status"] == "failed").sum() == 1
    assert df.loc[df["point"] == "mse-w4a4-s0", "value"].iloc[0] == pytest.approx(88.5, abs=0.6)


def test_unknown_keys_become_later_columns(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    write_point(tmp_path / "s", "mse", 4, 4, plain=True, zeta=3, alpha="x")
    write_point(tmp_path / "s", "mse", 8, 8, plain=True)
    df = collect(tmp_path / "s")
    assert list(df.columns[len(COLUMNS) :]) == [
        *("alpha", "higher_is_better", "is_share", "metric_label", "top5", "unit", "zeta"),
    ]


@pytest.mark.parametrize(
    "content", ["", '{"status": "ok", "val', "[1, 2]", "null", b"\xff\xfe\x00", b"\x00" * 400, "{}{}"]
)
def test_a_damaged_record_is_named_and_skipped(study: Path, content: str | bytes) -> None:
    whole = len(collect(study))
    damaged = study / "mse-w4a4-s0" / "metrics.json"
    damaged.write_bytes(content if isinstance(content, bytes) else content.encode())
    df = collect(study)
    assert len(df) == whole - 1
    (note,) = df.attrs["skipped"]
    assert note.startswith("mse-w4a4-s0: ")
    assert write_results(study).is_file()


def test_a_point_folder_without_a_record_is_no_point(study: Path) -> None:
    (study / "running").mkdir()
    assert "running" not in set(collect(study)["point"])


def test_lists_survive_the_csv(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    bits = [32, 8, 4]
    write_point(tmp_path / "s", "pact", 4, 4, plain=True, layer_abit=bits, diagnosis=["a, b", 'c "d"'])
    write_point(tmp_path / "s", "pact", 8, 8, plain=True)
    path = write_results(tmp_path / "s")
    with path.open(newline="") as file:
        rows = {row["point"]: row for row in csv.DictReader(file)}
    assert json.loads(rows["pact-w4a4-s0"]["layer_abit"]) == bits
    assert json.loads(rows["pact-w4a4-s0"]["diagnosis"]) == ["a, b", 'c "d"']
    assert rows["pact-w8a8-s0"]["weight_bytes"] == "269722"


def test_rebuilding_gives_the_same_bytes_and_leaves_nothing_behind(study: Path) -> None:
    first = write_results(study).read_bytes()
    assert write_results(study).read_bytes() == first
    assert [path.name for path in study.iterdir() if path.is_file()] == ["results.csv"]


def test_readers_see_whole_files_while_writers_race(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    texts = [letter * 200_000 for letter in "abcd"]
    write_text(path, texts[0])
    writers = [threading.Thread(target=lambda t=text: [write_text(path, t) for _ in range(10)]) for text in texts]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() in texts
    assert [one.name for one in tmp_path.iterdir()] == ["results.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text(tmp_path / "results.csv", "old")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(QexpError, match=r"nowhere.*no such folder"):
        collect(tmp_path / "nowhere")


def test_an_empty_study_has_the_columns(tmp_path: Path) -> None:
    assert collect(tmp_path).empty
    assert tuple(pd.read_csv(write_results(tmp_path)).columns) == COLUMNS


def test_odd_values_do_not_stop_the_table(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    odd = {
        "value": float("nan"),
        "layer_wbit": {"a*": 4},
        "model": 7,
        "quant": ["x"],
        "n_eval": "all",
        "bops": float("inf"),
    }
    write_point(tmp_path / "s", "mse", 4, 4, plain=True, **odd)
    write_point(tmp_path / "s", "mse", 8, 8, plain=True, layer_wbit="[8, 4]")
    df = collect(tmp_path / "s")
    assert set(df["model"]) == {"7", "resnet20"}
    assert df["n_eval"].isna().sum() == 1
    assert write_results(tmp_path / "s").is_file()


DAMAGE = {
    "nested": {"rules": json.loads("[" * 500 + "]" * 500)},
    "digits": {"params": 10**400},
    "many digits": {"macs": -(10**25)},
    "request a list": {"request": ["a"]},
    "plan a mapping": {"plan": {"a": 1}},
    "weights a list": {"weights": [1, [2]]},
    "value a list": {"value": [1]},
    "value text": {"value": "high", "ci_low": {}, "drop": "none"},
    "images text": {"n_eval": "many", "seconds_train": [1]},
    "names numbers": {"model": 3, "quant": {"a": 1}, "dataset": None},
    "widths lists": {"layer_wbit": [[8]], "mean_wbit": [4]},
    "error a list": {"status": "failed", "error": [1, 2]},
    "accumulator text": {"accumulator": "x", "diagnosis": {"a": 1}},
}
FILES = {
    "histograms.json": [
        '[{"layer": 1, "site": [], "low_edge": "a", "bin_width": {}, "counts": ["x"]}]',
        "[" * 100_000,
        "{}",
        "[1]",
    ],
    "depth.json": [
        '{"layers": [{"layer": "a"}]}',
        '{"layers": 3, "norms": 4}',
        "[" * 100_000,
        '{"layers": [1], "norms": [2]}',
    ],
    "layers.csv": ["layer,site\n", "layer,site,sqnr\na,weight,high\n", "layer\n1\n", "\x00\x00"],
    "pareto.csv": ["trial,weight_bytes,bops,front\n1,2,3,true\n", "trial\n1\n"],
    "history.csv": ["step,layer,site,scale,oscillating\n1,a,w,x,y\n"],
    "sensitivity.csv": ["layer,site,bits,divergence\n"],
    "accumulator.csv": ["bits,overflow,top1\nx,y,z\n"],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_point_costs_its_own_row_at_most(tmp_path: Path, write_point: Callable[..., Path], name: str) -> None:
    write_point(tmp_path / "s", "mse", 4, 4, plain=True)
    write_point(tmp_path / "s", "lsq", 4, 4, plain=True, **DAMAGE[name])
    assert main([str(tmp_path / "s")]) == 0
    table = pd.read_csv(tmp_path / "s" / "results.csv")
    assert "mse-w4a4-s0" in set(table.point)
    if name in ("nested", "digits", "many digits"):
        assert list(table.point) == ["mse-w4a4-s0"] and "left out" in (tmp_path / "s" / "dashboard.html").read_text()


def test_damaged_files_of_a_point_cost_their_own_figures(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    for name, contents in FILES.items():
        for i, content in enumerate(contents):
            point = write_point(tmp_path / "s", "mse", 4, 4, point=f"{name}-{i}")
            (point / name).write_text(content)
    assert main([str(tmp_path / "s")]) == 0
    assert len(pd.read_csv(tmp_path / "s" / "results.csv")) == sum(map(len, FILES.values()))


@pytest.mark.parametrize("shape", ["(1000000000000,)", "(-1,)", "(2, 2)", "(100,"])
def test_a_file_that_claims_more_than_it_holds_is_not_read(
    tmp_path: Path, write_point: Callable[..., Path], shape: str
) -> None:
    point = write_point(tmp_path / "s", "mse", 4, 4, plain=True)
    head = f"{{'descr': '|b1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    (point / "correct.npy").write_bytes(
        b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + b"\1" * 100
    )
    assert read_correct(point) is None
    assert main([str(tmp_path / "s")]) == 0


def test_a_page_elsewhere_leaves_a_study_that_cannot_be_written_alone(tmp_path, write_point, monkeypatch) -> None:
    write_point(tmp_path / "s", "mse", 4, 4, plain=True)
    write = table_csv.write_text

    def read_only(path: Path, text: str) -> Path:
        if path.parent == tmp_path / "s":
            raise OSError(30, "Read-only file system")
        return write(path, text)

    monkeypatch.setattr(table_csv, "write_text", read_only)
    assert (
        main([str(tmp_path / "s"), "--out", str(tmp_path / "page.html")]) == 0
        and (tmp_path / "page.html").stat().st_size > 1000
    )
    assert main([str(tmp_path / "s")]) == 2
