"""A pass has one name: of its file, its class, its choice on the command line, and its key in a recipe and a table."""

import re
from pathlib import Path

import pytest
import yaml

from qexp.system.objects import make

CONF = Path(__file__).parents[2] / "conf"


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@pytest.mark.parametrize("path", sorted((CONF / "passes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_pass_is_called_alike_everywhere(path):
    ((key, spec),) = yaml.safe_load(path.read_text()).items()
    *_, file, name = spec["_target_"].split(".")
    assert key == file == path.stem == snake(name)
    assert type(make(spec)).__name__ == name


def test_recipes_call_corrections_as_the_command_line_does():
    found = {
        (key, spec["_target_"].split(".")[-2])
        for path in (CONF / "quant").rglob("*.yaml")
        for key, spec in (yaml.safe_load(path.read_text()).get("passes") or {}).items()
        if spec and "correction" in spec.get("_target_", "")
    }
    assert found == {("weight_correction", "weight_correction")}


def test_the_table_tells_corrections_of_biases_and_of_weights_apart(run):
    made = run("quant=minmax", "bits=w4a8", "passes=[weight_correction,bias_correction]")
    assert made["quant"] == "minmax + weight_correction + bias_correction", made
