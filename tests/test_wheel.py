"""The wheel, installed into a folder of its own, is the whole program: built from a clone and from the source distribution."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from qexp_kernels import build

ROOT = Path(__file__).parents[1]
FOLDERS = ("qexp", "conf", "kernels", "zoo", "examples")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff", "run.py", "CHANGELOG.md")

pytest.importorskip("setuptools", minversion="77", reason="the build needs it")
pytestmark = pytest.mark.slow


def python(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python without the clone on its path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the files that a build reads, with the library of this processor compiled."""
    folder = tmp_path_factory.mktemp("clone")
    for name in FOLDERS:
        unwanted = shutil.ignore_patterns("__pycache__", "*.so", "compiled")
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    (folder / "qexp_kernels").symlink_to("kernels")
    words = ["-m", "qexp_kernels.for_wheel", build.level()]
    done = python(*words, cwd=folder, PYTHONPATH=str(folder))
    assert "Warning" not in done.stderr, done.stderr
    return folder


def wheel_of(source: Path, to: Path) -> Path:
    python("-c", f"from setuptools import build_meta as b; b.build_wheel({str(to)!r})", cwd=source)
    return next(to.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    return wheel_of(clone, tmp_path_factory.mktemp("dist"))


def test_the_wheel_carries_configuration_kernels_command_and_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("conf", "qexp/conf"), ("zoo", "qexp/zoo"), ("kernels", "qexp_kernels"), ("qexp", "qexp")):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "kernels/kernels" not in str(path)]
        kept = [p for p in files if not {"__pycache__", "compiled"} & set(p.parts) and p.suffix not in (".so", ".pyc")]
        assert {f"{inside}/{p.relative_to(ROOT / folder)}" for p in kept} <= names
    assert f"qexp_kernels/compiled/{build.library_name('cpp', build.level())}" in names
    assert wheel.name.startswith("qexp-") and "-py3-none-" in wheel.name and "none-any" not in wheel.name
    about = {
        name.rpartition("/")[2]: zipfile.ZipFile(wheel).read(name).decode() for name in names if "dist-info" in name
    }
    assert "qexp = qexp.command.program:main" in about["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in about["METADATA"] and "Apache License" in about["LICENSE"]
    assert not [name for name in names if name.startswith(("tests/", "conf/", "kernels/", "build/"))]


def test_the_installed_wheel_runs_in_an_empty_folder_and_compiles_nothing(wheel, tmp_path):
    site, here = tmp_path / "site", tmp_path / "empty"
    here.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    # ahead of an editable installation, whose finder comes after the path
    environment = {"PYTHONPATH": str(site), "QEXP_CACHE_DIR": str(tmp_path / "cache"), "CXX": "no-such-compiler"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    words = ["debug=fast", "study=s", "trainer=cpu", "trainer.enable_progress_bar=false"]
    done = python("-m", "qexp", *words, cwd=here, **environment)
    assert f"kernels: cpp (found in {site / 'qexp_kernels' / 'compiled'})" in done.stdout
    assert [p.name for p in here.iterdir()] == ["runs"] and (here / "runs" / "s" / "results.csv").exists()
    assert not list((tmp_path / "cache").rglob("*.so")), "compiled ones come with the wheel"
    assert "runs/s/dashboard.html" in python("-m", "qexp", "report", "runs/s", cwd=here, **environment).stdout


def test_the_source_distribution_builds_the_same_wheel_without_compiled_libraries(clone, wheel, tmp_path):
    code = f"from setuptools import build_meta as b; b.build_sdist({str(tmp_path)!r})"
    python("-c", code, cwd=clone)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    source = next((tmp_path / "unpacked").iterdir())
    assert (source / "LICENSE").exists() and not list(source.rglob("*.so"))
    (tmp_path / "dist").mkdir()
    again = wheel_of(source, tmp_path / "dist")
    assert again.name.endswith("-py3-none-any.whl")

    def inside(path: Path) -> set[str]:
        return {name for name in zipfile.ZipFile(path).namelist() if not name.endswith(".so")}

    assert inside(again) == inside(wheel)
