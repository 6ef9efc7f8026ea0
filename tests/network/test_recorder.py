"""The graph is what ran: any argument, default, keyword or in-place call; and where a replay differs there is none."""

from __future__ import annotations

import contextlib
import re
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qexp.network.cost import layer_costs
from qexp.network.facts import facts
from qexp.network.graph import same
from qexp.network.recorder import record

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """Two convolutions with norms, and a second norm and head that only other arguments reach."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c2, self.b2, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.pool = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.fc, self.margin = nn.Linear(4, 5), nn.Linear(4, 5)
        nn.init.uniform_(self.other.running_mean, 1, 2)

    def norm(self, y, x):
        return self.b2(y)

    def forward(self, x):
        y = self.c2(self.relu(self.b1(self.c1(x))))
        return self.fc(self.pool(F.relu(self.norm(y, x))).flatten(1))


class Domain(Body):
    def forward(self, x, domain=None):
        y = self.c2(self.relu(self.b1(self.c1(x))))
        y = self.b2(y) if domain is None else self.other(y)
        return self.fc(self.pool(F.relu(y)).flatten(1))


class Label(Body):
    def forward(self, x, label=None):
        y = self.pool(F.relu(self.b2(self.c2(self.relu(self.b1(self.c1(x))))))).flatten(1)
        return self.fc(y) if label is None else self.margin(y) - F.one_hot(label, 5)


class Typed(Body):
    def norm(self, y, x):
        return self.b2(y) if type(x) is torch.Tensor and isinstance(y, torch.Tensor) else self.other(y)


class Inner(Body):
    """The choice is an argument of a module inside."""

    class Choice(nn.Module):
        def __init__(self, one, other) -> None:
            super().__init__()
            self.one, self.two = one, other

        def forward(self, x, *, mask=None, **rest):
            return self.one(x) if mask is None and not rest else self.two(x)

    def __init__(self) -> None:
        super().__init__()
        self.choice = self.Choice(self.b2, self.other)

    def norm(self, y, x):
        return self.choice(y)


class Checked(Body):
    def norm(self, y, x):
        n, c, h, w = x.shape
        assert x.dim() == 4 and n and c == x.size(1) == 3 and h == w == 8
        if torch.isnan(x).any():
            raise ValueError("not a number")
        return self.b2(y)


class Locked(Body):
    """A network that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Named(Body):
    """Calls by keyword, and a result in a dictionary."""

    def forward(self, x):
        y = self.c2(input=self.relu(input=self.b1(input=self.c1(input=x))))
        y = F.relu(input=self.b2(input=y))
        return {"scores": self.fc(input=torch.flatten(input=self.pool(input=y), start_dim=1)), "of": (5, None)}


@pytest.mark.parametrize("make", [Body, Domain, Label, Typed, Inner, Checked, Locked, Named], ids=lambda m: m.__name__)
def test_the_graph_takes_the_way_of_the_run(make):
    torch.manual_seed(0)
    model = make().eval()
    seen, found = record(model, X), facts(model, X[:1])
    assert seen.error == found.trace_error == ""
    assert next(iter(found.bn_of.items())) == ("c1", "b1")
    assert found.bn_of["c2"] in ("b2", "choice.one") and found.followed_by_relu == {"b1", found.bn_of["c2"]}
    assert not {"other", "margin", "choice.two"} & {name for step in seen.graph.steps for name in [step.module]}
    assert found.chains["c2"][-1] == "fc" and "margin" not in found.order
    assert found.sources["c2"] == (("relu", "b1"),) and found.sources["fc"] == (("pool",),)
    for images in (torch.randn(5, 3, 8, 8), torch.zeros(1, 3, 8, 8)):
        with torch.no_grad():
            assert same(seen.graph.replay(images), model(images))


class Functional(nn.Module):
    """A convolution, what a test does to its result, and a classifier."""

    def __init__(self, does) -> None:
        super().__init__()
        self.conv, self.act, self.drop, self.does = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Dropout(), does
        self.register_buffer("constant", torch.linspace(0, 1, 4)[:, None, None])
        self.weight = nn.Parameter(torch.randn(4, 1, 1))
        self.fc = nn.Linear(256, 3)

    def forward(self, x):
        return self.fc(self.does(self, self.conv(x)).reshape(len(x), -1))


def kept(net, x):
    """Takes results out of a list that is filled and emptied, so that memory is used again."""
    parts = []
    for i in range(6):
        parts.append(x * i)
        if len(parts) > 2:
            parts.pop(0)
    return sum(parts)


def masked(net, x):
    y = x.clone()
    y[:, 1:3] = 0
    y[:, :, 0] += x[:, :, 1]
    return y


def through_a_view(net, x):
    flat = x.view(x.size(0), -1)
    flat.mul_(2).clamp_(min=0)
    return x + 1


def split(net, x):
    a, b = x.chunk(2, 1)
    n, c, h, w = x.shape
    shuffled = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return torch.cat([b, F.pad(a, (0, 0, 0, 0, 0, 2))[:, :2]], 1) + shuffled + shuffled.mT


def made(net, x):
    zeros = torch.zeros(x.shape[0], 2, *x.shape[2:], dtype=x.dtype, device=x.device)
    zeros[:, 0] += x[:, 0]
    return torch.cat([x[:, :2], zeros], 1) + torch.arange(x.size(0)).float()[:, None, None, None]


