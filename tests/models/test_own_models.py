"""Our own networks: exact counts, every operation a module, traceable, refused where the arguments make no sense."""

import copy
import os
import pickle

import pytest
import torch
from torch import fx, nn

from qexp.data.cifar import CIFAR10, CIFAR100
from qexp.errors import QexpError
from qexp.models.cifar_resnet import CifarResNet
from qexp.models.digits_cnn import DigitsCNN
from qexp.models.mobilenetv2 import MobileNetV2
from qexp.models.modules import Add, Concat
from qexp.models.toynet import ToyNet
from qexp.network.facts import facts

IMAGE = (3, 32, 32)
ALL = {
    "toynet": ToyNet,
    "mobilenetv2": MobileNetV2,
    "mobilenetv2_changed": lambda **k: MobileNetV2("changed", **k),
    "resnet20": CifarResNet,
    "resnet20b": lambda **k: CifarResNet(20, "B", **k),
    "resnet20_linear": lambda **k: CifarResNet(20, "B", post_add_relu=False, **k),
    "preact20": lambda **k: CifarResNet(20, "A", pre_activation=True, **k),
    "kd": lambda **k: CifarResNet(20, "B", post_add_relu="stage", stem_channels=64, pool=4, **k),
}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (ToyNet, (203_626, 25_265_152, 151_552)),
        (MobileNetV2, (2_383_050, 95_054_336, 1_795_584)),
        (lambda: MobileNetV2("changed"), (2_296_922, 91_154_944, 1_724_928)),
        (lambda: CifarResNet(20, "B"), (272_474, 40_813_184, 200_704)),
        (lambda: CifarResNet(20, "A"), (269_722, 40_551_040, 188_416)),
        (lambda: CifarResNet(32, "B"), (466_906, 69_124_736, 315_392)),
        (lambda: CifarResNet(110, "B"), (1_730_714, 253_149_824, 1_060_864)),
    ],
    ids=["toynet", "mbv2-all", "mbv2-changed", "r20B", "r20A", "r32B", "r110B"],
)
def test_parameters_macs_and_bn_elements_are_the_published_ones(build, expected, count):
    with torch.device("meta"):
        assert count(build(), *IMAGE) == expected


def test_hundred_classes():
    assert sum(p.numel() for p in CifarResNet(20, "B", 100).parameters()) == 278_324


@pytest.mark.parametrize("name", ALL)
def test_scores_have_the_asked_number_of_classes(name):
    assert ALL[name](num_classes=7).eval()(torch.randn(2, *IMAGE)).shape == (2, 7)


class Leaves(fx.Tracer):
    """Adds and concatenations stay calls of modules."""

    def is_leaf_module(self, module, name):
        return isinstance(module, Add | Concat) or super().is_leaf_module(module, name)


@pytest.mark.parametrize("build", [*ALL.values(), DigitsCNN], ids=[*ALL, "digits_cnn"])
def test_every_operation_is_a_module_used_once(build):
    graph = Leaves().trace(build())
    called = [n.target for n in graph.nodes if n.op == "call_module"]
    assert len(called) == len(set(called))
    functions = {str(n.target) for n in graph.nodes if n.op in ("call_function", "call_method")}
    # the option-A shortcut slices and pads
    assert all("getitem" in f or "pad" in f for f in functions), functions


@pytest.mark.parametrize("name", ALL)
def test_pickle_and_deepcopy_keep_the_output(name):
    net, x = ALL[name]().eval(), torch.randn(1, *IMAGE)
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


def test_where_relu_follows_the_sum():
    def relus(value):
        net = CifarResNet(20, "B", post_add_relu=value)
        return [isinstance(b.relu2, nn.ReLU) for b in [*net.layer1, *net.layer2, *net.layer3]]

    assert relus(True) == [True] * 9
    assert relus(False) == [False] * 9
    assert relus("stage") == [False, False, True] * 3


def test_toynet_is_linear_but_for_the_relus_inside_its_blocks():
    net = ToyNet()
    kinds = [name for name, m in net.named_modules() if isinstance(m, nn.ReLU | nn.ReLU6)]
    assert kinds == [f"blocks.{i}.relu" for i in range(10)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CifarResNet(21), "depth=21 is not allowed; use 6n"),
        (lambda: CifarResNet(20, "C"), "shortcut='C' is not allowed; use A, B"),
        (lambda: CifarResNet(20, post_add_relu="never"), "use True, False, stage"),
        (lambda: CifarResNet(20, "A", stem_channels=64), "shortcut A cannot go from 64"),
        (lambda: CifarResNet(20, pool=3), "pool=3"),
        (lambda: CifarResNet(20, init="zeros"), "init='zeros'"),
        (lambda: MobileNetV2("some"), "shortcut='some' is not allowed; use all or changed"),
    ],
)
def test_impossible_arguments_are_refused(build, message):
    with pytest.raises(QexpError, match=message):
        build()


def test_digits_cnn_is_small(count):
    assert 20_000 < count(DigitsCNN(), 1, 8, 8).params < 60_000


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    ("net", "weights", "data", "right"),
    [
        (
            lambda: CifarResNet(20, "A"),
            "cifar10_resnet20-12fca82f.th",
            lambda root: CIFAR10(root, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
            9173,
        ),
        (lambda: ALL["kd"](num_classes=100), "cifar100_resnet20_kd.pth", CIFAR100, 6969),
    ],
    ids=["cifar10", "cifar100"],
)
def test_public_weights_give_their_accuracy_to_the_image(net, weights, data, right):
    from qexp.models.weights import load_weights

    root, model = os.environ["QEXP_DATA_DIR"], net()
    load_weights(model, f"{root}/weights/{weights}")
    model.eval()
    with torch.inference_mode():
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in data(root).test_dataloader())
    assert hits == right


def test_kaiming_uniform_is_by_fan_in():
    torch.manual_seed(0)
    stem = CifarResNet(20, init="kaiming_uniform").conv1.weight.detach()
    bound = (6 / 27) ** 0.5  # fan-in 3 x 3 x 3
    assert 0.95 * bound < stem.abs().max() <= bound and stem.std() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize(("depth", "million"), [(164, 1.70), (1001, 10.3)])
def test_bottlenecks_have_the_parameters_of_their_source(depth, million):
    """He et al. 2016 (arXiv 1603.05027) give 1.7 and 10.2 million, whose shortcuts have no batch norm."""
    model = CifarResNet(depth, "B", pre_activation=True, bottleneck=True)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(million, rel=0.02)
    assert (
        sum(isinstance(m, nn.Conv2d) for m in model.modules()) == depth - 1 + 3
    )  # less the classifier, and three shortcuts


@pytest.mark.parametrize("pre_activation", [False, True])
def test_bottlenecks_compute_and_are_quantized(pre_activation):
    model, images = (
        CifarResNet(11, "A", pre_activation=pre_activation, bottleneck=True).eval(),
        torch.randn(2, 3, 32, 32),
    )
    found = facts(model, images)
    assert model(images).shape == (2, 10) and not found.trace_error and found.shapes["linear"]["input"][1] == 256
    assert len(found.bn_of) == (10 if not pre_activation else 6)


def test_bottlenecks_of_another_depth_are_refused():
    with pytest.raises(QexpError, match="depth=32 is not allowed; with bottlenecks use 9n"):
        CifarResNet(32, bottleneck=True)
