"""Tries to fool the names: code that changes and names that stay, in a project of a user's own outside the clone."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from qexp.calibration.cache import content_hash
from qexp.results import identity
from qexp.run import contents, float_network, pipeline
from qexp.run.datasets import load_data
from qexp.run.naming import point_hash
from qexp.run.settings import read
from qexp.system.objects import make

FILES = {
    "__init__.py": "",
    "parts.py": "import torch\n\n\ndef act(x):\n    return torch.relu(x)\n",
    "net.py": """
from torch import nn
from . import parts

class Net(nn.Module):
    '''A user's network.'''
    def __init__(self, num_classes=10):
        super().__init__()
        self.c1, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * 16, num_classes)
        self.gap = nn.AdaptiveAvgPool2d(4)
    def forward(self, x):
        return self.fc(self.gap(parts.act(self.c1(x))).flatten(1))
""",
    "quantizer.py": "from qexp.quantizers.uniform import Uniform\n\nclass Mine(Uniform):\n    margin = 1.0\n",
    "ranges.py": "from qexp.ranges import MinMax\n\nclass Tight(MinMax):\n    share = 1.0\n",
    "callback.py": "from pytorch_lightning import Callback\n\nclass Stop(Callback):\n    after = 1\n",
    "watching.py": "from pytorch_lightning import Callback\n\nclass Watch(Callback):\n    observes = True\n",
    "data.py": "from qexp.data.digits import Digits\n\nclass Mine(Digits):\n    gain = 1.0\n",
    "edit.py": "from qexp.passes.base import Pass\n\nclass Nothing(Pass):\n    amount = 0\n",
    "task.py": "from qexp.tasks.classification import Classification\n\nclass Mine(Classification):\n    weight = 1\n",
    "schedule.py": "from torch.optim import SGD\n\nclass Mine(SGD):\n    speed = 1\n",
    "teacher.py": "import lazily_found\nfrom .net import Net\n\nclass Teacher(Net):\n    pass\n",
    "unused.py": "x = 1\n",
}
OVERRIDES = [
    "trainer=cpu",
    "trainer.enable_progress_bar=false",
    "kernels=reference",
    "model.net._target_=mine.net.Net",
    "~model.net.width",
    "model.groups=null",
    "model.first=null",
    "model.last=null",
]
ALL = {"point", "float", "score", "statistics"}


def write(folder: Path, files: dict[str, str]) -> None:
    (folder / "mine").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / "mine" / name).write_text(text)


def forget() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in ("mine", "lazily_found", "plugged")]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's path with a package `mine`; what is edited there is found as by a new process."""
    write(tmp_path, FILES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def names(compose: Callable, project: Path) -> Callable[..., dict[str, str]]:
    """Call with overrides; returns the four names as a new process would find them."""

    def found(*overrides: str) -> dict[str, str]:
        forget()
        settings = read(compose(*OVERRIDES, *overrides))
        data = load_data(settings.data.module)
        torch.manual_seed(0)
        model = make(settings.network.net)
        return {
            "point": point_hash(settings, contents.contents(settings)),
            "float": float_network._float_hash(settings, data),
            "score": float_network._score_hash(settings, model, data),
            "statistics": content_hash(model, [data.example()], False),
        }

    return found


def edit(project: Path, file: str) -> None:
    path = project / "mine" / file
    path.write_text(
        path.read_text()
        .replace("relu(x)", "tanh(x)")
        .replace(" = 1", " = 2")
        .replace("padding=1", "padding=1, bias=True")
        .replace("amount = 0", "amount = 1")
    )


OWN = {
    "net.py": ("", ALL),
    "parts.py": ("", ALL),
    "quantizer.py": ("quant.weight._target_=mine.quantizer.Mine", {"point"}),
    "ranges.py": ("quant.input.range._target_=mine.ranges.Tight", {"point"}),
    "callback.py": ("+callbacks.stop={_target_: mine.callback.Stop}", {"point", "score"}),
    "data.py": ("dataset.data._target_=mine.data.Mine", {"point", "float", "score"}),
    "edit.py": ("+passes.own={_target_: mine.edit.Nothing}", {"point"}),
    "task.py": ("+dataset.task={_target_: mine.task.Mine, num_classes: 10}", {"point", "float", "score"}),
    "schedule.py": ("schedule.pretrain.optimizer._target_=mine.schedule.Mine", {"point", "float"}),
}


@pytest.mark.parametrize("file", OWN)
def test_what_an_edited_file_computes_is_renamed_and_nothing_else(project, names, file):
    override, renamed = OWN[file]
    asked = [override] if override else []
    before = names(*asked)
    edit(project, file)
    after = names(*asked)
    assert {name for name in ALL if before[name] != after[name]} == renamed


def test_a_callback_belongs_to_the_float_training_that_was_asked_for(project, names):
    own = ("schedule=float", "+callbacks.stop={_target_: mine.callback.Stop}")
    plain, before = names("schedule=float"), names(*own)
    edit(project, "callback.py")
    assert len({plain["float"], before["float"], names(*own)["float"]}) == 3
    assert len({plain["point"], before["point"], names(*own)["point"]}) == 3
    assert names()["float"] == names("+callbacks.stop={_target_: mine.callback.Stop}")["float"], (
        "a hidden one leaves it out"
    )


def test_a_callback_that_only_looks_on_stays_out_of_names(project, names):
    assert names("+callbacks.watch={_target_: mine.watching.Watch}") == names() == names("callbacks.history.points=3")


@pytest.mark.parametrize("file", ["unused.py", "quantizer.py", "callback.py", "notes.txt"])
def test_an_unrelated_edit_renames_nothing(project, names, file):
    before = names()
    (project / "mine" / file).write_text("x = 3\n")
    assert names() == before


def test_comments_docstrings_and_layout_rename_nothing(project, names):
    before, path = names(), project / "mine" / "net.py"
    path.write_text(
        path.read_text()
        .replace("A user's network.", "Mine.")
        .replace("\n    def forward", "\n    # as ever\n\n    def forward")
    )
    assert names() == before


@pytest.mark.parametrize(
    "line",
    [
        "from mine.parts import act",
        "import mine.parts as parts",
        "from .parts import *",
        "def late():\n    import mine.parts",
        "import importlib\nparts = importlib.import_module('mine.parts')",
        "try:\n    import mine.parts\nexcept ImportError:\n    pass",
        "from mine.between import act",
    ],
)
def test_a_helper_is_found_however_it_is_imported(project, names, line):
    (project / "mine" / "between.py").write_text("from mine.parts import act\n")
    path = project / "mine" / "net.py"
    path.write_text(path.read_text().replace("from . import parts", line).replace("parts.act", "nn.functional.relu"))
    before = names()
    edit(project, "parts.py")
    after = names()
    assert all(before[name] != after[name] for name in ALL)


def test_the_package_a_class_lies_in_counts(project, names):
    before = names()
    (project / "mine" / "__init__.py").write_text("import torch\n\ntorch.nn.ReLU.inplace = True\n")
    assert names() != before


def test_modules_that_import_each_other_or_that_are_missing_end(project, names):
    (project / "mine" / "parts.py").write_text(
        FILES["parts.py"] + "def other():\n    import mine.net, no_such_module\n"
    )
    assert set(names()) == ALL


def test_two_projects_with_one_dotted_name_are_kept_apart(project, names, tmp_path_factory, monkeypatch):
    before, other = names(), tmp_path_factory.mktemp("other")
    write(other, FILES)
    monkeypatch.syspath_prepend(str(other))
    assert names() == before, "the same code elsewhere is the same network"
    edit(other, "parts.py")
    after = names()
    assert all(before[name] != after[name] for name in ALL)


def test_the_version_of_a_plugin_counts(project, names):
    """Its classes may be named, or only imported by the user's code."""
    site = project / "site-packages"
    (site / "plugged").mkdir(parents=True)
    (site / "plugged" / "__init__.py").write_text(
        "from qexp.quantizers.uniform import Uniform\n\nclass Theirs(Uniform): pass\n"
    )
    path = project / "mine" / "net.py"
    path.write_text("import plugged\n" + path.read_text())

    def installed(version: str) -> dict[str, str]:
        for old in site.glob("*.dist-info"):
            shutil.rmtree(old)
        info = site / f"plugged_dist-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugged-dist\nVersion: {version}\n")
        (info / "RECORD").write_text("plugged/__init__.py,,\n")
        (info / "top_level.txt").write_text("plugged\n")
        importlib.invalidate_caches()
        identity._versions.cache_clear()
        identity._distributions.cache_clear()
        return names("quant.weight._target_=plugged.Theirs")

    sys.path.insert(0, str(site))
    try:
        one, two = installed("1.0"), installed("1.1")
        assert installed("1.0") == one
        assert all(one[name] != two[name] for name in ALL)
        assert identity.code(["plugged.Theirs"]) == {"plugged-dist": "1.0"}
    finally:
        sys.path.remove(str(site))
        forget()
        identity._versions.cache_clear()
        identity._distributions.cache_clear()


