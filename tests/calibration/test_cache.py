"""Statistics are kept under what they depend on: a second method on the same network calibrates without a forward pass."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from qexp.calibration.cache import behaviour, content_hash, load_stats, save_stats
from qexp.calibration.calibrate import calibrate, collect
from qexp.layers import swap, unswap
from qexp.layers.quantized import QUANTIZED
from qexp.models.cifar_resnet import CifarResNet
from qexp.quantizers.lsq import LSQ
from qexp.quantizers.uniform import Uniform
from qexp.ranges import ACIQ, KL, MSE, MinMax, Percentile
from tests.networks import Residual

BATCHES = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


class Forwards:
    """Counts the forward passes of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._seen)

    def _seen(self, *_):
        self.count += 1


def put(model: nn.Module, method: type, bits: int = 8, **options) -> None:
    for name in ("stem", "depthwise", "conv"):
        layer = model.get_submodule(name)
        swap(layer, {"input": method(bits, (1, layer.in_channels, 8, 8), **options)})


def test_a_second_method_runs_no_forward_pass(model, tmp_path):
    forwards = Forwards(model)
    put(model, Uniform, symmetric=False, range=MinMax())
    calibrate(model, BATCHES, cache_dir=tmp_path, progress=False)
    assert forwards.count == len(BATCHES)
    for rule in (MSE(), KL(), Percentile(0.99), ACIQ()):
        for bits in (8, 4):
            put(model, Uniform, bits, symmetric=False, range=rule)
            calibrate(model, BATCHES, cache_dir=tmp_path, progress=False)
    put(model, LSQ, 4, range=MSE())
    calibrate(model, BATCHES, cache_dir=tmp_path, progress=False)
    assert forwards.count == len(BATCHES)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_kept_statistics_give_the_same_ranges(model, tmp_path):
    scales = []
    for folder in (tmp_path, tmp_path, None):
        put(model, Uniform, 4, symmetric=False, range=MSE())
        calibrate(model, BATCHES, cache_dir=folder, progress=False)
        scales.append([model.get_submodule(n).input_quantizer.scale.item() for n in ("stem", "depthwise", "conv")])
    assert scales[0] == scales[1] == scales[2]


def test_round_trip_keeps_everything(model, tmp_path):
    seen = collect(model, BATCHES, channel_histograms=True, progress=False)
    save_stats(seen, tmp_path / "kept.safetensors")
    back = load_stats(tmp_path / "kept.safetensors")
    assert list(back) == list(seen) and back.aliases == seen.aliases
    for key in seen:
        for kind in ("tensor", "channel"):
            a, b = getattr(seen[key], kind).state(), getattr(back[key], kind).state()
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "foreign"])
def test_a_damaged_file_is_calibrated_again(model, tmp_path, damage, caplog):
    put(model, Uniform, symmetric=False)
    calibrate(model, BATCHES, cache_dir=tmp_path, progress=False)
    scale = model.conv.input_quantizer.scale.clone()
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"x": torch.ones(2)}, file)
    else:
        file.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"\x07" * 500, "empty": b""}[damage])
    forwards = Forwards(model)
    calibrate(model, BATCHES, cache_dir=tmp_path, progress=False)
    assert forwards.count == len(BATCHES) and torch.equal(model.conv.input_quantizer.scale, scale)
    assert "damaged" in caplog.text
    calibrate(model, BATCHES, cache_dir=tmp_path, progress=False)
    assert forwards.count == len(BATCHES), "the file was written anew"


def test_a_folder_that_cannot_be_written_costs_no_result(model, tmp_path, caplog):
    put(model, Uniform, symmetric=False)
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    calibrate(model, BATCHES, cache_dir=blocked / "calibration", progress=False)
    assert model.conv.input_quantizer.ready and "could not be written" in caplog.text


def changed_weight(m: Residual):
    with torch.no_grad():
        m.fc.bias[0] += 1e-3


def changed_statistics(m: Residual):
    m.bn1.running_mean[0] += 1e-3


