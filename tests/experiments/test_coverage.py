"""The coverage table: a cell that was reached once is reached again, and a failure of one network is a row."""

import json
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from experiments.coverage import __main__ as coverage
from experiments.coverage.networks import TIMM, Network, networks
from experiments.coverage.one import COLUMNS, cells
from tests.networks import FunctionalDigits

HELD = coverage.read()
FAST = ["conf/digits_cnn", "conf/toynet"]
SLOW = ["conf/resnet20", "conf/squeezenet1_1", "timm/resnet18", "timm/lcnet_050"]


@pytest.mark.parametrize("key", [*FAST, *(pytest.param(key, marks=pytest.mark.slow) for key in SLOW if key in HELD)])
def test_no_cell_is_lost(key):
    if key.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    network = Network(*key.split("/"))
    row = cells(*network.build(), network.scores, large=10**9)
    has_onnx = find_spec("onnx") and find_spec("onnxruntime")  # an extra
    tried = [column for column in COLUMNS if column != "onnx" or has_onnx]
    lost = {c: row[c] for c in tried if coverage.reached(HELD[key], c) and not coverage.reached(row, c)}
    assert not lost


def test_every_row_is_a_network_and_every_cell_a_number_or_a_reason():
    keys = {network.key for network in networks()}
    assert HELD.keys() <= keys and len(TIMM) == len(set(TIMM)) == 40
    for row in HELD.values():
        assert set(row) == set(COLUMNS) and all(isinstance(v, int | float) or v for v in row.values())


def test_a_network_of_functions_reaches_every_column():
    torch.manual_seed(0)
    row = cells(FunctionalDigits(), torch.randn(4, 1, 8, 8))
    assert all(coverage.reached(row, column) for column in COLUMNS if column != "onnx"), row


class Refused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x):
        return torch.cumsum(self.conv(x), 1).mean((2, 3))


def test_a_cell_without_a_number_says_why():
    row = cells(Refused(), torch.randn(4, 1, 8, 8))
    assert row["quantize"] == 0 and "cumsum" in row["lower"] and row["equal"] == row["c99"] == "not lowered"
    assert coverage.reached(row, "quantize") and not coverage.reached(row, "lower")


def test_the_page_counts_and_numbers_the_reasons():
    rows = {"conf/a": dict.fromkeys(COLUMNS, 0), "conf/b": dict.fromkeys(COLUMNS, "it takes more than 3 s")}
    page = coverage.page(rows | {"timm/c": dict.fromkeys(COLUMNS, 0) | {"equal": 4}})
    assert "| conf | " + " | ".join(["1 of 2"] * 6) in page and "| timm | 1 of 1 | 1 of 1 | 1 of 1 | 0 of 1 |" in page
    assert page.count("it takes more than 3 s") == 1 and json.dumps(rows)
