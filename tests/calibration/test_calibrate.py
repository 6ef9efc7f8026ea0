"""The calibration phase: what it sees, which sites share it, what each quantizer makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qexp.calibration.calibrate import calibrate, collect, fit
from qexp.errors import QexpError
from qexp.layers import swap
from qexp.numerics import PerChannel, PerGroup
from qexp.quantizers.lsq import LSQ
from qexp.quantizers.uniform import Uniform
from qexp.ranges import ACIQ, MSE, MinMax
from qexp.statistics.stats import NonFinite
from tests.networks import Mixed, Residual


def images(n: int = 3, size: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 3, 8, 8, generator=generator) * (1 + i) for i in range(n)]


def observed(model: nn.Module, batches: list[torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
    """Returns every input and output of every layer as `[C, n]`, by hooks of its own; clones, for layers may work in place."""
    seen: dict[tuple[str, str], list[torch.Tensor]] = {}

    def put(key, x):
        seen.setdefault(key, []).append(x.detach().clone())

    handles = []
    for name, module in model.named_modules():
        if list(module.children()) or not name:
            continue

        def before(_, args, name=name):
            for i, x in enumerate(args):
                put((name, "input" if len(args) == 1 else f"input.{i}"), x)

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(lambda _, __, y, name=name: put((name, "output"), y)))
    with torch.no_grad():
        for x in batches:
            model(x)
    for handle in handles:
        handle.remove()
    return {key: torch.cat([x.movedim(1, 0).flatten(1) for x in parts], 1) for key, parts in seen.items()}


@pytest.mark.parametrize("kind", [Residual, Mixed])
def test_statistics_equal_brute_force(kind):
    torch.manual_seed(0)
    model = kind().eval()
    seen, expected = collect(model, images(), progress=False), observed(model, images())
    assert set(seen) == set(expected)
    for key, x in expected.items():
        stats = seen[key]
        assert stats.tensor.count.item() == x.numel(), key
        assert stats.tensor.min.item() == x.min().item() and stats.tensor.max.item() == x.max().item(), key
        assert stats.tensor.mean.item() == pytest.approx(x.double().mean().item(), rel=1e-4, abs=1e-6), key
        assert stats.tensor.zeros.item() == (x == 0).sum().item(), key
        assert torch.equal(stats.channel.max, x.amax(1).double()), key
        torch.testing.assert_close(stats.channel.mean, x.double().mean(1), rtol=1e-4, atol=1e-6)


def test_sites_that_carry_one_tensor_share_one_entry(residual):
    seen = collect(residual, images(), progress=False)
    assert seen["relu1", "input"] is seen["bn1", "output"]
    assert seen["depthwise", "input"] is seen["relu1", "output"] is seen["add", "input.1"]
    assert seen["conv", "input"] is not seen["pool", "input"]


def test_a_layer_that_runs_twice_is_seen_twice(mixed):
    """Its first input is another layer's output, its second is not: it must not be taken for that output alone."""
    seen, expected = collect(mixed, images(), progress=False), observed(mixed, images())
    assert seen["act", "input"] is not seen["norm", "output"]
    assert seen["act", "input"].tensor.max.item() == expected["act", "input"].max().item()
    assert seen["act", "input"].tensor.max.item() > seen["norm", "output"].tensor.max.item()


def test_inplace_layers_change_no_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)).eval()
    seen, expected = collect(model, images(), progress=False), observed(model, images())
    assert seen["0", "output"].tensor.min.item() == expected["0", "output"].min().item() < 0
    assert seen["2", "input"].tensor.min.item() == 0


def test_the_model_is_left_as_it_was(residual):
    residual.train()
    before = {k: v.clone() for k, v in residual.state_dict().items()}
    collect(residual, images(), progress=False)
    assert residual.training and all(not m._forward_hooks and not m._forward_pre_hooks for m in residual.modules())
    assert all(torch.equal(v, before[k]) for k, v in residual.state_dict().items())


def test_statistics_are_of_the_float_model_whatever_it_carries(residual):
    plain = collect(residual, images(), progress=False)
    swap(residual.conv, {"input": Uniform(1, (1, 8, 8, 8), symmetric=False), "weight": Uniform(2, (12, 8, 3, 3))})
    carried = collect(residual, images(), progress=False)
    assert carried["fc", "input"].tensor.max == plain["fc", "input"].tensor.max


@pytest.mark.parametrize("where", [0, 2])
def test_nan_is_reported_by_layer_site_and_batch(residual, where):
    batches = images()
    batches[where][1, 0, 0, 0] = float("nan")
    message = rf"stem \(input\), calibration batch {where}: 1 of 768 values are NaN or infinite; check the weights"
    with pytest.raises(NonFinite, match=message):
        collect(residual, batches, progress=False)
    assert all(not m._forward_pre_hooks for m in residual.modules())


def test_a_non_finite_weight_is_reported_by_layer(residual):
    swap(residual.conv, {"weight": Uniform(4, (12, 8, 3, 3), signed=True)})
    with torch.no_grad():
        residual.conv.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(NonFinite, match=r"conv \(output\)|conv \(weight\)"):
        calibrate(residual, images(), progress=False)


