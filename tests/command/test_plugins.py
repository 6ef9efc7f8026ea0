"""Folders of YAML from outside: of a variable, of the command line, of an installed package; and the check of what they hold."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qexp.command import check_plugin
from qexp.command.choices import check_choices
from qexp.command.compose import settings_of
from qexp.command.contracts import quantizer
from qexp.command.folders import CONF, config_folders
from qexp.command.listing import all_groups
from qexp.data.digits import Digits
from qexp.errors import QexpError
from qexp.quantizers.grid import GridQuantizer

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "plugin"
UNIFORM = {"_target_": "qexp.quantizers.uniform.Uniform", "symmetric": True}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a network and a recipe."""
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "quant").mkdir()
    (tmp_path / "own" / "model" / "mine.yaml").write_text(
        "net: {_target_: qexp.models.digits_cnn.DigitsCNN, width: 4}\ninput_size: [1, 8, 8]\n"
    )
    (tmp_path / "own" / "quant" / "gentle.yaml").write_text("defaults: [minmax, _self_]\nname: gentle\n")
    return tmp_path / "own"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The example, installed by pip into a folder of its own."""
    import shutil

    place = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, place / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    done = subprocess.run(
        [*pip, str(place / "site"), str(place / "source")], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return place / "site"


def typed(words: list[str], folder: Path, site: Path, module: str = "") -> subprocess.CompletedProcess:
    start = ["-m", module] if module else [str(ROOT / "run.py")]
    path = os.pathsep.join([str(ROOT), str(site)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *start, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


def test_an_installed_plugin_is_checked_and_runs(installed, tmp_path):
    done = typed(["shapes"], tmp_path, installed, "qexp.command.check_plugin")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [
        [f"{choice}", "ok"] for choice in ("dataset=shapes", "model=shapes_net", "quant=clipped", "quant=rms")
    ]
    quiet = ["trainer=cpu", "kernels=reference", "trainer.enable_progress_bar=false"]
    done = typed(["model=shapes_net", "quant=clipped", "bits=w6a6", *quiet], tmp_path, installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "shapes_net on shapes" in done.stdout and re.search(r"clipped +W6A6 +9\d", done.stdout), done.stdout
    done = typed(["quant=cliped"], tmp_path, installed)
    assert done.returncode == 1 and "did you mean 'clipped'" in done.stderr


def test_the_example_is_short():
    source = (EXAMPLE / "qexp_shapes" / "__init__.py").read_text()
    tree = ast.parse(source)
    for node in ast.walk(tree):  # docstrings are no code
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0] = ast.Pass()
    lines = [line for line in ast.unparse(tree).splitlines() if line.strip() and line.strip() != "pass"]
    assert len(lines) < 40, len(lines)


def test_a_folder_joins_the_groups_wherever_it_is_named(folder, monkeypatch):
    for words in (["--config-dir", str(folder)], [f"--config-dir={folder}"], [f"hydra.searchpath=[file://{folder}]"]):
        check_choices([*words, "model=mine", "quant=gentle"], CONF)
        with pytest.raises(QexpError, match="did you mean 'gentle'"):
            check_choices([*words, "quant=gentel"], CONF)
    with pytest.raises(QexpError, match="model has no choice 'mine'"):
        check_choices(["model=mine"], CONF)
    monkeypatch.setenv("QEXP_CONFIG_PATH", str(folder))
    check_choices(["model=mine", "quant=gentle"], CONF)
    assert folder in config_folders([]) and "gentle" in all_groups()
    assert settings_of(["model=mine", "quant=gentle"]).network.name == "mine"


def test_a_name_that_would_hide_another_is_refused(folder, monkeypatch):
    (folder / "quant" / "mse.yaml").write_text("name: mine\n")
    monkeypatch.setenv("QEXP_CONFIG_PATH", str(folder))
    with pytest.raises(QexpError, match=r"mse lies in .*only the first would count; rename yours"):
        check_choices(["quant=mse"], CONF)
    check_choices(["quant=minmax"], CONF)


def test_a_folder_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("QEXP_CONFIG_PATH", "/nowhere/conf")
    with pytest.raises(QexpError, match="QEXP_CONFIG_PATH=/nowhere/conf: there is no such folder"):
        check_choices(["quant=mse"], CONF)


@pytest.mark.parametrize(
    "spec", [UNIFORM, {"_target_": "qexp.quantizers.apot.APoTWeight"}, {"_target_": "qexp.quantizers.sawb.SAWB"}]
)
def test_quantizers_that_keep_the_contract_have_no_faults(spec):
    assert list(quantizer.faults(spec, "weight")) == []


class Sound(GridQuantizer):
    """Even levels within the observed values."""

    bits_allowed = (2, 16)

    def __init__(self, bits, shape=(1,), **common):
        super().__init__(bits, shape, **common)
        self.hold_scale()

    @property
    def limits(self):
        return 1 - 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1

    def fit(self, stats, followed_by_relu=False):
        self.put(scale=(stats.min.abs().maximum(stats.max.abs()) / self.limits[1]).clamp_min(1e-30))
        self.mark_ready()


class Creeps(Sound):
    """Even levels whose step grows at each call."""

    def forward(self, x):
        self.scale.mul_(1.01)
        return super().forward(x)


class Early(Sound):
    """Even levels, used before calibration."""

    def prepared(self, x):
        return self.rows(x)


class Floored(Sound):
    """Even levels, rounded down."""

    def rounded(self, rows, axis):
        return torch.floor(rows / self.scale).clamp(*self.limits) * self.scale

    def codes(self, x):
        return torch.floor(x / self.scale).clamp(*self.limits)


class Forgets(Sound):
    """Even levels with a factor that its state lacks; neither idempotent nor monotone nor within half a step."""

    properties = frozenset({"needs_calibration"})
    factor = 1.0

    def fit(self, stats, followed_by_relu=False):
        super().fit(stats)
        self.factor = 2.0

    def level(self, rows):
        return super().level(rows) * self.factor

    def rounded(self, rows, axis):
        return super().rounded(rows, axis) * self.factor


class InPlace(Sound):
    """Even levels that clamp their input in place."""

    def forward(self, x):
        x.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class NotWide(Sound):
    """Even levels, of any number of bits, that are checked by nobody."""

    def __init__(self, bits, shape=(1,), **common):
        super().__init__(4, shape, **common)


class Unsure(Sound):
    """Even levels that declare nothing."""

    properties = frozenset({"needs_calibration", "idempotent", "monotone"})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Creeps, "a second call returns something else"),
        (Early, "can be used before calibration"),
        (Floored, "more than half a step"),
        (Forgets, "loaded from its state_dict it returns something else"),
        (InPlace, "changes its input in place"),
        (NotWide, "takes bits=0"),
        (Unsure, "does not promise half_step, and its docstring does not say why"),
    ],
)
def test_a_quantizer_that_breaks_the_contract_is_found(kind, words):
    found = list(quantizer.faults({"_target_": kind}, "weight"))
    assert any(re.search(words, fault) for fault in found), found


def test_a_quantizer_without_faults_has_none():
    assert list(quantizer.faults({"_target_": Sound}, "input")) == []


class Leaks(Digits):
    """Digits whose test part is the calibration part."""

    def test_dataloader(self):
        return self.val_dataloader()


def narrow(num_classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 8), torch.nn.Flatten())


def test_each_choice_of_a_folder_is_tried_and_its_faults_are_printed(folder, monkeypatch, capsys):
    monkeypatch.setenv("QEXP_CONFIG_PATH", str(folder))
    assert check_plugin.main([str(folder)]) == 0
    assert capsys.readouterr().out.split() == ["model=mine", "ok", "quant=gentle", "ok"]
    (folder / "model" / "short.yaml").write_text(
        f"net: {{_target_: {__name__}.narrow, num_classes: 10}}\ninput_size: [1, 8, 8]\n"
    )
    (folder / "model" / "lost.yaml").write_text("net: {_target_: nowhere.Net}\n")
    (folder / "quant" / "broken.yaml").write_text(
        f"defaults: [minmax, _self_]\nname: broken\nweight: {{_target_: {__name__}.Creeps, granularity: tensor}}\n"
    )
    (folder / "dataset").mkdir()
    text = (CONF / "dataset" / "digits.yaml").read_text().replace("qexp.data.digits.Digits", f"{__name__}.Leaks")
    (folder / "dataset" / "leaky.yaml").write_text(text)
    assert check_plugin.main([str(folder)]) == 1
    found = capsys.readouterr().out
    assert "returns [4, 2] for 4 images [1, 8, 8]; [4, 10] is needed" in found
    assert "there is no module 'nowhere'" in found
    assert "images are in the calibration part and in the test part" in found
    assert found.count("FAILED") == 4 and found.count(" ok") == 2, found


@pytest.mark.parametrize(
    ("word", "status", "words"), [("nothing_here", 2, "there is no such folder"), ("--help", 0, "usage:")]
)
def test_what_is_no_plugin_is_answered(word, status, words, capsys):
    assert check_plugin.main([word]) == status
    printed = capsys.readouterr()
    assert words in (printed.out if status == 0 else printed.err)


def test_a_folder_without_groups_is_answered(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QEXP_CONFIG_PATH", str(tmp_path))
    assert check_plugin.main([str(tmp_path)]) == 2
    assert "no choices in it" in capsys.readouterr().err


def test_help_explains_every_key_at_the_root():
    from dataclasses import fields

    from qexp.command.listing import explained
    from qexp.command.root import Root

    groups = {group.name for group in CONF.iterdir() if group.is_dir()}
    text = explained()
    missing = [f.name for f in fields(Root) if f.name not in groups and not re.search(rf"^  {f.name} +\S", text, re.M)]
    assert not missing
