"""A program on disk comes back whole, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from qexp.errors import QexpError
from qexp.integer.files import CONSTANTS, PROGRAM, load, save
from qexp.integer.lowering import lower
from qexp.integer.reference import Reference
from tests.networks import Residual


@pytest.fixture
def folder(quantize, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model, images = quantize(Residual())
    program = lower(model, images[:1], {"model": "residual"}).program
    save(program, tmp_path / "program")
    self = load(tmp_path / "program")
    codes = program.encode(images.numpy())
    assert np.array_equal(Reference(self).run(codes), Reference(program).run(codes))
    assert np.array_equal(self.encode(images.numpy()), codes) and self.about == {"model": "residual"}
    assert [t.unit.tolist() for t in self.tensors.values()] == [t.unit.tolist() for t in program.tensors.values()]
    return tmp_path / "program"


def test_weights_take_a_byte_each(folder):
    arrays = load_file(folder / CONSTANTS)
    document = json.loads((folder / PROGRAM).read_text())
    weights = [op["weight"] for op in document["ops"] if "weight" in op]
    assert len(weights) == 5 and all(arrays[w["array"]].dtype == np.int8 for w in weights)


def edit(folder: Path, **changes: object) -> None:
    document = json.loads((folder / PROGRAM).read_text())
    (folder / PROGRAM).write_text(json.dumps(document | changes))


def test_what_was_changed_is_refused(folder):
    arrays = load_file(folder / CONSTANTS)
    key = next(k for k in arrays if k.endswith(".weight"))
    save_file(arrays | {key: arrays[key] + np.int8(1)}, folder / CONSTANTS)
    with pytest.raises(
        QexpError, match=r"the weight of stem \(conv\) is missing from constants.safetensors or not the one"
    ):
        load(folder)
    save_file({k: v for k, v in arrays.items() if k != key}, folder / CONSTANTS)
    with pytest.raises(QexpError, match=r"the weight of stem \(conv\) is missing"):
        load(folder)
    (folder / CONSTANTS).write_bytes((folder / CONSTANTS).read_bytes()[:-100])
    with pytest.raises(QexpError, match="cut short or damaged"):
        load(folder)
    (folder / CONSTANTS).unlink()
    with pytest.raises(QexpError, match=r"not found; a program is program\.json and constants\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "fc.input"}, "program.json was changed after it was written"),
        ({"version": 1}, "version 1; this qexp reads version 2"),
        ({"format": "other"}, "not a qexp integer program"),
    ],
)
def test_another_version_or_an_edit_is_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(QexpError, match=message):
        load(folder)


def test_a_document_cut_short_is_refused(folder):
    text = (folder / PROGRAM).read_text()
    (folder / PROGRAM).write_text(text[: len(text) // 2])
    with pytest.raises(QexpError, match="cut short or damaged"):
        load(folder)
