"""Who wins: site defaults, one width for all, named rules in order, then what names layers."""

from __future__ import annotations

import copy

import pytest
import torch

from qexp.errors import QexpError
from qexp.layers.quantized import quantizers
from qexp.network.facts import facts
from qexp.quantizers.uniform import Uniform
from qexp.recipe import Recipe, apply, resolve
from tests.networks import Residual

WEIGHTED = ["stem", "depthwise", "grouped", "conv", "fc"]
UNIFORM = "qexp.quantizers.uniform.Uniform"
ENDS = {"layers": "@ends", "input": {"bits": 8}, "weight": {"bits": 8}}


def test_one_width_for_all(plan):
    found = plan(3, 5)
    assert found.bits("weight") == dict.fromkeys(WEIGHTED, 3) and found.bits("input") == dict.fromkeys(WEIGHTED, 5)
    assert {e.by for e in found} == {"layer_wbit", "layer_abit"}
    assert {e.layer for e in found} == set(WEIGHTED) and {e.site for e in found} == {"input", "weight"}


def test_thirty_two_is_float(plan):
    for value in (32, None):
        found = plan(value, 4)
        assert all(found[name, "weight"].spec is None and found[name, "weight"].bits == 32 for name in WEIGHTED)
        assert all(found[name, "input"].spec is not None for name in WEIGHTED)


def test_a_rule_beats_the_one_width_and_a_later_rule_the_earlier(plan):
    rules = {
        "ends": ENDS,
        "all": {"layers": "*", "weight": {"bits": 6}},
        "stem": {"layers": "stem", "weight": {"bits": 5}},
    }
    found = plan(3, 4, rules=rules)
    assert found.bits("weight") == {"stem": 5, "depthwise": 6, "grouped": 6, "conv": 6, "fc": 6}
    assert found["stem", "input"].bits == 8 and found["conv", "input"].bits == 4
    assert found["stem", "weight"].by == "quant.rules.stem" and found["conv", "weight"].by == "quant.rules.all"


def test_a_rule_edits_only_what_it_names(plan):
    found = plan(rules={"conv": {"layers": "conv", "weight": {"granularity": "tensor"}}})
    assert found["conv", "weight"].spec == {
        "_target_": UNIFORM,
        "signed": True,
        "narrow": True,
        "granularity": "tensor",
    }
    assert found["conv", "weight"].bits == 4 and found["fc", "weight"].spec["granularity"] == "channel"


def test_another_method_takes_no_arguments_of_the_one_before(plan):
    target = "qexp.quantizers.dorefa.DoReFaWeight"
    found = plan(rules={"conv": {"layers": "conv", "weight": {"_target_": target, "variant": "symmetric"}}})
    assert found["conv", "weight"].spec == {"_target_": target, "variant": "symmetric"}


def test_null_leaves_a_tensor_in_float_and_a_later_rule_brings_it_back(plan):
    off = {"layers": "conv", "weight": None, "input": None}
    found = plan(rules={"off": off})
    assert found["conv", "weight"].spec is None and found["conv", "input"].bits == 32
    found = plan(rules={"off": off, "on": {"layers": "conv", "weight": {"bits": 2}}})
    assert found["conv", "weight"].spec["granularity"] == "channel" and found["conv", "weight"].bits == 2
    assert found["conv", "input"].spec is None


def test_a_rule_can_start_from_the_quantizer_of_another_site(plan):
    found = plan(rules={"adds": {"types": ["Add"], "output": {"like": "input", "granularity": "channel"}}})
    assert found["add", "output"].spec == {"_target_": UNIFORM, "symmetric": False, "granularity": "channel"}
    assert found["add", "output"].bits == 4
    listed = plan(abit=[8, 7, 6, 5], rules={"adds": {"types": ["Add"], "output": {"like": "input"}}})
    assert listed["add", "output"].bits == 6, "a list that sets the width does not make the rule idle"
    for wrong in ("output", "weights", 3):
        with pytest.raises(QexpError, match=r"quant.rules.adds.output: like=.* use input or weight"):
            plan(rules={"adds": {"types": ["Add"], "output": {"like": wrong}}})
    with pytest.raises(QexpError, match=r"add has no quantizer there to edit; .*like: input"):
        plan(rules={"adds": {"types": ["Add"], "output": {"granularity": "channel"}}})


