"""Networks of every kind become integers that compute the same; what cannot is refused by layer and reason."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.integer.bounds import partial_sums
from qexp.integer.lowering import lower
from qexp.integer.program import Add, Requantize
from qexp.integer.reference import Reference
from qexp.integer.simulate import integer_rounding
from qexp.integer.verify import verify
from qexp.models import modules
from qexp.quantizers.hysteresis import Hysteresis
from tests.integer.conftest import CHANNELS, FIXED, UNIFORM
from tests.networks import Residual, Tied

Q = "qexp.quantizers"
METHODS = {
    "uniform": {},
    "symmetric": {"input": UNIFORM | {"symmetric": True}},
    "half up": {"input": UNIFORM | {"rounding": "half_up"}},
    "floor": {"input": UNIFORM | {"rounding": "floor"}},
    "fixed point": {"input": FIXED, "weight": FIXED, "bias": FIXED | {"bits": 8}},
    "gemmlowp": {"weight": {"_target_": f"{Q}.gemmlowp.GEMMLOWP", "granularity": "channel"}},
    "dorefa": {"weight": {"_target_": f"{Q}.dorefa.DoReFaWeight", "rescale": "max"}},
    "powers of two": {"weight": {"_target_": f"{Q}.power_of_two.INQ"}, "wbit": 4},
    "trunc": {"input": UNIFORM | {"rounding": "trunc"}},
    "k-means": {"weight": {"_target_": f"{Q}.kmeans.KMeans", "granularity": "tensor"}, "wbit": 3},
    "binary": {"weight": {"_target_": f"{Q}.bwn.BWN", "granularity": "channel"}, "wbit": 1},
}


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "batch norm"])
@pytest.mark.parametrize("method", METHODS)
def test_simulation_and_integers_are_the_same_numbers(method, fold, quantize):
    torch.manual_seed(0)
    model, images = quantize(Residual(), fold=fold, **{"wbit": 5, "abit": 6} | METHODS[method])
    lowered = lower(model, images[:1])
    verdict = verify(model, lowered, [(images, torch.zeros(len(images)))], progress=False)
    assert verdict.equal and verdict.reference == 16, verdict.line()
    assert sum(c.total for c in verdict.integer.values()) > 30_000
    assert verdict.share < 2, "against real scales few codes differ"
    assert set(verdict.integer) >= {s.tensor for s in lowered.sites.values()}


def test_fixed_point_needs_no_special_simulation(quantize):
    fixed = {"input": None, "weight": FIXED, "bias": FIXED | {"bits": 8}, "output": FIXED}
    rules = {
        "stem": {"layers": "stem", "input": FIXED},
        "sums": {"types": ["Add", "AdaptiveAvgPool2d"], "output": FIXED},
    }
    model, images = quantize(Residual(), rules=rules, **fixed)
    lowered = lower(model, images[:1])
    verdict = verify(model, lowered, [(images, None)], progress=False)
    assert verdict.equal and verdict.share == 0
    rescaled = [op for op in lowered.program.ops if isinstance(op, Requantize)]
    plain = {op.layer for op in rescaled if (op.multiplier == 1).all()}
    assert {op.layer for op in rescaled} - plain == {"pool"}, "powers of two are plain shifts; nine pixels are none"


def test_an_average_of_what_a_batch_norm_leaves_between_steps(quantize):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.bias.data.uniform_(-1, 1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    model, images = quantize(model, fold=False, abit=16, shape=(400, 3, 8, 8))
    verdict = verify(model, lower(model, images[:1]), [(images, None)], progress=False)
    assert verdict.equal, "36 summands that are rounded each, as the integers are, and not once their sum is made"


def test_results_that_carry_quantizers(quantize):
    rules = {"stem": {"layers": "stem", "input": UNIFORM}}
    model, images = quantize(Residual(), input=None, output=UNIFORM, rules=rules)
    lowered = lower(model, images[:1])
    assert verify(model, lowered, [(images, None)], progress=False).equal
    assert {site for _, site in lowered.sites} >= {"output", "input"}


def test_the_network_is_left_as_it_was(quantize):
    model, images = quantize(Residual())
    before, classes = copy.deepcopy(model.state_dict()), {n: type(m) for n, m in model.named_modules()}
    scores, grads = model(images), dict(model.named_parameters())
    lowered = lower(model, images[:1])
    with integer_rounding(model, lowered):
        inside = model(images)
    assert inside.dtype == torch.float64 and not torch.equal(inside.float(), scores)
    assert torch.allclose(inside.float(), scores, atol=0.05)
    after = model.state_dict()
    assert list(after) == list(before) and all(
        torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items()
    )
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert all(p is grads[n] for n, p in model.named_parameters())
    assert torch.equal(model(images), scores)


def test_scores_are_the_integers_times_their_unit(quantize):
    model, images = quantize(Residual())
    lowered = lower(model, images[:1], {"model": "residual"})
    program = lowered.program
    scores = program.decode(Reference(program).run(program.encode(images.numpy())))
    assert np.abs(scores - model(images).detach().numpy()).max() < 0.02
    assert program.about == {"model": "residual"}


def test_every_code_lies_in_the_range_the_program_states(quantize):
    model, images = quantize(Residual(), fold=False, wbit=3)
    program = lower(model, images[:1]).program
    seen = {}
    Reference(program).run(program.encode(images.numpy()), lambda name, c: seen.update({name: (c.min(), c.max())}))
    assert set(seen) == set(program.tensors)
    for name, (low, high) in seen.items():
        assert program.tensors[name].low <= low and high <= program.tensors[name].high, name


def test_sums_are_wide_unless_they_carry_quantizers(quantize):
    model, images = quantize(Residual())
    wide = lower(model, images[:1]).program
    (sum_,) = (op for op in wide.ops if isinstance(op, Add))
    assert 24 < wide.tensors[sum_.inputs[0]].bits <= 31
    narrow = {"sums": {"types": ["Add"], "input": FIXED | {"bits": 12}}}
    model, images = quantize(Residual(), rules=narrow)
    program = lower(model, images[:1]).program
    (sum_,) = (op for op in program.ops if isinstance(op, Add))
    assert program.tensors[sum_.inputs[0]].bits <= 12


def test_levels_without_a_common_step_keep_sums_in_32_bits(quantize):
    torch.manual_seed(0)
    weight = {"_target_": f"{Q}.kmeans.KMeans", "granularity": "tensor"}
    network = Residual()
    network.conv, network.fc = nn.Conv2d(8, 600, 3, stride=2), nn.Linear(600, 5)
    model, images = quantize(network, 4, 8, weight=weight)
    lowered = lower(model, images[:1])
    for op in lowered.program.ops:
        if op.kind in ("conv", "linear"):
            spec = lowered.program.tensors[op.inputs[0]]
            low, high = partial_sums(op, spec.low, spec.high)
            assert low >= -(2**31) and high < 2**31 and 2**11 <= np.abs(op.weight).max() < 2**15
            exact = model.get_submodule(op.layer).quantized_weight().detach().double().numpy()
            unit = lowered.steps[op.layer].reshape(-1, *[1] * (exact.ndim - 1))
            assert (np.abs(op.weight * unit - exact) <= 0.5001 * unit).all()


class Chain(nn.Sequential):
    def __init__(self, *between: nn.Module) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), *between, nn.Flatten(), nn.LazyLinear(3))
        self(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    "between",
    [
        (nn.ReLU6(),),
        (nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        (nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()),
        (nn.AvgPool2d(2), nn.ReLU()),
        (nn.AvgPool2d(3, 2, 1),),
        (nn.AdaptiveAvgPool2d(2),),
        (nn.ReLU(), nn.BatchNorm2d(4), nn.Dropout(), nn.Dropout2d()),
        (modules.StridedPad(3, 2),),
        (nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=2), nn.ReLU()),
    ],
    ids=lambda b: "-".join(type(m).__name__ for m in b),
)
def test_layers_between(between, quantize):
    torch.manual_seed(2)
    model, images = quantize(Chain(*between), fold=False)
    verdict = verify(model, lower(model, images[:1]), [(images, None)], progress=False)
    assert verdict.equal, verdict.line()


def test_a_channel_that_batch_norm_makes_constant(quantize):
    network = Residual()
    with torch.no_grad():
        network.bn1.weight[0], network.bn1.weight[1], network.bn1.weight[2] = 0, -1, 1e-20
    model, images = quantize(network, fold=False)
    assert verify(model, lower(model, images[:1]), [(images, None)], progress=False).equal


PER_CHANNEL = UNIFORM | {"symmetric": True, "granularity": "channel"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": None}, r"stem.weight: cannot be lowered to integers: the weight is float; give it bits"),
        (
            {"input": None},
            r"stem: cannot be lowered to integers: the images are not quantized; .*32.*layer_abit=.*add deploy=integer",
        ),
        ({"input": PER_CHANNEL}, r"stem.input: .* its channels have different scales, which are not powers of two"),
        (
            {"input": UNIFORM | {"rounding": "stochastic"}},
            r"stem.input: .* rounds stochastically; use rounding: half_even",
        ),
        (
            {"weight": {"_target_": f"{Q}.hysteresis.Hysteresis", "rule": "legacy"}, "wbit": 1},
            r"stem.weight: .* Hysteresis produced \d+ distinct weight values, more than 1 bits allow",
        ),
        (
            {"input": {"_target_": f"{Q}.exponential.Exponential"}, "abit": 4},
            r"stem.input: .* levels of Exponential are not evenly spaced",
        ),
    ],
)
def test_what_has_no_integer_form_is_refused(arguments, message, quantize):
    torch.manual_seed(0)
    model, images = quantize(Residual(), **arguments)
    for layer in model.modules():
        if isinstance(
            getattr(layer, "weight_quantizer", None), Hysteresis
        ):  # as after a step that crossed zero, but not far enough
            layer.weight_quantizer.start(layer.weight)
            layer.weight_quantizer.state[:1] = layer.weight.detach()[:1]
    with pytest.raises(QexpError, match=message):
        lower(model, images[:1])


class Functional(nn.Module):
    def __init__(self, step) -> None:
        super().__init__()
        self.conv, self.fc, self.step = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 3), step

    def forward(self, x):
        return self.fc(torch.flatten(self.step(self.conv(x)), 1))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda x: torch.cumsum(x, 1), r"cumsum: .* the function cumsum has no integer form .*; known are"),
        (
            lambda x: x if x.sum() > 0 else -x,
            "Functional: .* its graph is not known .the calls depend on the images",
        ),
    ],
)
def test_functions_without_integer_form_are_refused(step, message, quantize):
    model, images = quantize(Functional(step), fold=False)
    with pytest.raises(QexpError, match=message):
        lower(model, images[:1])
    model, images = quantize(Functional(torch.relu))
    assert verify(model, lower(model, images[:1]), [(images, None)], progress=False).equal


class InPlace(nn.Module):
    """Activations in place whose operands a shortcut reads; keyword calls, and a view whose batch size is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)
        self.act2, self.conv2, self.add = nn.ReLU6(inplace=True), nn.Conv2d(8, 8, 1), modules.Add()
        self.cat, self.fc = modules.Concat(), nn.Linear(1024, 5)

    def forward(self, x, features=False):
        x = self.stem(input=x)
        y = self.act2(self.conv(self.act(input=x)))
        y = self.add(self.conv2(input=y), x)
        y = self.cat(torch.relu_(y), y) if not features else None
        return self.fc(input=y.view(y.size(0), -1))