@pytest.mark.parametrize(
    "does",
    [
        *(kept, masked, through_a_view, split, made),
        lambda net, x: net.act(net.act(x) - net.constant * net.weight),
        lambda net, x: F.interpolate(x, scale_factor=2)[..., ::2, ::2] * x.shape[-1],
        lambda net, x: F.interpolate(input=x, size=x.shape[-2:]) + x.new_zeros(()),
        lambda net, x: x.sub_(x.mean((2, 3), keepdim=True)).relu_().add_(x),
        lambda net, x: torch.where(x > 0, x, x.abs().max(1, keepdim=True).values).softmax(dim=1),
        lambda net, x: net.drop(F.dropout(x, 0.5, net.training)),
    ],
)
def test_any_call_is_replayed_on_any_batch(does):
    torch.manual_seed(0)
    model = Functional(does).eval()
    seen = record(model, X[:1])
    assert seen.error == "" and len({step.name for step in seen.graph.steps}) == len(seen.graph.steps)
    for images in (torch.randn(4, 3, 8, 8), torch.randn(7, 3, 8, 8)):
        with torch.no_grad():
            assert same(seen.graph.replay(images), model(images))


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (lambda net, x: x if x.mean() > 0 else -x, "ran where"),
        (lambda net, x: x * x.abs().max().item(), "takes .* on other images"),
        (lambda net, x: x / float(x[0, 0, 0, 0]), "takes .* on other images"),
        (lambda net, x: x + torch.tensor(x.tolist()).flip(0), "different"),
        (lambda net, x: torch.from_numpy(x.numpy() * 2), "different"),
        (lambda net, x: x + torch.randn(1), "different result"),
        (lambda net, x: x[:, : 1 + int(x.std() > 9)].repeat(1, 4, 1, 1)[:, :4], "on other images"),
        (lambda net, x: x if len(x) == 2 else x + 1, "the calls depend"),
    ],
)
def test_where_a_replay_would_differ_there_is_no_graph(does, reason):
    torch.manual_seed(0)
    model = Functional(does).eval()
    seen = record(model, X)
    assert seen.graph is None
    assert re.search(reason, seen.error), seen.error
    found = facts(model, X)
    assert found.trace_error == seen.error and found.order == ("conv", "fc") and not found.bn_of


def test_names_are_stable():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, x):
            y = self.relu(self.relu(self.conv(x)) + x)
            y += x
            return y * 2 + 1

    block = Block()
    model = nn.Sequential(block, nn.Sequential(block, nn.Identity()))
    names = [step.name for step in record(model, X).graph.steps]
    assert names[1:9] == ["0.conv", "0.relu", "0.add", "0.relu@1", "0.add_1", "0.mul", "0.add_2", "0.conv@1"]
    assert names[-3:] == ["0@1.add_2", "1.1", "output"] and len(set(names)) == len(names)


def test_who_reads_after_a_call_in_place_reads_its_result():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.left = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.conv(x)
            return self.left(self.relu(x)) + x.flatten(2).unflatten(2, (8, 8))

    graph = record(Net(), X).graph
    relu = next(step for step in graph.steps if step.name == "relu")
    assert [user.name for user in relu.users] == ["left", "flatten"]
    assert [user.name for user in graph.steps[1].users] == ["relu"]


def test_a_squeeze_does_not_lose_the_batch():
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.fc = nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(16, 4)

        def forward(self, x):
            return self.fc(self.pool(self.conv(x)).squeeze())

    model = Squeezed()
    cost = layer_costs(model, facts(model, X[:1]))["fc"]
    assert (cost.weights, cost.macs, cost.inputs) == (64, 64, 16)


def test_windows_in_the_batch_dimension_are_counted():
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 5)

        def forward(self, x):
            n, c, h, w = x.shape
            windows = x.reshape(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, h // 2, w // 2)
            return self.fc(self.conv(windows).permute(0, 2, 3, 1).reshape(-1, 4)).reshape(n, -1, 5).mean(1)

    model = Windows()
    found = facts(model, X[:1])
    costs = layer_costs(model, found)
    assert found.trace_error == ""
    assert (costs["conv"].macs, costs["conv"].inputs) == (64 * 12, 64 * 3)
    assert (costs["fc"].macs, costs["fc"].inputs) == (64 * 20, 64 * 4)


def test_a_network_for_single_images_has_shapes_and_a_reason():
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 3)

        def forward(self, x):
            return self.fc(x.reshape(192))[None]

    found = facts(Single(), X[:1])
    assert found.order == ("fc",) and found.trace_error == "the network does not run on two images"


def test_nothing_is_left_on_the_network():
    model = Body().train()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    facts(model, X)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(random, torch.get_rng_state()) and all(m.training for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_call_that_raises_and_is_caught_is_not_recorded():
    class Trying(Body):
        def forward(self, x):
            with contextlib.suppress(RuntimeError):
                self.fc(x)
            return super().forward(x)

    found = facts(Trying().eval(), X)
    assert found.trace_error == "" and found.order[-1] == "fc" and found.calls["fc"] == 1
    assert found.bn_of == {"c1": "b1", "c2": "b2"}
