"""Every arrow points down: which part may import which, read off the source; and what stays unloaded."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom, one part per level: a part imports only parts above it in this list, never later ones, not even inside a function or for
# a type. Inside a part the modules form no circle.
ORDER = (
    "errors",
    "system",
    "results",
    "report",
    "qexp_kernels",
    "numerics",
    "statistics",
    "ranges",
    "quantizers",
    "models",
    "layers",
    "network",
    "calibration",
    "analysis",
    "passes",
    "recipe",
    "integer",
    "search",
    "data",
    "tasks",
    "callbacks",
    "run",
    "command",
    "verbs",
    "__main__",
)
RANK = {name: i for i, name in enumerate(ORDER)}
QUANTIZATION = {"quantizers", "layers", "network", "calibration", "analysis", "passes", "recipe", "integer", "search"}
BLIND = {"models", "data", "tasks"}  # they know nothing of quantization
BLIND_OF = {
    "models": {"report"},
    "data": {"report"},
    "tasks": {"report"},
}  # they leave files, and pages are made of those
FOREIGN = {  # what a part may not import of other libraries
    "results": {"torch", "pytorch_lightning", "torchvision", "bokeh"},
    "report": {"torch", "pytorch_lightning", "torchvision"},
}
# Only these know the configuration as Hydra and OmegaConf hold it; the others take plain values.
KNOWS_HYDRA = {"qexp.command", "qexp.run.settings"}


def modules(root: Path) -> dict[str, Path]:
    """Returns every module of the package by dotted name."""
    found = {}
    for path in sorted((root / "qexp").rglob("*.py")):
        found[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def part(module: str) -> str | None:
    """Returns the part a module belongs to; None for a foreign module and for the package itself."""
    names = module.split(".")
    if names[0] == "qexp_kernels":
        return "qexp_kernels"
    return names[1] if names[0] == "qexp" and len(names) > 1 else None


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yields the modules a file imports: at its top, inside functions, for types."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: imports are absolute here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else node.module


def violations(root: Path) -> list[str]:
    """Returns a sentence for each import that the order forbids and for each circle inside a part."""
    known = modules(root)
    found, inside = [], defaultdict(set)
    for module, path in known.items():
        own = part(module)
        for other in imported(path, known):
            if own is None or part(other) is None:
                if own in FOREIGN and other.split(".")[0] in FOREIGN[own]:
                    found.append(f"{module} imports {other}")
                continue
            if own not in RANK:
                found.append(f"{own} has no place in the order")
            elif part(other) == own:
                inside[module].add(other)
            elif RANK.get(part(other), len(RANK)) > RANK[own]:
                found.append(f"{module} imports {other}")
            elif own in BLIND and part(other) in QUANTIZATION:
                found.append(f"{module} knows nothing of quantization, yet imports {other}")
            elif part(other) in BLIND_OF.get(own, ()):
                found.append(f"{module} draws nothing, yet imports {other}")
    return found + [f"a circle: {' <-> '.join(circle)}" for circle in circles(inside)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Returns the groups of modules that import each other, directly or through others."""

    def reach(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for other in graph.get(waiting.pop(), ()):
                if other not in seen and other != start:
                    seen.add(other)
                    waiting.append(other)
        return seen

    reached = {module: reach(module) for module in graph}
    pairs = {m: {o for o in others if m in reached.get(o, ())} | {m} for m, others in reached.items()}
    return sorted({tuple(sorted(group)) for group in pairs.values() if len(group) > 1})


def test_every_import_points_down():
    assert not violations(ROOT)


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        (
            "qexp/data/offset_epochs.py",
            "from qexp.command import choices",
            "qexp.data.offset_epochs imports qexp.command.choices",
        ),
        ("qexp/data/offset_epochs.py", "def f():\n    from qexp.layers import swap", "knows nothing of quantization"),
        (
            "qexp/recipe/bits.py",
            "if False:\n    from qexp.search.quantizers_by_width import Key",
            "imports qexp.search.quantizers_by_width",
        ),
        (
            "qexp/statistics/histogram.py",
            "from qexp.statistics import density",
            "qexp.statistics.density <-> qexp.statistics.histogram",
        ),
        ("qexp/report/style.py", "import torch", "qexp.report.style imports torch"),
        ("qexp/tasks/base.py", "def f():\n    from qexp.report import style", "qexp.tasks.base draws nothing"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, file, line, words):
    for module in modules(ROOT).values():
        copy = tmp_path / module.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(module.read_text())
    (tmp_path / file).write_text(f"{(tmp_path / file).read_text()}\n{line}\n")
    assert any(words in found for found in violations(tmp_path)), violations(tmp_path)


def test_only_tasks_know_what_outputs_decide():
    """Who else took the greatest of an image's outputs would call numbers of a segmentation or a regression classes."""
    greatest = re.compile(
        r"\.(argmax|topk)\(\s*((dim|axis)\s*=\s*)?-?1\s*[,)]|\.(argmax|topk)\(self\.k|argmax\((y|scores|outputs|logits)\b"
    )
    rooms = RANK.keys() - {"tasks", "statistics", "ranges", "quantizers", "models", "data", "numerics", "qexp_kernels"}
    found = [
        f"{module}: {line.strip()}"
        for module, path in modules(ROOT).items()
        if part(module) in rooms
        for line in path.read_text().splitlines()
        if greatest.search(line)
    ]
    assert not found, found
    assert greatest.search((ROOT / "qexp" / "tasks" / "classification.py").read_text())


def who_knows_hydra(root: Path) -> set[str]:
    """Returns the modules that import hydra or omegaconf, at their top or inside functions."""
    return {
        module
        for module, path in modules(root).items()
        if any(other.split(".")[0] in ("hydra", "omegaconf") for other in imported(path, {}))
    }


def within(module: str, edge: str) -> bool:
    return module == edge or module.startswith(f"{edge}.")


def test_only_the_edge_knows_hydra():
    knows = who_knows_hydra(ROOT)
    assert not [module for module in knows if not any(within(module, edge) for edge in KNOWS_HYDRA)]
    assert not [edge for edge in KNOWS_HYDRA if not any(within(module, edge) for module in knows)], "named for nothing"


@pytest.mark.parametrize(
    "line", ["import hydra", "def f():\n    from omegaconf import DictConfig", "import hydra.utils as u"]
)
def test_a_module_that_learns_of_hydra_is_found(tmp_path, line):
    path = tmp_path / "qexp" / "results" / "wording.py"
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert who_knows_hydra(tmp_path) == {"qexp.results.wording"}


def test_nothing_lies_loose_at_the_top_of_the_package():
    assert sorted(p.name for p in (ROOT / "qexp").glob("*.py")) == ["__init__.py", "__main__.py", "errors.py"]


def test_the_library_loads_neither_lightning_nor_torchvision():
    names = ["", "numerics", "quantizers.uniform", "layers", "recipe", "calibration.calibrate", "network.facts"]
    loaded = ", ".join(f"qexp.{name}".rstrip(".") for name in names)
    code = (
        f"import sys, {loaded}; print([m for m in ('pytorch_lightning', 'torchvision', 'bokeh') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_module_can_be_imported():
    import importlib
    import pkgutil

    import qexp

    for module in pkgutil.walk_packages(qexp.__path__, "qexp."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
