"""A package with altered files is refused in one sentence, for every alteration, also with recomputed checksums."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from qexp.errors import QexpError
from qexp.integer import files, package
from qexp.integer.lowering import lower
from tests.networks import Residual
from tests.test_fuzz_files import fuzz

VALUES = (None, -1, 0, 2**70, 1.5, float("inf"), float("nan"), "x", "../x", "", True, [], [1, "a"], {}, {"a": 1})


@pytest.fixture
def folder(quantize, tmp_path) -> Path:
    torch.manual_seed(0)
    model, images = quantize(Residual(), 4, 8)
    package.write(lower(model, images[:1]).program, tmp_path / "p", images[:1].numpy())
    return tmp_path / "p"


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yields the path of everything in a document; of long lists the first and last."""
    keys = node.keys() if isinstance(node, dict) else {0, len(node) - 1} if isinstance(node, list) and node else ()
    for key in keys:
        yield (*path, key)
        yield from places(node[key], (*path, key))


def altered(document: Any, path: tuple, value: Any) -> Any:
    out = copy.deepcopy(document)
    node = out
    for key in path[:-1]:
        node = node[key]
    if value is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return out


def sealed(folder: Path, document: dict) -> None:
    """Writes a program and its sums as who altered it on purpose would."""
    document = {k: v for k, v in document.items() if k != "checksum"}
    document["checksum"] = files.checksum(document)
    (folder / files.PROGRAM).write_text(json.dumps(document))
    listed(folder, files.PROGRAM)


def listed(folder: Path, name: str) -> None:
    manifest = json.loads((folder / package.MANIFEST).read_text())
    manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / package.MANIFEST).write_text(json.dumps(manifest))


def outcome(folder: Path) -> str:
    """Returns the message of the error that reading raises; anything but a QexpError fails the test."""
    try:
        package.read(folder)
    except QexpError as error:
        assert "\n" not in str(error)
        return str(error)
    return "read"


def test_an_altered_manifest_is_refused_or_means_nothing(folder):
    manifest = json.loads((folder / package.MANIFEST).read_text())
    free = {
        ("weights", "layer"),
        ("files", "README.txt"),
    }  # for people, as are input and output: nothing is computed by them
    count = 0
    for path in list(places(manifest)):
        for value in (..., *VALUES):
            (folder / package.MANIFEST).write_text(json.dumps(altered(manifest, path, value)))
            said, count = outcome(folder), count + 1
            named = tuple(key for key in path if isinstance(key, str))
            if (
                named[:1] not in (("about",), ("input",), ("output",))
                and named not in free
                and altered(manifest, path, value) != manifest
            ):
                assert said != "read" or value == manifest_value(manifest, path), (path, value)
    assert count > 500


def manifest_value(document: Any, path: tuple) -> Any:
    for key in path:
        document = document[key]
    return document


def test_an_altered_program_with_right_sums_ends_in_one_sentence(folder):
    document = json.loads((folder / files.PROGRAM).read_text())
    changes = [(path, value) for path in places(document) for value in (..., *VALUES)]
    for path, value in random.Random(0).sample(changes, 120):
        sealed(folder, altered(document, path, value))
        outcome(folder)
    sealed(folder, altered(document, ("tensors", 0, "low"), float("inf")))
    assert "low is inf; a whole number" in outcome(folder)


def test_a_manifest_damaged_at_random_is_refused(folder):
    path = folder / package.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text())))  # no spaces between: each change hits something
    assert fuzz(path, lambda: package.read(folder), 200) > 150


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "null", "[]", '"x"', "\udcff", '{"format": 1e999}', "9" * 5000])
def test_a_manifest_that_is_none_is_refused(folder, text):
    (folder / package.MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert outcome(folder) != "read"


def test_an_edited_program_of_a_package_that_lists_no_files_is_refused(folder):
    manifest = json.loads((folder / package.MANIFEST).read_text())
    (folder / package.MANIFEST).write_text(json.dumps(manifest | {"files": {}}))
    assert "does not list c/" in outcome(folder)
    (folder / package.MANIFEST).write_text(json.dumps(manifest))
    (folder / "c" / "more.c").write_text("int more;")  # would be compiled
    assert "does not list c/more.c" in outcome(folder)
    (folder / "c" / "more.c").unlink()
    (folder / "golden").write_text("a program somebody built here")
    assert outcome(folder) == "read"


@pytest.mark.parametrize("kind", ["fewer images", "floats", "no output", "another shape"])
def test_golden_vectors_of_another_kind_are_refused(folder, kind):
    held = dict(load_file(folder / package.GOLDEN))
    changes = {
        "fewer images": {"input": held["input"][:0]},
        "floats": {"input": held["input"].astype(np.float32)},
        "no output": {"output": None},
        "another shape": {"output": held["output"][:, :1]},
    }[kind]
    save_file({k: v for k, v in (held | changes).items() if v is not None}, folder / package.GOLDEN)
    listed(folder, package.GOLDEN)
    assert "holds no codes" in outcome(folder)
