"""What lies between layers on codes, in one pass: the bits of the layers one by one, and nothing hidden from those who look."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import qexp_kernels as kernels
import torch
from torch import nn

from qexp.integer import int8
from qexp.integer.on_codes import on_codes
from qexp.layers.swap import baked_weights
from qexp.models.modules import Add
from qexp.network.lean_evaluation import lean

pytestmark = pytest.mark.skipif(not int8.available(127), reason="no 8-bit dot products")


class Block(nn.Module):
    """Two convolutions and a sum; the shortcut has its own convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, inplace: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)
        self.relu1, self.relu2, self.add = nn.ReLU(inplace), nn.ReLU(inplace), Add()
        self.norm = nn.BatchNorm2d(outputs)  # folded: an identity

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu2(self.add(self.norm(self.conv2(self.relu1(self.conv1(x)))), self.short(x)))


class Net(nn.Module):
    """Residual blocks, windows of one pixel, channels each by itself, ReLU6, no activation, dilation, and a head that reads values."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.relu = nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(inplace)
        self.blocks = nn.Sequential(Block(16, 16, 1, inplace), Block(16, 24, 2, inplace), Block(24, 24, 1, inplace))
        self.expand, self.each, self.project = (
            nn.Conv2d(24, 80, 1),
            nn.Conv2d(80, 80, 3, 1, 1, groups=80),
            nn.Conv2d(80, 20, 1),
        )
        self.clip1, self.clip2 = nn.ReLU6(inplace), nn.ReLU6(inplace)
        self.wide, self.groups = nn.Conv2d(20, 12, 3, 1, 2, dilation=2), nn.Conv2d(12, 8, 3, groups=2)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.relu(self.first(x)))
        x = self.project(self.clip2(self.each(self.clip1(self.expand(x)))))
        return self.head(self.groups(self.wide(x)).mean((2, 3)))


def _apart(model: nn.Module, images: torch.Tensor, watch: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the result of the layers one by one, as references compute them, and the values of some modules."""
    seen: dict[str, torch.Tensor] = {}
    kernels.load("reference")
    try:
        with on_codes(model, images[:1]) as found, ExitStack() as held:
            assert not found.passes
            for name in watch:
                module = model.get_submodule(name)
                hook = module.register_forward_hook(lambda m, a, y, name=name: seen.__setitem__(name, y.clone()))
                held.callback(hook.remove)
            return model(images), seen
    finally:
        kernels.load("auto")


@pytest.fixture(autouse=True)
def _compiled():
    if kernels.load("auto").implementation == "reference":
        pytest.skip("no compiled kernels")


