"""Edits of a float network keep its results: computed or shared weights, norms without statistics, features that are no channels."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from qexp.errors import QexpError
from qexp.network.facts import facts
from qexp.passes.base import Pass, PassContext
from qexp.passes.bias_correction import BiasCorrection
from qexp.passes.equalize import Equalize, find_pairs
from qexp.passes.fold_bn import fold_bn
from qexp.passes.permanent import computes_weights, make_permanent
from qexp.passes.unchanged import edit_floats, unchanged
from qexp.recipe import Recipe, apply, resolve

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            nn.init.uniform_(m.running_mean, -1, 1)
            nn.init.uniform_(m.running_var, 0.2, 3)
    return model.eval()


def net(wrap=lambda m: m, norm: nn.Module | None = None, conv: nn.Module | None = None) -> nn.Module:
    conv = conv or nn.Conv2d(4, 6, 3, bias=False)
    norm = norm or nn.BatchNorm2d(6)
    return shaken(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), wrap(conv), norm, nn.ReLU(), nn.Conv2d(6, 5, 1)))


WRAPS = {
    "weight norm": parametrizations.weight_norm,
    "weight norm, old": nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm, old": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "pruned twice": lambda m: prune.random_structured(prune.l1_unstructured(m, "weight", 0.5), "weight", 1, dim=0),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", WRAPS)
@pytest.mark.parametrize("edit", ["fold", "equalize"])
def test_computed_weights_become_parameters(how, edit):
    torch.manual_seed(0)
    model = net(WRAPS[how], nn.Identity() if edit == "equalize" else None)
    with torch.no_grad():
        before = model(X)
    assert computes_weights(model) and make_permanent(model, X) == ["2"] and not computes_weights(model)
    assert type(model[2]) is nn.Conv2d and isinstance(model[2].weight, nn.Parameter)
    if edit == "fold":
        assert list(fold_bn(model, facts(model, X))) == ["2"]
    else:
        edit_floats(Equalize(), model, PassContext(facts(model, X), [X], {}))
    with torch.no_grad():
        torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)


def test_a_weight_computed_in_another_way_is_refused_by_name():
    model = net()
    weight = model[2].weight
    del model[2].weight
    model[2].raw = nn.Parameter(weight.detach())
    model[2].register_forward_pre_hook(lambda m, _: setattr(m, "weight", m.raw * 2))
    with pytest.raises(QexpError, match="2: its weight is no parameter of the layer but computed anew"):
        make_permanent(model, X)


class Tied(nn.Module):
    """Two convolutions with one weight: the same parameter, or two parameters in one piece of memory."""

    def __init__(self, how: str, norms: bool = True) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.mid, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 1)
        if how in ("weight", "both"):
            self.b.weight = self.a.weight
        if how in ("bias", "both"):
            self.b.bias = self.a.bias
        if how == "memory":
            self.b.weight = nn.Parameter(self.a.weight.data)
        self.na, self.nb = (nn.BatchNorm2d(4), nn.BatchNorm2d(4)) if norms else (nn.Identity(), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        x = self.na(self.a(self.stem(x).relu())).relu()
        return self.last(self.nb(self.b(self.mid(x).relu())).relu())


@pytest.mark.parametrize("how", ["weight", "bias", "both", "memory"])
def test_shared_weights_are_folded_once_each(how):
    model = shaken(Tied(how))
    with torch.no_grad():
        before = model(X)
        assert set(fold_bn(model, facts(model, X))) == {"a", "b"}
        torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["weight", "bias", "both", "memory"])
def test_equalize_leaves_shared_layers_alone(how):
    model = shaken(Tied(how, norms=False))
    model.last.weight.data[:, 0] *= 100
    model.stem.weight.data[0] *= 100
    with pytest.raises(QexpError, match="shares its weight or bias"):
        edit_floats(Equalize(), model, PassContext(facts(model, X), [X], {}))


def test_bias_correction_of_a_shared_bias_corrects_each_layer_for_itself():
    model = shaken(Tied("bias", norms=False))
    apart = copy.deepcopy(model)
    apart.b.bias = nn.Parameter(apart.a.bias.detach().clone())
    for m in (model, apart):
        structure = facts(m, X)
        u = {"_target_": "qexp.quantizers.uniform.Uniform"}
        apply(m, resolve(m, structure, Recipe(sites={"weight": u}, wbit=3, abit=32)), structure)
        from qexp.calibration.calibrate import calibrate

        context = PassContext(structure, [X], {}, calibration=calibrate(m, [X], progress=False))
        BiasCorrection().on_fitted(m, context)
    with torch.no_grad():
        torch.testing.assert_close(model(X), apart(X))


def later() -> nn.Module:
    """Returns a batch norm whose statistics are no longer kept after construction; evaluation uses them still."""
    norm = nn.BatchNorm2d(6)
    norm.track_running_stats = False
    return norm


class WithActivation(nn.BatchNorm2d):
    """A batch norm with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6, track_running_stats=False), later(), WithActivation(6)])
