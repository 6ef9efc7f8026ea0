"""Files that anybody wrote, damaged at random: what they cause is a QexpError, or nothing."""

from __future__ import annotations

import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.models.weights import load_weights, save_weights
from qexp.recipe.plan_file import read_rows

pytestmark = pytest.mark.filterwarnings("ignore")  # of the readers, about what the damage made of a file


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Returns the content after one to four of: a byte changed, a length made huge, a piece cut out, doubled or moved, the end cut off."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(out)), rng.choice((1, 2, 4, 8, 30))
        kind = rng.randrange(6)
        if kind <= 1:
            out[at] = rng.randrange(256)
        elif kind == 2:
            out[at : at + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**60), struct.pack(">Q", 2**40)))
        elif kind == 3:
            del out[at : at + length]
        elif kind == 4:
            out[at:at] = out[at : at + length]
        else:
            del out[max(len(out) - length * 8, 1) :]
        out = out or bytearray(b"x")
    return bytes(out)


def fuzz(path: Path, read: Callable[[], object], rounds: int) -> int:
    """Returns how often reading was refused; anything raised besides a QexpError of one line fails."""
    content, rng, refused = path.read_bytes(), random.Random(path.name), 0
    for _ in range(rounds):
        path.write_bytes(damaged(content, rng))
        try:
            read()
        except QexpError as error:
            refused += 1
            assert "\n" not in str(error).split(" (", 1)[0]
    return refused


def test_checkpoints_in_the_form_of_zip(tmp_path):
    torch.save({"state_dict": net().state_dict(), "epoch": 3, "args": [1.5, "x", None]}, tmp_path / "w.pt")
    assert fuzz(tmp_path / "w.pt", lambda: load_weights(net(), tmp_path / "w.pt"), 250) > 60


def test_the_pickle_inside_a_checkpoint(tmp_path):
    """The checksums of the zip guard it against chance, not against who writes the zip anew."""
    torch.save({"state_dict": net().state_dict(), "epoch": 3}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    (name,) = (name for name in parts if name.endswith("data.pkl"))
    rng, refused = random.Random(1), 0
    for _ in range(250):
        with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
            for part, content in parts.items():
                archive.writestr(part, damaged(content, rng) if part == name else content)
        try:
            load_weights(net(), tmp_path / "w.pt")
        except QexpError:
            refused += 1
    assert refused > 100


def test_checkpoints_in_the_old_form(tmp_path):
    torch.save(net().state_dict(), tmp_path / "w.th", _use_new_zipfile_serialization=False)
    assert fuzz(tmp_path / "w.th", lambda: load_weights(net(), tmp_path / "w.th"), 250) > 60


@pytest.mark.parametrize("compressed", [False, True])
def test_weights_of_8_bit_codes(tmp_path, compressed):
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in (("0", (4, 3, 3, 3)), ("3", (2, 16))):
        arrays |= {f"{name}.q": rng.integers(-128, 128, shape).astype(np.int8), f"{name}.s": np.float32(0.01)}
        arrays[f"{name}.b"] = np.zeros(shape[0], np.float32)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "w.npz", **arrays)
    assert fuzz(tmp_path / "w.npz", lambda: load_weights(net(), tmp_path / "w.npz"), 200) > 100


def test_safetensors(tmp_path):
    save_weights(net(), tmp_path / "w.safetensors")
    assert fuzz(tmp_path / "w.safetensors", lambda: load_weights(net(), tmp_path / "w.safetensors"), 200) > 60


def test_plans(tmp_path):
    path = tmp_path / "layers.csv"
    lines = [f"{layer},{site},{bits}," for layer in ("conv", "fc") for site, bits in (("weight", 4), ("input", 8.0))]
    path.write_text("\n".join(["layer,site,bits,rule", *lines]) + "\n")
    assert fuzz(path, lambda: read_rows(path, ["conv", "fc"]), 400) > 200


HOSTILE = {  # pickles that claim what no file of this size holds
    "a text of 2^60 letters": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
    "bytes of 2^60": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "a bytearray of 2^60": b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"x.",
    "a memo beyond any": b"\x80\x04j\xff\xff\xff\xff.",
    "lists in lists": b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "an empty stack": b"\x80\x04.",
    "a number as a file": pickle.dumps(3, 2),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("inside", [False, True])
def test_pickles_that_claim_too_much(tmp_path, kind, inside):
    path = tmp_path / "w.pt"
    if inside:
        torch.save(net().state_dict(), tmp_path / "whole.pt")
        with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(path, "w") as archive:
            for name in whole.namelist():
                archive.writestr(name, HOSTILE[kind] if name.endswith("data.pkl") else whole.read(name))
    else:
        path.write_bytes(HOSTILE[kind])
    with pytest.raises(QexpError):
        load_weights(net(), path)


def header(dtype: str, shape: str) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("|i1", "(9007199254740992,)"),
        ("<f8", "(-3,)"),
        ("<f8", "(1, 2"),
        ("|O", "(2,)"),
        ("<M8[s]", "(2,)"),
        ("<U4", "()"),
    ],
)
def test_arrays_that_claim_to_be_what_they_are_not(tmp_path, dtype, shape):
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("0.q.npy", header(dtype, shape) + bytes(16))
    with pytest.raises(QexpError):
        load_weights(net(), tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("s", np.float32("nan"), "scales that are not positive and finite"),
        ("s", np.float32(-0.1), "scales that are not positive and finite"),
        ("s", np.complex64(1 + 1j), "holds complex64 values; real numbers"),
        ("s", np.str_("0.1"), "holds <U3 values; real numbers"),
        ("b", np.array([1, 2], "M8[s]"), r"holds datetime64\[s\] values"),
        ("b", np.array([1, np.inf]), "holds nan or inf"),
    ],
)
def test_scales_and_biases_of_another_kind(tmp_path, part, value, message):
    arrays = {"0.q": np.zeros((2, 3), np.int8), "0.s": np.float32(0.1), "0.b": np.zeros(2, np.float32)}
    np.savez(tmp_path / "w.npz", **(arrays | {f"0.{part}": value}))
    with pytest.raises(QexpError, match=message):
        load_weights(nn.Sequential(nn.Linear(3, 2)), tmp_path / "w.npz")
