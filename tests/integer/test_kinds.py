"""Networks with gates, norms, other map sizes, reshapings and attention become integers that compute the same, in C as well."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.integer import package
from qexp.integer.lowered import Lowered
from qexp.integer.lowering import lower
from qexp.integer.verify import verify
from qexp.models import modules, operations
from tests.integer.conftest import UNIFORM

ROOT = Path(__file__).parents[2]
IMAGES = (24, 3, 8, 8)
STEM = {"stem": {"layers": "stem", "input": UNIFORM, "output": UNIFORM}}
FLOAT = {"stem": {"layers": "stem", "input": UNIFORM}}  # the body reads sums, whose channels have scales of their own


class Net(nn.Module):
    """A convolution to 8 channels, a body, and a classifier."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body, self.fc = nn.Conv2d(3, 8, 3, padding=1), body, nn.LazyLinear(5)
        for norm in (
            m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm)
        ):
            nn.init.uniform_(norm.weight, -1, 1)
            nn.init.uniform_(norm.bias, -1, 1)
        self(torch.zeros(2, *IMAGES[1:]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).flatten(1))


class Calls(nn.Module):
    """A body written as a function of its input and of some layers."""

    def __init__(self, call: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.call, self.layers = call, nn.ModuleList(layers)
        self.scale = nn.Parameter(torch.linspace(-1, 1, 8).reshape(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, *self.layers)


class Scaled(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, *self.layers) * self.scale


def proven(model: nn.Module, images: Tensor, share: float = 1.5) -> Lowered:
    """Returns the program of a network, after proving it on all images."""
    lowered = lower(model, images[:1])
    verdict = verify(model, lowered, [(images, None)], progress=False)
    assert verdict.equal and verdict.reference == 16, verdict.line()
    assert verdict.share < share, "against real scales few codes differ"
    return lowered


def gate(activation: nn.Module) -> nn.Module:
    return Calls(
        lambda x, a, b, g: x * g(b(a(x.mean((2, 3), keepdim=True)).relu())),
        nn.Conv2d(8, 4, 1),
        nn.Conv2d(4, 8, 1),
        activation,
    )


def joined(x: Tensor, a: nn.Module, b: nn.Module, norm: nn.Module, last: nn.Module) -> Tensor:
    return last(norm(torch.cat([x, a(x), b(x)], 1)).relu())


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.size()
    a, b = x.chunk(2, 1)
    return torch.cat([b.relu(), a], 1).view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def last_dimension(x: Tensor, norm: nn.Module, wide: nn.Module, narrow: nn.Module) -> Tensor:
    return narrow(F.gelu(wide(norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)


def attention(x: Tensor, qkv: nn.Module, last: nn.Module) -> Tensor:
    x = x.flatten(2).transpose(1, 2)
    q, k, v = qkv(x).chunk(3, -1)
    return last(torch.softmax(q @ k.transpose(1, 2) * 0.35, -1) @ v)


def heads(x: Tensor, qkv: nn.Module, last: nn.Module) -> Tensor:
    """Attention of two heads with its projection split first and products written as sums over an index."""
    n, width = x.shape[:2]
    x = x.flatten(2).transpose(1, 2)
    q, k, v = (part.reshape(n, -1, 2, width // 2).permute(0, 2, 1, 3) for part in qkv(x).chunk(3, -1))
    shares = torch.einsum("b h i d, b h j d -> b h i j", q, k * 0.35).softmax(-1)
    return last(torch.einsum("bhij,bhjd->bhid", shares, v).permute(0, 2, 1, 3).reshape(n, -1, width))


def patches(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    """Patches of a convolution's result as rows, as MobileViT takes them apart; others read that result before and afterwards."""
    y = a(x)
    n, c, h, w = y.shape
    early = y.relu()
    z = y.reshape(n * c * h // 2, 2, w // 2, 2).transpose(1, 2).reshape(n, c, h * w // 4, 4).transpose(1, 3)
    z = b(z.reshape(n * 4, -1, c)).reshape(n, 4, -1, c).transpose(1, 3).reshape(n, c, h, w)
    return z + early + y


class Blur(nn.Module):
    """A filter that is not learned, whose weights are float and small multiples of a power of two."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.tensor([[[[1.0, 2, 1]]]] * 8) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.relu(), self.filter, stride=2, padding=(0, 1), groups=8)


class Tokens(nn.Module):
    """A class token, positions, and attention of two heads as vision transformers write it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 65, 8) / 2)
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        shares = (q * 0.5 @ k.transpose(-2, -1)).softmax(-1)
        x = x + self.proj((shares @ v).transpose(1, 2).reshape(n, tokens, width))
        return x[:, 0]


def predictions(x: Tensor, *heads: nn.Module) -> Tensor:
    """Boxes and classes of two maps as rows, as SSD has them: channels spread over two dimensions before they are joined."""
    y = F.normalize(x.relu(), p=2.0, dim=1) * torch.linspace(1, 20, 8)[:, None, None]
    pairs = [(x, heads[:2]), (y, heads[2:])]
    parts = [[head(m).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)) for head in pair] for m, pair in pairs]
    return torch.cat([torch.cat(pair, -1) for pair in parts], 1)


class Rows(nn.Module):
    """Attention whose projections have batch norms over rows of all images, as LeViT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.last, self.after = (
            nn.Linear(8, 24, bias=False),
            nn.BatchNorm1d(24),
            nn.Linear(8, 8, bias=False),
            nn.BatchNorm1d(8),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, width = x.shape[:2]
        x = self.qkv(x.flatten(2).transpose(1, 2))
        x = self.norm(x.flatten(0, 1)).reshape_as(x)
        q, k, v = x.view(n, -1, 2, 12).split([4, 4, 4], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        shares = (q @ k * 0.5).softmax(-1)
        x = self.last(F.hardswish((shares @ v).transpose(1, 2).reshape(n, -1, width)))
        return self.after(x.flatten(0, 1)).reshape_as(x)


def in_and_out(x: Tensor, conv: nn.Module) -> Tensor:
    gates = torch.sigmoid(conv(x.mean((2, 3)).unsqueeze(-2)).squeeze(1)).unsqueeze(2).unsqueeze(-1)
    first = x.permute(1, 0, 2, 3)[:1].squeeze(0).squeeze(dim=(1,)).unsqueeze(1)
    return torch.cat([x * gates, first], 1)


class GlobalResponse(nn.Module):
    """ConvNeXt V2's global response norm: lengths of channels over their mean, and a product with a summand in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.linspace(-1, 1, 8)), nn.Parameter(torch.linspace(1, -1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        length = x.norm(p=2, dim=(1, 2), keepdim=True)
        share = length / (length.mean(dim=-1, keepdim=True) + 1e-6)
        x = x + torch.addcmul(self.bias.view(1, 1, 1, -1), self.weight.view(1, 1, 1, -1), x * share)
        return x.permute(0, 3, 1, 2)


def linear_attention(x: Tensor, qkv: nn.Module, last: nn.Module) -> Tensor:
    """Attention of EfficientViT: products of matrices without softmax, divided by a sum that is computed along."""
    n, width = x.shape[:2]
    q, k, v = qkv(x).reshape(n, 3, width, -1).transpose(-1, -2).unbind(1)
    v = F.pad(v, (0, 1), mode="constant", value=1.0)
    y = F.relu(q) @ (F.relu(k).transpose(-1, -2) @ v)
    y = y[..., :-1] / (y[..., -1:] + 0.05)
    return last(y.transpose(-1, -2).reshape(n, width, 8, 8))


def gated(x: Tensor, wide: nn.Module, conv: nn.Module, narrow: nn.Module) -> Tensor:
    """A gated block with channels last, a part of which is convolved (MambaOut): parts with other numbers of channels are joined."""
    gates, kept, taken = torch.split(wide(x.permute(0, 2, 3, 1)), (8, 5, 3), dim=-1)
    taken = conv(taken.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return narrow(F.gelu(gates) * torch.cat((kept, taken), dim=-1)).permute(0, 3, 1, 2) + x


def in_rows(x: Tensor, *heads: nn.Module) -> Tensor:
    return torch.cat([y(x * 50**k).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4) for k, y in enumerate(heads)], 1)


class Unnamed(nn.Module):
    """Joins two tensors of rows in a call that has no name, since its `forward` is no method of the class: nothing can be rounded there."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Calls(in_rows, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)) for _ in range(2))
        self.parts[1].layers[0].weight.data *= 1000  # so that the first part's steps are too fine for both
        self.forward = self.both

    def both(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def selected(x: Tensor, a: nn.Module, b: nn.Module, squeeze: nn.Module) -> Tensor:
    paths = torch.stack([a(x), b(x)], 1)
    gates = squeeze(paths.sum(1).mean((2, 3), keepdim=True)).view(x.shape[0], 2, 8, 1, 1).softmax(1)
    return (paths * gates).sum(dim=1)


def of_channels(x: Tensor, conv: nn.Module) -> Tensor:
    return x * torch.sigmoid(conv(x.mean((2, 3)).view(x.shape[0], 1, -1))).view(x.shape[0], -1, 1, 1).expand_as(x)


def on_lines(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
    return norm(conv(x.flatten(2)).relu())


def of_numbers(x: Tensor, linear: nn.Module, norm: nn.Module, again: nn.Module) -> Tensor:
    return again(norm(linear(x.flatten(1))).relu())


DEPLOY = "deploy"  # the rules of deploy=integer
KINDS: dict[str, tuple[Callable[[], nn.Module], dict | str]] = {
    **{
        f"gate {a.__name__}": (lambda a=a: gate(a()), DEPLOY)
        for a in (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.GELU, nn.LeakyReLU, nn.ELU)
    },
    "slopes": (lambda: nn.PReLU(8), STEM),
    "functions": (lambda: Calls(lambda x: F.hardswish(x) + torch.sigmoid(x) * x - F.silu(x)), DEPLOY),
    "clamps": (
        lambda: Calls(lambda x, c: c(x.clamp(-0.2, 0.3)).clamp(max=0.4) + F.hardtanh(x), nn.Conv2d(8, 8, 1)),
        DEPLOY,
    ),
    "clamps of sums": (lambda: Calls(lambda x: torch.clamp(x, min=-0.1) - x.clamp_max(0.2)), FLOAT),
    "elements": (lambda: Calls(lambda x: x.abs() + x**2 - F.selu(x) + torch.exp(-x)), DEPLOY),
    "concatenation": (
        lambda: Calls(
            joined, nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(18), nn.Conv2d(18, 4, 1)
        ),
        {"q": {"layers": ["stem", "body.layers.0"], "output": UNIFORM}} | FLOAT,
    ),
    "concatenated sums": (
        lambda: Calls(
            joined, nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(18), nn.Conv2d(18, 4, 1)
        ),
        FLOAT,
    ),
    "channel shuffle": (lambda: Calls(shuffled), FLOAT),
    "slices": (lambda: Calls(lambda x: torch.cat([x[:, ::2, 1:-1], x[:, 1::2, 1:-1]], 2)), FLOAT),
    "mean of channels": (lambda: Calls(lambda x: x.mean(1)), FLOAT),
    "nearest": (lambda: nn.Upsample(scale_factor=1.6), FLOAT),
    "bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), STEM),
    "bilinear corners": (lambda: nn.Upsample((13, 20), mode="bilinear", align_corners=True), STEM),
    "bicubic": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), STEM),
    "pixel shuffle": (lambda: nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ChannelShuffle(4)), FLOAT),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), FLOAT),
    "transposed groups": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(8, 6, (2, 4), stride=2, groups=2, padding=(2, 1)), nn.BatchNorm2d(6), nn.ReLU()
        ),
        FLOAT,
    ),
    "transposed depthwise": (lambda: nn.ConvTranspose2d(8, 8, 3, dilation=2, groups=8), STEM),
    "borders": (
        lambda: nn.Sequential(
            nn.ReflectionPad2d(2), nn.ZeroPad2d((1, 2, -1, 0)), nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular")
        ),
        STEM,
    ),
    "averages": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), STEM),
    "uneven averages": (lambda: nn.AdaptiveAvgPool2d((3, 5)), FLOAT),
    "layer norm last": (lambda: Scaled(last_dimension, nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)), DEPLOY),
    "group norm": (lambda: nn.GroupNorm(2, 8), STEM),
    "instance norm": (lambda: nn.InstanceNorm2d(8, affine=True), STEM),
    "constants": (lambda: Scaled(lambda x: torch.relu((x * 2 + 1) / 3 - 0.1)), FLOAT),
    "selective kernels": (
        lambda: Calls(selected, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 1)),
        DEPLOY,
    ),
    "channels in a line": (lambda: Calls(of_channels, nn.Conv1d(1, 1, 3, padding=1, bias=False)), DEPLOY),
    "lines": (
        lambda: Calls(on_lines, nn.Conv1d(8, 6, 5, 2, 2, 3, groups=2, padding_mode="circular"), nn.BatchNorm1d(6)),
        DEPLOY,
    ),
    "sums of lines": (
        lambda: Calls(lambda x, c: c(x.flatten(2)).sum(-1), nn.Conv1d(8, 6, 5, padding="same", dilation=3)),
        DEPLOY,
    ),
    "norms of numbers": (
        lambda: Calls(of_numbers, nn.Linear(512, 12), nn.BatchNorm1d(12), nn.BatchNorm1d(12)),
        DEPLOY,
    ),
    "stacked": (
        lambda: Calls(
            lambda x: torch.stack([x.relu(), x[:, :, :1].expand(-1, -1, 8, -1)], -1).sum((2, 4), keepdim=True)
        ),
        STEM,
    ),
    "tokens": (Tokens, DEPLOY),
    "blur": (Blur, FLOAT),
    "patches": (lambda: Calls(patches, nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, 6)), DEPLOY),
    "other shapes and types": (
        lambda: Calls(lambda x: x.flatten(2).double().float().view_as(x) + x.to(torch.float32)),
        STEM,
    ),
    "patches of sums": (lambda: Calls(patches, nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, 6)), FLOAT),
    "groups of a function": (
        lambda: Calls(lambda x, g: F.group_norm(x, 4, g.weight, g.bias), nn.GroupNorm(4, 8)),
        STEM,
    ),
    "boxes": (lambda: Calls(predictions, *(nn.Conv2d(8, 12, 3, padding=1) for _ in range(4))), DEPLOY),
    "boxes in a call without a name": (Unnamed, DEPLOY),
    "dimensions of one entry": (
        lambda: Calls(in_and_out, nn.Conv1d(1, 1, 3, padding=1, bias=False)),
        DEPLOY,
    ),
    "global response": (GlobalResponse, DEPLOY),
    "lengths": (
        lambda: Calls(lambda x: torch.linalg.vector_norm(x, dim=1) + torch.norm(x, dim=(1,), p=2) - x.norm(dim=1)),
        DEPLOY,
    ),
    "linear attention": (lambda: Calls(linear_attention, nn.Conv2d(8, 24, 1), nn.Conv2d(8, 8, 1)), DEPLOY),
    "gated parts": (
        lambda: Calls(gated, nn.Linear(8, 16), nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Linear(8, 8)),
        DEPLOY,
    ),
    "norms of rows": (Rows, DEPLOY),
    "vectors of length 1": (lambda: Calls(lambda x: F.normalize(x, dim=2) + F.normalize(x, eps=1.5)), DEPLOY),
    "attention of heads": (lambda: Calls(heads, nn.Linear(8, 24), nn.Linear(8, 8)), DEPLOY),
    "attention": (lambda: Calls(attention, nn.Linear(8, 24), nn.Linear(8, 8)), DEPLOY),
}


CASES = [(kind, True) for kind in KINDS]
CASES += [
    (kind, False) for kind in ("concatenation", "concatenated sums", "transposed groups")
]  # they have batch norms


@pytest.mark.parametrize(
    ("kind", "fold"), CASES, ids=lambda v: v if isinstance(v, str) else "folded" if v else "batch norm"
)
def test_simulation_and_integers_are_the_same_numbers(kind, fold, quantize):
    body, rules = KINDS[kind]
    rules = _deployed("integer") if rules == DEPLOY else rules
    proven(*quantize(Net(body()), fold=fold, rules=rules, shape=IMAGES))


def _deployed(name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "deploy" / f"{name}.yaml").quant.rules)


class Everything(nn.Module):
    """Scores of images [N, 3, 8, 8] through every kind of operation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.norm, self.wide, self.narrow = (
            gate(nn.Sigmoid()),
            nn.LayerNorm(8),
            nn.Linear(8, 16),
            nn.Linear(16, 8),
        )
        self.up, self.down, self.group, self.slopes = (
            nn.ConvTranspose2d(8, 4, 2, stride=2),
            nn.Conv2d(4, 8, 3, 2, 1),
            nn.GroupNorm(2, 8),
            nn.PReLU(8),
        )
        self.respond = GlobalResponse()
        self.attend, self.twice, self.cat = (
            Calls(attention, nn.Linear(8, 24), nn.Linear(8, 8)),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            modules.Concat(),
        )
        self.shrink, self.scale, self.fc = (
            nn.AdaptiveAvgPool2d(3),
            nn.Parameter(torch.linspace(-1, 1, 8).reshape(8, 1, 1)),
            nn.Linear(144, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(x)
        x = x + last_dimension(x, self.norm, self.wide, self.narrow) * self.scale
        x = self.slopes(self.group(self.down(F.pad(self.up(x), (1, 0, 1, 0)))))
        x = self.attend(x[:, :, :8, :8]).transpose(1, 2).reshape(-1, 8, 8, 8)
        x = self.twice(x)
        x = self.cat(self.respond(x), F.normalize(x.relu(), dim=1))
        return self.fc(torch.flatten(self.shrink(x), 1))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is at hand")
def test_c_computes_every_kind(quantize, tmp_path):
    model, images = quantize(Net(Everything()), rules=_deployed("integer"), shape=IMAGES)
    program = proven(model, images, share=100).program  # a code that differs early differs everywhere
    kinds = {op.kind for op in program.ops}
    assert kinds >= {
        "multiply",
        "matmul",
        "affine",
        "resample",
        "normalize",
        "unit_length",
        "length",
        "divide",
        "softmax",
        "lookup",
        "permute",
        "reshape",
        "slice",
        "pad",
    }
    package.write(program, tmp_path / "p", images[:4].numpy())
    found = package.check(tmp_path / "p")
    assert found["differ"] == 0 and found["c"] == "4 images, 0 of 20 scores differ"


def test_all_refusals_come_in_one_error(quantize):
    body = Calls(
        lambda x, pool: torch.cumsum(pool(torch.sigmoid(x)), 1) + torch.sigmoid(x[:, :, ::2, ::2]), nn.LPPool2d(2, 2)
    )
    model, images = quantize(Net(body), rules=FLOAT, shape=IMAGES)
    with pytest.raises(QexpError) as error:
        lower(model, images[:1])
    lines = str(error.value).splitlines()
    assert len(lines) == 3, lines
    assert (
        lines[0].startswith("body.sigmoid: ")
        and lines[0].endswith("(so for body.sigmoid_1)")
        and "add deploy=integer" in lines[0]
    )
    assert lines[1].startswith("body.layers.0: ") and "LPPool2d has no integer form" in lines[1]
    assert lines[2].startswith("body.cumsum: ") and "known are" in lines[2]


def test_the_remedy_of_a_wide_quotient_works(quantize):
    body = Calls(lambda x: x / (x.abs() + 1))
    with pytest.raises(
        QexpError, match="a quotient needs operands of one scale and at most 16 bits; add deploy=integer"
    ):
        model, images = quantize(
            Net(body), rules=FLOAT | {"abs": {"layers": "body.abs", "input": UNIFORM}}, shape=IMAGES
        )
        lower(model, images[:1])
    proven(*quantize(Net(body), rules=_deployed("integer"), shape=IMAGES))


def test_what_could_drop_or_mix_images_is_refused(quantize):
    for call, said in (
        (lambda x: x.squeeze(0), "it may drop the dimension of the batch"),
        (lambda x: F.normalize(x, dim=0), "names no dimension of an image"),
        (lambda x: x + torch.linalg.vector_norm(x, dim=(0, 1), keepdim=True), "names the batch"),
    ):
        model, images = quantize(Net(Calls(call)), rules=_deployed("integer"), shape=IMAGES)
        with pytest.raises(QexpError, match=said):
            lower(model, images[:1])


@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(8), nn.Softmax(-1), operations.UnitLength(-1), operations.Length((-1,), True)],
    ids=lambda m: type(m).__name__,
)
def test_the_remedy_of_a_wide_input_works(layer, quantize):
    body = Calls(lambda x, f: f(x.permute(0, 2, 3, 1)), layer)
    model, images = quantize(Net(body), rules=FLOAT, shape=IMAGES)
    with pytest.raises(QexpError, match="needs an input of one scale and at most 16 bits; add deploy=integer"):
        lower(model, images[:1])
    proven(*quantize(Net(body), rules=_deployed("integer"), shape=IMAGES))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: x.to(torch.float16).float() + x, "converts to torch.float16, which rounds; keep float32"),
        (lambda x: x.reciprocal() + x, "is not finite at 0, which its input may be; clamp its input before"),
        (lambda x: F.conv2d(x, torch.ones(8, 1, 1, 1), torch.ones(8) / 3, groups=8), "the bias of a call is float"),
        (
            lambda x: x.flatten(1).view_as(x.permute(2, 0, 1, 3)).permute(1, 2, 0, 3),
            "its shape mixes images of a batch",
        ),
    ],
    ids=["half precision", "pole", "bias", "shape"],
)
def test_what_integers_cannot_hold_is_refused_by_reason(call, words, quantize):
    model, images = quantize(Net(Calls(call)), rules=_deployed("integer"), shape=IMAGES)
    with pytest.raises(QexpError, match=words):
        lower(model, images[:1])


def test_a_doubled_map_is_the_real_one(quantize):
    model, images = quantize(Net(nn.Upsample((13, 9), mode="bilinear")), rules=STEM, shape=IMAGES)
    program = proven(model, images).program
    (op,) = (op for op in program.ops if op.kind == "resample")
    codes = np.random.default_rng(0).integers(0, 255, (1, 8, 8, 8))
    from qexp.integer.reference import Reference

    made = Reference(program).compute(op, [codes]) * float(program.tensors[op.output].unit[0])
    source = program.tensors[op.inputs[0]]
    real = torch.from_numpy((codes - source.zero_point) * source.unit)
    wanted = F.interpolate(real, (13, 9), mode="bilinear").numpy()
    assert np.abs(made - wanted).max() < 1e-12 * np.abs(wanted).max()


def test_means_half_way_between_two_steps_are_not_rounded_twice(quantize):
    """A mean of 24 bits after a sum on steps of powers of two: float64 falls to either side of the tie, and the proof must not."""
    body = Calls(lambda x, norm: norm(F.relu(x) + x).relu(), nn.BatchNorm2d(8))
    network = Net(body)
    norm = body.layers[0]
    with torch.no_grad():
        norm.running_mean.copy_(1 + (2 * torch.arange(8) + 1) * 2.0**-23)
        norm.running_var.copy_(torch.linspace(0.3, 2, 8))
        norm.weight.abs_().add_(0.1)
        norm.bias.zero_()
    model, images = quantize(network, rules=_deployed("integer"), shape=IMAGES)
    program = proven(model, images).program
    summed = next(op for op in program.ops if op.layer.startswith("body.layers.0") and op.kind == "conv")
    gain = (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).detach().numpy()
    steps = -gain * norm.running_mean.double().numpy() / program.tensors[summed.output].unit
    assert np.abs(steps - np.floor(steps) - 0.5).min() > 0.2
