"""The scripts of the studies and of the documentation find all that they import."""

import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = ("onnx", "onnxruntime", "openvino", "timm")
STUDIES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "experiments").rglob("[!_]*.py")
)


@pytest.mark.parametrize("module", STUDIES)
def test_a_script_of_the_studies_is_imported(module):
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name not in EXTRAS:
            raise
        pytest.skip(f"{missing.name} is not installed")


@pytest.mark.parametrize("script", sorted((ROOT / "docs").glob("*.py")), ids=lambda path: path.name)
def test_a_hook_of_the_documentation_is_imported(script):
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location(f"docs_{script.stem}", script)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