def test_what_names_a_folded_batch_norm_is_told_so():
    from qexp.passes.fold_bn import fold_bn

    torch.manual_seed(0)
    model, images = Residual().eval(), torch.randn(2, 3, 8, 8)
    norms = [n for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    fold_bn(model, facts(model, images))
    structure = facts(model, images)
    sites = {"input": {"_target_": UNIFORM}, "weight": {"_target_": UNIFORM}}
    rule = {"layers": norms[0], "output": {"_target_": UNIFORM, "bits": 8}}
    for recipe in (Recipe(sites, {"norm": rule}), Recipe(sites, abit={norms[0]: 4})):
        with pytest.raises(QexpError, match=rf"matches no layer.*{norms[0]} does nothing here.*bn=keep"):
            resolve(model, structure, recipe)
    with pytest.raises(QexpError, match="matches no layer") as plain:
        resolve(model, structure, Recipe(sites, abit={"nowhere": 4}))
    assert "bn=keep" not in str(plain.value)


def test_a_pattern_for_many_layers_leaves_what_a_rule_keeps_in_float(plan):
    rules = {"off": {"layers": "conv", "input": None}}
    found = plan(abit={"*": 5}, rules=rules)
    assert found["conv", "input"].bits == 32 and found["fc", "input"].bits == 5
    with pytest.raises(QexpError, match=r"layer_abit\[conv\]=5: conv has no quantizer on its input"):
        plan(abit={"*": 5, "conv": 5}, rules=rules)


def test_a_removed_rule_decides_nothing(plan):
    assert plan(rules={"ends": None}).bits("weight") == dict.fromkeys(WEIGHTED, 4)


def test_rules_name_types_and_unweighted_layers(plan):
    rules = {
        "adds": {"types": ["Add"], "output": {"_target_": UNIFORM, "bits": 6}},
        "linear": {"types": "Linear", "weight": {"bits": 7}},
    }
    found = plan(rules=rules)
    assert found["add", "output"].bits == 6 and found["fc", "weight"].bits == 7 and found["conv", "weight"].bits == 4


def test_an_operand_of_an_add_is_a_site_of_its_own(plan):
    spec = {"_target_": UNIFORM, "bits": 6}
    both = plan(rules={"adds": {"types": ["Add"], "input": spec}})
    assert both["add", "input.0"].bits == both["add", "input.1"].bits == 6
    one = plan(rules={"adds": {"layers": "add", "input.1": spec}})
    assert one["add", "input.1"].bits == 6
    with pytest.raises(KeyError):
        one["add", "input.0"]


@pytest.mark.parametrize("site", ["weight", "input"])
def test_a_list_has_the_last_word(plan, site):
    widths = [32, 5, 3, 2]
    found = plan(**{"wbit" if site == "weight" else "abit": widths}, rules={"ends": ENDS})
    assert found.bits(site) == {"stem": 32, "depthwise": 5, "grouped": 5, "conv": 3, "fc": 2}
    assert found["stem", site].spec is None and found["fc", site].by == f"layer_{'wa'[site == 'input']}bit[3]"
    other = "input" if site == "weight" else "weight"
    assert found.bits(other) == {"stem": 8, "depthwise": 4, "grouped": 4, "conv": 4, "fc": 8}


def test_dots_repeat_the_entry_before(plan):
    assert plan([6, 3, "..."]).bits("weight") == plan([6, 3, 3, 3]).bits("weight")
    assert plan([6, 5, 4, 3, "..."]).bits("weight") == plan([6, 5, 4, 3]).bits("weight")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([4, 4], r"layer_wbit has 2 entries, but the model has 4 groups: stem, depthwise \+ grouped \+ add, conv, fc"),
        ([4] * 5, "layer_wbit has 5 entries, but the model has 4 groups"),
        (["..."], "'...' repeats the entry before it up to 4 groups, got 0"),
        ([4, 4, 4, 4, 4, "..."], "up to 4 groups, got 5"),
        ([], "layer_wbit has 0 entries"),
        ([4, 4, 4, 4.5], r"layer_wbit\[3\]: got 4.5; allowed are whole numbers of bits 1..16, or 32 for float"),
        ("four", "layer_wbit: got 'four'; allowed are"),
        (True, "layer_wbit: got True"),
        (0, "layer_wbit: got 0"),
        (17, "layer_wbit: got 17; allowed are whole numbers of bits 1..16, or 32 for float"),
        (33, "layer_wbit: got 33"),
        ({"conv": 0}, r"layer_wbit\[conv\]: got 0"),
        ({"cnov": 4}, r"layer_wbit: the pattern 'cnov' matches no layer \(did you mean 'conv'"),
    ],
)
def test_widths_that_are_none(plan, value, message):
    with pytest.raises(QexpError, match=message):
        plan(value)


