"""A training step in fewer passes is the step in all passes: results, gradients, running statistics; and what is left alone."""

import copy
import logging

import pytest
import qexp_kernels as kernels
import torch
from torch import nn
from torch.nn import functional as F

import qexp
from qexp.models.cifar_resnet import CifarResNet
from qexp.models.mobilenetv2 import MobileNetV2
from qexp.models.modules import Add, StridedPad
from qexp.network.lean_training import lean_training


@pytest.fixture(autouse=True)
def compiled():
    try:
        kernels.load("cpp")
    except kernels.KernelError as error:
        pytest.skip(str(error))
    yield
    kernels.load("reference")


class Shared(nn.Module):
    """One in-place ReLU at two widths, a sum whose second operand is a batch norm's result, and one that two layers read."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(i, 8, 3, padding=1, bias=False) for i in (3, 8, 8))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(8, momentum=m) for m in (0.1, 0.3, 0.01))
        self.relu, self.add, self.head = nn.ReLU(inplace=True), Add(), nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.add(x, self.bn2(self.conv2(x))))
        y = self.bn3(self.conv3(x))
        return self.head((y * torch.sigmoid(y)).mean((2, 3)))


class Dropped(nn.Module):
    """Scales a branch at random while it trains, as networks with stochastic depth do."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.add, self.head = (
            nn.Conv2d(3, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            Add(),
            nn.Linear(3, 2),
        )

    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.training:
            y = y * 0.5
        return self.head(self.add(x, y).mean((2, 3)))


NETWORKS = {
    "resnet": lambda: CifarResNet(8),
    "preact": lambda: CifarResNet(8, pre_activation=True),
    "mobilenet": lambda: MobileNetV2(num_classes=10),
    "shared": Shared,
}
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 1, 0])


def network(name):
    torch.manual_seed(3)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def steps(model, count=2, images=IMAGES):
    """Returns the losses and the first gradients of a few training steps."""
    model.train()
    optimizer, losses, gradients = torch.optim.SGD(model.parameters(), lr=0.01), [], {}
    for _ in range(count):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), LABELS)
        loss.backward()
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, gradients


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "rows"])
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_and_running_statistics_are_those_of_all_passes(name, layout):
    plain = network(name).double()
    quick = copy.deepcopy(plain)
    images = IMAGES.double().contiguous(memory_format=layout)
    wanted, wanted_gradients = steps(plain, images=images)
    with lean_training(quick, images[:2]) as found:
        assert len(found) > 2
        losses, gradients = steps(quick, images=images)
    assert losses == pytest.approx(wanted, rel=1e-9)
    for key, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-6, atol=1e-9)
    for key, value in plain.named_buffers():
        torch.testing.assert_close(quick.get_buffer(key), value, rtol=1e-9, atol=1e-12)


def test_running_statistics_of_the_first_layer_are_exact():
    plain, quick = network("resnet"), network("resnet")
    steps(plain, 1)
    with lean_training(quick, IMAGES[:2]):
        steps(quick, 1)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(quick.bn1, key), getattr(plain.bn1, key), rtol=1e-6, atol=1e-7)


def test_what_is_computed_together_is_named_and_ends_with_the_block():
    model = network("resnet")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with lean_training(model, IMAGES[:2]) as found:
        names = [fused.names for fused in found]
    assert names[:3] == [
        ("bn1", "relu1"),
        ("layer1.0.bn1", "layer1.0.relu1"),
        ("layer1.0.bn2", "layer1.0.add", "layer1.0.relu2"),
    ]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any({"forward", "_conv_forward"} & vars(m).keys() for m in model.modules())


def test_quantized_network_trains_as_in_all_passes():
    model = network("resnet")
    quantized = qexp.quantize(model, [IMAGES], quant="lsq", bits="w8a8").network
    twin = copy.deepcopy(quantized)
    wanted, _ = steps(quantized)
    with lean_training(twin, IMAGES[:2]) as found:
        assert found
        assert steps(twin)[0] == pytest.approx(wanted, rel=2e-2)  # codes on a boundary may round to the other side


def test_evaluation_frozen_norms_and_steps_without_gradients_compute_as_they_are():
    model = network("resnet").eval()
    wanted = model(IMAGES)
    with lean_training(model, IMAGES[:2]):
        assert torch.equal(model(IMAGES), wanted)
        model.train()
        with torch.no_grad():
            twin = network("resnet").train()
            assert torch.equal(model(IMAGES), twin(IMAGES))


def test_layer_with_a_hook_is_left_alone():
    model, twin = network("resnet"), network("resnet")
    seen = {}
    for m in (model, twin):
        m.layer1[0].bn2.register_forward_hook(lambda layer, _, y: seen.update({layer: y.detach().clone()}))
    steps(twin, 1)
    with lean_training(model, IMAGES[:2]) as found:
        steps(model, 1)
    assert any("layer1.0.bn2" in fused.names for fused in found)
    one, two = (seen[m.layer1[0].bn2] for m in (model, twin))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_network_that_computes_otherwise_in_training_is_left_as_it_is(caplog):
    torch.manual_seed(0)
    model = Dropped()
    with caplog.at_level(logging.WARNING), lean_training(model, IMAGES[:2]) as found:
        assert found == []
    assert "compute all passes over memory: add: the batch norm's result does not reach it" in caplog.text


def test_copy_made_inside_the_block_stands_alone():
    model = network("shared")
    with lean_training(model, IMAGES[:2]):
        copied = copy.deepcopy(model)
        steps(copied, 1)
    assert model.bn1.num_batches_tracked == 0 and copied.bn1.num_batches_tracked == 1
    assert torch.equal(network("shared").bn1.running_mean, model.bn1.running_mean)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [5, 8])
def test_shortcut_gives_the_same_pixels_and_the_same_gradient(stride, size):
    layer = StridedPad(3, stride)
    x = torch.randn(2, 4, size, size).contiguous(memory_format=torch.channels_last)
    plain, quick = (x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    wanted = layer(plain)
    with lean_training(nn.Sequential(nn.Conv2d(4, 4, 1), layer), x):
        got = layer(quick)
    assert torch.equal(got, wanted)
    g = torch.randn_like(wanted)
    (one,), (two,) = torch.autograd.grad(wanted, plain, g), torch.autograd.grad(got, quick, g)
    assert torch.equal(one, two) and two.is_contiguous(memory_format=torch.channels_last)


def test_strided_depthwise_convolution_computes_in_float32_under_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, 2, 1, groups=8))
    wanted = model(IMAGES)
    with lean_training(model, IMAGES[:2]), torch.autocast("cpu", torch.bfloat16):
        y = model(IMAGES)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and model[1].weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), wanted, rtol=2e-2, atol=2e-2)
