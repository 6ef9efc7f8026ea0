"""What the documentation tells people to type is what the program takes."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from qexp.command.choices import check_choices, rules_added
from qexp.command.folders import CONF
from qexp.command.listing import offered
from qexp.command.root import register
from qexp.numerics.grid import UniformGrid
from qexp.ranges import Context
from qexp.recipe.head import when
from qexp.statistics.stats import TensorStats

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "pages").rglob("*.md")),
    *sorted(ROOT.glob("experiments/*/README.md")),
]


def commands() -> list[tuple[str, str]]:
    """Every line that calls `run.py`, with the page it stands on."""
    found = []
    for page in PAGES:
        for line in page.read_text().splitlines():
            match = re.match(r"\s*(?:\$ )?python run\.py (.*)", line)
            if (
                match
                and "--help" not in line
                and "--cfg" not in line
                and "..." not in match[1].split("#")[0].replace("...]", "")
            ):
                found.append((page.relative_to(ROOT).as_posix(), match[1].split("   #")[0].strip()))
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_composes(page, command):
    register()
    typed = rules_added(shlex.split(command))
    check_choices(typed, ROOT / "conf")
    words = [word for word in typed if "=" in word and not word.startswith("hydra")]  # launchers are plugins
    overrides = []
    for word, override in zip(words, OverridesParser.create().parse_overrides(words)):
        key = word.split("=", 1)[0]
        overrides.append(f"{key}={next(override.sweep_string_iterator())}" if override.is_sweep_override() else word)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        hydra_compose("config", overrides=overrides)


def test_every_method_says_when_to_use_it():
    silent = [name for name in offered([CONF], "quant") if not when(CONF / "quant" / f"{name}.yaml")]
    assert not silent, "a line `# When: ...` in the head of each"


def test_advice_that_names_a_study_finds_the_method_measured_there():
    """Brackets at the end hold studies, or a source where nothing was measured."""
    files = [CONF / "quant" / f"{name}.yaml" for name in offered([CONF], "quant")]
    advice = {yaml.safe_load(file.read_text())["name"]: when(file) for file in files}
    named = [(method, re.search(r"\(([^()]+)\)\.$", text)) for method, text in advice.items()]
    found = [
        (method, study)
        for method, match in named
        if match and not match[1].startswith("source")
        for study in match[1].split(", ")
    ]
    for method, study in found:
        rows = [
            row for row in (ROOT / "experiments" / study / "README.md").read_text().splitlines() if row.startswith("|")
        ]
        assert any(re.search(rf"\| *`?{method}\b", row, re.I) for row in rows), f"{study} has no row of {method}"
    assert len(found) > 10


def test_the_example_of_an_own_rule_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/pages/howto/quantizer.md").read_text(), re.S)[1]
    space: dict = {}
    exec(code, space)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    low, high = space["RootMeanSquare"]()(TensorStats.of(x), UniformGrid(4, signed=True), Context())
    assert float(high) == pytest.approx(min(3 * float(x.square().mean().sqrt()), float(x.max())), rel=1e-3)
    assert float(low) < 0
