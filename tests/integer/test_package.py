"""A package is the program, bit for bit: its weights unpack, its C reproduces the golden vectors, what was edited is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qexp.errors import QexpError
from qexp.integer import package
from qexp.integer.lowering import lower
from qexp.integer.package.c_source import plan_memory
from qexp.integer.package.packing import coded, form, weights
from qexp.integer.reference import Reference
from qexp.models.modules import Add, Concat, StridedPad
from qexp.numerics.packing import pack, unpack
from tests.networks import Residual

COMPILER = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is at hand")


class Everything(nn.Module):
    """Scores [N, 4] of images [N, 3, 8, 8]: what `Residual` lacks of the operations a program can have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 4, 3, padding=1, dilation=1), nn.ReLU6()
        self.pool, self.shortcut = nn.MaxPool2d(3, 2, ceil_mode=True), StridedPad(4, 2)
        self.down, self.side = nn.Conv2d(4, 8, 3, 2, padding=1), nn.Conv2d(4, 3, 1)
        self.add, self.concat, self.act = Add(), Concat(), nn.PReLU()
        self.mean, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(11, 4)

    def forward(self, x):
        x = self.relu(self.stem(x))
        y = self.act(self.add(self.down(x), self.shortcut(x)))
        z = self.side(self.pool(x))
        return self.fc(self.mean(self.concat(y, z)).flatten(1))


def everything_rules() -> dict:
    wide = {"_target_": "qexp.quantizers.uniform.Uniform", "symmetric": True, "granularity": "tensor", "bits": 8}
    return {
        "sums": {"types": ["Add"], "input.0": wide, "input.1": wide, "output": wide},
        "acts": {"types": ["PReLU", "Concat", "AdaptiveAvgPool2d"], "output": wide},
    }


@pytest.fixture
def program(quantize):
    torch.manual_seed(0)
    model, images = quantize(Residual(), 4, 8)
    return lower(model, images[:1], {"model": "residual */ evil"}).program, images.numpy()


@given(st.integers(1, 16), st.booleans(), st.lists(st.integers(0, 2**16 - 1), max_size=40))
def test_codes_survive_packing(bits, signed, values):
    codes = np.array([v % 2**bits - (2 ** (bits - 1) if signed else 0) for v in values], np.int64)
    packed = pack(codes, bits)
    assert len(packed) == -(-bits * len(codes) // 8)
    assert np.array_equal(unpack(packed, len(codes), bits, signed), codes)


def test_the_form_of_codes_is_the_narrowest():
    assert (
        form(np.array([-8, 7])) == (4, True)
        and form(np.array([0, 15])) == (4, False)
        and form(np.array([0, 1])) == (1, False)
    )


@given(
    st.integers(1, 5), st.integers(1, 40), st.lists(st.integers(-(2**15), 2**15), min_size=1, max_size=6), st.randoms()
)
def test_weights_of_few_values_are_places_in_a_table(rows, inner, levels, random):
    weight = np.array([[random.choice(levels) for _ in range(inner)] for _ in range(rows)], np.int64)
    found = coded(weight)
    assert np.array_equal(weights(found.codes, found.levels), weight)
    assert len(found.table) + len(pack(found.codes, found.bits)) <= len(pack(weight, form(weight)[0]))


def test_a_place_beyond_its_table_is_refused():
    with pytest.raises(QexpError, match="a code of 2 lies beyond its table of 2 levels"):
        weights(np.array([[0, 2]]), np.array([[-1, 1]]))


def test_packed_bytes_hold_the_lowest_bit_first():
    assert pack(np.array([1, 2, 3, 0, 7]), 3) == bytes([0b11010001, 0b01110000])


def test_a_package_comes_back_whole(program, tmp_path):
    program, images = program
    manifest = package.write(program, tmp_path / "p", images[:3])
    again, read, codes, scores = package.read(tmp_path / "p")
    assert read == json.loads(json.dumps(manifest))
    assert np.array_equal(Reference(again).run(codes), scores) and len(codes) == 3
    weights = sum(w["bytes"] for w in manifest["weights"])
    numbers = sum(np.prod(w["shape"]) for w in manifest["weights"])
    assert manifest["weight_bytes"] == weights == (tmp_path / "p" / "weights.bin").stat().st_size
    assert weights < 0.75 * numbers  # 4-bit weights, but for a few bytes of rounding up


def test_memory_is_used_again_and_nothing_alive_is_overwritten(program):
    program, _ = program
    places, total = plan_memory(program)
    sizes = {name: int(np.prod(t.shape)) for name, t in program.tensors.items()}
    assert total < sum(sizes.values())
    last, alive = {**program.last_use(), program.output: len(program.ops)}, {program.input: -1}
    for i, op in enumerate(program.ops):
        for other in [n for n in alive if last.get(n, -1) >= i]:
            a, b = places[op.output], places[other]
            assert a + sizes[op.output] <= b or b + sizes[other] <= a, (op.output, other)
        alive[op.output] = i


@COMPILER
def test_the_c_computes_the_golden_scores(program, tmp_path):
    program, images = program
    package.write(program, tmp_path / "p", images[:4])
    assert package.compile_and_run(tmp_path / "p") == "4 images, 0 of 20 scores differ"
    found = package.check(tmp_path / "p")
    assert found["differ"] == 0 and "0 of 20" in found["c"]


LEVELS = {
    "binary": ({"_target_": "qexp.quantizers.bwn.BWN", "granularity": "channel"}, 1),
    "k-means": ({"_target_": "qexp.quantizers.kmeans.KMeans", "granularity": "tensor"}, 3),
    "powers of two": ({"_target_": "qexp.quantizers.power_of_two.INQ", "granularity": "tensor"}, 4),
}


@COMPILER
@pytest.mark.parametrize("method", LEVELS)
def test_weights_on_levels_take_their_own_bits(method, quantize, tmp_path):
    torch.manual_seed(0)
    weight, bits = LEVELS[method]
    network = Residual()
    network.conv = nn.Conv2d(8, 64, 3, stride=2)  # enough weights for a table to pay
    network.fc = nn.Linear(64, 5)
    model, images = quantize(network, bits, 8, weight=weight)
    manifest = package.write(lower(model, images[:1]).program, tmp_path / "p", images[:2].numpy())
    (entry,) = (e for e in manifest["weights"] if e["layer"] == "conv")
    assert entry["bits"] == bits and entry["levels"][1] <= 2**bits
    assert package.check(tmp_path / "p")["c"] == "2 images, 0 of 10 scores differ"


@COMPILER
def test_every_operation_has_its_c(quantize, tmp_path):
    torch.manual_seed(0)
    model, images = quantize(Everything(), rules=everything_rules())
    program = lower(model, images[:1]).program
    kinds = {op.kind for op in program.ops}
    assert kinds >= {
        "conv",
        "linear",
        "requantize",
        "clamp",
        "add",
        "concat",
        "max_pool",
        "sum_pool",
        "strided_pad",
        "lookup",
    }
    package.write(program, tmp_path / "p", images[:4].numpy())
    assert "0 of 16 scores differ" in package.compile_and_run(tmp_path / "p")


@COMPILER
def test_a_wrong_score_is_noticed(program, tmp_path):
    program, images = program
    package.write(program, tmp_path / "p", images[:2])
    source = tmp_path / "p" / "c" / "golden.h"
    head, _, tail = source.read_text().rpartition("{{")
    source.write_text(head + "{{1" + tail)
    with pytest.raises(QexpError, match="scores differ"):
        package.compile_and_run(tmp_path / "p")


@pytest.mark.parametrize("name", ["weights.bin", "golden.safetensors", "c/network.c", "program.json"])
@pytest.mark.parametrize("damage", ["edited", "short", "missing"])
def test_a_damaged_package_is_refused_by_file(program, tmp_path, name, damage):
    program, images = program
    package.write(program, tmp_path / "p", images[:1])
    path = tmp_path / "p" / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-3] if damage == "short" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(QexpError, match=name.split("/")[-1]):
        package.read(tmp_path / "p")


