"""What a wheel carries: the same library for several levels of x86-64, chosen when it is loaded, with the same bits from each."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import qexp_kernels as kernels
import torch
from qexp_kernels import build

CHILD = """
import sys, torch, qexp_kernels
from qexp_kernels.examples import arguments
from qexp_kernels.library import REFERENCES
torch.ops.load_library(sys.argv[1])
torch.set_num_threads(2)
results = []
for images, size in ((3, 33), (40, 41)):
    found = arguments(torch.device("cpu"), images, size)
    for name in REFERENCES:
        given = tuple(t.contiguous() if isinstance(t, torch.Tensor) and size == 41 else t for t in found[name])
        y = getattr(torch.ops.qexp, name).default(*given)
        results += [(name, t.detach()) for t in (y if isinstance(y, tuple | list) else (y,))]
        for rounding in ("half_up", "half_away", "floor", "trunc"):
            if "half_even" in given:
                y = getattr(torch.ops.qexp, name).default(*(rounding if a == "half_even" else a for a in given))
                results += [(name, t.detach()) for t in (y if isinstance(y, tuple | list) else (y,))]
from qexp_kernels.fused_conv import products
x = torch.randint(0, 256, (3, 100, 9, 11), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
line, step = torch.tensor([1.0, 0, -1e9, 1e9, 0, 0]).double()[:, None], [5, 0, -1, 1, 0]
for shape, groups in (((37, 100, 1, 1), 1), ((100, 1, 3, 3), 100), ((100, 1, 5, 2), 100)):  # the lowest levels have no dot products
    weight = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(2)).to(torch.int8)
    p = products(weight, 77, (1, 2), (0, 0), (1, 1), groups, wide=True)
    results += [("fused_conv", torch.ops.qexp.fused_conv.default(x, *p[:4], [], [line], [], step, [1], True)[0])]
torch.save(results, sys.argv[2])
"""


def levels_here() -> list[str]:
    """Returns the levels that this processor runs."""
    names = sorted(build.LEVELS.values())
    return names[: names.index(build.level()) + 1] if build.level() in names else []


@pytest.mark.slow
def test_every_level_computes_the_same_bits(tmp_path):
    if platform.machine() != "x86_64":
        pytest.skip("levels are those of x86-64")
    results = []
    for level in levels_here():
        library = build.cache_folder() / build.library_name("cpp", level)
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            build.compile_library("cpp", library, level)
        saved = tmp_path / f"{level}.pt"
        done = subprocess.run([sys.executable, "-c", CHILD, str(library), str(saved)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(saved))
    assert len(results[0]) > 100
    for other in results[1:]:
        for (name, one), (_, two) in zip(results[0], other, strict=True):
            assert torch.equal(one.flatten().view(torch.uint8), two.flatten().view(torch.uint8)), name


def test_a_library_in_the_package_is_taken_as_it_is_and_no_compiler_is_asked(compiled, tmp_path):
    if compiled != "cpp":
        pytest.skip("the libraries of a wheel are those of the CPU")
    name = build.library_name("cpp", build.level())
    (tmp_path / name).write_bytes((build.cache_folder() / name).read_bytes())
    code = (
        "import pathlib, sys; from qexp_kernels import build, load\n"
        f"build.CARRIED = pathlib.Path({str(tmp_path)!r})\nprint(load('cpp').reason)"
    )
    env = {
        **os.environ,
        "QEXP_CACHE_DIR": str(tmp_path / "none"),
        "CXX": "no-such-compiler",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == f"found in {tmp_path}", done.stderr
    assert not (tmp_path / "none").exists()


def test_a_library_asks_only_for_what_torch_promises_to_keep(compiled):
    """No C++ of torch and nothing of Python, so that one file serves every version of both."""
    if compiled != "cpp" or shutil.which("nm") is None:
        pytest.skip("nm lists the symbols of a library for the CPU")
    library = build.cache_folder() / build.library_name("cpp", build.level())
    text = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    wanted = [line.split()[-1] for line in text.splitlines()]
    assert [s for s in wanted if s.startswith("Py") or re.match(r"_ZNK?(2at|3c10|5torch)", s)] == []
    assert [s for s in wanted if s.startswith(("torch_", "aoti_torch_"))]


def test_a_wheel_carries_the_sources_headers_and_compiled_libraries(tmp_path, monkeypatch):
    """What setup.py lists, looked up in the folder that it lists it of."""
    import runpy

    setuptools = pytest.importorskip("setuptools", minversion="77", reason="the build needs it")
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    root = Path(kernels.__file__).resolve().parents[1]
    monkeypatch.chdir(root)
    runpy.run_path(str(root / "setup.py"))
    patterns = given["package_data"]["qexp_kernels"]
    carried = {path for pattern in patterns for path in build.HERE.glob(pattern)}
    needed = {p for suffix in ("cpp", "cu", "h", "cuh") for p in build.HERE.glob(f"*/*.{suffix}")}
    assert needed <= carried and "compiled/*.so" in patterns
    assert {f"qexp_kernels.{p.parent.name}" for p in build.HERE.glob("*/__init__.py")} <= set(given["packages"])


def test_the_level_follows_what_torch_found_the_processor_to_have(monkeypatch):
    if platform.machine() != "x86_64":
        pytest.skip("levels are those of x86-64")
    for found, level in (
        ("AVX512", "x86-64-v4"),
        ("AVX2", "x86-64-v3"),
        ("DEFAULT", "x86-64-v2"),
        ("new", "x86-64-v2"),
    ):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=found: found)
        assert build.level() == level and f"-march={level}" in build.flags("cpp", build.level())
