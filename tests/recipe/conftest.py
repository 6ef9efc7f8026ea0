"""A network, its facts, and a plan from a few words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qexp.network.facts import Facts, facts
from qexp.recipe import Plan, Recipe, resolve
from tests.networks import Residual

UNIFORM = "qexp.quantizers.uniform.Uniform"
SITES = {
    "input": {"_target_": UNIFORM, "symmetric": False},
    "weight": {"_target_": UNIFORM, "signed": True, "narrow": True, "granularity": "channel"},
    "bias": None,
    "output": None,
}
ENDS = {"layers": "@ends", "input": {"bits": 8}, "weight": {"bits": 8}}
GROUPS = ["stem", ["depthwise", "grouped", "add"], "conv", "fc"]


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, Facts]:
    torch.manual_seed(0)
    model = Residual().eval()
    return model, facts(model, torch.randn(2, 3, 8, 8))


@pytest.fixture
def plan(network) -> Callable[..., Plan]:
    """Call with what differs: wbit, abit, rules, sites, groups, first, last, plan."""

    def made(wbit: Any = 4, abit: Any = 4, *, sites: dict | None = None, **options: Any) -> Plan:
        recipe = Recipe(SITES | (sites or {}), wbit=wbit, abit=abit, **({"groups": GROUPS} | options))
        return resolve(*network, recipe)

    return made
