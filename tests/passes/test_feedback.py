"""GPTQ, GPFQ and Qronos: published vectors, convolutions as matrices, layers that end better than with nearest roundings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.passes.feedback.gpfq import GPFQ, gpfq
from qexp.passes.feedback.gptq import GPTQ, gptq
from qexp.passes.feedback.grams import Grams, columns, rows
from qexp.passes.feedback.qronos import Qronos, qronos

S, M = 0.3, 3
X = torch.tensor([[1, 1.9, 0, -1], [0.5, 1.5, 1, -0.5], [1.9, -1, 0.5, 1], [0, 1, -1.9, 0.5]]).double()
SEEN = 0.8 * torch.round(X / 0.8)
W = torch.tensor([[0.83, -0.42, 0.29, 0.62]]).double()
OTHER = torch.tensor([[0.77, 0.82, 0.17, 0.69]]).double()


def level(column: Tensor, _: int = 0) -> Tensor:
    return S * torch.round(column / S).clamp(-M, M)


def codes(values: Tensor) -> list[int]:
    return (values / S).round().int().flatten().tolist()


def error(w: Tensor, q: Tensor, x: Tensor = X, seen: Tensor = X) -> float:
    return float((w @ x - q @ seen).square().sum())


def test_the_problem():
    h = X @ X.T
    assert h.diagonal().tolist() == pytest.approx([5.61, 3.75, 5.86, 4.86]) and float(h[0, 1]) == pytest.approx(3.85)
    assert SEEN[0].tolist() == pytest.approx([0.8, 1.6, 0, -0.8])
    nearest = level(W)
    assert codes(nearest) == [3, -1, 1, 2]
    assert error(W, nearest) == pytest.approx(0.145759, abs=1e-6)
    assert error(W, nearest, X, SEEN) == pytest.approx(0.361099, abs=1e-6)


def test_gptq_vectors():
    gram = 2 * X @ X.T / 4
    found = gptq(W, gram, level)
    assert codes(found) == [3, -2, 1, 2] and error(W, found) == pytest.approx(0.047059, abs=1e-6)
    dead = X.clone()
    dead[2] = 0
    assert codes(gptq(W, 2 * dead @ dead.T / 4, level)) == [3, -2, 0, 2]
    assert error(OTHER, level(OTHER)) == pytest.approx(0.302579, abs=1e-6)
    for options, expected, size in (
        ({}, [3, 2, 1, 2], 0.167579),
        ({"by_size": True}, [2, 3, 1, 3], 0.226559),
        ({"damp": 1.0}, [3, 3, 1, 2], 0.302579),
    ):
        found = gptq(OTHER, gram, level, **options)
        assert codes(found) == expected and error(OTHER, found) == pytest.approx(size, abs=1e-6)


def test_gpfq_vectors():
    found = gpfq(W, SEEN @ X.T, SEEN @ SEEN.T, level)
    assert codes(found) == [3, -1, 1, 3] and error(W, found, X, SEEN) == pytest.approx(0.321259, abs=1e-6)
    found = gpfq(W, X @ X.T, X @ X.T, level)
    assert codes(found) == [3, -2, 1, 2] and error(W, found) == pytest.approx(0.047059, abs=1e-6)
    found = gpfq(OTHER, SEEN @ X.T, SEEN @ SEEN.T, level)
    assert codes(found) == [3, 3, 1, 3] and error(OTHER, found, X, SEEN) == pytest.approx(0.235199, abs=1e-6)
    assert error(OTHER, level(OTHER), X, SEEN) == pytest.approx(0.350399, abs=1e-6)


def test_gpfq_is_its_memory_form():
    torch.manual_seed(0)
    w, x = torch.randn(3, 7).double(), torch.randn(7, 40).double()
    seen = x + 0.2 * torch.randn_like(x)
    found, u, expected = (
        gpfq(w, seen @ x.T, seen @ seen.T, level),
        torch.zeros(3, 40).double(),
        torch.empty(3, 7).double(),
    )
    for t in range(7):
        wanted = u + w[:, t, None] * x[t]
        expected[:, t] = level((wanted @ seen[t]) / seen[t].square().sum())
        u = wanted - expected[:, t, None] * seen[t]
    assert codes(found) == codes(expected)


def test_gpfq_leaves_inputs_that_are_always_zero_at_zero():
    seen = SEEN.clone()
    seen[1] = 0
    assert codes(gpfq(W, seen @ X.T, seen @ seen.T, level))[1] == 0


def test_qronos_vectors():
    found = qronos(W, SEEN @ X.T, SEEN @ SEEN.T, level, damp=0.0)
    assert codes(found) == [3, -1, 1, 3] and error(W, found, X, SEEN) == pytest.approx(0.321259, abs=1e-6)
    assert codes(qronos(W, X @ X.T, X @ X.T, level, damp=0.0)) == [3, -2, 1, 2]
    assert codes(qronos(OTHER, SEEN @ X.T, SEEN @ SEEN.T, level, damp=0.0)) == [3, 3, 0, 2]


def test_qronos_corrects_the_columns_after_the_first():
    seen: list[Tensor] = []

    def watched(column: Tensor, place: int) -> Tensor:
        seen.append(column.clone())
        return level(column)

    qronos(W, SEEN @ X.T, SEEN @ SEEN.T, watched, damp=0.0)
    assert float(seen[0]) == pytest.approx(1.145208, abs=1e-6) and float(seen[1]) == pytest.approx(-0.2526014, abs=1e-6)


def test_each_beats_nearest_rounding_on_average():
    torch.manual_seed(0)
    sums = torch.zeros(4)
    for _ in range(20):
        x = torch.randn(24, 8).double() @ torch.randn(8, 200).double() + 0.3 * torch.randn(24, 200).double()
        w, seen = 0.4 * torch.randn(4, 24).double(), 0.5 * torch.round(x / 0.5)
        cross, gram = seen @ x.T, seen @ seen.T
        found = (
            level(w),
            gptq(w, gram, level),
            gpfq(w, cross, gram, level),
            qronos(w, cross, gram, level),
        )
        sums += torch.tensor([error(w, q, x, seen) for q in found])
    assert (sums[1:] < 0.8 * sums[0]).all()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), bias=False),
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False),
        nn.Linear(5, 3, bias=False),
    ],
)
def test_a_layer_is_the_product_of_its_rows_and_columns(layer):
    x = torch.randn(2, 7, 5) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 6, 5)
    y = layer(x)
    product = rows(layer, layer.weight) @ columns(layer, x)  # [groups, outputs, positions]
    channels_last = y if isinstance(layer, nn.Linear) else y.movedim(1, -1)
    assert torch.allclose(product.flatten(0, 1).T.reshape(channels_last.shape), channels_last, atol=1e-5)


def test_grams_give_the_error_of_the_layer():
    layer = nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False)
    x, seen = torch.randn(3, 4, 6, 6), torch.randn(3, 4, 6, 6)
    other = layer.weight.detach() + 0.1 * torch.randn_like(layer.weight)
    grams = Grams.empty(layer)
    for part in (slice(0, 2), slice(2, 3)):
        grams.add(columns(layer, x[part]), columns(layer, seen[part]))
    y, off = layer(x), nn.functional.conv2d(seen, other, padding=1, groups=2)
    exact = float(((y - off).square().sum() / y.square().sum()).detach())
    assert grams.error(*(rows(layer, w.detach().double()) for w in (layer.weight, other))) == pytest.approx(
        exact, rel=1e-4
    )
    assert grams.positions == 3 * 36


@pytest.mark.parametrize("quant", ["gptq", "gpfq", "qronos"])
def test_a_run_ends_with_smaller_layer_errors_and_moved_roundings(run, quant):
    metrics = run(f"quant={quant}", "bits=w3a8", "study=s")
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["layer_error"] < 0.9 * metrics["layer_error_nearest"]
    assert metrics["roundings_moved"] > 5 and metrics["rounded_layers"] == 5


def test_positions_may_be_a_sample_and_the_float_inputs_theirs(run):
    some = run("quant=gptq", "bits=w3a8", "study=s", "quant.passes.feedback.positions=300")
    floating = run("quant=gptq", "bits=w3a8", "study=s", "quant.passes.feedback.input=float")
    sized = run("quant=gpfq", "bits=w3a8", "study=s", "quant.passes.feedback.order=size")
    for metrics in (some, floating, sized):
        assert metrics["status"] == "ok", metrics["error"]
        assert metrics["layer_error"] < metrics["layer_error_nearest"]


def test_layers_without_such_a_quantizer_are_named(run):
    refused = run("quant=minmax", "+quant.passes.feedback._target_=qexp.passes.feedback.gpfq.GPFQ")
    assert refused["status"] == "failed" and "found no weight with a LearnedRounding" in refused["error"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPTQ(damp=0),
        lambda: GPTQ(order="random"),
        lambda: GPTQ(input="both"),
        lambda: GPFQ(positions=0),
        lambda: GPFQ(order="up"),
        lambda: Qronos(memory_mb=-1),
    ],
)
def test_what_is_not_allowed_is_refused(make):
    with pytest.raises(QexpError, match=r"(GPTQ|GPFQ|Qronos): .* is not allowed; use"):
        make()
