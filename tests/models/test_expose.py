"""Exposing a torchvision block changes what can be addressed and nothing else."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision import models

from qexp.errors import QexpError
from qexp.models.expose import EXPOSED, expose_adds
from qexp.models.modules import Add, Concat
from qexp.models.zoo import torchvision_model

SIDE = {"inception_v3": 75}
OPTIONS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
# adds and concatenations of the published layouts
COUNTS = {
    "resnet18": (8, 0),
    "resnet50": (16, 0),
    "mobilenet_v2": (10, 0),
    "squeezenet1_1": (0, 8),
    "googlenet": (0, 9),
    "inception_v3": (0, 15),
    "mobilenet_v3_small": (6, 0),
    "mnasnet1_0": (10, 0),
    "efficientnet_b0": (9, 0),
    "efficientnet_v2_s": (35, 0),
    "regnet_y_400mf": (16, 0),
    "convnext_tiny": (18, 0),
}


def plain(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.get_model(name, weights=None, num_classes=10, **OPTIONS.get(name, {}))


def image(name: str, batch: int = 1) -> torch.Tensor:
    side = SIDE.get(name, 32)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=COUNTS)
def case(request) -> tuple[str, nn.Module, torch.Tensor, list[str]]:
    """A network exposed, what it computed before, and its keys before."""
    model = plain(request.param).eval()
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(image(request.param))
    expose_adds(model)
    return request.param, model, before, keys


def out(name: str, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(image(name))


def test_output_is_the_same_to_the_bit_and_the_keys_stay(case):
    name, model, before, keys = case
    assert torch.equal(out(name, model), before)
    assert list(model.state_dict()) == keys


def test_every_add_and_concat_is_a_module_that_runs_once(case):
    name, model, _, _ = case
    runs = {n: 0 for n, m in model.named_modules() if isinstance(m, Add | Concat)}

    def count(n):
        return lambda *_: runs.update({n: runs[n] + 1})

    hooks = [model.get_submodule(n).register_forward_hook(count(n)) for n in runs]
    out(name, model)
    for hook in hooks:
        hook.remove()
    assert set(runs.values()) == {1}
    kinds = [type(model.get_submodule(n)) for n in runs]
    assert (kinds.count(Add), kinds.count(Concat)) == COUNTS[name]


def test_no_activation_is_shared(case):
    name, model, _, _ = case
    runs: dict[nn.Module, int] = {}

    def count(module, *_):
        runs[module] = runs.get(module, 0) + 1

    activations = [m for n, m in model.named_modules() if isinstance(m, nn.ReLU | nn.ReLU6) and "aux" not in n.lower()]
    hooks = [m.register_forward_hook(count) for m in activations]
    out(name, model)
    for hook in hooks:
        hook.remove()
    assert runs == dict.fromkeys(activations, 1)


def test_pickle_and_deepcopy_keep_class_and_output(case):
    name, model, before, _ = case
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(out(name, twin), before)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


def test_a_second_call_changes_nothing(case):
    _, model, _, _ = case
    modules = list(model.modules())
    expose_adds(model)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1", "googlenet"])
def test_gradients_and_running_statistics_are_the_same_to_the_bit(name):
    one, two = plain(name).train(), plain(name).train()
    expose_adds(two)
    for model in (one, two):
        torch.manual_seed(5)  # dropout
        result = model(image(name, batch=2))
        (result if isinstance(result, torch.Tensor) else result.logits).square().sum().backward()
    for (key, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), key
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))


def test_train_flag_and_isinstance_survive():
    model = plain("resnet18").eval()
    expose_adds(model)
    assert not any(m.training for m in model.modules())
    assert isinstance(model.layer1[0], models.resnet.BasicBlock)


def test_every_exposed_class_extends_the_one_it_replaces():
    assert all(issubclass(new, old) and new.__qualname__.isidentifier() for old, new in EXPOSED.items())


def test_detector_backbones_are_exposed():
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    with torch.device("meta"):
        model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    expose_adds(model)
    assert sum(isinstance(m, Add) for m in model.modules()) == 16


def test_zoo_remembers_the_name_and_refuses_others():
    with torch.device("meta"):
        assert torchvision_model("resnet18", 10).torchvision_name == "resnet18"
    with pytest.raises(QexpError, match=r"no classifier 'resnet19' \(did you mean 'resnet18'"):
        torchvision_model("resnet19")