def test_code_edited_while_a_process_runs_keeps_the_name_of_what_is_loaded(project, names):
    names()
    before = identity.code(["mine.net.Net"])
    edit(project, "parts.py")
    assert identity.code(["mine.net.Net"]) == before, "this process computes with the old code"
    forget()
    assert identity.code(["mine.net.Net"]) != before


def test_classes_that_lie_in_no_file_count_by_their_code():
    def made(text: str) -> type:
        space: dict[str, object] = {"__name__": "a_notebook"}
        exec(f"class Net:\n    def forward(self, x):\n        return {text}\n", space)
        return space["Net"]

    one, same, two = (identity.code([made(text)]) for text in ("x + 1", "x + 1", "x + 2"))
    assert one == same != two and list(one) == ["a_notebook.Net"]


def test_of_qexp_the_classes_involved_count_with_what_lies_beside_them():
    found = set(identity.code(["qexp.quantizers.lsq.LSQ", "qexp.ranges.MSE", "qexp.layers.shift.FAMILY"]))
    assert {"qexp.quantizers.lsq", "qexp.quantizers.base", "qexp.ranges.mse", "qexp.layers.shift"} <= found
    assert not {
        name
        for name in found
        if "kl" in name or "pact" in name or name.startswith(("qexp.numerics", "qexp.network.facts"))
    }
    assert identity.code(["torch.optim.SGD", "xml.etree.ElementTree", "no.such.thing"]) == {}


