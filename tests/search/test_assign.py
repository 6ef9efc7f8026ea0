"""The integer programme finds what trying every choice finds; budgets read as documented; curvature is the exact one."""

import itertools

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qexp.errors import QexpError
from qexp.network.cost import LayerCost
from qexp.search.assign import assign, monotone
from qexp.search.budget import limits, spent

LAYERS = {"a": LayerCost(10, 100, 8), "b": LayerCost(40, 50, 16), "c": LayerCost(6, 300, 4)}
WIDTHS = (2, 4, 8)
KEYS = [("a", "weight"), ("a", "input"), ("b", "weight"), ("c", "input")]
FIXED = {
    ("a", "weight"): 4,
    ("a", "input"): 4,
    ("b", "weight"): 4,
    ("b", "input"): 8,
    ("c", "weight"): 8,
    ("c", "input"): 4,
}


def by_site(widths):
    return tuple({n: b for (n, s), b in widths.items() if s == site} for site in ("weight", "input"))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=12, max_size=12), st.floats(0.55, 1.5), st.floats(0.55, 1.5))
def test_no_choice_within_the_budget_is_better(values, size, work):
    rows = [(n, s, b) for n, s in KEYS for b in WIDTHS]
    table = pd.DataFrame([(*r, v) for r, v in zip(rows, values)], columns=["layer", "site", "bits", "divergence"])
    worth = monotone(table)
    now = {k: spent(k, *by_site(FIXED), LAYERS) for k in ("weight_bytes", "bops")}
    bounds = {"weight_bytes": size * now["weight_bytes"], "bops": work * now["bops"]}
    best = None
    for widths in itertools.product(WIDTHS, repeat=len(KEYS)):
        choice = dict(zip(KEYS, widths))
        if all(spent(k, *by_site({**FIXED, **choice}), LAYERS) <= bounds[k] for k in bounds):
            total = sum(worth[n, s, b] for (n, s), b in choice.items())
            best = total if best is None else min(best, total)
    if best is None:
        with pytest.raises(QexpError, match=r"search"):
            assign(table, FIXED, LAYERS, bounds)
        return
    choice = assign(table, FIXED, LAYERS, bounds)
    assert set(choice) == set(KEYS)
    for kind, bound in bounds.items():
        assert spent(kind, *by_site({**FIXED, **choice}), LAYERS) <= bound * (1 + 1e-6)
    assert sum(worth[n, s, b] for (n, s), b in choice.items()) == pytest.approx(best, abs=1e-5)


def test_more_bits_never_count_as_worse():
    table = pd.DataFrame({"layer": "a", "site": "weight", "bits": [2, 4, 8], "divergence": [0.1, 0.3, 0.2]})
    assert monotone(table) == {("a", "weight", 2): 0.3, ("a", "weight", 4): 0.3, ("a", "weight", 8): 0.2}


def test_budgets_are_numbers_the_cost_at_hand_or_a_share_of_it():
    wbits, abits = by_site(FIXED)
    assert spent("weight_bytes", wbits, abits, LAYERS) == (10 * 4 + 40 * 4 + 6 * 8) / 8
    assert spent("bops", wbits, abits, LAYERS) == 100 * 16 + 50 * 32 + 300 * 32
    assert spent("mean_wbit", wbits, abits, LAYERS) == pytest.approx((10 * 4 + 40 * 4 + 6 * 8) / 56)
    found = limits({"weight_bytes": "same", "bops": "50%", "mean_abit": 5, "mean_wbit": None}, wbits, abits, LAYERS)
    assert found == {"weight_bytes": 31.0, "bops": 6400.0, "mean_abit": 5.0}


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({"bytes": 3}, "budget.bytes is not allowed"),
        ({"bops": "few"}, "a number, same"),
        ({"bops": 0}, "above 0"),
        ({}, "names no limit"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(budget, says):
    with pytest.raises(QexpError, match=says):
        limits(budget, *by_site(FIXED), LAYERS)


def test_a_budget_below_the_narrowest_widths_says_what_the_least_is():
    table = pd.DataFrame(
        [(n, s, b, 1 / b) for n, s in KEYS for b in WIDTHS], columns=["layer", "site", "bits", "divergence"]
    )
    with pytest.raises(QexpError, match=r"already cost 18\.5"):
        assign(table, FIXED, LAYERS, {"weight_bytes": 10})


class Linear(nn.Module):
    """Scores [N, 3] of images [N, 1, 2, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x.flatten(1))


def test_curvature_of_a_layer_has_no_share_of_another():
    """Two layers in a row: each trace is that of its own block of the exact Hessian."""
    from qexp.search.hessian import traces
    from tests.search.test_shelf_and_replay import shelved

    torch.manual_seed(3)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x.flatten(1))))

    model, images = Two(), torch.randn(32, 1, 2, 2)
    x = images.flatten(1).double()
    parts = {n: p.detach().double() for n, p in model.named_parameters()}

    def scores(w):
        now = parts | w
        return torch.tanh(x @ now["a.weight"].T + now["a.bias"]) @ now["b.weight"].T + now["b.bias"]

    p = torch.softmax(scores({}), 1)
    shelf, _ = shelved(model, images)
    found = traces(shelf, images, probes=400, progress=False)
    for name in ("a", "b"):

        def loss(w, name=name):
            return -(p * torch.log_softmax(scores({f"{name}.weight": w}), 1)).sum() / len(x)

        weight = parts[f"{name}.weight"]
        exact = torch.autograd.functional.hessian(loss, weight).reshape(weight.numel(), -1).trace() / weight.numel()
        assert found[name] == pytest.approx(float(exact), rel=0.1), name


def test_curvature_is_the_hessians():
    from qexp.search.hessian import traces
    from tests.search.test_shelf_and_replay import shelved

    torch.manual_seed(0)
    model, images = Linear(), torch.randn(16, 1, 2, 2)
    x, w, b = images.flatten(1).double(), model.fc.weight.detach().double(), model.fc.bias.detach().double()
    p = torch.softmax(x @ w.T + b, 1)

    def loss(weight):
        return -(p * torch.log_softmax(x @ weight.T + b, 1)).sum() / len(x)

    exact = torch.autograd.functional.hessian(loss, w).reshape(12, 12).trace() / 12
    shelf, _ = shelved(model, images)
    assert traces(shelf, images, probes=400, batch=8, progress=False)["fc"] == pytest.approx(float(exact), rel=0.1)
