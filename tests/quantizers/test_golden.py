"""Golden numbers: what every quantizer of `conf/quant` makes of two fixed tensors, at 8, 4 and 2 bits, as readable JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qexp.errors import QexpError
from tests.quantizers.test_contract import RECIPES

FILE = Path(__file__).parents[1] / "golden" / "quantizers.json"
WRITE = os.environ.get("QEXP_GOLDEN") == "write"
CLOSE = 1e-4  # relative: sums of float32 differ that much between processors


def tensor(site: str) -> Tensor:
    """Returns a bell-shaped tensor that arithmetic makes, the same everywhere; as after a ReLU where it is an input."""
    shape = (6, 4, 3, 3) if site in ("weight", "bias") else (4, 6, 8, 8)
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    parts = [torch.sin(i * 12.9898 + k * 78.233) * 43758.5453 for k in range(6)]
    x = (sum(p - p.floor() for p in parts) - 3).reshape(shape).float()
    return x.relu() if site == "input" else x


def numbers(fitted, site: str, spec: dict) -> dict[str, dict[str, float]]:
    """Returns scale, error and codes by width; widths that the method is not made for are left out."""
    out: dict[str, dict[str, float]] = {}
    x = tensor(site)
    for bits in (8, 4, 2, 1):
        torch.manual_seed(0)
        try:
            q = fitted(spec, bits, x, site).eval()
        except QexpError:
            continue
        y, codes = q(x).detach().double(), q.codes(x).double().flatten()
        place = torch.arange(1, codes.numel() + 1, dtype=torch.float64)
        out[f"{bits} bits"] = {
            "scale": float(torch.as_tensor(q.scale).detach().double().mean()),
            "error": float(((y - x) ** 2).mean() / (x.double() ** 2).mean()),
            "codes": float((codes * place).sum() / place.sum()),
            "levels": int(codes.unique().numel()),
        }
    return {bits: {name: float(f"{value:.6g}") for name, value in row.items()} for bits, row in out.items()}


def test_the_file_holds_no_recipe_that_is_gone():
    if WRITE:
        pytest.skip("the numbers are being written")
    assert set(json.loads(FILE.read_text())) <= set(RECIPES), "make golden writes the numbers anew"


@pytest.mark.skipif(not WRITE, reason="QEXP_GOLDEN=write is not set")
def test_write(fitted):
    made = {name: numbers(fitted, site, spec) for name, (site, spec) in sorted(RECIPES.items())}
    rows = (
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"    {json.dumps(bits)}: {json.dumps(row)}" for bits, row in widths.items())
        + "\n  }"
        for name, widths in made.items()
    )
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


@pytest.mark.parametrize("name", RECIPES)
def test_the_numbers_stay(name, fitted):
    if WRITE:
        pytest.skip("the numbers are being written")
    golden = json.loads(FILE.read_text()).get(name)
    if golden is None:
        pytest.skip("a new method: make golden writes its numbers down")
    found = numbers(fitted, *RECIPES[name])
    assert found.keys() == golden.keys()
    moved = [
        f"{bits} {key}: {golden[bits][key]} -> {value}"
        for bits, row in found.items()
        for key, value in row.items()
        if value != pytest.approx(golden[bits][key], rel=CLOSE, abs=1e-7)
    ]
    assert not moved, (
        f"{name}: {'; '.join(moved)}. If the change is intended: make golden, and a line under Numerics in the changelog"
    )
