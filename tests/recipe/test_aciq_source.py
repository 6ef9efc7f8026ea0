"""The placement and the arithmetic of cnn-quantization itself, tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qexp.calibration.calibrate import calibrate
from qexp.network.facts import facts
from qexp.quantizers.midtread import clip_over_b
from qexp.recipe import apply, resolve
from qexp.run import pipeline
from qexp.run.settings import read


def network(classifier: str) -> nn.Sequential:
    torch.manual_seed(0)
    head = {
        "linear": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)],
        "conv": [nn.Conv2d(6, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    }[classifier]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(), *head).eval()


def planned(compose, net: nn.Module, images: Tensor):
    cfg = compose("quant=sources/cnn_quantization", "bits=w4a4", "model.first=null", "model.last=null")
    structure = facts(net, images)
    return structure, resolve(net, structure, pipeline.recipe(read(cfg)))


def whole(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Half away from zero, zero a code only where it lies inside the range."""
    n = 2**bits - 1
    s = (high - low) / n
    round_ = lambda v: torch.sign(v) * torch.floor(v.abs() + 0.5)  # noqa: E731
    if low < 0 < high:
        z = round_(-low / s)
        return (round_((x / s + z).clamp(0, n)) - z) * s
    return round_(((x - low) / s).clamp(0, n)) * s + low


@pytest.mark.parametrize("classifier", ["linear", "conv"])
def test_which_tensors_keep_their_bits(compose, classifier):
    images = torch.randn(4, 3, 12, 12)
    net = network(classifier)
    _, plan = planned(compose, net, images)
    bits = {(e.layer, e.site): e.bits for e in plan if e.spec}
    pool = "5" if classifier == "linear" else "7"
    expected = {("0", "weight"): 8, ("0", "output"): 8, ("2", "output"): 8, ("3", "weight"): 4, ("3", "output"): 4}
    expected |= {(pool, "output"): 8}
    last, width = ("7", 8) if classifier == "linear" else ("5", 4)
    expected |= {(last, "weight"): width, (last, "output"): width}
    assert bits == expected
    tensorwise = {key for key in bits if plan[key].spec["granularity"] == "tensor"}
    assert tensorwise == {("0", "output"), ("2", "output"), (pool, "output")} | (
        {(last, "output")} if classifier == "linear" else set()
    )


@torch.no_grad()
def test_a_network_computes_as_the_formulas_say(compose):
    images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    net = network("linear")
    # no bits by channel and no correction here: their vectors are tests of their own
    structure, plan = planned(compose, net, images)
    seen, float_seen = {}, {}
    hooks = [m.register_forward_hook(lambda m, a, y, n=n: float_seen.update({n: y})) for n, m in net.named_children()]
    net(images)
    for hook in hooks:
        hook.remove()
    apply(net, plan, structure)
    calibrate(net, [images], followed_by_relu=structure.followed_by_relu, progress=False)
    for name, module in net.named_children():
        module.register_forward_hook(lambda m, a, y, n=name: seen.update({n: (a[0], y)}))
    net(images)

    x, y = seen["0"]
    raw = nn.functional.conv2d(x, net[0].quantized_weight(), net[0].bias)
    # before a ReLU the half range, min-max: [0, max] of the float results
    assert torch.allclose(y, whole(raw, torch.tensor(0.0), float_seen["0"].max(), 8), atol=1e-5)
    x, y = seen["2"]
    raw = nn.functional.max_pool2d(x, 2)
    assert torch.allclose(y, whole(raw, float_seen["2"].min(), float_seen["2"].max(), 8), atol=1e-5)
    x, y = seen["3"]
    raw = nn.functional.conv2d(x, net[3].quantized_weight(), net[3].bias)
    f = float_seen["3"].transpose(0, 1).flatten(1).double()
    b = (f - f.mean(1, keepdim=True)).abs().mean(1)
    k = clip_over_b(torch.tensor([2.0**5]))  # the half range takes the constant of one bit more
    step = ((f.mean(1).clamp_min(0) + k * b) / 15)[:, None, None]
    assert torch.allclose(y.double(), torch.round((raw / step).clamp(0, 15)) * step, atol=1e-5)
    weight = net[3].weight.flatten(1)
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    s = (high - low) / 15
    z = torch.round(-low / s)
    wanted = (torch.round((weight / s + z).clamp(0, 15)) - z) * s
    assert torch.allclose(net[3].quantized_weight().flatten(1), wanted, atol=1e-6)
    x, y = seen["7"]
    raw = nn.functional.linear(x, net[7].quantized_weight(), net[7].bias)
    assert torch.allclose(y, whole(raw, float_seen["7"].min(), float_seen["7"].max(), 8), atol=1e-5)


def test_the_whole_pipeline_runs(run):
    metrics = run("quant=sources/cnn_quantization", "bits=w4a4", "schedule=ptq")
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["corrected_weights"] > 0