def test_a_layer_that_runs_only_later_is_refused():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(self.a(x)) if x.abs().max() > 5 else self.a(x)

    with pytest.raises(QexpError, match=r"b \(input\): ran in calibration batch 1 but not in the first"):
        collect(Sometimes(), [torch.ones(2, 3), torch.full((2, 3), 9.0)], progress=False)


def test_a_layer_that_runs_on_empty_tensors_alone_is_refused():
    class Found(nn.Module):
        """A head for what is found, which is nothing."""

        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.body(x)
            return y.mean() + self.head(y[y.mean((1, 2, 3)) > 1e9]).sum()

    model = Found()
    swap(model.head, {"input": Uniform(8)})
    with pytest.raises(QexpError, match=r"head \(input\): .* ran on empty tensors alone"):
        calibrate(model, [torch.randn(2, 3, 4, 4)], progress=False)


def test_no_images_are_refused(residual):
    with pytest.raises(QexpError, match="calibration got no images"):
        calibrate(residual, [], progress=False)


def test_quantizers_take_the_ranges_of_their_site(residual):
    expected = observed(residual, images())
    weight = residual.conv.weight.detach().clone()
    swap(
        residual.conv,
        {
            "input": Uniform(8, (1, 8, 8, 8), symmetric=False, range=MinMax()),
            "weight": Uniform(8, weight.shape, signed=True, narrow=True, granularity=PerChannel(0)),
            "output": Uniform(8, (1, 12, 3, 3), signed=True, narrow=True, granularity=PerChannel(1), range=MSE()),
        },
    )
    calibrate(residual, images(), progress=False)
    x = expected["conv", "input"]
    assert residual.conv.input_quantizer.scale.item() == pytest.approx(
        (x.max() - min(x.min(), 0)).item() / 255, rel=1e-6
    )
    limits = weight.abs().amax((1, 2, 3))
    torch.testing.assert_close(residual.conv.weight_quantizer.scale.flatten(), limits / 127)
    assert residual.conv.output_quantizer.scale.shape == (1, 12, 1, 1)
    highest = expected["conv", "output"].abs().amax(1) / 127
    assert (residual.conv.output_quantizer.scale.flatten() <= highest * 1.0001).all()


def test_a_shared_quantizer_is_fitted_on_all_it_sits_on(residual):
    expected = observed(residual, images())
    shared = Uniform(8, (1, 8, 8, 8), signed=True, narrow=True)
    swap(residual.add, {"input.0": shared, "input.1": shared})
    seen = collect(residual, images(), progress=False)
    before = seen["add", "input.0"].tensor.histogram.counts.sum().item()
    for _ in range(2):  # fitting again changes neither the range nor what was seen
        fit(residual, seen)
        both = torch.cat([expected["add", "input.0"], expected["add", "input.1"]], 1)
        assert shared.scale.item() == pytest.approx(both.abs().max().item() / 127, rel=1e-6)
        assert seen["add", "input.0"].tensor.histogram.counts.sum().item() == before


def test_two_weights_under_one_quantizer(residual):
    shared = Uniform(3, (1,), signed=True, narrow=True, range=MSE())
    swap(residual.stem, {"weight": shared})
    swap(residual.conv, {"weight": shared})
    fit(residual, collect(residual, images(), progress=False))
    together = Uniform(3, (1,), signed=True, narrow=True, range=MSE())
    from qexp.statistics.stats import TensorStats

    together.fit(TensorStats.of(torch.cat([residual.stem.weight.flatten(), residual.conv.weight.flatten()])))
    assert torch.equal(shared.scale, together.scale)


def test_the_half_range_follows_the_relu(residual):
    from qexp.network.facts import facts

    structure = facts(residual, images()[0])
    for name in ("bn1", "grouped"):
        q = Uniform(4, (1, 8, 8, 8), symmetric=False, range=ACIQ())
        swap(residual.get_submodule(name), {"output": q})
    calibrate(residual, images(), followed_by_relu=structure.followed_by_relu, progress=False)
    assert residual.bn1.output_quantizer.zero_point.item() == 0  # goes straight into relu1
    assert residual.grouped.output_quantizer.zero_point.item() > 0


def test_a_shared_quantizer_has_a_half_range_only_where_every_site_goes_into_a_relu(residual):
    from qexp.network.facts import facts

    structure = facts(residual, images()[0])
    assert "add" in structure.followed_by_relu and "grouped" not in structure.followed_by_relu
    shared = Uniform(4, (1, 8, 8, 8), symmetric=False, range=ACIQ())
    for name in ("grouped", "add"):  # the last one goes into a ReLU
        swap(residual.get_submodule(name), {"output": shared})
    calibrate(residual, images(), followed_by_relu=structure.followed_by_relu, progress=False)
    assert shared.zero_point.item() > 0


def test_groups_on_an_activation_are_refused_by_name(residual):
    swap(residual.conv, {"input": LSQ(4, (1, 8, 8, 8), granularity=PerGroup(8))})
    with pytest.raises(QexpError, match=r"conv \(input\).*group"):
        calibrate(residual, images(), progress=False)
