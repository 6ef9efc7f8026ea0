"""Attention as people write it: torch's function and module, windows, masks; computed from parts, quantized, and proven."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.integer.lowering import lower
from qexp.layers.quantized import quantizers
from qexp.models.attention import Attention
from qexp.network.cost import layer_costs, quantized_macs
from qexp.network.facts import facts
from qexp.recipe import Recipe, resolve
from tests.integer.test_kinds import IMAGES, Calls, _deployed, proven

CAUSAL = torch.ones(64, 64, dtype=torch.bool).tril()


class Net(nn.Module):
    """A convolution, a body on its pixels as tokens `[N, 64, 8]`, and a classifier."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body, self.fc = nn.Conv2d(3, 8, 3, padding=1), body, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class Fused(nn.Module):
    """Attention by torch's function."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.qkv, self.proj, self.options = nn.Linear(8, 24), nn.Linear(8, 8), options

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, **self.options)
        return x + self.proj(y.transpose(1, 2).reshape(n, tokens, 8))


class Grouped(nn.Module):
    """Attention of four heads of queries to two of keys and values."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.q, self.kv, self.options = nn.Linear(8, 8), nn.Linear(8, 8), options

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q = self.q(x).view(n, tokens, 4, 2).transpose(1, 2)
        k, v = self.kv(x).view(n, tokens, 2, 2, 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **self.options)
        return y.transpose(1, 2).reshape(n, tokens, 8)


class Module(nn.Module):
    """Attention by torch's module."""

    def __init__(
        self, heads: int = 2, first: bool = True, mask: Tensor | None = None, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm, self.first, self.mask = nn.LayerNorm(8), first, mask
        self.attend = nn.MultiheadAttention(8, heads, dropout, bias=bias, batch_first=first)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.first else x.transpose(0, 1)
        y = self.norm(y)
        y, _ = self.attend(y, y, y, attn_mask=self.mask)
        return x + (y if self.first else y.transpose(0, 1))


class Windows(nn.Module):
    """Attention in windows of 3 x 3 of a map of 8 x 8, which is padded and moved on, with positions and a mask, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.places = nn.Parameter(torch.randn(2, 9, 9) / 4)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        y = torch.roll(F.pad(x.view(n, 8, 8, 8), (0, 0, 0, 1, 0, 1)), (-1, -1), (1, 2))
        y = y.view(n, 3, 3, 3, 3, 8).permute(0, 1, 3, 2, 4, 5).reshape(n * 9, 9, 8)
        q, k, v = F.linear(y, self.qkv.weight, self.qkv.bias).reshape(n * 9, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)[:]
        shares = q.mul(0.5).matmul(k.transpose(-2, -1)) + self.places
        mask = y.new_zeros((9, 9))
        mask[-3:, -1:] = 1.0
        mask = mask.view(9, 1, 9).sub(mask.view(9, 9, 1)).abs() * -100.0
        shares = (shares.view(n, 9, 2, 9, 9) + mask[:, None]).flatten(0, 1).softmax(-1)
        y = self.proj(shares.matmul(v).transpose(1, 2).reshape(n * 9, 9, 8))
        y = y.view(-1, 3, 3, 3, 3, 8).permute(0, 1, 3, 2, 4, 5).reshape(n, 9, 9, 8)
        return x + torch.roll(y, (1, 1), (1, 2))[:, :8, :8].reshape(n, 64, 8)


class Cosine(nn.Module):
    """Attention by angles as Swin Transformer V2 has it: vectors of length 1, a learned factor per head, a bias of a small network.

    The key's part of the bias is replaced by zeros in a copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.of_places = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(2, 2)
        self.logit_scale = nn.Parameter(torch.full((2, 1, 1), 5.0).log())
        with torch.no_grad():
            self.qkv.bias[8:16] = 0
        places = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij"), -1) / 7 - 4
        self.register_buffer("places", places)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        bias = self.qkv.bias.clone()
        bias[8:16].zero_()
        qkv = F.linear(x, self.qkv.weight, bias).reshape(n, 64, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        shares = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        shares = shares * torch.clamp(self.logit_scale, max=4.6).exp()
        shares = shares + 2 * torch.sigmoid(self.of_places(self.places).permute(2, 0, 1))
        return self.proj(shares.softmax(-1).matmul(v).transpose(1, 2).reshape(n, 64, 8))


BODIES = {
    "function": Fused,
    "scale": lambda: Fused(scale=0.3),
    "causal": lambda: Fused(is_causal=True),
    "where": lambda: Fused(attn_mask=CAUSAL),
    "added": lambda: Fused(attn_mask=torch.linspace(-2, 2, 64)[None].float()),
    "minus infinity": lambda: Fused(attn_mask=torch.zeros(64, 64).masked_fill(~CAUSAL, -torch.inf)),
    "module": Module,
    "odd heads": lambda: Module(heads=1),
    "images second": lambda: Module(first=False),
    "no biases": lambda: Module(bias=False),
    "masked module": lambda: Module(mask=~CAUSAL),
    "windows": Windows,
    "cosine": Cosine,
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_attention_is_quantized_and_proven(body, quantize):
    model = Net(body()).eval()
    images = torch.randn(4, *IMAGES[1:], generator=torch.Generator().manual_seed(3))
    before, keys = model(images).detach(), list(model.state_dict())
    found = facts(model, images[:1])
    assert not found.trace_error and not found.strays
    after = model(images)
    assert (after - before).norm() < 1e-5 * before.norm() and list(model.state_dict()) == keys
    model, images = quantize(model, rules=_deployed("integer"), shape=(16, *IMAGES[1:]))
    carried = {name.removeprefix("body.") for name, _, _ in quantizers(model)}
    assert sum(name.split(".")[-1].split("_")[0] in ("scores", "values", "matmul") for name in carried) == 2, carried
    assert any("qkv" in name or "in_proj" in name for name in carried) and any("proj" in name for name in carried)
    proven(model, images, share=1.5)


def test_products_of_quantized_factors_count_as_quantized():
    model, images = Net(Fused()).eval(), torch.randn(2, *IMAGES[1:])
    found = facts(model, images)
    for rules, share in (({}, False), (_deployed("integer"), True)):
        plan = resolve(model, found, Recipe({"input": UNIFORM, "weight": UNIFORM}, rules=rules))
        bits = plan.bits("weight"), plan.bits("input")
        part, left = quantized_macs(layer_costs(model, found), found.products, *bits, plan.operand_bits())
        assert (part == 100 and not left) is share


UNIFORM = {"_target_": "qexp.quantizers.uniform.Uniform"}


def test_shares_are_left_out_in_training():
    model, images = Net(Module(dropout=0.5)), torch.randn(2, *IMAGES[1:])
    facts(model, images)
    model.train()
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))
    drops = Fused()
    model = Net(drops)
    facts(model, images)
    drops.options["dropout_p"] = 0.5
    assert not torch.equal(model(images), model(images))


def test_attention_in_parts_trains_and_is_saved_as_before(quantize):
    torch.manual_seed(0)
    plain = Net(Module(heads=2))
    model, images = quantize(copy.deepcopy(plain), rules=_deployed("integer"), shape=(16, *IMAGES[1:]))
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(again(images), model(images))
    again.body.attend.in_proj_weight.data.zero_()
    assert not again.body.attend.in_proj.weight.any(), "one tensor under both names"
    model.train()
    model(images).square().sum().backward()
    assert model.body.attend.in_proj_weight.grad.abs().sum() > 0 and model.body.attend.in_proj_bias.grad is not None
    again.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(again.eval()(images), model.eval()(images))
    assert {k for k in model.state_dict() if "_quantizer" not in k} == set(plain.state_dict())


class Crossed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.other, self.attend = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.other(x), x, x)[0]


