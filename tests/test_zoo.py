"""The zoo of this repository: what is in it, and that each entry still gives what its card says."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from qexp.command.choices import check_choices
from qexp.command.root import register
from qexp.results import zoo
from qexp.run.zoo_check import check

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "zoo"
NAMES = zoo.names(ZOO)
CARDS = {name: json.loads((ZOO / name / zoo.CARD).read_text()) for name in NAMES}
QUICK = [name for name in NAMES if CARDS[name]["dataset"] == "digits"]
SECONDS = 60


def marked(name: str):
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in NAMES])
def test_an_entry_holds_on_a_sample(name):
    report = check(name, folder=ZOO)
    assert report.holds, report.text()


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICK])
def test_an_entry_holds_on_all_test_images(name):
    report = check(name, whole=True, folder=ZOO)
    assert report.holds, report.text()
    said = {what: holds for what, holds, _ in report.rows}
    assert said["simulation"], "the images are not at hand"


def test_it_covers_the_widths_and_tasks():
    assert len(NAMES) >= 16
    widths = {(card["layer_wbit"], card["layer_abit"]) for card in CARDS.values()}
    assert {(8, 8), (4, 8), (4, 4), (3, 3), (2, 2), (1, 2), (1, 1)} <= widths
    assert {card["score"]["metric"] for card in CARDS.values()} >= {"top1", "map_voc07", "lfw_accuracy"}


def test_it_stays_small_and_lists_every_file():
    files = [p for p in ZOO.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 15e6
    listed = zoo.sums(ZOO)
    assert sorted(listed) == sorted(p.relative_to(ZOO).as_posix() for p in files if p.name != zoo.SUMS)
    assert all(zoo.sha256(ZOO / name) == said for name, said in listed.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_card_can_be_repeated(name):
    """Its command is one that the program takes, and it names no place of a machine."""
    card = CARDS[name]
    text = (ZOO / name / zoo.CARD).read_text() + (ZOO / name / zoo.CONFIG).read_text()
    assert not any(place in text for place in ("/root", "/home", "/tmp", "/work"))
    assert card["score"]["n"] and card["commit"] and card["bytes"] and "quantized_macs" in card
    assert card["published"] is None or {"value", "source"} <= card["published"].keys()
    register()
    words = shlex.split(card["command"])[2:]
    check_choices(words, ROOT / "conf")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        compose("config", overrides=[word for word in words if "=" in word])


def test_the_page_lists_every_entry_beside_what_is_published():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_zoo", ROOT / "docs" / "zoo.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    text = page.page(list(CARDS.values()))
    for name, card in CARDS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert row.count("|") == 10 and f"{card['score']['value']:.2f}" in row
        assert card["published"] is None or card["published"]["source"] in row
