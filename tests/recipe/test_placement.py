"""Where PACT-Quantization and Quantized_ResNet put quantizers, and what their bit lists mean, tensor by tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from hydra.utils import instantiate

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.layers import check_all_ran, quantizers
from qexp.network.facts import facts
from qexp.recipe import apply, resolve
from qexp.run import pipeline
from qexp.run.settings import read

LISTS = {  # layer_abit, layer_wbit as published
    "toynet_cfg1": ([32] + [8] * 10 + [32, 32], [32] + [8] * 10 + [16, 16]),
    "toynet_cfg1s": ([32] + [8] * 11 + [16], [8] * 13),
    "toynet_cfg2": ([32] + [8] * 10 + [32, 32], [32, 8] + [6] * 6 + [8] * 3 + [16, 16]),
    "toynet_cfg3": ([32, 8] + [6] * 9 + [32, 32], [32, 8] + [6] * 9 + [16, 16]),
}


@pytest.fixture(scope="module")
def planned(compose):
    """Call with overrides; returns model, facts, plan and {(layer, site): bits} of what is quantized."""
    known = {}

    def plan(*overrides: str):
        cfg = compose(*overrides)
        key = str(cfg.model.net)
        if key not in known:
            torch.manual_seed(0)
            model = instantiate(cfg.model.net).eval()
            known[key] = model, facts(model, torch.randn(1, 3, 32, 32))
        model, structure = known[key]
        made = resolve(model, structure, pipeline.recipe(read(cfg)))
        return model, structure, made, {(e.layer, e.site): e.bits for e in made if e.spec is not None}

    return plan


@pytest.mark.parametrize("name", LISTS)
def test_toynet_lists_are_those_published_and_reach_their_tensors(planned, compose, name):
    abit, wbit = LISTS[name]
    cfg = compose(f"experiment={name}")
    assert list(cfg.layer_abit) == abit and list(cfg.layer_wbit) == wbit and len(abit) == 13
    *_, bits = planned(f"experiment={name}")

    def expect(layer: str, site: str, width: int) -> None:
        assert bits.get((layer, site), 32) == width, (layer, site)

    expect("conv1", "input", abit[0])
    expect("bn1", "output", abit[1])
    for i in range(10):
        block, unit = f"blocks.{i}", i + 1
        expect(f"{block}.expand", "input", abit[unit])
        expect(f"{block}.project", "input", abit[unit])
        expect(f"{block}.add", "output", abit[unit + 1])
        for layer in ("depthwise", "expand", "project"):
            expect(f"{block}.{layer}", "weight", wbit[unit])
    for i in (
        1,
        7,
    ):  # the strided blocks: batch norm, then a convolution of its wide result, then the block's own tensor
        expect(f"blocks.{i}.down.conv", "input", 32)
        expect(f"blocks.{i}.down.conv", "output", abit[i + 1])
        expect(f"blocks.{i}.down.conv", "weight", wbit[i + 1])
    expect("bn2", "output", abit[12])
    expect("pool", "output", abit[12])
    expect("conv2", "weight", wbit[11])
    expect("linear", "weight", wbit[12])


def test_mobilenetv2_places(planned):
    model, _, plan, bits = planned("experiment=mobilenetv2_cfg1s")
    assert ("conv1", "input") not in bits and bits["conv1", "weight"] == 8
    assert bits["relu1", "output"] == 8 and bits["pool", "output"] == 16 and bits["linear", "weight"] == 8
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        assert bits[f"{name}.conv2", "input"] == bits[f"{name}.conv3", "input"] == 8
        if block.residual:
            assert bits[f"{name}.add", "output"] == bits[f"{name}.shortcut.1", "output"] == 8
            assert (f"{name}.bn3", "output") not in bits, "the last convolution of a block is quantized after the sum"
        else:
            assert bits[f"{name}.bn3", "output"] == 8
        assert (f"{name}.conv1", "input") not in bits, "a tensor is quantized once"
    assert plan["linear", "input"].by == "quantized at pool (output)"


def test_the_branch_quantizer_is_a_switch(planned):
    on = planned("experiment=mobilenetv2_uniform")[3]
    off = planned("experiment=mobilenetv2_uniform", "quant.rules.branch=null")[3]
    assert {layer for layer, site in set(on) - set(off)} == {n for n, _ in on if n.endswith("shortcut.1")} != set()


@pytest.mark.parametrize("method", ["dorefa", "pact", "mpact"])
@pytest.mark.parametrize(("model", "first"), [("mobilenetv2", "blocks.0.conv1"), ("resnet20", "layer1.0.conv1")])
def test_uniform_lists(planned, model, first, method):
    *_, bits = planned(f"model={model}", f"quant=placed/{model}/{method}", f"bits=placed/{model}/uniform6")
    assert bits[first, "weight"] == 6 and ("conv1", "input") not in bits
    assert bits.get(("relu1", "output"), 32) == (6 if model == "mobilenetv2" else 32), "a ResNet's stem stays in float"


def test_resnet_ends_stay_wide_and_every_sum_has_the_width_of_its_block(planned):
    *_, bits = planned("model=resnet20b", "quant=placed/resnet20/pact", "bits=placed/resnet20/uniform4")
    assert ("conv1", "weight") not in bits and bits["linear", "weight"] == 16 and ("linear", "input") not in bits
    assert bits["layer1.0.add", "output"] == bits["layer2.0.shortcut.1", "output"] == 4
    assert {w for (_, site), w in bits.items() if site == "output"} == {4}
    assert ("relu1", "output") not in bits and ("layer1.0.conv1", "input") not in bits
    *_, bits = planned("model=resnet20b", "quant=placed/resnet20/pact", "layer_abit=[2,3,4,5,6,7,8,9,10]")
    sums = [bits[f"layer{i}.{j}.add", "output"] for i in (1, 2, 3) for j in range(3)]
    inner = [bits[f"layer{i}.{j}.conv2", "input"] for i in (1, 2, 3) for j in range(3)]
    assert sums == inner == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert bits["layer2.0.shortcut.1", "output"] == 5 and bits["layer3.0.shortcut.1", "output"] == 8


def test_the_clip_after_the_sum_replaces_the_relu_where_the_network_has_none(planned):
    model, structure, plan, _ = planned("experiment=resnet20_uniform")
    assert all(e.spec["signed"] is False for e in plan if e.site == "output" and e.layer.endswith("add") and e.spec)
    model, structure, plan, _ = planned("model=resnet20", "quant=placed/resnet20/pact", "bits=w4a4")
    model = copy.deepcopy(model)  # which other tests plan for
    apply(model, plan, structure)
    calibrate(model, [torch.randn(2, 3, 32, 32)], followed_by_relu=structure.followed_by_relu, progress=False)
    sums = [q for name, site, q in quantizers(model) if name.endswith("add") and site == "output"]
    assert len(sums) == 9 and all(q.limits == (0, 15) for q in sums), "before a ReLU no level is spent below zero"


def test_one_bit_places(planned):
    model, *_, bits = planned("experiment=one_bit", "model=resnet20b")
    convs = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)} - {"conv1"}
    assert {n for n, site in bits if site == "weight"} == convs and len(convs) == 18 + 2
    assert {n for n, site in bits if site == "input"} == convs, "a projection takes the quantized tensor"
    assert {w for (_, site), w in bits.items() if site == "weight"} == {1}
    assert {w for (_, site), w in bits.items() if site == "input"} == {2}
    stages = planned("experiment=one_bit", "layer_abit=[2,2,2,3,3,3,4,4,4]")[3]
    assert [stages[f"layer{i}.0.conv1", "input"] for i in (1, 2, 3)] == [2, 3, 4]


@pytest.mark.parametrize("name", ["toynet_cfg2", "one_bit"])
def test_experiments_train_a_step(compose, name):
    cfg = compose(f"experiment={name}")
    torch.manual_seed(0)
    model, x = instantiate(cfg.model.net), torch.randn(2, 3, 32, 32)
    structure = facts(model, x)
    apply(model, resolve(model, structure, pipeline.recipe(read(cfg))), structure)
    calibrate(model, [x], followed_by_relu=structure.followed_by_relu, progress=False)
    check_all_ran(model, x)
    model.train()(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("wrong", ["layer_abit=[8,8]", "layer_wbit=[8,8,8,8,8,8,8,8,8,8,8,8]"])
def test_a_list_of_the_wrong_length_names_the_groups(planned, wrong):
    with pytest.raises(QexpError, match=r"13 groups: conv1 \+ bn1, blocks.0"):
        planned("model=toynet", "quant=placed/toynet/mpact", wrong)
