"""The loader's fallbacks and its log lines, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import qexp_kernels as kernels
from qexp_kernels import build

REPORT = "import qexp_kernels as k; loaded = k.load({which!r}); print(loaded.implementation, '|', loaded.reason)"


def run(code: str, cache: Path, **environment: str) -> subprocess.Popen:
    """Starts Python on `code` with a compile cache of its own."""
    env = {**os.environ, "QEXP_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": "", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-W", "error", "-c", code], env=env, stdout=pipe, stderr=pipe, text=True)


def report(which: str, cache: Path, **environment: str) -> str:
    """Returns what `load` answers in a new process."""
    process = run(REPORT.format(which=which), cache, **environment)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return out.strip()


def one_small_source(tmp_path: Path, text: str) -> str:
    """Returns code that makes one source all there is to compile."""
    source = tmp_path / "small" / "op.cpp"
    source.parent.mkdir(exist_ok=True)
    source.write_text(text)
    return f"import pathlib, qexp_kernels.build as b; b.sources = lambda kind: [pathlib.Path({str(source)!r})]; "


SMALL = """#include <torch/csrc/stable/library.h>
STABLE_TORCH_LIBRARY_FRAGMENT(qexp_small, m) { m.def("one() -> int"); }"""


def test_importing_compiles_nothing(tmp_path):
    process = run("import qexp_kernels, sys; print('torch.utils.cpp_extension' in sys.modules)", tmp_path / "cache")
    assert process.communicate(timeout=100)[0].strip() == "False"
    assert not (tmp_path / "cache").exists()


def test_no_compiler_falls_back_with_the_reason(tmp_path):
    answer = report("auto", tmp_path, CXX="no-such-compiler")
    assert answer.startswith("reference | no C++ compiler (no-such-compiler)")


def test_not_building_falls_back_with_the_reason(tmp_path):
    process = run("import qexp_kernels as k; print(k.load('auto', build=False))", tmp_path)
    assert "reference" in (out := process.communicate(timeout=100)[0]) and "not built yet" in out


def test_an_implementation_asked_for_by_name_is_an_error_if_it_cannot_be_had(tmp_path):
    process = run(REPORT.format(which="cpp"), tmp_path, CXX="no-such-compiler")
    assert "KernelError: kernels: 'cpp' is not available: no C++ compiler" in process.communicate(timeout=100)[1]
    process = run(REPORT.format(which="cuda"), tmp_path)
    assert (
        "KernelError: kernels: 'cuda' is not available: torch sees no CUDA device"
        in process.communicate(timeout=100)[1]
    )


def test_a_source_that_does_not_compile_falls_back_with_the_error(tmp_path):
    code = one_small_source(tmp_path, "int broken( { }") + REPORT.format(which="auto")
    out, err = run(code, tmp_path / "cache").communicate(timeout=300)
    assert out.startswith("reference | the cpp sources did not compile:") and "error:" in out, (out, err)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]  # nothing half-built stays


def test_a_cache_that_cannot_be_written_falls_back_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("in the way")  # also stops a superuser, whom permissions do not
    answer = report("auto", tmp_path / "file" / "cache")
    assert answer.startswith("reference | the cache folder cannot be written")


def test_a_damaged_library_is_built_again(tmp_path):
    code = one_small_source(tmp_path, SMALL) + (
        "p = b.cache_folder() / b.library_name('cpp', b.level()); p.parent.mkdir(parents=True); p.write_text('no library'); "
        + REPORT.format(which="cpp")
    )
    out, err = run(code, tmp_path / "cache").communicate(timeout=300)
    assert out.startswith("cpp | built into"), (out, err)


def test_two_processes_at_once_build_one_library(tmp_path):
    code = one_small_source(tmp_path, SMALL) + REPORT.format(which="cpp")
    both = [run(code, tmp_path / "cache") for _ in range(2)]
    answers = sorted(p.communicate(timeout=300)[0].split(" into ")[0].split(" in ")[0].strip() for p in both)
    assert answers == ["cpp | built", "cpp | found"]
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1
    assert report_small(tmp_path).startswith("cpp | found")


def test_a_build_says_in_one_line_how_long_it_takes_and_what_is_found_says_nothing(tmp_path):
    code = (
        one_small_source(tmp_path, SMALL)
        + "import logging; logging.basicConfig(level=20); "
        + REPORT.format(which="cpp")
    )
    for lines in (1, 0):
        out, err = run(code, tmp_path / "cache").communicate(timeout=300)
        assert out.startswith("cpp |") and err.count("\n") == err.count("kernels: building them, about") == lines, (
            out,
            err,
        )
        assert lines == 0 or " s, once" in err


def report_small(tmp_path: Path) -> str:
    code = one_small_source(tmp_path, SMALL) + REPORT.format(which="auto")
    return run(code, tmp_path / "cache").communicate(timeout=300)[0]


def test_the_name_changes_with_sources_headers_and_flags_and_not_with_torch(tmp_path, monkeypatch):
    before = build.library_name("cpp", "x86-64-v3")
    monkeypatch.setattr(build.torch, "__version__", "0.0.0")
    assert build.library_name("cpp", "x86-64-v3") == before != build.library_name("cpp", "x86-64-v4")
    monkeypatch.undo()
    folder = tmp_path / "small"
    folder.mkdir()
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "architectures", lambda: ["90"])
    names = []
    for name in ("op.cpp", "shared.h", "op.cu", "shared.cuh"):
        (folder / name).write_text("int changed;")
        names.append((build.library_name("cpp", "x86-64-v3"), build.library_name("cuda", "x86-64-v3")))
    (one, a), (two, b), (three, c), (four, d) = names
    assert one != two == three == four and a != b != c != d != a


def test_the_cache_follows_the_environment(monkeypatch):
    monkeypatch.setenv("QEXP_CACHE_DIR", "/a")
    assert build.cache_folder() == Path("/a")
    monkeypatch.delenv("QEXP_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert build.cache_folder() == Path("/b/qexp")


def test_references_replace_compiled_kernels_and_step_back(compiled, device, monkeypatch):
    import torch
    from qexp_kernels import library

    calls = []
    monkeypatch.setitem(library.REFERENCES, "round_to", lambda x, *rest: calls.append(1) or x.round())
    x = torch.randn(3, device=device)
    kernels.load("reference")
    kernels.round_to(x)
    assert len(calls) == 1
    assert kernels.load(compiled).implementation == compiled
    kernels.round_to(x)
    assert len(calls) == 1


def test_a_second_call_is_free(compiled, monkeypatch):
    monkeypatch.setattr(build, "load", lambda *a, **k: pytest.fail("loaded twice"))
    assert kernels.load(compiled) == kernels.load(compiled)
