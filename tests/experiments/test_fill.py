"""Tables of pages are what their commands print; the first page's table is that of the studies as they stand."""

import re
from pathlib import Path

import pytest

from experiments import index
from experiments.fill import BLOCK, filled
from experiments.front import ROWS, Row, best, recorded, table

ROOT = Path(__file__).parents[2]
STUDY = """# A study

| method | W4A4 |
|---|---|
| mse | 10.00 ± 1.00 |

float 50.00

## Another network, float 90.00

| method | W8A8 | W4A4 |
|---|---|---|
| minmax | 89.00 ± 0.50 | failed: no images |
| mse | 88.00 ± 0.50 | 80.10 ± 0.60 |
| kl |  | 80.90 ± 0.60 |
"""


def test_the_first_page_shows_the_studies_figures():
    block = BLOCK.search((ROOT / "README.md").read_text())[0]
    assert table() in block, "the studies' tables have changed: run python -m experiments.fill README.md"


def test_the_list_of_studies_is_that_of_their_pages():
    page = (ROOT / "experiments" / "README.md").read_text()
    assert index.table() in page, "the studies have changed: run python -m experiments.fill experiments/README.md"


def test_every_verdict_is_counted():
    rows = [
        "| not run: needs time | A |",
        "| 70 → 69 (+1.00) | reproduced (±1) | A |",
        "| 70 → 60 (+10.00) | worse (±1) | A |",
    ]
    head = (
        "| network | method | bits | published: float → quantized (loss) | ours | verdict | source |\n"
        + "|---" * 7
        + "|\n"
    )
    text = head + "".join(f"| net | mse | W4A4 | 70 → 69 (+1.00) {row}\n" for row in rows) + "\n3 rows"
    assert index.verdicts(text) == {"rows": 3, "not run": 1, "reproduced": 1, "better": 0, "worse": 1}


def test_every_row_of_the_first_page_leads_to_its_study():
    assert all((ROOT / "experiments" / row.study / "README.md").is_file() for row in ROWS)


def test_the_best_cell_of_the_named_table_is_taken():
    assert best(STUDY, Row("net", "", "s", "W4A4")) == ("mse", "10.00 ± 1.00", "50.00")
    assert best(STUDY, Row("net", "", "s", "W4A4", under="## Another")) == ("kl", "80.90 ± 0.60", "90.00")
    assert best(STUDY, Row("net", "", "s", "W8A8", under="## Another")) == ("minmax", "89.00 ± 0.50", "90.00")
    for missing in (Row("net", "", "s", "W2A2"), Row("net", "", "s", "W4A4", under="## A third")):
        with pytest.raises(ValueError, match="no table with a column"):
            best(STUDY, missing)


def test_a_page_is_filled_by_its_own_commands():
    page = "before\n<!-- python -m experiments.front -->\nold\n<!-- end -->\nafter\n"
    new = filled(page)
    assert (
        new == f"before\n<!-- python -m experiments.front -->\n{table()}\n<!-- end -->\nafter\n" and filled(new) == new
    )
    with pytest.raises(RuntimeError, match="nowhere"):
        filled("<!-- python -m experiments.collect runs/nowhere -->\n<!-- end -->")


@pytest.mark.parametrize("page", sorted(ROOT.glob("experiments/*/README.md")), ids=lambda p: p.parent.name)
def test_every_marked_table_is_closed_and_not_empty(page):
    text = page.read_text()
    blocks = BLOCK.findall(text)
    assert len(blocks) == text.count("<!-- python -m"), "a mark without its <!-- end -->"
    assert all(re.search(r"^\|", block[0], re.M) for block in BLOCK.finditer(text)), "a table that was never filled"


def test_a_long_training_is_taken_from_its_row():
    page = "| run | epochs | held out | test | float | goal | published | hours |\n" + "|---" * 8 + "|\n"
    page += "| net lsq W4A4 | 20 | 93.3, 97.9 | 91.78 ± 0.54 | 91.75 | 91.73 | 92.3 (a paper) | 0.8 |\n"
    assert recorded(page, "W4A4") == ("lsq", "20", "91.78 ± 0.54", "91.75")
    with pytest.raises(ValueError, match="no training to W3A3"):
        recorded(page, "W3A3")
