"""Expected-input bias correction: the vectors, what a layer's mean result becomes, where E[x] comes from."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.network.facts import facts
from qexp.passes.base import PassContext
from qexp.passes.bias_correction import BiasCorrection, known_input, relu_mean
from qexp.passes.fold_bn import fold_bn
from qexp.recipe import Recipe, apply, resolve

UNIFORM = {"_target_": "qexp.quantizers.uniform.Uniform", "granularity": "tensor"}


@pytest.mark.parametrize(("beta", "gamma", "expected"), [(0.5, 1.2, 0.7696963), (0.0, 1.0, 0.3989423)])
def test_the_vectors(beta, gamma, expected):
    """V2.4-a."""
    assert relu_mean(torch.tensor(beta), torch.tensor(gamma)).item() == pytest.approx(expected, abs=1e-6)


def test_the_mean_of_a_relu_against_samples_and_at_its_ends():
    rng = np.random.default_rng(0)
    for mean, std in ((-1.0, 0.5), (0.3, 2.0), (5.0, 1.0)):
        samples = np.maximum(rng.normal(mean, std, 10**6), 0).mean()
        assert relu_mean(torch.tensor(mean), torch.tensor(std)).item() == pytest.approx(samples, abs=5e-3)
    assert relu_mean(torch.tensor([-2.0, 3.0]), torch.zeros(2)).tolist() == [0, 3], "a constant"


class Two(nn.Module):
    """conv, BN, ReLU, conv, without padding, then a classifier that sees the pool."""

    def __init__(self, bias: bool = True, act: type[nn.Module] = nn.ReLU, kernel: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn, self.relu = nn.Conv2d(3, 8, kernel), nn.BatchNorm2d(8), act()
        self.conv2, self.pool, self.fc = nn.Conv2d(8, 6, kernel, bias=bias), nn.AdaptiveAvgPool2d(1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.conv2(self.relu(self.bn(self.conv1(x))))).flatten(1))


class Branched(nn.Module):
    """conv, BN whose result goes on through a ReLU, and past it."""

    def __init__(self, rectify) -> None:
        super().__init__()
        self.conv1, self.bn, self.relu, self.conv2 = (
            nn.Conv2d(3, 2, 1),
            nn.BatchNorm2d(2),
            nn.ReLU(),
            nn.Conv2d(2, 2, 1),
        )
        self.rectify = rectify

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv1(x))
        return self.conv2(self.rectify(self, y)) + y


@pytest.mark.parametrize(
    "rectify",
    [lambda m, y: m.relu(y), lambda m, y: torch.relu(y), lambda m, y: y.relu()],
    ids=["module", "function", "method"],
)
def test_a_relu_counts_where_the_result_goes_past_it_too(rectify):
    model, x = Branched(rectify).eval(), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        model.bn.weight.copy_(torch.tensor([1.2, 1.0]))
        model.bn.bias.copy_(torch.tensor([0.5, 0.0]))
    folded = fold_bn(model, facts(model, x))
    context = PassContext(facts(model, x), [x], {}, folded=folded)
    assert known_input("conv2", model, context).tolist() == pytest.approx([0.7696963, 0.3989423], abs=1e-6)


def test_a_relu_by_name_is_one():
    class Method(Branched):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.bn(self.conv1(x)).relu_())

    assert "bn" in facts(Method(None), torch.randn(2, 3, 4, 4)).followed_by_relu


def quantized(bits: int = 3, recipe: dict | None = None, **options) -> tuple[Two, PassContext]:
    torch.manual_seed(0)
    model = Two(**options)
    x = torch.randn(64, 3, 10, 10) + 0.5
    model.train()
    for _ in range(60):
        model(x)  # a batch norm that knows its input
    nn.init.uniform_(model.bn.weight, 0.5, 1.5)
    nn.init.uniform_(model.bn.bias, -0.5, 0.5)
    model.eval()
    folded = fold_bn(model, facts(model, x[:1]))
    structure = facts(model, x[:1])
    plan = resolve(model, structure, Recipe(sites=recipe or {"input": UNIFORM, "weight": UNIFORM}, wbit=bits, abit=8))
    apply(model, plan, structure)
    context = PassContext(structure, [x[:32], x[32:]], {}, folded=folded)
    context.calibration = calibrate(model, context.images, progress=False)
    return model, context


def results(model: nn.Module, images: list[Tensor]) -> dict[str, Tensor]:
    """Returns the mean result of each channel of each convolution."""
    seen = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    handles = [
        m.register_forward_hook(lambda _, __, y, n=n: seen.update({n: y.transpose(0, 1).flatten(1).mean(1)}))
        for n, m in layers.items()
    ]
    with torch.no_grad():
        model(torch.cat(images))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("bias", [True, False])
def test_each_layer_gives_on_average_what_float_weights_would_give_on_the_same_input(bias):
    model, context = quantized(bias=bias, kernel=1)  # larger kernels see less of the border than of the middle
    before = copy.deepcopy(model)
    BiasCorrection(images=64).on_fitted(model, context)
    corrected = results(model, context.images)
    for name in ("conv1", "conv2", "fc"):  # each in the network that is corrected up to it
        hybrid = copy.deepcopy(model)
        layer = hybrid.get_submodule(name)
        layer.weight_quantizer, layer.bias = nn.Identity(), copy.deepcopy(before.get_submodule(name).bias)
        torch.testing.assert_close(results(hybrid, context.images)[name], corrected[name], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results(before, context.images)["conv2"], corrected["conv2"], atol=1e-3)
    assert context.findings["corrected_biases"] == 3 and model.conv2.bias is not None
    assert torch.equal(
        model.conv1.weight_quantizer.codes(model.conv1.weight), before.conv1.weight_quantizer.codes(before.conv1.weight)
    )


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.Identity])
def test_analytic_inputs_are_those_of_the_batch_norm(act):
    model, context = quantized(act=act)
    twin, seen = copy.deepcopy(model), copy.deepcopy(context)
    BiasCorrection("analytic", images=64).on_fitted(model, context)
    BiasCorrection("empirical", images=64).on_fitted(twin, seen)
    assert context.findings["analytic_inputs"] == 1, "one layer follows a batch norm; the others are measured"
    shift = (twin.conv2.bias - quantized(act=act)[0].conv2.bias).abs().max().item()
    assert (model.conv2.bias - twin.conv2.bias).abs().max().item() < 0.35 * shift, "near what is measured"
    assert not torch.equal(model.conv2.bias, twin.conv2.bias)
    assert torch.equal(model.conv1.bias, twin.conv1.bias)


def test_a_quantized_bias_is_fitted_anew():
    bias = UNIFORM | {"bits": 8, "signed": True}
    model, context = quantized(recipe={"input": UNIFORM, "weight": UNIFORM, "bias": bias})
    model.conv2.bias_quantizer.scale.fill_(1e-3)
    BiasCorrection().on_fitted(model, context)
    q, b = model.conv2.bias_quantizer, model.conv2.bias
    assert q.scale.item() == pytest.approx(b.abs().max().item() / 127, rel=1e-5)


def test_what_cannot_be_corrected_is_refused():
    with pytest.raises(QexpError, match="use empirical or analytic"):
        BiasCorrection("guess")
    with pytest.raises(QexpError, match="use 1 or more"):
        BiasCorrection(images=0)
    model, context = quantized(recipe={"input": UNIFORM})
    with pytest.raises(QexpError, match="no layer has quantized weights"):
        BiasCorrection().on_fitted(model, context)
