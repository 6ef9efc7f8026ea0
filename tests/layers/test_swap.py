"""Surgery in place: keys, copies, ties and optimizers survive, and every way back gives the float model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.layers import (
    Quantized,
    bake,
    baked_weights,
    check_all_ran,
    quantized_layers,
    quantizers,
    quantizers_off,
    swap,
    unswap,
)
from qexp.layers.quantized import QUANTIZED, float_class, is_quantizer_parameter
from qexp.numerics import PerChannel
from qexp.quantizers.dorefa import DoReFaWeight
from qexp.quantizers.lsq import LSQ
from qexp.quantizers.pact import PACT
from qexp.quantizers.uniform import Uniform
from qexp.ranges import Fixed
from qexp.statistics.stats import TensorStats
from tests.networks import Bypassed, Mixed, Residual, Tied

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def everywhere(model: nn.Module, example: torch.Tensor = X, bits: int = 4) -> None:
    """Puts a uniform quantizer on every site of every layer and calibrates."""
    for _, layer in list(model.named_modules()):
        kind = QUANTIZED.get(type(layer))
        if kind is None:
            continue
        sites = {s: Uniform(bits) for s in kind.sites if s.split(".")[0] in ("input", "output")}
        for site in ("weight", "bias", "running_mean", "running_var"):
            if site in kind.sites and getattr(layer, site, None) is not None:
                sites[site] = Uniform(bits)
        swap(layer, sites)
    calibrate(model, [example], progress=False)


@pytest.mark.parametrize("kind", [Residual, Mixed])
def test_every_layer_type_carries_quantizers_on_every_site(kind):
    torch.manual_seed(0)
    model = kind().eval()
    keys, before = set(model.state_dict()), model(X)
    everywhere(model)
    check_all_ran(model, X)
    assert keys <= set(model.state_dict())
    assert {k for k in model.state_dict() if "_quantizer." not in k} == keys
    after = model(X)
    assert after.shape == before.shape and not torch.equal(after, before)
    with quantizers_off(model):
        assert torch.equal(model(X), before)
    assert torch.equal(model(X), after)
    for _, layer in list(quantized_layers(model)):
        unswap(layer)
    assert torch.equal(model(X), before) and not any(isinstance(m, Quantized) for m in model.modules())
    assert set(model.state_dict()) == keys and pickle.dumps(model)


def test_all_float_is_exactly_the_float_model(residual, mixed):
    for model in (residual, mixed):
        before = model(X)
        for _, layer in list(model.named_modules()):
            if type(layer) in QUANTIZED:
                swap(layer, {})
        assert torch.equal(model(X), before) and not list(quantizers(model))
        with baked_weights(model):
            assert torch.equal(model(X), before)
        assert set(model.state_dict()) == set(type(model)().state_dict())


def test_training_a_batch_norm_is_the_same_with_its_sites_in_float(residual):
    twin = copy.deepcopy(residual)
    for bn in (twin.bn1, twin.bn2, twin.bn3):
        swap(bn, {})
    twin.bn2.momentum = residual.bn2.momentum = None
    for model in (residual, twin):
        model.train()
        model(X)
        model(X * 2)
    for name, buffer in residual.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name), buffer, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(residual, copied):
    everywhere(residual)
    y = residual(X)
    other = copied(residual)
    assert torch.equal(other(X), y)
    with torch.no_grad():
        other.conv.weight_quantizer.scale.mul_(3)
        other.conv.weight.add_(1)
    assert torch.equal(residual(X), y) and not torch.equal(other(X), y)


def test_a_float_checkpoint_loads_after_the_swap(residual):
    float_state = {k: v.clone() for k, v in residual.state_dict().items()}
    everywhere(residual)
    missing, unexpected = residual.load_state_dict(float_state, strict=False)
    assert not unexpected and all("_quantizer." in k for k in missing)


def test_a_quantized_state_loads_into_a_fresh_quantized_model(residual):
    everywhere(residual)
    fresh = Residual().eval()
    for name, layer in list(quantized_layers(residual)):
        swap(
            fresh.get_submodule(name),
            {s: Uniform(4) for s in layer.sites if not isinstance(layer.site(s), nn.Identity)},
        )
    fresh.load_state_dict(residual.state_dict(), strict=True)
    assert torch.equal(fresh(X), residual(X))


def test_tied_layers_and_tied_weights_stay_tied():
    model = Tied()
    x = torch.randn(5, 6)
    model(x)
    swap(model.a, {"weight": Uniform(3, (6, 6), signed=True, narrow=True), "input": Uniform(4, (1, 6))})
    assert model.b is model.a and model.c.weight is model.a.weight
    assert [name for name, _ in quantized_layers(model)] == ["a"]
    calibrate(model, [x], progress=False)
    model(x).sum().backward()
    assert model.a.weight.grad is not None and model.c.weight is model.a.weight


def test_an_optimizer_built_before_still_steps_the_weights(residual):
    optimizer = torch.optim.SGD(residual.parameters(), lr=0.1)
    everywhere(residual, bits=8)
    residual.train()
    before = residual.conv.weight.detach().clone()
    residual(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(residual.conv.weight, before)
    assert optimizer.param_groups[0]["params"][0] is residual.stem.weight


def test_bake_leaves_plain_layers_with_the_quantized_weights(residual):
    for layer in (residual.stem, residual.conv, residual.fc):
        swap(layer, {"weight": Uniform(3, layer.weight.shape, signed=True, narrow=True, granularity=PerChannel(0))})
    swap(residual.bn1, {"weight": Uniform(4), "running_var": Uniform(4), "running_mean": Uniform(4)})
    calibrate(residual, [X], progress=False)
    y = residual(X)
    for _, layer in list(quantized_layers(residual)):
        bake(layer)
    assert torch.equal(residual(X), y)
    assert type(residual.conv) is nn.Conv2d and len(residual.conv.weight[0].unique()) <= 7
    assert len(residual.bn1.running_var.unique()) <= 16
    assert set(residual.state_dict()) == set(Residual().state_dict())


def test_baked_weights_give_the_same_numbers_and_quantize_once(residual):
    everywhere(residual)
    y = residual(X)
    calls = []
    residual.conv.weight_quantizer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), baked_weights(residual):
        assert torch.equal(residual(X), y) and torch.equal(residual(X), y)
    assert len(calls) == 1
    keys = set(residual.state_dict())
    with torch.no_grad():
        residual.conv.weight.mul_(2)
    assert not torch.equal(residual(X), y), "the held weight is gone afterwards"
    assert not any("baked" in k for k in keys)


def test_baked_weights_leave_float_weights_alone(residual):
    """A layer whose weight stays float holds its own parameter meanwhile, and must not register it a second time."""
    swap(residual.conv, {"input": Uniform(8, (1, 8, 8, 8), symmetric=False)})
    calibrate(residual, [X], progress=False)
    names = [n for n, _ in residual.named_parameters()]
    y = residual(X)
    with torch.no_grad(), baked_weights(residual):
        assert torch.equal(residual(X), y)
        assert [n for n, _ in residual.named_parameters()] == names
    assert [n for n, _ in residual.named_parameters()] == names
    unswap(residual.conv)
    assert "baked_weight" not in residual.conv._parameters


def test_quantizers_off_ends_with_an_exception_too(residual):
    everywhere(residual)
    y = residual(X)
    with pytest.raises(ValueError), quantizers_off(residual):
        raise ValueError
    assert torch.equal(residual(X), y)


def test_a_bypassed_layer_is_found_by_name():
    model = Bypassed()
    for layer in (model.first, model.hidden, model.last):
        swap(layer, {"weight": Uniform(4, layer.weight.shape, signed=True, narrow=True), "input": Uniform(8, (1, 6))})
    for _, _, q in quantizers(model):
        q.range = Fixed(-1, 1)
        q.mark_ready()
    with pytest.raises(
        QexpError, match=r"2 of 6 quantizers never ran: hidden.input, hidden.weight\. .*leave these layers"
    ):
        check_all_ran(model, torch.randn(2, 6))
    unswap(model.hidden)
    check_all_ran(model, torch.randn(2, 6))
    assert not any(q._forward_pre_hooks for _, _, q in quantizers(model))


def test_what_cannot_be_swapped_is_refused():
    with pytest.raises(QexpError, match=r"no quantized form of layer type LSTM; known are .*Conv2d.*Add a class"):
        swap(nn.LSTM(3, 3), {})
    with pytest.raises(QexpError, match=r"ReLU has no site 'weight'; its sites are input, output"):
        swap(nn.ReLU(), {"weight": Uniform(4)})
    with pytest.raises(QexpError, match=r"PACT cannot sit on 'weight'; it is made for input, output"):
        swap(nn.Linear(3, 3), {"weight": PACT(4)})
    with pytest.raises(QexpError, match=r"DoReFaWeight cannot sit on 'input'; it is made for weight"):
        swap(nn.Linear(3, 3), {"input": DoReFaWeight(4)})


def test_a_refused_swap_changes_nothing():
    layer = nn.Linear(3, 3)
    with pytest.raises(QexpError):
        swap(layer, {"input": Uniform(4), "weight": PACT(4)})
    assert type(layer) is nn.Linear and not list(layer.children())


def test_quantizer_parameters_are_told_apart(residual):
    swap(residual.conv, {"weight": LSQ(4, (12, 8, 3, 3), signed=True), "input": PACT(4, (1, 8, 8, 8))})
    own = is_quantizer_parameter(residual)
    names = {n for n, p in residual.named_parameters() if id(p) in own}
    assert names == {"conv.weight_quantizer.scale", "conv.input_quantizer.alpha"}


def test_after_an_optimizer_step_quantizers_see_their_latent_tensor(residual):
    seen = {}

    class Watcher(Uniform):
        def on_optimizer_step(self, latent):
            seen[self.name] = latent

    sites = {}
    for site in ("input", "weight", "bias"):
        sites[site] = Watcher(4)
        sites[site].name = site
    swap(residual.fc, sites)
    residual.fc.after_optimizer_step()
    assert seen["weight"] is residual.fc.weight and seen["bias"] is residual.fc.bias and seen["input"] is None


class Conv3(nn.Conv2d):
    """A shorthand: only what it sets up differs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)


