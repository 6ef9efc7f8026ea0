"""Function calls in a network's own `forward` carry quantizers as modules do, without an edit of its class."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.layers.calls import Routed, unrouted
from qexp.layers.quantized import QuantAdd, QuantAddInto, QuantConcat, QuantMultiply, quantizers
from qexp.layers.swap import check_all_ran
from qexp.models.modules import Add, Concat
from qexp.models.operations import Mean, Multiply
from qexp.network.facts import facts
from qexp.network.lean_evaluation import lean
from qexp.recipe import Recipe, apply, resolve
from qexp.search.replay import Replay

UNIFORM = {"_target_": "qexp.quantizers.uniform.Uniform", "symmetric": False, "granularity": "tensor"}
LSQ = {"_target_": "qexp.quantizers.lsq.LSQ"}
SUMS = {"types": ["Add"], "input": UNIFORM}
JOINS = {"types": ["Concat", "Multiply"], "output": UNIFORM}


class Block(nn.Module):
    """Sums of three kinds and a gate, with functions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.conv3 = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        y = self.bn1(self.conv1(x)) + x
        y = torch.add(self.conv2(F.relu(y)), y)
        y += x
        return y * torch.sigmoid(self.conv3(y.mean((2, 3), keepdim=True)))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.fc = nn.Conv2d(3, 6, 3), Block(6), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu6(self.stem(x))
        x = torch.cat([self.block(x), x], 1)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class BlockOfModules(nn.Module):
    """The same with a module for each function, under the names of the calls."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.conv3 = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.add, self.add_1, self.add_2, self.relu = Add(), Add(), Add(), nn.ReLU()
        self.mul, self.mean, self.sigmoid = Multiply(), Mean((2, 3), keepdim=True), nn.Sigmoid()

    def forward(self, x):
        y = self.add(self.bn1(self.conv1(x)), x)
        y = self.add_1(self.conv2(self.relu(y)), y)
        y = self.add_2(y, x)
        return self.mul(y, self.sigmoid(self.conv3(self.mean(y))))


class OfModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.fc = nn.Conv2d(3, 6, 3), BlockOfModules(6), nn.Linear(12, 5)
        self.relu6, self.cat, self.adaptive_avg_pool2d = nn.ReLU6(), Concat(), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.relu6(self.stem(x))
        x = self.cat(self.block(x), x)
        return self.fc(torch.flatten(self.adaptive_avg_pool2d(x), 1))


@pytest.fixture
def images():
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def twins():
    torch.manual_seed(0)
    model, twin = Functional().eval(), OfModules().eval()
    twin.load_state_dict(model.state_dict())
    return model, twin


def quantized(model, images, rules, calibrated=True, **sites):
    found = facts(model, images[:1])
    plan = resolve(model, found, Recipe({"input": UNIFORM, "weight": UNIFORM} | sites, wbit=4, abit=5, rules=rules))
    apply(model, plan, found)
    if calibrated:
        calibrate(model, [images], progress=False, followed_by_relu=found.followed_by_relu)
    return plan


@pytest.mark.parametrize(
    "rules",
    [
        {"sums": SUMS},
        {"sums": SUMS, "joins": JOINS},
        {"by_name": {"layers": ["*.add*", "cat"], "output": UNIFORM | {"symmetric": True}}},
        {
            "acts": {"types": ["ReLU", "ReLU6", "Sigmoid"], "output": UNIFORM},
            "pool": {"types": ["Mean"], "input": UNIFORM},
        },
    ],
    ids=["sums", "joins", "names", "activations"],
)
def test_functions_are_quantized_as_modules_are(rules, images):
    model, twin = twins()
    plan, planned = quantized(model, images, rules), quantized(twin, images, rules)
    assert plan.frame().equals(planned.frame())
    check_all_ran(model, images)
    with torch.no_grad():
        assert torch.equal(model(images), twin(images))
        assert not torch.equal(model(images), Functional().eval()(images))
        with lean(model, images) as spared:
            assert torch.equal(model(images), twin(images))
        with lean(twin, images) as of_twin:
            pass
    if "acts" in rules:
        assert spared.absorbed == of_twin.absorbed
    assert facts(model, images[:1]) == facts(twin, images[:1])


def test_a_mapping_of_widths_names_calls(images):
    model, _ = twins()
    found = facts(model, images[:1])
    assert found.order[2:7] == ("block.conv1", "block.bn1", "block.add", "block.relu", "block.conv2")
    recipe = Recipe({"input": UNIFORM, "weight": UNIFORM}, abit={"*": 8, "block.add_1": 3}, rules={"sums": SUMS})
    assert resolve(model, found, recipe)["block.add_1", "input.1"].bits == 3


def test_training_has_the_gradients_of_modules(images):
    model, twin = twins()
    rules = {"sums": SUMS | {"input": LSQ}, "joins": JOINS | {"output": LSQ}}
    for network in (model, twin):
        quantized(network, images, rules, weight=LSQ, input=LSQ)
        network.train()(images).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    expected = {name: p.grad for name, p in twin.named_parameters()}
    assert grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], expected[name]) for name in grads)


def test_copies_pickles_and_state(images):
    model, _ = twins()
    quantized(model, images, {"sums": SUMS, "joins": JOINS})
    with torch.no_grad():
        expected = model(images)
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in (copied, loaded):
            assert torch.equal(other(images), expected)
        copied.block.add.input_0_quantizer.scale.mul_(3)
        assert torch.equal(model(images), expected) and not torch.equal(copied(images), expected)
        copied.load_state_dict(model.state_dict())
        assert torch.equal(copied(images), expected)
    assert set(Functional().state_dict()) <= set(model.state_dict())
    assert isinstance(model.block, Block) and type(model.block).__name__ == "Block"


def test_a_second_reading_changes_nothing(images):
    model, _ = twins()
    quantized(model, images, {"sums": SUMS})
    expected, kind = model(images), type(model.block)
    again = facts(model, images[:1])
    assert again == facts(model, images[:1]) and again.order == facts(Functional().eval(), images[:1]).order
    assert torch.equal(model(images), expected) and type(model.block) is kind and type(model) is Functional


def test_where_no_call_carries_a_quantizer_no_class_changes(images):
    model, _ = twins()
    quantized(model, images, {})
    assert not any(isinstance(m, Routed) for m in model.modules())
    assert not any(isinstance(m, Add | Concat | Multiply) for m in model.modules())
    quantized(model := twins()[0], images, {"one": {"layers": "block.mul", "output": UNIFORM}})
    assert [name for name, m in model.named_modules() if isinstance(m, Routed)] == ["block"]
    assert unrouted(type(model.block)) is Block


def test_statistics_of_one_recipe_serve_another(images, tmp_path):
    """Calibration sees every call that could carry a quantizer, whatever the recipe."""
    for rules in ({}, {"sums": SUMS}, {"joins": JOINS}):
        model, _ = twins()
        quantized(model, images, rules, calibrated=False)
        calibrate(model, [images], progress=False, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_search_replays_calls(images):
    model, _ = twins()
    quantized(model, images, {"sums": SUMS})
    with torch.no_grad():
        expected, replay = model(images), Replay(model, facts(model, images[:1]))
        assert torch.equal(replay.first(images), expected)
        assert torch.equal(replay.again(images, "block.add_1"), expected)


def test_over_ranks(images):
    model, _ = twins()
    quantized(model, images, {"sums": SUMS, "joins": JOINS})
    expected = model(images)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        scores = nn.parallel.DistributedDataParallel(model)(images)
        assert torch.equal(scores, expected)
        scores.sum().backward()
    finally:
        torch.distributed.destroy_process_group()


def test_compiled(images):
    model, _ = twins()
    quantized(model, images, {"sums": SUMS, "joins": JOINS})
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(images), expected) and torch.equal(compiled(images), expected)


class Dense(nn.ModuleDict):
    """Goes through its children, as torchvision's dense block does."""

    def __init__(self) -> None:
        super().__init__({f"layer{i}": nn.Conv2d(3 * (i + 1), 3, 1) for i in range(3)})

    def forward(self, x):
        found = [x]
        for layer in self.values():
            found.append(layer(torch.cat(found, 1)))
        return torch.cat(found, 1)