BEGIN = [
    "first", "blocks.0.conv1", "blocks.0.add", "blocks.1.conv1", "blocks.1.add", "blocks.2.conv1", "blocks.2.add", "expand", "each",
    "project", "wide",
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_are_bits_of_the_layers_one_by_one(quantize, bits, inplace, layout):
    torch.manual_seed(0)
    model, images = quantize(Net(inplace), *bits, shape=(9, 3, 14, 18))
    images = images.contiguous(memory_format=layout)
    with baked_weights(model):
        wanted, _ = _apart(model, images, [])
        with on_codes(model, images[:1]) as found:
            assert found.passes == BEGIN and found.share == 1
            added = [block.conv2.forward.__self__.beside is not None for block in model.blocks]
            assert added == [True, False, True], "the sum of values that are there already is in the layer's own pass"
            assert torch.equal(model(images), wanted) and torch.equal(model(images[:3]), wanted[:3])
            with lean(model, images[:1]):
                assert torch.equal(model(images), wanted) and torch.equal(model(images), wanted)
            assert torch.equal(model(images), wanted)
    assert not any("forward" in vars(m) for m in model.modules())


@torch.no_grad()
def test_hooks_see_the_values_as_if_there_were_no_pass(quantize):
    """Also a hook of a module around them."""
    torch.manual_seed(0)
    model, images = quantize(Net(), 4, 4)
    watch = ["first", "relu", "blocks.0.relu1", "blocks.0.conv2", "blocks.2.norm", "blocks.2.short", "blocks.2.add"]
    watch += ["blocks.0.relu2", "blocks.1", "clip1", "each", "wide"]
    wanted, values = _apart(model, images, watch)
    with on_codes(model, images[:1]):
        for name in watch:
            seen: list[torch.Tensor] = []
            hook = model.get_submodule(name).register_forward_hook(lambda m, a, y, seen=seen: seen.append(y.clone()))
            assert torch.equal(model(images), wanted)
            hook.remove()
            assert seen[0].dtype == torch.float32 and torch.equal(seen[0], values[name]), name


@torch.no_grad()
def test_layers_turned_off_compute_in_float(quantize):
    torch.manual_seed(0)
    model, images = quantize(Net(), 4, 4)
    for layer in ("blocks.0.conv2", "each"):
        model.get_submodule(layer).enabled = False
        plain = model(images)
        model.get_submodule(layer).enabled = True
        with on_codes(model, images[:1]):
            model.get_submodule(layer).enabled = False
            torch.testing.assert_close(model(images), plain, rtol=1e-3, atol=0.02 * float(plain.abs().max()))
            model.get_submodule(layer).enabled = True


class Twice(nn.Module):
    """A convolution that is called twice, a value that is returned, and one that a function reads beside the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, 1, 1) for _ in range(4))
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.a(x))
        z = self.b(self.b(y))
        return self.d(self.c(z)) + z.abs() + y


@torch.no_grad()
def test_values_that_others_read_stay_values(quantize):
    torch.manual_seed(0)
    model, images = quantize(Twice(), 5, 5)
    wanted, _ = _apart(model, images, [])
    with on_codes(model, images[:1]) as found:
        assert found.passes == ["c"]
        assert torch.equal(model(images), wanted)


@torch.no_grad()
def test_bytes_of_an_image_are_not_taken_for_codes(quantize):
    """A network that reads pixels: its first layer makes codes of them."""
    torch.manual_seed(0)
    model, images = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), 8, 8)
    pixels = (images * 40 + 120).clamp(0, 255).byte()
    with on_codes(model, images[:1]) as found:
        assert found.passes == ["0"]
        assert torch.equal(model(pixels), model(pixels.float()))


@torch.no_grad()
def test_a_run_that_ends_early_leaves_nothing_for_the_next(quantize):
    """Values of the aborted run, of the same shape, must not be added to those of the next."""
    torch.manual_seed(0)
    model, images = quantize(Net(), 4, 4)
    others = torch.randn(images.shape)
    wanted, _ = _apart(model, others, [])

    def stop(module: nn.Module, given: tuple) -> None:
        raise KeyboardInterrupt

    with on_codes(model, images[:1]):
        for name in ("blocks.0.relu1", "blocks.0.conv2", "blocks.2.norm", "clip1"):
            hook = model.get_submodule(name).register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                model(images)
            hook.remove()
            held = model.get_submodule("first").register_forward_hook(lambda m, a, y: None)
            assert torch.equal(model(others), wanted)
            held.remove()
            assert torch.equal(model(others), wanted)


@torch.no_grad()
def test_a_layer_called_by_itself_returns_its_values(quantize):
    torch.manual_seed(0)
    model, images = quantize(Net(), 4, 4)
    plain = model.first(images)
    with on_codes(model, images[:1]):
        model(images)
        alone = model.first(images)
        assert alone.dtype == torch.float32
        torch.testing.assert_close(alone, plain, rtol=0, atol=2e-6 * float(plain.abs().max()))
        torch.testing.assert_close(model.relu(alone), torch.relu(alone), rtol=0, atol=0)


@torch.no_grad()
def test_where_onednn_computes_the_sums_what_follows_is_one_pass_too(quantize, monkeypatch):
    """On processors without 512-bit dot products, and for weights beyond the cache."""
    monkeypatch.setattr(int8, "tiled", lambda *_: None)
    torch.manual_seed(0)
    model, images = quantize(Net(), 4, 4)
    wanted, _ = _apart(model, images, [])
    with on_codes(model, images[:1]) as found:
        assert found.passes == BEGIN
        assert torch.equal(model(images), wanted)


@torch.no_grad()
@pytest.mark.parametrize("unscale", [True, False])
def test_inputs_that_are_rounded_as_they_are_come_from_the_pass(quantize, unscale):
    """DoReFa's inputs, unless they are multiplied first."""
    inputs = {"_target_": "qexp.quantizers.dorefa.DoReFaInput", "unscale": unscale, "range": 0.4, "signed": True}
    torch.manual_seed(0)
    model, images = quantize(Net(), 4, 4, input=inputs)
    wanted, _ = _apart(model, images, [])
    with on_codes(model, images[:1]) as found:
        assert found.share == 1 and found.passes == (BEGIN if unscale else [])
        assert torch.equal(model(images), wanted)