def test_an_edited_network_is_computed_again_and_right(compose, project, tmp_path):
    """The same command after an edit: another point, of another float network, as in a fresh folder."""

    def run(where: str) -> dict:
        forget()
        few = ("schedule.pretrain.epochs=2", "max_samples=200", "n_calibrate=32", f"runs_dir={tmp_path / where}")
        return pipeline.run(read(compose(*OVERRIDES, *few)))

    first = run("runs")
    edit(project, "parts.py")
    second, fresh = run("runs"), run("fresh")
    assert first["status"] == second["status"] == "ok", (first["error"], second["error"])
    assert second["point"] == fresh["point"] != first["point"]
    assert (second["value"], second["value_float"]) == (fresh["value"], fresh["value_float"])
    assert (second["value"], second["value_float"]) != (first["value"], first["value_float"])
    assert run("runs")["point"] == second["point"]


@pytest.mark.parametrize(
    "few, whole",
    [
        (["dataset.data.max_samples=60"], []),
        (["dataset.data.eval_batch_size=50", "trainer.limit_test_batches=1"], ["dataset.data.eval_batch_size=50"]),
        (["dataset.data.eval_batch_size=50", "trainer.limit_test_batches=0.5"], ["dataset.data.eval_batch_size=50"]),
        (["dataset.data.sampling=balanced", "max_samples=60"], ["max_samples=60"]),
    ],
)
def test_the_float_score_is_of_the_images_that_were_scored(names, few, whole):
    if "dataset.data.sampling=balanced" in few:
        few[0] = f"+{few[0]}"
    assert names(*few)["score"] != names(*whole)["score"]


def test_the_same_images_asked_for_otherwise_have_one_float_score(names):
    asked = (
        ["max_samples=100"],
        ["dataset.data.max_samples=100"],
        ["dataset.data.eval_batch_size=50", "trainer.limit_test_batches=2"],
    )
    assert len({names(*each)["score"] for each in asked}) == 1


def test_a_callback_that_ends_training_does_not_end_the_hidden_float_training(compose, project, tmp_path):
    hook = "    def on_train_batch_end(self, trainer, *_):\n        trainer.should_stop = True\n"
    (project / "mine" / "callback.py").write_text(FILES["callback.py"] + hook)
    few = ("max_samples=200", "n_calibrate=32")

    def run(where: str, *more: str) -> dict:
        forget()
        return pipeline.run(read(compose(*OVERRIDES, *few, f"runs_dir={tmp_path / where}", *more)))

    short = "schedule.pretrain.epochs=2"
    plain, stopped = run("a", short), run("b", short, "+callbacks.stop={_target_: mine.callback.Stop}")
    assert plain["value_float"] == stopped["value_float"] and plain["point"] != stopped["point"]
    assert (
        run("c", "schedule=float", "schedule.epochs=2", "+callbacks.stop={_target_: mine.callback.Stop}")["value"]
        < plain["value"]
    )