@pytest.mark.parametrize("site", [None, "input", "output"])
def test_who_reads_an_operand_after_a_call_in_place_reads_its_result(site, quantize):
    torch.manual_seed(0)
    rules = {"sums": {"types": ["Add"], "output": UNIFORM | {"symmetric": True}}}
    if site:
        rules["acts"] = {"types": ["ReLU", "ReLU6"], site: UNIFORM | {"symmetric": True}}
    exact = InPlace().eval()
    model, images = quantize(copy.deepcopy(exact), rules=rules, input=UNIFORM | {"symmetric": True})
    with torch.no_grad():
        assert (model(images) - exact(images)).abs().max() < 0.1 * exact(images).abs().max()
    verdict = verify(model, lower(model, images[:1]), [(images, torch.zeros(len(images)))], progress=False)
    assert verdict.equal and verdict.share < 2, verdict.line()


def test_layers_that_run_twice_are_refused(quantize):
    model, images = quantize(Tied(), shape=(8, 6), weight=CHANNELS)
    with pytest.raises(QexpError, match=r"a: .* it runs more than once; give each call a module of its own"):
        lower(model, images[:1])


def test_operands_that_carry_quantizers_of_any_step(quantize):
    """The operand's quantizer rounds first, then its codes move to the sum's step."""
    rules = {"sums": {"types": ["Add"], "input": UNIFORM | {"bits": 5}}}
    model, images = quantize(Residual(), rules=rules)
    lowered = lower(model, images[:1])
    assert {("add", "input.0"), ("add", "input.0 (wide)")} <= set(lowered.sites)
    assert verify(model, lowered, [(images, None)], progress=False).equal


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish, nn.PReLU])
@pytest.mark.parametrize("quantized", [True, False])
def test_other_activations_are_tables(activation, quantized, quantize):
    torch.manual_seed(3)
    rules = {"tables": {"types": [activation.__name__], "input": UNIFORM | {"bits": 9}}}
    if quantized:
        rules["tables"]["output"] = UNIFORM | {"bits": 6}
    model, images = quantize(Chain(activation()), fold=False, rules=rules)
    lowered = lower(model, images[:1])
    verdict = verify(model, lowered, [(images, None)], progress=False)
    assert verdict.equal and verdict.share < 1, verdict.line()
    (op,) = (op for op in lowered.program.ops if op.kind == "lookup")
    assert 2**8 < len(op.table) <= 2**9
    assert ("1", "output" if quantized else "output (wide)") in lowered.sites


def test_tables_need_narrow_inputs(quantize):
    model, images = quantize(Chain(nn.SiLU()), fold=False)
    with pytest.raises(
        QexpError, match=r"1: .* a table needs an input of at most 16 bits, this one has 27; add deploy=integer"
    ):
        lower(model, images[:1])
