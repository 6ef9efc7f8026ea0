"""DoReFa gradients: the published vector, the noise, and the place in a layer where they are quantized."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.layers import check_all_ran, quantizers, swap
from qexp.network.facts import facts
from qexp.numerics.granularity import PerChannel
from qexp.quantizers.dorefa_gradient import DoReFaGradient
from qexp.quantizers.uniform import Uniform
from qexp.recipe import Recipe, apply, resolve

SPEC = {"_target_": "qexp.quantizers.dorefa_gradient.DoReFaGradient", "bits": 4, "noise": "none"}


def test_vector():
    q = DoReFaGradient(4, (1, 4), noise="none")
    g = torch.tensor([[0.3, -0.1, 0.05, -0.4]])
    assert q(g)[0].tolist() == pytest.approx([0.2933333, -0.08, 0.0266667, -0.4], abs=1e-6)
    assert torch.equal(q.dequantize(q.codes(g)), q(g)) and q.levels == 16


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_levels_of_a_dense_ramp(bits):
    ramp = torch.linspace(-1, 1, 100 * 2**bits + 1)[None]
    assert len(DoReFaGradient(bits, (1, 1), noise="none")(ramp).unique()) == 2**bits


def test_each_sample_has_its_own_range_and_an_empty_one_passes():
    g = torch.tensor([[0.3, -0.1, 0.05, -0.4]])
    q = DoReFaGradient(4, (1, 4), noise="none")
    both = q(torch.cat([g, 1000 * g, 0 * g]))
    assert torch.allclose(both[1], 1000 * both[0]) and both[2].tolist() == [0, 0, 0, 0]
    assert q(g.new_zeros(0, 4)).shape == (0, 4)


def test_noise_is_right_on_average_and_stays_on_the_grid():
    q = DoReFaGradient(3, (1, 3))
    g = torch.tensor([[1.0, 0.2, -0.37]])
    seen = torch.stack([q(g) for _ in range(4000)])
    assert torch.allclose(seen.mean(0)[0, 1:], g[0, 1:], atol=0.01)
    codes = (seen / 2 + 0.5) * 7
    assert torch.allclose(codes, codes.round(), atol=1e-5) and len(seen[:, 0, 1].unique()) > 1


def test_noise_is_seeded_by_layer_and_goes_on_after_a_resume():
    def made(name: str, seed: int = 0) -> DoReFaGradient:
        q = DoReFaGradient(2, (1, 64), seed=seed)
        q.name = name
        return q

    g = torch.linspace(-1, 1, 64)[None]
    first, again = made("a"), made("a")
    assert torch.equal(first(g), again(g)) and not torch.equal(made("a")(g), made("b")(g))
    assert not torch.equal(made("a")(g), made("a", seed=1)(g))
    resumed = made("a")
    resumed.load_state_dict(copy.deepcopy(first.state_dict()), strict=True)
    assert torch.equal(resumed(g), first(g))


def test_the_layer_makes_both_gradients_from_the_quantized_one():
    torch.manual_seed(0)
    conv, x, g = nn.Conv2d(2, 3, 3), torch.randn(4, 2, 5, 5), torch.randn(4, 3, 3, 3)
    expected_x, expected_w = torch.autograd.grad(
        conv(x.requires_grad_()), (x, conv.weight), DoReFaGradient(4, (1, 3, 3, 3), noise="none")(g)
    )
    before = conv(x).detach()
    swap(conv, {"grad_output": DoReFaGradient(4, (1, 3, 3, 3), noise="none")})
    y = conv(x)
    assert torch.equal(y, before), "the forward pass is the identity"
    dx, dw = torch.autograd.grad(torch.relu_(y), (x, conv.weight), torch.where(before > 0, g, 0))
    masked = DoReFaGradient(4, (1, 3, 3, 3), noise="none")(torch.where(before > 0, g, 0))
    assert torch.equal(dx, torch.autograd.grad(nn.functional.conv2d(x, conv.weight, conv.bias), x, masked)[0])
    dx, dw = torch.autograd.grad(conv(x), (x, conv.weight), g)
    assert torch.equal(dx, expected_x) and torch.equal(dw, expected_w)


def test_a_recipe_gives_gradients_their_own_width(residual):
    x = torch.randn(2, 3, 8, 8)
    structure = facts(residual, x)
    sites = {"weight": {"_target_": "qexp.quantizers.uniform.Uniform"}, "grad_output": SPEC}
    plan = resolve(residual, structure, Recipe(sites=sites, wbit=8, abit=32))
    assert {e.bits for e in plan if e.site == "grad_output"} == {4}
    assert {e.layer for e in plan if e.site == "grad_output"} == {e.layer for e in plan if e.site == "weight"}
    apply(residual, plan, structure)
    calibrate(residual, [x], progress=False)
    check_all_ran(residual, x)
    assert all(site == "weight" for _, site, _ in quantizers(residual))
    residual.train()(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in residual.parameters())
    off = resolve(residual, structure, Recipe(sites=sites | {"grad_output": SPEC | {"bits": 32}}, wbit=8, abit=32))
    assert not any(e.site == "grad_output" for e in off)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(QexpError, match="made for grad_output"):
        swap(nn.Linear(2, 2), {"input": DoReFaGradient(4, (1, 2))})
    with pytest.raises(QexpError, match="cannot sit on 'grad_output'"):
        swap(nn.Linear(2, 2), {"grad_output": Uniform(4, (1, 2))})
    with pytest.raises(QexpError, match="no site 'grad_output'"):
        swap(nn.ReLU(), {"grad_output": DoReFaGradient(4, (1, 2))})
    with pytest.raises(QexpError, match="noise='gauss'"):
        DoReFaGradient(4, (1, 2), noise="gauss")
    with pytest.raises(QexpError, match="granularity=channel is not allowed; use tensor"):
        DoReFaGradient(4, (1, 2), granularity=PerChannel(1))
