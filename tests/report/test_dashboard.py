"""The page as a file: complete, self-contained, small, and safe for every configuration text."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qexp.errors import QexpError
from qexp.report import payload
from qexp.report.__main__ import main
from qexp.report.dashboard import write_dashboard, write_page
from qexp.results.table_csv import collect

EVIL = "<script>alert(1)</script>"


def data_of(page: Path, name: str = "data") -> dict:
    """Returns the data inside the page."""
    found = re.search(rf'<script type="application/json" id="qexp-{name}">(.*?)</script>', page.read_text(), re.S)
    data = json.loads(found[1])
    for part in {"rows", "cells"} & set(data):
        data[part] = unpacked(data[part])
    return data


def unpacked(table: dict) -> list[dict]:
    """Returns the rows of a table of the page, as its script unpacks them."""
    rows = [dict(table["common"]) for _ in range(table["length"])]
    for name, column in table["columns"].items():
        values = [column["of"][i] if i >= 0 else None for i in column["at"]] if isinstance(column, dict) else column
        for row, value in zip(rows, values, strict=True):
            row |= {} if value is None else {name: value}
    return rows


@pytest.mark.parametrize("count", [5, 40])
def test_what_points_share_is_on_the_page_once(count: int):
    records = [
        {"model": "net", "bits": 4, "flag": True, "n": i, "quant": "ab"[i % 2], "left": [i % 2]} for i in range(count)
    ]
    records[3] |= {"flag": 1}  # equal, but shown otherwise
    del records[1]["quant"]
    table = payload.packed(pd.DataFrame(records))
    rows = [
        {key: value for key, value in row.items() if key != "width"}
        for row in unpacked(json.loads(payload.dump(table)))
    ]
    assert rows == records and {type(row["flag"]) for row in rows} == {bool, int}
    assert table["common"] == {"model": "net", "bits": 4, "width": "W?A?"}
    assert isinstance(table["columns"]["quant"], dict) == (count == 40)
    one = payload.packed(pd.DataFrame(records[:1]))
    assert one["common"] == {} and unpacked(one)[0] | records[0] == unpacked(one)[0]


def test_every_point_is_on_the_page_with_its_layers(study: Path) -> None:
    data = data_of(write_dashboard(study))
    df = collect(study)
    assert [row["point"] for row in data["rows"]] == list(df["point"])
    i = list(df["point"]).index("mse-w4a4-s0")
    layers = {name: data["pool"][at] for name, at in data["points"][i]["layers"].items()}
    assert (len(layers["layer"]), layers["layer"][2], layers["site"][2:4]) == (
        44,
        "layer1.0.conv1",
        ["weight", "input"],
    )
    layer, site, at, low, high, levels = data["points"][i]["histograms"][0]
    assert (layer, site, len(data["pool"][at][2]), len(levels)) == ("conv1", "weight", 128, 3)
    assert (levels[0], levels[1], levels[2]) == (pytest.approx(low, rel=1e-3), pytest.approx(high, rel=1e-3), 16)
    trained = list(df["point"]).index("lsq-w4a4-s0")
    assert set(data["points"][trained]["curves"]) == {"train_loss", "lr", "val_top1", "train_top1"}


def test_untrained_points_share_what_is_the_same(study: Path) -> None:
    data = data_of(write_dashboard(study))
    ptq = [point for row, point in zip(data["rows"], data["points"]) if row["schedule"] == "ptq"]
    assert len({point["layers"]["layer"] for point in ptq}) == 1
    assert len({point["histograms"][0][2] for point in ptq}) == 1


def test_noise_is_marked_in_the_ranks(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    for point, value in (("a", 91.0), ("b", 90.9), ("c", 80.0)):
        ends = {"ci_low": value - 0.5, "ci_high": value + 0.5}
        write_point(tmp_path / "s", "mse", 4, 4, plain=True, point=point, value=value, **ends)
    rows = data_of(write_dashboard(tmp_path / "s"))["rows"]
    assert {row["point"]: (row["rank_low"], row["rank_high"]) for row in rows} == {
        "a": (1, 2),
        "b": (1, 2),
        "c": (3, 3),
    }


def test_hits_on_the_same_images_settle_what_intervals_leave_open(
    tmp_path: Path, write_point: Callable[..., Path]
) -> None:
    hits = np.ones(1000, bool)
    wrong = {"a": hits[:0], "b": np.arange(50), "c": np.arange(999, 1000)}
    for point, missed in wrong.items():
        ends = {"value": 90.0 - len(missed) / 100, "ci_low": 88.0, "ci_high": 91.0}
        folder = write_point(tmp_path / "s", "mse", 4, 4, plain=True, point=point, **ends)
        np.save(folder / "correct.npy", np.where(np.isin(np.arange(1000), missed), False, hits))
    data = data_of(write_dashboard(tmp_path / "s"))
    assert data["paired"]
    ranks = {row["point"]: (row["rank_low"], row["rank_high"]) for row in data["rows"]}
    assert ranks == {"a": (1, 2), "b": (3, 3), "c": (1, 2)}
    points = {i: row["point"] for i, row in enumerate(data["rows"])}
    near = {
        points[cell["rows"][0]]: sorted(points[data["cells"][i]["rows"][0]] for i in cell["near"])
        for cell in data["cells"]
    }
    assert near == {"a": ["a", "c"], "b": ["b"], "c": ["a", "c"]}


def test_the_page_needs_no_network(study: Path) -> None:
    text = write_dashboard(study).read_text()
    text = re.sub(r"<script[^>]*>.*?</script>", "", text, flags=re.S)  # what runs is watched in a browser
    assert not re.search(r"""(src|href)\s*=\s*["'](https?:)?//""", text)
    assert "@import" not in text
    assert "url(" not in text