def test_norms_are_folded_only_where_they_are_constants(norm):
    model = net(norm=norm)
    structure = replace(facts(model, X), trace_error="", bn_of={"2": "3"})  # whoever read it off, and however well
    with torch.no_grad():
        before = model(X)
        with unchanged(model, X, "bn=fold"):
            assert bool(fold_bn(model, structure)) == (norm.running_mean is not None and type(norm) is nn.BatchNorm2d)
        torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)


class Mixing(nn.Module):
    """A linear layer over positions, over columns or over the features of patches, where a convolution's channels were before."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.mix = nn.Linear({"positions": 64, "columns": 8, "patches": 4, "vectors": 256}[how], 8)
        self.fc = nn.Linear({"positions": 32, "columns": 256, "patches": 512, "vectors": 8}[how], 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        if self.how == "positions":
            x = torch.flatten(x, 2)
        if self.how == "patches":
            x = x.flatten(2).transpose(1, 2)
        if self.how == "vectors":
            x = torch.flatten(x, 1)
        return self.fc(torch.flatten(self.mix(x).relu(), 1))


@pytest.mark.parametrize("how", ["positions", "columns", "patches", "vectors"])
def test_equalize_scales_channels_only_where_they_are(how):
    torch.manual_seed(0)
    model = Mixing(how).eval()
    pairs, _ = find_pairs(model, facts(model, X))
    assert (pairs[0].first, pairs[0].second) == ("a", "b")
    assert len(pairs) == (3 if how == "vectors" else 1)
    edit_floats(Equalize(), model, PassContext(facts(model, X), [X], {}))


@pytest.mark.parametrize("mode", ["empirical", "analytic"])
@pytest.mark.parametrize("how", ["positions", "columns", "patches", "vectors"])
def test_bias_correction_of_linear_layers_over_other_dimensions(how, mode):
    from qexp.calibration.calibrate import calibrate

    torch.manual_seed(0)
    model = Mixing(how).eval()
    with torch.no_grad():
        wanted = model(X)
        structure = facts(model, X)
        u = {"_target_": "qexp.quantizers.uniform.Uniform"}
        apply(model, resolve(model, structure, Recipe(sites={"weight": u}, wbit=3, abit=32)), structure)
        context = PassContext(structure, [X], {}, calibration=calibrate(model, [X], progress=False))
        before = (model(X) - wanted).mean(0).norm()
        BiasCorrection(mode).on_fitted(model, context)
        assert (model(X) - wanted).mean(0).norm() < 0.5 * before


class Doubles(Pass):
    def on_float(self, model: nn.Module, context: PassContext) -> None:
        model[5].weight.data.mul_(2)


class DoublesByDesign(Doubles):
    keeps_results = False


def test_an_edit_that_changes_results_is_named():
    model = net()
    context = PassContext(facts(model, X), [X], {})
    with pytest.raises(
        QexpError, match=r"Doubles changed what the float network computes, by 0\.|Doubles changed .* by 1"
    ):
        edit_floats(Doubles(), model, context)
    edit_floats(DoublesByDesign(), model, context)
    edit_floats(Pass(), model, context)
    with pytest.raises(QexpError, match=r"bn=fold changed .*: use bn=keep"), unchanged(model, X, "bn=fold"):
        model[5].bias.data.add_(1)