def test_a_list_needs_groups(plan):
    with pytest.raises(QexpError, match=r"layer_wbit is a list, but this model names no groups"):
        plan([4, 4, 4, 4], groups=None)
    with pytest.raises(QexpError, match=r"model.groups\[3\] = 'head' holds no layer of the model"):
        plan([4, 4, 4, 4], groups=["stem", "depthwise", "conv", "head"])


def test_a_mapping_has_the_last_word_and_later_patterns_win(plan):
    found = plan({"*": 5, "d*": 2, "@last": 7}, rules={"ends": ENDS})
    assert found.bits("weight") == {"stem": 5, "depthwise": 2, "grouped": 5, "conv": 5, "fc": 7}
    assert found["depthwise", "weight"].by == "layer_wbit[d*]"


def test_what_a_mapping_leaves_out_takes_its_rule_or_stays_float(plan):
    found = plan({"conv": 3}, rules={"ends": ENDS})
    assert found.bits("weight") == {"stem": 8, "depthwise": 32, "grouped": 32, "conv": 3, "fc": 8}


def test_first_and_last_are_named_by_the_model_or_by_the_graph(plan):
    found = plan(rules={"ends": ENDS})
    assert [n for n, b in found.bits("weight").items() if b == 8] == ["stem", "fc"]
    found = plan(rules={"ends": ENDS}, first="depthwise", last=["conv", "fc"])
    assert [n for n, b in found.bits("weight").items() if b == 8] == ["depthwise", "conv", "fc"]
    with pytest.raises(QexpError, match=r"model.first = 'stm' is not a layer of the model \(did you mean 'stem'"):
        plan(first="stm")


def test_ends_of_null_are_like_the_rest(plan):
    rule = {"layers": "@ends", "input": {"bits": None}, "weight": {"bits": None}}
    assert plan(3, rules={"ends": rule}).bits("weight") == dict.fromkeys(WEIGHTED, 3)


def test_a_tensor_is_quantized_once(plan):
    found = plan(4, 4, rules={"adds": {"layers": "add", "output": {"_target_": UNIFORM, "bits": 6}}})
    conv = found["conv", "input"]
    assert conv.spec is None and conv.bits == 6 and conv.by == "quantized at add (output)"
    assert found["depthwise", "input"].spec is not None and found["fc", "input"].spec is not None


def test_the_add_that_feeds_a_group_takes_its_input_bits(plan):
    rules = {"adds": {"layers": "add", "output": {"_target_": UNIFORM}}}
    found = plan(4, [8, 6, 3, 5], rules=rules)
    assert found["add", "output"].bits == 3 and found["add", "output"].by == "layer_abit[2]"
    assert found["conv", "input"].by == "quantized at add (output)" and found["conv", "input"].bits == 3


