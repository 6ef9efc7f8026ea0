"""What a search leaves for people: the plan it found, where it lies, how to go on; and a warning where floats only guess."""

from __future__ import annotations

import pandas as pd
import pytest

from qexp.recipe.plan import Entry, Plan, Source
from qexp.report.study import finish
from qexp.run import outcome


def plan(bits: dict[tuple[str, str], int]) -> Plan:
    return Plan(tuple(Entry(*key, {"_target_": "x"}, b, Source.SEARCH, "search") for key, b in bits.items()))


def test_the_plan_is_told_in_one_line():
    before = {("a", "weight"): 3, ("a", "input"): 3, ("b", "weight"): 3}
    assert "none was changed" in outcome.found_by_search(plan(before), plan(before))
    words = outcome.found_by_search(plan(before), plan(before | {("b", "weight"): 6}))
    assert words == "search: 1 of 3 widths changed; weight bits a 3, b 6; input bits a 3"


def test_a_search_says_what_it_found_where_and_how_to_go_on(run, caplog, tmp_path, capsys):
    with caplog.at_level("INFO", logger="qexp"):
        found = run(
            "quant=minmax",
            "bits=w3a4",
            "search=allocate",
            "search.images=64",
            "search.budget={mean_wbit: 4, mean_abit: 4}",
        )
    folder = tmp_path / "runs" / found["study"] / found["point"]
    assert "widths changed; " in caplog.text
    assert (
        f"the plan: {folder / 'layers.csv'}; the same command with quant=lsq plan={folder / 'layers.csv'} trains it"
        in caplog.text
    )
    assert found["seconds_search"] > 0
    table = pd.read_csv(folder / "layers.csv")
    assert (table["rule"] == "search.allocate").any()
    finish(folder.parent, {found["point"]})
    shown = capsys.readouterr().out
    assert f"W~{found['mean_wbit']:.2g}" in shown and f"point  {folder}" in shown


def test_the_widths_of_a_sensitivity_run_stay_as_asked(run, capsys, tmp_path):
    found = run("quant=minmax", "bits=w3a4", "search=sensitivity", "search.images=64")
    finish(tmp_path / "runs" / found["study"])
    assert "W3A4" in capsys.readouterr().out


@pytest.mark.parametrize(("weights", "guesses"), [("random", True), (None, False)])
def test_a_float_network_that_guesses_is_warned_of(run, caplog, weights, guesses):
    run("quant=minmax", *([f"weights={weights}"] if weights else []))
    assert ("guessing among 10 classes" in caplog.text) is guesses
