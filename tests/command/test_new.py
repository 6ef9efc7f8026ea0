"""What `qexp new` writes runs as it is, where the user stands and in a clone, and keeps the contracts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qexp.command import new
from qexp.errors import QexpError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A folder of the user's, whose modules Python finds, as the program makes it find them."""
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("quantizer", ["quant=kind_quantizer", "layer_wbit=4"]),
        ("range", ["quant=kind_range", "layer_abit=4"]),
        ("model", ["model=kind_model", "debug=fast", "weights=null"]),
        ("dataset", ["dataset=kind_dataset", "debug=fast", "weights=null", "model.net.num_classes=2"]),
    ],
)
def test_what_is_written_elsewhere_runs_as_it_is(kind, overrides, elsewhere, run):
    source, choice = new.write(kind, f"kind_{kind}")
    assert source.parent == elsewhere and choice.is_relative_to(elsewhere / "conf")
    if kind == "model":  # the fixture narrows another network
        overrides = [*overrides, "model.net.width=8"]
    result = run(*overrides)
    assert result["status"] == "ok", result
    assert f"kind_{kind}" in {result["quant"], result["model"], result["dataset"]}


def test_a_written_quantizer_and_its_example_agree(elsewhere):
    import doctest
    import importlib

    for kind in new.KINDS:
        new.write(kind, f"shown_{kind}")
    for kind in new.KINDS:
        assert doctest.testmod(importlib.import_module(f"shown_{kind}")).failed == 0


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("quantizer", "My-Method", "use small letters, digits and _"),
        ("quantizer", "class", "use small letters, digits and _"),
        ("model", "../net", "use small letters, digits and _"),
        ("quantizer", "lsq", "quant=lsq is a choice already"),
        ("dataset", "json", "Python has a module of this name"),
    ],
)
def test_names_that_cannot_be_are_refused_and_nothing_is_written(kind, name, said, elsewhere):
    with pytest.raises(QexpError, match=said):
        new.write(kind, name)
    assert list(elsewhere.iterdir()) == []


def test_a_file_is_never_written_over(elsewhere):
    (elsewhere / "mine_too.py").write_text("x = 1\n")
    with pytest.raises(QexpError, match="is taken"):
        new.write("model", "mine_too")
    assert (elsewhere / "mine_too.py").read_text() == "x = 1\n"
    new.write("model", "mine_three")
    with pytest.raises(QexpError, match="is a choice already"):
        new.write("model", "mine_three")


def test_the_folder_of_another_program_does_not_join(elsewhere):
    from qexp.command.folders import CONF, beside, config_folders

    new.write("model", "joins")
    assert beside() == [elsewhere / "conf"]
    assert config_folders(["--config-dir", "conf"]) == [CONF, elsewhere / "conf"], "named too, it counts once"
    (elsewhere / "conf" / "config.yaml").write_text("defaults: []\n")
    assert beside() == []


@pytest.mark.slow
def test_what_is_written_in_a_clone_passes_the_contract_tests(tmp_path):
    clone = tmp_path / "clone"
    for folder in ("qexp", "conf", "tests", "docs"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("run.py", "pyproject.toml"):
        shutil.copy(ROOT / file, clone)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(clone), os.environ.get("PYTHONPATH", "")])}
    for kind in new.KINDS:
        words = [sys.executable, "run.py", "new", kind, f"fresh_{kind}"]
        done = subprocess.run(words, cwd=clone, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and (clone / "conf" / new.KINDS[kind].group / f"fresh_{kind}.yaml").exists(), done
        assert f"-k 'fresh_{kind} or Fresh{kind.capitalize()}'" in done.stdout
    parts = sorted({kind.tests for kind in new.KINDS.values()})
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parts, "-k", "fresh_ or Fresh"]
    done = subprocess.run(words, cwd=clone, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]
    assert (
        "fresh_quantizer-weight"
        in subprocess.run(
            [*words, "--collect-only"], cwd=clone, env=env, capture_output=True, text=True, timeout=300
        ).stdout
    )
    assert "failed" not in done.stdout and int(done.stdout.split(" passed")[0].split()[-1]) > 40
