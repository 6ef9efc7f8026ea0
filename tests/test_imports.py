"""Every arrow points down: what each part may import, read off the source; and what stays unloaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = (  # from the bottom; a part imports only from parts on lower levels
    ("errors", "locks", "memory", "ranks", "int8_npz", "qexp_kernels"),
    ("numerics",),
    ("calibration.histogram", "calibration.density"),
    ("calibration", "calibration.stats"),
    ("calibration.ranges",),
    ("quantizers",),
    ("models",),
    ("layers",),
    (
        "strays",
        "network",
        "graph",
        "cost",
        "calibration.cache",
        "calibration.kept",
        "calibration.calibrate",
        "calibration.depth",
        "calibration.channels",
        "calibration.measure",
        "hardware",
    ),
    ("passes",),
    ("recipe",),
    ("integer", "search"),
    (
        "data",
        "tasks",
        "callbacks",
        "weights",
        "diagnosis",
        "config",
        "choices",
        "keys",
        "devices",
        "record",
        "datasets",
        "report",
    ),
    ("training",),
    ("floats", "stages"),
    ("teachers",),
    ("outcome", "takeaway", "proof", "export"),
    ("pipeline", "prepare", "sweeps"),
)
RANK = {name: i for i, level in enumerate(LEVELS) for name in level}
BLIND = {"models", "data", "tasks"}  # know nothing of quantization
QUANTIZATION = {"quantizers", "layers", "recipe", "graph", "network", "passes", "cost", "calibration"}


def part(module: str) -> str | None:
    """Returns the part a module of ours belongs to, None for a foreign one."""
    if module.split(".")[0] == "qexp_kernels":
        return "qexp_kernels"
    if module.split(".")[0] != "qexp" or module == "qexp":
        return None
    names = module.split(".")[1:]
    return max((n for n in (".".join(names[:2]), names[0]) if n in RANK), key=len, default=names[0])


def imports(file: Path) -> list[tuple[str, bool]]:
    """Returns the modules a file imports, and whether only for types."""
    tree = ast.parse(file.read_text())
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in for_types) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = (
                [f"{node.module}.{a.name}" for a in node.names] if part(node.module) in (None, "calibration") else []
            )
            found += [(name, id(node) in for_types) for name in names or [node.module]]
    return found


FILES = sorted(
    p for p in (ROOT / "qexp").rglob("*.py") if p.name != "__init__.py" or len(p.relative_to(ROOT).parts) > 3
)


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(ROOT / "qexp")))
def test_imports_point_down(file):
    own = part(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    assert own in RANK, f"{own} has no place among the levels of this test"
    for module, for_types in imports(file):
        other = part(module)
        if other is None or other == own or for_types:
            continue
        lazy_pair = {own, other} == {"calibration.cache", "calibration.calibrate"}  # one file format, read and written
        assert RANK.get(other, 99) < RANK[own] or lazy_pair or RANK.get(other) == RANK[own], f"{own} imports {module}"
        assert not (own in BLIND and other in QUANTIZATION), (
            f"{own} knows nothing of quantization, yet imports {module}"
        )


REPORT = [p for p in FILES if "report" in p.parts]


@pytest.mark.parametrize("file", REPORT, ids=lambda p: p.name)
def test_the_report_knows_no_model(file):
    for module, _ in imports(file):
        root = module.split(".")[0]
        assert root not in ("torch", "pytorch_lightning", "torchvision", "qexp_kernels")
        assert part(module) in (None, "report", "errors", "diagnosis")


@pytest.mark.parametrize("top", ["torch", "numpy", "hydra"])
def test_only_the_edge_knows_hydra(top):
    """Hydra is config: below `pipeline` and `recipe` everything takes plain values."""
    if top != "hydra":
        assert any(m.split(".")[0] == top for f in FILES for m, _ in imports(f))
        return
    below = {name for level in LEVELS[: RANK["recipe"]] for name in level}
    for file in FILES:
        own = part(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        if own in below:
            assert not [m for m, _ in imports(file) if m.split(".")[0] in ("hydra", "omegaconf")], file


def test_the_library_loads_neither_lightning_nor_torchvision():
    modules = (
        "qexp, qexp.numerics, qexp.quantizers.uniform, qexp.layers, qexp.recipe, qexp.calibration.calibrate, qexp.graph"
    )
    code = (
        f"import sys, {modules}; print([m for m in ('pytorch_lightning', 'torchvision', 'bokeh') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
