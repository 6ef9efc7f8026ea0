"""The closing table: float first, aligned, inside 100 columns."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from qexp.results.closing_table import closing_table
from qexp.results.run_folder_read import worst_layer
from qexp.results.table_csv import collect
from qexp.results.wording import bits, number, seconds


def lines_of(folder: Path) -> list[str]:
    """Returns the lines of the study's table."""
    return closing_table(collect(folder)).splitlines()


def test_float_comes_first_and_is_named(study: Path) -> None:
    lines = lines_of(study)
    assert lines[0] == "resnet20 on cifar10"
    assert lines[1].split() == ["method", "bits", "top-1", "%", "95", "%", "interval", "drop", "time"]
    assert lines[3].split() == ["float", "W32A32", "91.73", "-"], "no interval is made up of a number of images"


def test_lines_are_aligned_and_fit(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    for method in ("mse", "a_method_with_a_name_nobody_would_want_to_type_twice"):
        write_point(tmp_path / "s", method, 4, 4, plain=True)
    error = "first line\nsecond line " + "x" * 300
    write_point(tmp_path / "s", "lsq", 2, 2, plain=True, status="failed", error=error, value=None)
    lines = lines_of(tmp_path / "s")
    assert max(map(len, lines)) <= 100
    assert len({line.index(".") for line in lines[3:6]}) == 1
    assert lines[-2] == "1 of 3 points failed:"
    assert "first line second line" in lines[-1]


def test_seeds_share_a_line(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    for seed, value in enumerate((90.0, 91.0, 92.0)):
        write_point(tmp_path / "s", "lsq", 4, 4, seed, plain=True, value=value)
    lines = lines_of(tmp_path / "s")
    assert len(lines) == 5
    assert "91.00 ± 1.00" in lines[4]


def test_each_network_has_its_float(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    write_point(tmp_path / "s", "mse", 4, 4, plain=True)
    write_point(tmp_path / "s", "aciq", 4, 4, plain=True, model="toynet", dataset="digits", value_float=99.0)
    lines = lines_of(tmp_path / "s")
    assert sum(line.startswith("float ") for line in lines) == 2
    assert {"resnet20 on cifar10", "toynet on digits"} <= set(lines)


def test_what_differs_beside_the_method_is_shown(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    for ends in (8, 4):
        write_point(tmp_path / "s", "mse", 4, 4, plain=True, ends_bit=ends, point=f"p{ends}")
    assert {line.split("  ")[0] for line in lines_of(tmp_path / "s")[4:]} == {"mse ends_bit=4", "mse ends_bit=8"}


def test_plans_have_lines_of_their_own(tmp_path: Path, write_point: Callable[..., Path]) -> None:
    write_point(tmp_path / "s", "mse", 8, 8, plain=True)
    for name in ("x.csv@3fa2b1", "y.csv@77aa00"):
        asked = {"layer_wbit": "plan", "layer_abit": "plan", "mean_wbit": 4.21, "plan": name, "point": name[:1]}
        write_point(tmp_path / "s", "mse", 4, 8, plain=True, **asked)
    text = [line.split()[:3] for line in lines_of(tmp_path / "s")[4:]]
    assert text[0][:2] == ["mse", "W8A8"]
    assert text[1:] == [["mse", "plan=x.csv@3fa2b1", "W~4.2A~8"], ["mse", "plan=y.csv@77aa00", "W~4.2A~8"]]


def test_long_sweeps_show_the_best(study: Path) -> None:
    lines = closing_table(collect(study), limit=3).splitlines()
    assert "the best 3 of 27; all are in results.csv" in lines
    assert sum("W" in line and "%" not in line for line in lines[4:7]) == 3


def test_worst_layers_have_a_column(study: Path) -> None:
    df = collect(study)
    worst = {point: worst_layer(study / point) for point in df["point"]}
    lines = closing_table(df, lambda point: worst.get(point, "")).splitlines()
    layers = pd.read_csv(study / "mse-w4a4-s0" / "layers.csv")
    low = layers.loc[layers["sqnr"].idxmin()]
    assert worst["mse-w4a4-s0"] == f"{low['layer']} {low['sqnr']:.1f} dB"
    assert "worst layer" in lines[1]
    assert any(worst["mse-w4a4-s0"] in line for line in lines)
    assert max(map(len, lines)) <= 100
    assert all(line.endswith((" s", "in", " h")) for line in lines[4:10])
    named = closing_table(
        df.assign(quant="a_method_with_a_name_nobody_would_want_to_type_twice"), lambda point: worst.get(point, "")
    )
    assert "worst layer" not in named
    assert "to_type_twice" in named


def test_nothing_yet() -> None:
    assert closing_table(pd.DataFrame()) == "no results yet"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0421, "0.042 s"), (12.4, "12 s"), (185, "3 min 05 s"), (8040, "2 h 14 min"), (None, "-")]
)
def test_durations(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("spec", "mean", "text"),
    [
        (4, 4.1, "4"),
        ("8", 8, "8"),
        ("[8, 4]", 5.27, "~5.3"),
        ("plan", 30.46, "~30.5"),
        (None, None, "?"),
        ("[8]", None, "mixed"),
    ],
)
def test_widths(spec: object, mean: float, text: str) -> None:
    assert bits(spec, mean) == text


@pytest.mark.parametrize(("value", "text"), [(0.000123456, "0.000123"), (12345.6, "12346"), (0, "0"), ("x", "-")])
def test_numbers(value: object, text: str) -> None:
    assert number(value) == text


def test_the_run_that_prints_the_table_is_marked_and_never_cut_off(
    tmp_path: Path, write_point: Callable[..., Path]
) -> None:
    for method in ("mse", "lsq", "minmax"):
        write_point(tmp_path / "s", method, 4, 4, plain=True)
    text = closing_table(collect(tmp_path / "s"), limit=1, marked={"minmax-w4a4-s0"})
    lines = [line for line in text.splitlines() if "W4A4" in line and "%" not in line]
    assert [line.startswith("> minmax") for line in lines] == [False, True] and lines[0].startswith("lsq")
