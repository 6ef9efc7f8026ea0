"""Bi-Real networks: order of layers, shortcuts, activations with their gradients, a start from a plain residual network."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qexp.errors import QexpError
from qexp.models.activations import ACTIVATIONS, Maxout, RPReLU
from qexp.models.bireal_resnet import BiRealBlock, BiRealResNet, PooledPad
from qexp.models.cifar_resnet import CifarResNet
from qexp.models.modules import StridedPad
from qexp.models.weights import save_weights
from qexp.network.cost import params
from qexp.network.facts import facts

X = torch.tensor([-1, -0.2, 0.1, 0.35, 1.5])
G = torch.tensor([1, -1, 0.5, 2, 1])


def backward(module: nn.Module) -> tuple[list[float], list[float]]:
    x = X.reshape(1, 1, 5, 1).clone().requires_grad_()
    y = module(x)
    (y * G.reshape(y.shape)).sum().backward()
    return y.detach().flatten().tolist(), x.grad.flatten().tolist()


def test_rprelu_vector():
    module = RPReLU(1)
    with torch.no_grad():
        module.xi.fill_(0.1)
        module.zeta.fill_(-0.2)
    y, dx = backward(module)
    assert y == pytest.approx([-0.475, -0.275, -0.2, 0.05, 1.2], abs=1e-6)
    assert dx == pytest.approx([0.25, -0.25, 0.125, 2, 1])
    got = [float(p.grad) for p in (module.xi, module.zeta, module.slope)]
    assert got == pytest.approx([-3.125, 3.5, -0.8], abs=1e-6)


def test_maxout_vector_and_gradients():
    module = Maxout(1)
    x = torch.tensor([-2, -0.4, 0, 1.5]).reshape(1, 1, 4, 1)
    assert module(x).detach().flatten().tolist() == pytest.approx([-0.5, -0.1, 0, 1.5])
    _, dx = backward(module)
    assert dx == pytest.approx([0.25, -0.25, 0.5, 2, 1])
    # sum of g x where x > 0: 0.05 + 0.7 + 1.5; where x <= 0: -1 + 0.2
    assert [float(module.positive.grad), float(module.negative.grad)] == pytest.approx([2.25, -0.8])


def test_each_channel_has_its_own_slopes_and_shifts():
    for name, make in ACTIVATIONS.items():
        module = make(3)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.tensor([0.1, 0.2, 0.3]))
        x = torch.linspace(-1, 1, 8).reshape(1, 1, 2, 4).repeat(1, 3, 1, 1)
        differ = not torch.equal(module(x)[0, 0], module(x)[0, 2])
        assert differ == (name in ("prelu", "rprelu", "maxout")), name


def test_shortcuts_take_every_second_pixel_or_means():
    x = torch.arange(1.0, 17).reshape(1, 1, 4, 4).repeat(1, 2, 1, 1)
    strided, pooled = StridedPad(2, 2)(x), PooledPad(2, 2)(x)
    assert strided[0, 1].tolist() == [[1, 3], [9, 11]] and pooled[0, 1].tolist() == [[3.5, 5.5], [11.5, 13.5]]
    for y in (strided, pooled):
        assert y.shape == (1, 4, 2, 2) and not y[0, 0].any() and not y[0, 3].any()


def test_each_convolution_has_a_sum_of_its_own():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    block = BiRealBlock(4, 4, 1, "hardtanh", "conv", "strided_zero").eval()
    first = block.act1(block.bn1(block.conv1(x)) + x)
    assert torch.equal(block(x), block.act2(block.bn2(block.conv2(first)) + first))
    plain = BiRealBlock(4, 4, 1, "hardtanh", "block", "strided_zero").eval()
    plain.load_state_dict(block.state_dict())
    first = plain.act1(plain.bn1(plain.conv1(x)))
    assert torch.equal(plain(x), plain.act2(plain.bn2(plain.conv2(first)) + x))


def test_counts_of_resnet20():
    net = BiRealResNet(activation="hardtanh", shortcut_down="strided_zero")
    binary = [m for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and n != "conv1"]
    assert len(binary) == 18 and sum(m.weight.numel() for m in binary) == 267264
    assert net.conv1.weight.numel() + sum(p.numel() for p in net.linear.parameters()) == 1082
    norms = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert norms == 688 and params(net) == 267264 + 1082 + 2 * 688


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("down", ["strided_zero", "avg_zero", "avg_conv"])
@pytest.mark.parametrize("span", ["conv", "block"])
def test_every_form_is_traced_and_only_relu_leaves_one_sign(activation, down, span):
    net = BiRealResNet(8, activation=activation, shortcut_down=down, shortcut_span=span, bn_before_classifier=True)
    found = facts(net.eval(), torch.randn(2, 3, 16, 16))
    assert not found.trace_error and not found.strays
    assert found.bn_of["layer2.0.conv1"] == "layer2.0.bn1"
    seen = []
    net.layer2[0].conv2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    assert bool((seen[-1] < 0).any()) == (activation != "relu")


def test_the_start_takes_over_a_plain_network_but_for_what_it_lacks(tmp_path):
    plain, file = CifarResNet(8), tmp_path / "plain.safetensors"
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    save_weights(plain, file)
    net = BiRealResNet(8, start=str(file))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name
    assert net.layer1[0].act1.slope.eq(0.25).all()


def test_a_start_that_does_not_fit_is_refused_with_a_name(tmp_path):
    file = tmp_path / "plain.safetensors"
    with pytest.raises(QexpError, match=r"start=.* is not a file"):
        BiRealResNet(8, start=str(file))
    save_weights(CifarResNet(14), file)
    with pytest.raises(QexpError, match=r"start=.* does not fit: .*layer1\.1"):
        BiRealResNet(8, start=str(file))
    state = CifarResNet(8).state_dict()
    del state["layer1.0.conv2.weight"]
    save_file(state, file)
    with pytest.raises(QexpError, match=r"start=.* does not fit: .*layer1\.0\.conv2\.weight"):
        BiRealResNet(8, start=str(file))


@pytest.mark.parametrize(
    "options", [{"depth": 9}, {"activation": "swish"}, {"shortcut_span": "net"}, {"shortcut_down": "max"}]
)
def test_options_that_are_not_allowed_are_named(options):
    with pytest.raises(QexpError, match=next(iter(options))):
        BiRealResNet(**options)
