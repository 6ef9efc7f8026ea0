"""A layer that is called at several places: what calibration makes of calls that differ in width, shape or number of tensors."""

import pytest
import torch
from torch import Tensor, nn

from qexp.analysis.channel_spread import channel_measures
from qexp.analysis.error_by_depth import errors_by_depth
from qexp.calibration.cache import load_stats, save_stats
from qexp.calibration.calibrate import calibrate, collect
from qexp.errors import QexpError
from qexp.layers.swap import quantizers_off
from qexp.models.modules import Add, Concat
from qexp.network.facts import facts
from qexp.recipe import Recipe, apply, resolve
from qexp.statistics.collectors import MaxMap

UNIFORM = {"_target_": "qexp.quantizers.uniform.Uniform", "symmetric": False}
WEIGHT = {"_target_": "qexp.quantizers.uniform.Uniform", "granularity": "channel"}


class Shared(nn.Module):
    """One module of a kind for two places, of 4 and of 6 channels; Adds and Concats have both as operands."""

    def __init__(self, kind: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.shared = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), kind
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.a, self.b):
            y = conv(x)
            x = self.shared(y, y.relu()) if isinstance(self.shared, Add) else self.shared(y)
        return self.fc(x.mean((2, 3)))


KINDS = [
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.PReLU()),
    *(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(4), Add(), Concat()),
]


def quantized(model: nn.Module, x: Tensor, **sites) -> nn.Module:
    model.eval()
    structure = facts(model, x[:1])
    rule = {"layers": "shared", **sites}
    recipe = Recipe(sites={"input": UNIFORM, "weight": WEIGHT}, rules={"shared": rule} if sites else {}, wbit=8, abit=8)
    apply(model, resolve(model, structure, recipe), structure)
    return model


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: str(k).replace("()", ""))
@pytest.mark.parametrize("sits", [False, True], ids=["float", "output"])
def test_one_module_at_places_of_two_widths(kind, sits):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    model = quantized(Shared(kind), x, **({"output": {**UNIFORM, "bits": 8}} if sits else {}))
    seen = calibrate(model, [x, x.flip(0)], progress=False)
    model.zero_grad()
    with torch.no_grad():
        with quantizers_off(model):
            wanted = model(x)
        got = model(x)
    assert (got - wanted).norm() / wanted.norm() < 0.03
    assert not seen["shared", "output"].tensor.empty and seen["shared", "output"].channel.empty
    depth, _, _ = errors_by_depth(model, x)
    assert len(depth) == (4 if sits else 3)
    if sits:
        quantizer = model.shared.output_quantizer
        assert channel_measures(model, "shared", "output", quantizer, seen) == {}
        assert quantizer.scale.numel() == 1


def test_the_range_is_that_of_all_calls(tmp_path):
    torch.manual_seed(0)
    x, model = torch.randn(4, 3, 8, 8), Shared(nn.ReLU()).eval()
    model.b.weight.data *= 50
    results = []
    model.shared.register_forward_hook(lambda _, __, y: results.append(y.detach().clone()))
    seen = collect(model, [x], progress=False)
    both = torch.cat([y.flatten() for y in results]).double()
    assert float(seen["shared", "output"].tensor.max) == float(both.max())
    assert float(seen["shared", "output"].tensor.mean) == pytest.approx(float(both.mean()), rel=1e-5)
    assert int(seen["shared", "output"].tensor.count) == both.numel()
    save_stats(seen, tmp_path / "kept.safetensors")
    kept = load_stats(tmp_path / "kept.safetensors")
    assert kept["shared", "output"].channel.empty and not kept["a", "output"].channel.empty


def test_one_scale_per_channel_is_refused_by_name():
    x = torch.randn(2, 3, 8, 8)
    model = quantized(Shared(nn.ReLU()), x, output={**UNIFORM, "bits": 8, "granularity": "channel"})
    with pytest.raises(QexpError, match=r"shared \(output\): granularity=channel is not allowed.*granularity: tensor"):
        calibrate(model, [x], progress=False)


def test_equal_widths_keep_their_channels():
    torch.manual_seed(0)
    model = Shared(nn.ReLU())
    model.a, model.b, model.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2), nn.Linear(4, 5)
    seen = collect(model.eval(), [torch.randn(2, 3, 9, 9)], progress=False, collectors=[MaxMap()])
    assert seen["shared", "output"].channel.count.tolist() == [2 * (49 + 9)] * 4
    assert seen["shared", "output"].extra["max_map"].numel() == 0  # maps of two sizes have no map together
    assert seen["a", "output"].extra["max_map"].shape == (4, 7, 7)


def test_a_map_over_calls_of_different_shapes_is_refused_only_where_it_is_asked_for():
    x = torch.randn(2, 3, 8, 8)
    caq = {"_target_": "qexp.quantizers.caq.CAQShift", "exponent_mean": "activation_mean", "bits": 8}
    calibrate(quantized(Shared(nn.ReLU()), x), [x], progress=False)
    model = quantized(Shared(nn.ReLU()), x, output=caq)
    with pytest.raises(QexpError, match=r"shared \(output\): CAQShift needs tensors of one shape"):
        calibrate(model, [x], progress=False)


class Tokens(nn.Module):
    """A linear layer on each of the patches; features lie in the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.fc = nn.Conv2d(3, 6, 4, stride=4), nn.Linear(6, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mix(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def test_channels_of_a_linear_layer_are_its_features():
    torch.manual_seed(0)
    x, model = torch.randn(4, 3, 8, 8), Tokens()
    model.embed.weight.data[2] *= 100
    structure = facts(model.eval(), x[:1])
    recipe = Recipe(sites={"input": {**UNIFORM, "granularity": "channel"}, "weight": WEIGHT}, wbit=8, abit=8)
    apply(model, resolve(model, structure, recipe), structure)
    seen = calibrate(model, [x], progress=False)
    assert len(seen["mix", "input"].channel.count) == 6 and len(seen["mix", "output"].channel.count) == 7
    assert model.mix.input_quantizer.scale.shape == (1, 1, 6)
    scales = model.mix.input_quantizer.scale.flatten()
    assert scales[2] > 20 * scales[torch.arange(6) != 2].max()
    with torch.no_grad():
        got = model(x)
        with quantizers_off(model):
            wanted = model(x)
    assert (got - wanted).norm() / wanted.norm() < 0.02