def test_only_one_quantizer_runs_on_that_tensor():
    torch.manual_seed(0)
    model = Residual().eval()
    x = torch.randn(2, 3, 8, 8)
    structure = facts(model, x)
    sites = {"input": {"_target_": UNIFORM}, "weight": None, "bias": None, "output": None}
    rules = {"adds": {"layers": "add", "output": {"_target_": UNIFORM, "bits": 6}}}
    found = resolve(model, structure, Recipe(sites, rules, wbit=32, abit=4))
    apply(model, found, structure)
    names = {(name, site) for name, site, _ in quantizers(model)}
    assert ("add", "output") in names and ("conv", "input") not in names and ("fc", "input") in names


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"layers": "cnv*", "weight": {"bits": 3}},
            r"quant.rules.r: the pattern 'cnv\*' matches no layer.*did you mean 'conv'",
        ),
        ({"layers": "@end", "weight": {"bits": 3}}, "'@end' is not a place; use @first or @last or @ends"),
        ({"layers": "conv", "wieght": {"bits": 3}}, r"unknown key 'wieght' \(did you mean 'weight'"),
        ({"types": ["Conv2D"], "weight": {"bits": 3}}, r"'Conv2D' is not a layer type .*did you mean 'Conv2d'"),
        ({"types": ["Conv1d"], "weight": {"bits": 3}}, r"no layer has a type of \['Conv1d'\]; the model has .*Conv2d"),
        ({"weight": {"bits": 3}}, "it needs `layers` or `types`"),
        ({"layers": "conv", "weight": 3}, r"quant.rules.r.weight=3 is not allowed; use null \(float\) or a mapping"),
        ({"layers": "conv", "weight": {"bits": 40}}, "quant.rules.r.weight.bits: got 40; allowed are"),
        ({"layers": "add", "output": {"bits": 4}}, "add has no quantizer there to edit; name one with _target_"),
        ({"layers": "relu1", "weight": {"bits": 4}}, "quant.rules.r changes nothing: it edits no tensor"),
        ({"layers": "conv"}, "quant.rules.r changes nothing"),
    ],
)
def test_rules_that_say_nothing_sensible(plan, rule, message):
    with pytest.raises(QexpError, match=message):
        plan(rules={"r": rule})


def test_a_rule_that_is_wholly_overruled_is_an_error(plan):
    rules = {"stem": {"layers": "stem", "weight": {"bits": 5}}}
    with pytest.raises(
        QexpError, match=r"quant.rules.stem changes nothing: all it names was decided by layer_wbit\[0\]"
    ):
        plan([4, 4, 4, 4], rules=rules)
    assert plan([4, 4, 4, 4], 4, rules={"ends": ENDS}).bits("weight")["stem"] == 4  # `ends` may be overruled


def test_a_list_cannot_quantize_what_a_rule_leaves_float(plan):
    sites = {"weight": None}
    with pytest.raises(QexpError, match=r"layer_wbit\[0\]=4: stem has no quantizer on its weight"):
        plan([4, 4, 4, 4], sites=sites)


def test_resolving_changes_nothing(network, plan):
    before = copy.deepcopy(network[0].state_dict())
    plan(rules={"ends": ENDS})
    assert all(type(m) is not Uniform for m in network[0].modules())
    assert list(before) == list(network[0].state_dict())


def test_an_operand_that_a_function_computes_has_no_grid_of_the_images():
    from qexp.models.cifar_resnet import CifarResNet

    model, images = CifarResNet(8).eval(), torch.randn(2, 3, 32, 32)
    found = facts(model, images)
    uniform = {"_target_": "qexp.quantizers.uniform.Uniform"}
    rules = {"sums": {"follow": True, "types": ["Add"], "missing": True, "input": dict(uniform)}}
    plan = {
        (e.layer, e.site): e.spec
        for e in resolve(model, found, Recipe(sites={"input": uniform, "weight": uniform}, wbit=8, abit=8, rules=rules))
    }
    assert found.sources["layer2.0.add"][1] == found.sources["conv1"][0] == ()  # both are known to come from no layer
    assert "share" not in plan["layer2.0.add", "input.1"] and "share" not in plan["conv1", "input"]
