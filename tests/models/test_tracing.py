"""The graph of a network is found without touching the network: a forward that sets attributes sets them on a copy."""

from __future__ import annotations

import torch
from torch import nn

from qexp.graph import trace


class Counting(nn.Module):
    """Remembers what it saw last, and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.calls = nn.Conv2d(3, 4, 1), nn.ReLU(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen = self.conv(x)
        return self.act(self.seen) if not self.training else self.seen


def test_a_model_that_sets_attributes_is_left_as_it_was():
    model = nn.Sequential(Counting(), Counting())
    model[1].conv.eval()  # a frozen layer
    before = [(m, m.training) for m in model.modules()]
    graph, error = trace(model)
    assert error == "" and [n.target for n in graph.nodes if n.op == "call_module"] == [
        *("0.conv", "0.act", "1.conv", "1.act")
    ]
    assert all(m.calls == 0 and not hasattr(m, "seen") for m in model)
    assert [(m, m.training) for m in model.modules()] == before


def test_layers_and_weights_are_not_copied():
    class Precious(nn.Conv2d):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    Precious.__module__ = "torch.nn.modules.conv"  # a leaf, as all that torch brings along
    graph, error = trace(nn.Sequential(Precious(3, 4, 1), nn.ReLU()))
    assert error == "" and len(graph.nodes) == 4


def test_why_a_network_has_no_graph():
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    model = Branching().train()
    graph, error = trace(model)
    assert graph is None and "TraceError" in error and model.training
