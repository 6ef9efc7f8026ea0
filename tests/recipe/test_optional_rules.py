"""Rules that a recipe ships for any network, and widths that tensors quantized at their source pass to their readers."""

import pytest

from qexp.errors import QexpError
from qexp.network.facts import facts
from qexp.recipe import Recipe, resolve

UNIFORM = {"_target_": "qexp.quantizers.uniform.Uniform", "granularity": "tensor"}


def plan_of(model, images, **recipe):
    sites = {"input": None, "weight": UNIFORM, "bias": None, "output": UNIFORM}
    return resolve(model, facts(model, images[:1]), Recipe(sites, **recipe))


@pytest.fixture
def images():
    import torch

    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_an_optional_rule_may_find_nothing(residual, images):
    rule = {"types": ["AvgPool2d"], "output": {"granularity": "tensor"}}
    with pytest.raises(QexpError, match="no layer has a type of"):
        plan_of(residual, images, rules={"pools": rule})
    plan_of(residual, images, rules={"pools": rule | {"optional": True}})
    with pytest.raises(QexpError, match="matches no layer"):
        plan_of(residual, images, rules={"deep": {"layers": "stage.*", "output": None}})
    plan_of(residual, images, rules={"deep": {"layers": "stage.*", "output": None, "optional": True}})


def test_an_input_quantized_at_its_source_has_the_width_of_the_source(residual, images):
    rules = {"bn": {"types": ["BatchNorm2d"], "output": {"granularity": "tensor", "bits": 6}}}
    plan = plan_of(residual, images, wbit=8, abit=5, rules=rules)
    assert plan["depthwise", "input"].bits == 6 and plan["depthwise", "input"].spec is None
    assert plan["conv", "input"].bits == 32, "the add between is not quantized"


def test_named_widths_reach_the_output_that_feeds_the_layer(residual, images):
    rules = {"bn": {"types": ["BatchNorm2d"], "output": {"granularity": "tensor", "bits": 8}}}
    plan = plan_of(residual, images, wbit=8, abit={"depthwise": 4}, rules=rules)
    assert plan["bn1", "output"].bits == plan["depthwise", "input"].bits == 4


def test_a_width_that_is_none_is_refused(residual, images):
    sites = {"input": None, "weight": UNIFORM, "bias": UNIFORM | {"bits": [8, 8]}, "output": None}
    with pytest.raises(QexpError, match=r"quant.bias.bits: got \[8, 8\]"):
        resolve(residual, facts(residual, images[:1]), Recipe(sites))
