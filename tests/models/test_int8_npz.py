"""Weights of 8-bit codes: the network computes with codes, scale and bias; files that do not fit are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qexp.errors import QexpError
from qexp.models.weights import load_weights


def net() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, eps=0.02)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(16, 2)
    ).eval()


def arrays(per_channel: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    out = {}
    for name, shape in (("0", (6, 3, 3, 3)), ("3", (4, 6, 1, 1)), ("5", (2, 16))):
        out[f"{name}.q"] = rng.integers(-128, 128, shape).astype(np.int8)
        out[f"{name}.s"] = rng.random(shape[0]) / 100 if per_channel else np.float64(0.01)
        out[f"{name}.b"] = rng.standard_normal(shape[0]).astype(np.float32)
    return out


def file(tmp_path, **changes):
    found = {k: v for k, v in {**arrays(), **changes}.items() if v is not None}
    np.savez(tmp_path / "w.npz", **found)
    return tmp_path / "w.npz"


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_network_computes_codes_times_scale_plus_bias(tmp_path, per_channel):
    model, held = net(), arrays(per_channel)
    np.savez(tmp_path / "w.npz", **held)
    assert load_weights(model, tmp_path / "w.npz").kind == "file"

    def layer(name):
        scale = np.asarray(held[f"{name}.s"]).reshape(-1, *[1] * (held[f"{name}.q"].ndim - 1))
        return torch.tensor(held[f"{name}.q"] * scale), torch.tensor(held[f"{name}.b"]).double()

    x = torch.randn(5, 3, 4, 4)
    expected = F.conv2d(F.conv2d(x.double(), *layer("0")).relu(), *layer("3"))
    expected = F.linear(expected.flatten(1), *layer("5"))
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    unit = model[1](torch.full((1, 6, 1, 1), 2.0)).flatten() - model[1].bias
    torch.testing.assert_close(unit, torch.full((6,), 2.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"3.b": None}, "lacks 3.b"),
        ({"extra": np.zeros(3)}, "holds extra|lacks"),
        ({"5.q": None, "5.s": None, "5.b": None}, "layer 5 is in one of them only"),
        ({"7.q": np.zeros((1, 1), np.int8), "7.s": np.ones(1), "7.b": np.zeros(1)}, "layer 7 is in one of them only"),
        ({"3.q": np.zeros((4, 6, 3, 3), np.int8)}, r"3 is int8 \[4, 6, 3, 3\].*int8 \[4, 6, 1, 1\] and 4"),
        ({"3.q": np.zeros((4, 6, 1, 1), np.uint8)}, "3 is uint8"),
        ({"3.s": np.ones(3)}, "3 has 3 scales; 1 or 4"),
    ],
)
def test_files_that_do_not_fit_are_named_and_the_model_stays(tmp_path, changes, message):
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(QexpError, match=message):
        load_weights(model, file(tmp_path, **changes))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_bias_without_a_place_for_it_is_an_error(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU())
    kept = {k: v for k, v in arrays().items() if k.startswith("0.")}
    np.savez(tmp_path / "w.npz", **kept)
    with pytest.raises(QexpError, match="neither a bias nor a batch norm"):
        load_weights(model, tmp_path / "w.npz")


def test_damaged_files_are_named(tmp_path):
    path = file(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(QexpError, match="damaged or truncated"):
        load_weights(net(), path)
