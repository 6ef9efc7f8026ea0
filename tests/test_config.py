"""Every configuration file composes, everything it names exists and takes the arguments given; who beats whom."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from qexp.command.keys import check_key
from qexp.errors import QexpError
from qexp.quantizers.base import Quantizer
from qexp.run.settings import read
from qexp.run.settings.trainer import OWN

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
GROUPS = (
    "model",
    "dataset",
    "quant",
    "bits",
    "schedule",
    "trainer",
    "experiment",
    "debug",
    "callbacks",
    "search",
    "deploy",
    "passes",
)
CHOICES = [
    f"{group}={file.relative_to(CONF / group).with_suffix('')}"
    for group in GROUPS
    for file in sorted((CONF / group).rglob("[!_]*.yaml"))
]

NAMED = {  # choices that name a network on the command line
    "model=timm": ["model.name=resnet18"],
    "model=torchvision": ["model.name=resnet18"],
    "model=import": ["model.target=qexp.models.digits_cnn.DigitsCNN"],
}
NEEDS = {"model=timm": "timm"}  # an extra: its preprocessing is read off the library itself


def targets(node: Any, path: str = "") -> list[tuple[str, dict]]:
    """Returns every mapping with a `_target_`, with the place it stands at."""
    found = []
    if isinstance(node, dict):
        if "_target_" in node:
            found.append((path, node))
        for key, value in node.items():
            found += targets(value, f"{path}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            found += targets(value, f"{path}[{i}]")
    return found


def keys(node: dict, above: str = "") -> list[str]:
    """Returns every key of a configuration, with those above it."""
    found = []
    for key, value in node.items():
        found.append(f"{above}{key}")
        if isinstance(value, dict):
            found += keys(value, f"{above}{key}.")
    return found


def plain(cfg: DictConfig) -> dict:
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_its_keys_are_known_and_its_targets_bind(compose, choice):
    if choice in NEEDS:
        pytest.importorskip(NEEDS[choice])
    config = plain(compose(choice, *NAMED.get(choice, ())))
    OmegaConf.create(config)
    for key in keys(config):
        check_key(key, [CONF])
    for where, node in targets(config):
        # a recipe's quantizers get bits, shape and granularity from the plan
        given = {
            k: v for k, v in node.items() if k not in ("_target_", "_partial_", "_convert_", "_args_", "bits", "share")
        }
        if where == ".trainer":
            given = {key: value for key, value in given.items() if key not in OWN}
        target = get_object(node["_target_"])
        if not callable(target):
            continue  # a family of layers
        made_by_plan = inspect.isclass(target) and issubclass(target, Quantizer)
        if made_by_plan:
            target.require_arguments(given)
        signature = inspect.signature(target)
        signature.bind_partial(*node.get("_args_", []), **given)
        if not node.get("_partial_") and not made_by_plan and where not in (".trainer",):
            missing = [
                p.name
                for p in signature.parameters.values()
                if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given
            ]
            assert len(missing) <= len(node.get("_args_", [])) or where.endswith(".compute"), f"{where} lacks {missing}"


def test_the_bits_preset_beats_the_default_and_the_command_line_the_preset(compose):
    assert compose().layer_wbit == 8
    assert compose("bits=w4a4").layer_wbit == compose("bits=w4a4").layer_abit == 4
    assert compose("bits=w4a4", "layer_wbit=3").layer_wbit == 3
    assert compose("layer_wbit=3", "bits=w4a4").layer_wbit == 3, "for every order on the command line"


def test_the_experiment_beats_the_groups_and_the_command_line_the_experiment(compose):
    config = compose("experiment=demo")
    assert config.study == "demo"
    assert compose("experiment=demo", "study=mine").study == "mine"
    assert compose("debug=fast").max_samples == 64 and compose("debug=fast", "max_samples=8").max_samples == 8
    assert compose("debug=fast").schedule.max_steps == 2


def test_a_schedule_brings_its_batch_norm_policy_and_keeps_how_float_is_trained(compose):
    assert compose("schedule=ptq").bn == "fold" and compose("schedule=qat").bn == "keep"
    assert compose("schedule=qat", "bn=freeze").bn == "freeze"
    config = compose("schedule=qat", "schedule.epochs=2")
    assert config.schedule.epochs == 2 and config.schedule.pretrain.epochs == config.dataset.epochs.float


def test_passes_are_chosen_by_name_in_the_order_written(compose):
    assert not compose().passes
    assert list(compose("passes=equalize").passes) == ["equalize"]
    config = compose("passes=[bias_correction,equalize]", "passes.equalize.relu6=clip")
    assert list(config.passes) == ["bias_correction", "equalize"] and config.passes.equalize.relu6 == "clip"
    both = read(
        compose("quant=ladder/aciq/bias", "passes=[equalize,weight_correction]", "passes.weight_correction.form=paper")
    ).all_passes
    assert list(both) == ["weight_correction", "equalize"], "the recipe's first; a name in both keeps its place"
    assert both["weight_correction"]["form"] == "paper"
    off = compose("quant=ladder/aciq/bias", "quant.passes.weight_correction=null", "passes=equalize")
    assert list(read(off).all_passes) == ["equalize"]


def test_ends_bit_reaches_the_rule(compose):
    for value in (8, 6, None):
        config = plain(compose(f"ends_bit={'null' if value is None else value}"))
        assert config["quant"]["rules"]["ends"]["weight"]["bits"] == value


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("layer_abit=[32,8,8,...]", "layer_abit", [32, 8, 8, "..."]),
        ("layer_abit=[32,8,...]", "layer_abit", [32, 8, "..."]),
        ("layer_wbit={layer1.*: 4}", "layer_wbit", {"layer1.*": 4}),
        ("layer_wbit={layer1.*: 4, *.conv2: 2}", "layer_wbit", {"layer1.*": 4, "*.conv2": 2}),
        ("layer_wbit={blocks.?.conv: 4,fc: 32}", "layer_wbit", {"blocks.?.conv": 4, "fc": 32}),
        ("quant.rules.ends.weight.bits=6", "quant.rules.ends.weight.bits", 6),
        ("layer_wbit=null", "layer_wbit", None),
    ],
)
def test_spellings_of_the_command_line(compose, override, key, expected):
    found = OmegaConf.select(compose(override), key)
    assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == expected


def test_a_rule_is_added_with_a_plus(compose):
    config = plain(compose("+quant.rules.stem={layers: conv1, weight: {bits: 6}}"))
    assert config["quant"]["rules"]["stem"] == {"layers": "conv1", "weight": {"bits": 6}}
    assert list(config["quant"]["rules"]) == ["ends", "stem"], "a later rule wins"
    config = plain(compose("+quant.rules.stem.layers='layer1.*'", "+quant.rules.stem.weight=null"))
    assert config["quant"]["rules"]["stem"] == {"layers": "layer1.*", "weight": None}


def test_a_mapping_replaces_the_number_and_merges_with_a_presets(compose, tmp_path):
    assert OmegaConf.is_dict(compose("bits=w4a4", "layer_wbit={fc: 6}").layer_wbit)


def test_a_list_of_values_sweeps_and_a_list_in_brackets_does_not():
    parse = OverridesParser.create().parse_override
    assert parse("layer_wbit=2,4").is_sweep_override()
    assert not parse("layer_wbit=[2,4]").is_sweep_override()
    assert not parse("layer_wbit={a: 4, b: 2}").is_sweep_override()


def test_unknown_keys_and_wrong_types_are_refused(compose):
    with pytest.raises(ConfigCompositionException, match="Could not override 'sed'"):
        compose("sed=3")
    for wrong in ("seed=three", "max_samples=many", "force=perhaps"):
        with pytest.raises(QexpError, match=f"{wrong} is not allowed"):
            read(compose(wrong))
    with pytest.raises(Exception, match="Could not find 'quant/minmx'"):
        compose("quant=minmx")


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_help_answers_without_loading_torch(arguments):
    """What costs seconds to import is not imported; measured as modules, for seconds depend on the machine."""
    code = (
        "import sys, runpy, atexit\n"
        "atexit.register(lambda: print('LOADED', [m for m in ('torch', 'pytorch_lightning', 'torchvision', 'bokeh', 'pandas')"
        " if m in sys.modules]))\n"
        f"sys.argv = ['run.py', *{arguments!r}]\n"
        "runpy.run_path('run.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout, done.stdout[-300:]
    assert ("qexp:" in done.stdout) if arguments == ["--help"] else ("layer_wbit: 8" in done.stdout)