def test_attention_to_another_tensor_is_refused_by_name():
    model, images = Net(Crossed()).eval(), torch.randn(2, *IMAGES[1:])
    before = model(images)
    found = facts(model, images)
    assert torch.equal(model(images), before)
    with pytest.raises(
        QexpError, match=r"body.attend \(MultiheadAttention\).*cannot carry quantizers.*Leave them in float"
    ):
        resolve(model, found, Recipe({"input": UNIFORM, "weight": UNIFORM}))


REFUSED = {
    "a convolution of windows": (
        lambda x, f: f(x.reshape(-1, 8, 4, 4)).reshape(x.shape[0], 64, 8),
        nn.Conv2d(8, 8, 1),
        "parts of images; move dimension 0 back",
    ),
    "a mixed shape": (
        lambda x, f: f(x.reshape(64, -1, 8)).reshape(-1, 64, 8),
        nn.Linear(8, 8),
        "mixes images of a batch",
    ),
    "matrices of images": (
        lambda x, f: f((x.permute(1, 2, 0) @ x.permute(1, 0, 2)).softmax(-1) @ x.permute(1, 2, 0)).permute(2, 0, 1),
        nn.Identity(),
        "no images in dimension 0",
    ),
}


@pytest.mark.parametrize(("call", "layer", "message"), REFUSED.values(), ids=REFUSED)
def test_what_mixes_images_is_refused_by_name(call, layer, message, quantize):
    model, images = quantize(Net(Calls(call, layer)), rules=_deployed("integer"), shape=(16, *IMAGES[1:]))
    with pytest.raises(QexpError, match=message):
        lower(model, images[:1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"attn_mask": torch.randn(4, 5, 5), "scale": 0.3},
        {"attn_mask": torch.randn(5, 5)},
        {"attn_mask": torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()},
    ],
    ids=["plain", "causal", "by head", "one mask", "bool"],
)
def test_grouped_heads_attend_as_torch_s_function(options):
    q, k, v = torch.randn(2, 4, 5, 6), torch.randn(2, 2, 5, 6), torch.randn(2, 2, 5, 6)
    wanted = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    named = {"attn_mask": "mask", "is_causal": "causal", "scale": "scale"}
    torch.testing.assert_close(Attention(grouped=True, **{named[n]: o for n, o in options.items()})(q, k, v), wanted)


def _layers(**options: object) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


@pytest.mark.parametrize("body", [Grouped, _layers, lambda: _layers(activation="gelu", norm_first=True)])
def test_grouped_heads_and_torch_s_encoder_are_proven(body, quantize):
    proven(*quantize(Net(body()), rules=_deployed("integer"), shape=IMAGES), share=5.0)


def test_a_bias_given_as_a_copy_is_learned_in_part(quantize):
    model, images = quantize(Net(Cosine()), rules=_deployed("integer"), shape=IMAGES)
    model.zero_grad()
    model(images[:4]).square().sum().backward()
    gradient = model.body.qkv.bias.grad
    assert not gradient[8:16].any() and gradient[:8].any() and gradient[16:].any()