class Chain(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x) + x
        return x


class Children(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1)

    def forward(self, x):
        for child in self.children():
            x = child(x) * x
        return x


class Loops(nn.Module):
    """Modules that go through their children, a module that runs twice, attributes that have the names of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.chain, self.children_ = Dense(), Chain(*(nn.Conv2d(12, 12, 1) for _ in range(2))), Children()
        self.relu, self.add = nn.ReLU(), "no module"
        self.fc = nn.Linear(12, 3)

    def mul(self, x):
        return x * self.relu(x)

    def forward(self, x):
        x = self.chain(self.chain(self.dense(x)))
        x = F.relu(self.relu(self.children_(x)) + x)
        return self.fc(self.mul(x).mean((2, 3)))


def test_loops_and_names(images):
    torch.manual_seed(0)
    model = Loops().eval()
    expected = model(images)
    found = facts(model, images[:1])
    calls = [n for n in found.order if n.rpartition(".")[2].startswith(("add", "cat", "mul", "relu", "mean"))]
    assert calls == [
        *("dense.cat", "dense.cat_1", "dense.cat_2", "dense.cat_3", "chain.add", "chain.add_1"),
        *("children_.mul", "children_.mul_1", "relu", "add_", "relu_", "mul_", "mean"),
    ]
    assert torch.equal(model(images), expected) and len(found.every_call["chain.add"]) == 2
    rules = {"sums": SUMS, "joins": JOINS, "acts": {"types": ["ReLU"], "output": UNIFORM}}
    quantized(model, images, rules)
    check_all_ran(model, images)
    assert len([q for _, _, q in quantizers(model) if q.bits == 5]) > 12
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other(images), model(images)) and [*other.dense] == [*model.dense]
    assert set(Loops().state_dict()) <= set(model.state_dict())


class Training(nn.Module):
    """Makes another product in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(x)
        x = x * torch.rand_like(x) if self.training else x
        return self.fc((x * x.sigmoid()).mean((2, 3)))


