"""Every command of the pages for users of other projects does what the page shows: it is composed, and run where the digits are enough."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from qexp.command.choices import check_choices, rules_added
from qexp.command.compose import settings_of
from qexp.command.folders import CONF
from qexp.run import pipeline

PAGES = sorted((Path(__file__).parents[1] / "docs" / "pages" / "coming_from").glob("*.md"))
QUIET = ["debug=fast", "n_calibrate=32", "trainer=cpu", "trainer.enable_progress_bar=false", "kernels=reference"]
# what takes minutes even on few images, or has a test of its own: searches, an export of a finished run
ELSEWHERE = ("search=", "export=", "experiment=")


def commands() -> list[str]:
    """Returns every command on the pages, without repeats."""
    found: dict[str, None] = {}
    for page in PAGES:
        for line in page.read_text().splitlines():
            found |= dict.fromkeys(re.findall(r"`python run\.py ([^`]+)`", line))
            found |= dict.fromkeys(re.findall(r"^    python run\.py (.+)$", line))
    return list(found)


def words_of(command: str) -> list[str]:
    """Returns a command's overrides; of a sweep, also of one that an experiment holds, the first value of each."""
    words = [word for word in shlex.split(command) if word != "-m"]
    for name in re.findall(r"experiment=(\w+)", command):
        held = (
            yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())
            .get("hydra", {})
            .get("sweeper", {})
            .get("params", {})
        )
        words += [f"{key}={value}" for key, value in held.items()]
    out = []
    for word, override in zip(words, OverridesParser.create().parse_overrides(rules_added(words))):
        out.append(
            f"{word.split('=', 1)[0]}={next(override.sweep_string_iterator())}"
            if override.is_sweep_override()
            else word
        )
    return out


def keys() -> list[str]:
    """Returns every `GROUP=CHOICE` that a page names outside of a command."""
    found: dict[str, None] = {}
    for page in PAGES:
        for code in re.findall(r"`([^`]+)`", page.read_text()):
            if not code.startswith("python") and re.match(
                r"(quant|model|dataset|bits|passes|search|trainer|deploy|optimizer)=[\w/.]+$", code
            ):
                found[code] = None
    return list(found)


def test_the_pages_hold_commands():
    assert len(commands()) > 45 and len(keys()) > 12 and len(PAGES) == 4


@pytest.mark.parametrize("command", commands())
def test_the_command_is_taken(command):
    words = words_of(command)
    check_choices(rules_added(words), CONF)
    settings_of([*words, "debug=fast"])


@pytest.mark.parametrize("key", keys())
def test_the_choice_exists(key):
    check_choices([key], CONF)


ON_DIGITS = [c for c in commands() if not any(word in c for word in (*ELSEWHERE, "model=", "dataset="))]


@pytest.mark.slow
@pytest.mark.parametrize("command", ON_DIGITS)
def test_the_command_runs_on_the_digits(command, digits_weights, tmp_path):
    more = [*QUIET, f"weights={digits_weights}", "model.net.width=8", f"runs_dir={tmp_path}"]
    found = pipeline.run(settings_of([*words_of(command), *more]))
    assert found["status"] == "ok", found["error"]
    assert found["quant"] != "none" and found["value"] is not None


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    "command", [c for c in commands() if "model=" in c and "export=" not in c] + ["experiment=one_bit"]
)
def test_the_command_runs_on_cifar(command, tmp_path):
    found = pipeline.run(settings_of([*words_of(command), *QUIET, f"runs_dir={tmp_path}"]))
    assert found["status"] == "ok", found["error"]