def test_names_from_configs_stay_text(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    folder = tmp_path / "runs" / "a<b>&amp;"
    evil = {
        "model": EVIL,
        "quant": EVIL,
        "dataset": '"><img src=x onerror=alert(2)>',
        "diagnosis": [EVIL, "]]>", "<!--"],
    }
    write_point(folder, "mse", 4, 4, study=f"</title>{EVIL}", error=EVIL, **evil)
    page = write_dashboard(folder)
    text = page.read_text()
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "<!--" not in text.split('id="qexp-data">')[1].split("</script>")[0]
    assert data_of(page)["rows"][0]["model"] == EVIL


@pytest.mark.parametrize(
    "name", ["layers.csv", "curves.csv", "histograms.json", "sensitivity.csv", "pareto.csv", "accumulator.csv"]
)
@pytest.mark.parametrize("content", ["", "{", "\x00\x01", "a,b\n1,2\n", '[{"layer": 1}]', '"text"', "layer,site\n"])
def test_a_damaged_file_costs_its_own_figure_only(
    tmp_path: Path, write_point: Callable[..., Path], name: str, content: str
) -> None:
    (write_point(tmp_path, "lsq", 4, 4) / name).write_text(content)
    built = payload.build(collect(tmp_path).assign(study_dir=str(tmp_path)))
    (point,) = json.loads(built["data"])["points"]
    everything = {"layers", "curves", "histograms", "depth", "history"}
    assert set(point) - {"none"} == everything - {name.split(".")[0]}


def test_a_histogram_of_nonsense_is_left_out(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    entry = {"layer": "conv1", "site": "weight", "low_edge": 0, "bin_width": 1, "counts": ["many"], "levels": ["x"] * 9}
    (write_point(tmp_path, "mse", 4, 4) / "histograms.json").write_text(json.dumps([entry]))
    built = payload.build(collect(tmp_path).assign(study_dir=str(tmp_path)))
    (point,) = json.loads(built["data"])["points"]
    assert set(point) == {"layers", "depth"}


def test_layer_names_that_look_like_numbers_stay_names(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    point = write_point(tmp_path / "s", "mse", 4, 4, plain=True)
    (point / "layers.csv").write_text("layer,site,bits\n3.10,weight,4\nNA,input,\n")
    data = data_of(write_dashboard(tmp_path / "s"))
    layers = {name: data["pool"][at] for name, at in data["points"][0]["layers"].items()}
    assert layers == {"layer": ["3.10", "NA"], "site": ["weight", "input"], "bits": [4, None]}


def test_unreadable_records_are_named_on_the_page(study: Path) -> None:
    (study / "mse-w4a4-s0" / "metrics.json").write_text("{")
    (note,) = data_of(write_dashboard(study), "about")["skipped"]
    assert note.startswith("mse-w4a4-s0")


def test_the_budget_drops_histograms_before_layers_and_the_best_keep_theirs(study: Path) -> None:
    df = collect(study).assign(study_dir=str(study), folder="")
    built = payload.build(df, budget=190_000)
    assert built["layers"] == 34
    assert 0 < built["histograms"] < 34
    assert len(built["data"]) < 220_000
    points = json.loads(built["data"])["points"]
    ranked = payload.rank(df)["rank_low"]
    kept = [rank for rank, point in zip(ranked, points) if "histograms" in point]
    assert max(kept) <= ranked.sort_values().iloc[built["histograms"] - 1]


@pytest.mark.slow
def test_500_trained_points_stay_below_5_megabytes(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    folder = tmp_path / "big"
    for i in range(500):
        write_point(folder, "lsq" if i % 2 else "pact", 2 + i % 7, 2 + i // 7 % 7, seed=i)
    page = write_dashboard(folder)
    about, data = data_of(page, "about"), data_of(page)
    assert page.stat().st_size < 5_000_000
    assert (len(data["rows"]), about["layers"]) == (500, 500)
    assert about["histograms"] >= 20


def test_several_studies_share_a_page(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    write_point(tmp_path / "ptq", "mse", 4, 4)
    write_point(tmp_path / "qat", "lsq", 4, 4, extra_number=1.5)
    page = write_page([tmp_path / "ptq", tmp_path / "qat"], tmp_path / "both.html")
    rows = data_of(page)["rows"]
    assert [(row["study"], row["folder"]) for row in rows] == [("ptq", "ptq/mse-w4a4-s0"), ("qat", "qat/lsq-w4a4-s0")]
    assert "<title>ptq + qat" in page.read_text()


def test_studies_of_one_name_are_told_apart(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    for runs in ("old", "new"):
        write_point(tmp_path / runs / "widths", "mse", 4, 4, plain=True)
    page = write_page([tmp_path / "old" / "widths", tmp_path / "new" / "widths"], tmp_path / "both.html")
    assert len({row["study"] for row in data_of(page)["rows"]}) == 2


def test_a_study_of_failures_only_has_a_page(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    nothing = dict.fromkeys(("value", "value_float", "drop", "ci_low", "ci_high", "metric", "mean_wbit", "bops"))
    write_point(tmp_path / "s", "mse", 4, 4, plain=True, status="failed", error="no data", **nothing)
    data = data_of(write_dashboard(tmp_path / "s"))
    assert (len(data["rows"]), data["cells"]) == (1, [])


def test_command_line(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(study)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-2:] == [str(study / "results.csv"), str(study / "dashboard.html")]
    assert any(line.startswith("float ") for line in out)
    page = tmp_path / "page.html"
    assert main([str(study), "--out", str(page), "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(study / "results.csv"), str(page)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/none"], "no such folder"),
        (["{tmp}"], "no point with a readable metrics.json"),
        (["{tmp}", "--out", "{tmp}/none/x.html"], "does not exist"),
        (["{tmp}", "--out", "{tmp}"], "is a folder"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not any(tmp_path.iterdir()), "a refusal leaves nothing behind"


def test_a_folder_without_points_among_others_stays_as_it_is(study: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(study), str(tmp_path / "empty"), "--out", str(tmp_path / "page.html"), "--quiet"]) == 0
    assert not any((tmp_path / "empty").iterdir()) and (study / "results.csv").is_file()


def test_no_study_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QexpError, match="no point"):
        write_dashboard(tmp_path)


def test_the_report_does_not_load_the_model_side() -> None:
    code = "import sys, qexp.report.__main__; print({'torch', 'pytorch_lightning', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    code = "import sys, qexp.results.table_csv, qexp.results.confidence; print('bokeh' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