class Act(nn.ReLU):
    """A ReLU by another name."""


class Norm(nn.BatchNorm2d):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.affine:
            nn.init.constant_(self.weight, 0.5)


class Helped(nn.Conv2d):
    """Has a method that others may call."""

    def gain(self) -> float:
        return 2.0


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


class Scaled(nn.Linear):
    @property
    def gain(self) -> float:
        return 2.0


def test_a_shorthand_of_a_layer_is_quantized_as_the_layer():
    def network(conv, norm, act):
        torch.manual_seed(0)
        return nn.Sequential(conv, norm, act, nn.Flatten(), nn.Linear(512, 4)).eval()

    short = network(Conv3(3, 8), Norm(8), Act())
    plain = network(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    plain.load_state_dict(short.state_dict())
    for model in (short, plain):
        layers = [m for m in model if float_class(m) in QUANTIZED]
        assert len(layers) == 4
        for layer in layers:
            target = QUANTIZED[float_class(layer)]
            swap(layer, {s: Uniform(3) for s in target.sites if s in ("input", "output", "weight")})
        calibrate(model, [X], progress=False)
    assert torch.equal(short(X), plain(X))
    again = pickle.loads(pickle.dumps(short))
    for layer in list(again):
        if isinstance(layer, Quantized):
            unswap(layer)
    assert [type(m) for m in again[:3]] == [Conv3, Norm, Act] and not any("written" in k for k in vars(again[0]))


@pytest.mark.parametrize("layer", [Helped(3, 4, 3), Padded(3, 4, 3), Scaled(3, 4)])
def test_a_subclass_with_code_of_its_own_is_no_shorthand(layer):
    assert float_class(layer) is type(layer)
    with pytest.raises(QexpError, match="no quantized form of layer type"):
        swap(layer, {})


def test_a_parametrized_layer_is_no_shorthand():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    assert float_class(layer) not in QUANTIZED


def test_baked_weights_follow_the_layer_to_its_device() -> None:
    layer = torch.nn.Linear(4, 3)
    quantizer = Uniform(4, (3, 4))
    quantizer.fit(TensorStats.of(layer.weight.detach()))
    swap(layer, {"weight": quantizer})
    with baked_weights(layer):
        assert layer.to("meta").quantized_weight().device.type == "meta"
        assert "baked_weight" not in layer.state_dict()
    assert "baked_weight" not in dict(layer.named_buffers())
