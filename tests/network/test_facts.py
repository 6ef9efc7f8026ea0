"""The graph of a network is found without touching the network: a forward that sets attributes sets them on a copy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qexp.network.facts import facts
from qexp.network.recorder import record

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    """Remembers what it saw last, how often, and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.calls = nn.Conv2d(3, 3, 1), nn.ReLU(), 0
        self.register_buffer("counted", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.counted += 1
        self.seen = self.conv(x)
        return self.act(self.seen) if not self.training else self.seen


class Held(nn.Module):
    """Blocks in a list, a dictionary and a bare module."""

    def __init__(self) -> None:
        super().__init__()
        self.listed, self.named = nn.ModuleList([Counting()]), nn.ModuleDict({"a": Counting()})
        self.bare = nn.Module()
        self.bare.block = Counting()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bare.block(self.named["a"](self.listed[0](x)))


@pytest.mark.parametrize(
    ("make", "paths"),
    [
        (lambda: nn.Sequential(Counting(), Counting()), ("0", "1")),
        (Held, ("listed.0", "named.a", "bare.block")),
    ],
    ids=["sequential", "held"],
)
def test_a_model_that_sets_attributes_is_left_as_it_was(make, paths):
    model = make()
    blocks = [model.get_submodule(path) for path in paths]
    blocks[1].conv.eval()  # a frozen layer
    before = [(m, m.training) for m in model.modules()]
    seen = record(model, X)
    assert seen.error == ""
    assert [s.module for s in seen.graph.steps if s.module] == [
        f"{path}.{layer}" for path in paths for layer in ("conv", "act")
    ]
    assert all(m.calls == m.counted == 0 and not hasattr(m, "seen") for m in blocks)
    assert [(m, m.training) for m in model.modules()] == before


def test_layers_and_weights_are_not_copied():
    class Precious(nn.Conv2d):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    Precious.__module__ = "torch.nn.modules.conv"  # a leaf, as all that torch brings along
    seen = record(nn.Sequential(Precious(3, 4, 1), nn.ReLU()), X)
    assert seen.error == "" and [s.name for s in seen.graph.steps] == ["input", "0", "1", "output"]


def test_why_a_network_has_no_graph():
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    model = Branching().train()
    seen = record(model, X)
    assert seen.graph is None and "the calls depend on the images" in seen.error and model.training


def test_a_layer_called_twice_goes_into_a_relu_only_if_both_calls_do():
    class Twice(nn.Module):
        def __init__(self, last: nn.Module) -> None:
            super().__init__()
            self.conv, self.act, self.last = nn.Conv2d(3, 3, 1), nn.ReLU(), last

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.conv(self.act(self.conv(x))))

    x = torch.zeros(1, 3, 2, 2)
    assert facts(Twice(nn.Sigmoid()), x).followed_by_relu == frozenset()
    assert facts(Twice(nn.ReLU()), x).followed_by_relu == {"conv"}