def changed_stride(m: Residual):
    m.conv.stride = (1, 1)


def changed_activation(m: Residual):
    m.relu2 = nn.Hardswish()


def changed_behaviour(m: Residual):
    m.after_add = False


def changed_list(m: Residual):
    m.routes = [-1, {"from": -2}]


def changed_function(m: Residual):
    m.activation = torch.tanh


def changed_body(m: Residual):
    m.gain = lambda x: x * 3


def changed_call(m: Residual):
    m.scaled = lambda x: torch.tanh(x)


def changed_closure(m: Residual):
    m.clipped = clip(2)


def changed_argument(m: Residual):
    m.squash = functools.partial(torch.clamp, max=2)


def changed_tensor(m: Residual):
    m.priors = m.priors + 1


def clip(limit: int):
    return lambda x: x.clamp_max(limit)


def changed_anchors(m: Residual):
    m.anchors += 1


@pytest.mark.parametrize(
    "change",
    [
        *(changed_weight, changed_statistics, changed_stride, changed_activation, changed_behaviour),
        *(changed_list, changed_function, changed_body, changed_anchors),
        *(changed_call, changed_closure, changed_argument, changed_tensor),
    ],
)
def test_another_network_has_another_hash(model, change):
    model.routes, model.activation, model.gain = [-1, {"from": -3}], torch.relu, lambda x: x * 2
    model.scaled, model.clipped, model.squash = lambda x: torch.relu(x), clip(1), functools.partial(torch.clamp, max=1)
    object.__setattr__(model, "priors", torch.zeros(3))
    model.register_buffer("anchors", torch.zeros(2), persistent=False)
    other = copy.deepcopy(model)
    assert content_hash(other, BATCHES, False) == content_hash(model, BATCHES, False)
    change(other)
    assert content_hash(other, BATCHES, False) != content_hash(model, BATCHES, False)


def test_settings_of_any_kind_have_a_hash(model):
    @dataclass(slots=True)
    class Slots:
        a: int = 1

    cyclic: list = [1]
    cyclic.append(cyclic)
    model.slots, model.method, model.upper, model.cyclic = Slots(), torch.Tensor.relu, str.upper, cyclic
    assert content_hash(model, BATCHES, False) == content_hash(copy.deepcopy(model), BATCHES, False)


def test_other_images_have_another_hash(model):
    base = content_hash(model, BATCHES, False)
    brighter = [BATCHES[0] + 1e-4, *BATCHES[1:]]
    regrouped = [torch.cat(BATCHES[:2]), BATCHES[2]]  # averaged ranges depend on the batches
    hashes = {base, *(content_hash(model, b, False) for b in (brighter, regrouped, BATCHES[:2], BATCHES[::-1]))}
    assert len(hashes) == 5 and content_hash(model, BATCHES, True) not in hashes


def test_a_version_that_quantizes_more_classes_looks_anew(model, tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.delitem(QUANTIZED, nn.Conv2d)
        calibrate(model, BATCHES, cache_dir=tmp_path, progress=False)
    put(model, Uniform)
    calibrate(model, BATCHES, cache_dir=tmp_path, progress=False)
    assert model.get_submodule("conv").input_quantizer.scale > 0


def test_the_method_does_not_enter_the_hash(model):
    plain = content_hash(model, BATCHES, False)
    for bits in (8, 2):
        put(model, LSQ, bits)
        assert content_hash(model, BATCHES, False) == plain
        for name in ("stem", "depthwise", "conv"):
            unswap(model.get_submodule(name))
    assert content_hash(model.train(), BATCHES, False) == plain
    assert Path(plain).name == plain


def test_float_scores_tell_networks_with_the_same_weights_apart() -> None:
    one = CifarResNet(depth=20, shortcut="A", num_classes=10, post_add_relu=True)
    other = CifarResNet(depth=20, shortcut="A", num_classes=10, post_add_relu=False)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert [behaviour(m) for m in one.modules()] != [behaviour(m) for m in other.modules()]