def test_another_version_is_refused(program, tmp_path):
    program, images = program
    package.write(program, tmp_path / "p", images[:1])
    path = tmp_path / "p" / package.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 9}))
    with pytest.raises(QexpError, match="of version 9"):
        package.read(tmp_path / "p")
    with pytest.raises(QexpError, match="not a package"):
        package.read(tmp_path)


def test_a_finished_run_is_packaged(run, tmp_path: Path):
    metrics = run("quant=mse", "bits=w4a4", "study=s")
    folder = tmp_path / "runs" / "s" / metrics["point"]
    exported = run("export=package", f"weights={folder}", "verify=32")
    assert exported["status"] == "ok" and exported["value"] == metrics["value"], exported.get("error")
    assert exported["package_bytes"] < 0.5 * exported["weight_bytes_float"]
    found = package.check(folder / "package")
    assert found["differ"] == 0


@COMPILER
@pytest.mark.parametrize("bits", [8, 4])
def test_c_requantizes_as_runtimes_do(bits, deployed, tmp_path):
    torch.manual_seed(0)
    lowered, _, images = deployed(Residual(), bits, bits)
    assert any(op.kind == "requantize" and op.rounding == "float32" for op in lowered.program.ops)
    package.write(lowered.program, tmp_path / "p", images.numpy())
    assert package.check(tmp_path / "p")["differ"] == 0


class Rows(nn.Module):
    """Numbers `[N, 64, 5]` of images `[N, 3, 8, 8]`, one row per pixel, as detectors return them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x):
        return self.conv(x).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("innermost", [False, True], ids=["plain", "channels_last"])
def test_golden_codes_are_those_of_the_program_in_any_memory_layout(quantize, tmp_path, innermost):
    model, images = quantize(Rows())
    program = lower(model, images[:1]).program
    given = images[:2].numpy()
    given = np.ascontiguousarray(given.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) if innermost else given
    package.write(program, tmp_path / "p", given)
    assert package.check(tmp_path / "p")["differ"] == 0