def test_other_calls_in_training_are_refused(images):
    model = Training().eval()
    quantized(model, images, {"joins": {"types": ["Multiply"], "output": UNIFORM}})
    with pytest.raises(
        QexpError, match=r"Training: it makes 2 calls of mul here and made 1 when the network was read, so mul "
    ):
        model.train()(images)
    assert model.eval()(images).shape == (6, 3)


class Decoder(nn.Module):
    """Boxes: what follows the last weights of a network with several results is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.head(self.conv(x).relu())
        return y[:, :2] + y[:, 2:], y[:, :2] * y[:, 2:]


def test_the_decoding_of_results_is_no_layer(images):
    assert facts(Decoder().eval(), images[:1]).order == ("conv", "relu", "head")


def test_the_classes_of_quantized_calls(images):
    model, _ = twins()
    quantized(model, images, {"sums": SUMS, "joins": JOINS})
    kinds = [type(m) for m in (model.block.add, model.block.add_2, model.cat, model.block.mul)]
    assert kinds == [QuantAdd, QuantAddInto, QuantConcat, QuantMultiply]


class DependsOnValues(nn.Module):
    """Its number of sums depends on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        y = y * self.fc(y)
        for _ in range(int(x.abs().max())):
            y = y + self.fc(y)
        return y.mean((2, 3))


def test_control_flow_that_depends_on_values_is_still_found(images):
    """Also in the second reading, with stand-ins; calls that each run makes are layers, the others are not."""
    model = DependsOnValues().eval()
    found = facts(model, images[:1])
    assert "the calls depend on the images" in found.trace_error
    assert "mul" in found.order and not any(name.startswith("add") for name in found.order)
    quantized(model, images, {"joins": {"types": ["Multiply"], "output": UNIFORM}})
    assert model(images * 3).shape == model(images * 0).shape == (6, 4)
