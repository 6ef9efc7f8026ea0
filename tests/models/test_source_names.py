"""Checkpoints under the names that the source projects gave their layers load through the key maps of the model files."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from qexp.command.root import register
from qexp.models.weights import load_weights
from tests.models.test_conf_models import ALL_MODELS, CONF

State = dict[str, Tensor]


@cache
def config(*overrides: str) -> DictConfig:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def renamed(state: State, *steps: tuple[str, str]) -> State:
    """Returns a state under the names that the first step that matches gives."""
    out = {}
    for key, value in state.items():
        for pattern, replacement in steps:
            new, found = re.subn(pattern, replacement, key)
            if found:
                key = new
                break
        out[key] = value
    assert len(out) == len(state)
    return out


def caq_googlenet(state: State) -> State:
    steps = ((r"^conv1\.conv", "conv1"), (r"^conv1\.bn", "bn1"), (r"^conv3\.conv", "conv3"), (r"^conv3\.bn", "bn2"))
    return renamed(state, *steps)


def caq_squeezenet(state: State) -> State:
    fires = dict(zip((4, 5, 7, 8, 10, 11, 12, 13), range(2, 10)))
    norms = {"squeeze": "bn1", "expand1x1": "bn2", "expand3x3": "bn3"}
    steps = [
        (r"^features\.0\.", "conv1."),
        (r"^features\.1\.", "bn1."),
        ("^conv10", "final_conv"),
        ("^embedding", "fc"),
    ]
    for place, number in fires.items():
        for part, norm in norms.items():
            steps.append((rf"^features\.{place}\.{part}\.0\.", f"fire{number}.{part}."))
            steps.append((rf"^features\.{place}\.{part}\.1\.", f"fire{number}.{norm}."))
    return renamed(state, *steps)


def pact_resnet(state: State) -> State:
    steps = [(r"^conv1\.", "stem."), (r"^linear\.", "output.")]
    for unit in range(3):
        place = rf"^layer(\d)\.{unit}\."
        steps.append((place + r"shortcut\.0\.", rf"features.stage\1.unit{unit + 1}.identity_conv."))
        steps.append((place + r"shortcut\.1\.", rf"features.stage\1.unit{unit + 1}.bn3."))
        steps.append((place, rf"features.stage\1.unit{unit + 1}."))
    return renamed(state, *steps)


def pact_toynet(state: State) -> State:
    block = r"^blocks\.(\d+)\."
    inner = {
        "down.bn": "norm",
        "down.conv": "downsample",
        "depthwise": "conv1",
        "bn": "bn1",
        "expand": "conv2",
        "project": "conv3",
    }
    steps = [(rf"{block}{re.escape(ours)}\.", rf"cells.\1.{theirs}.") for ours, theirs in inner.items()]
    ends = {"conv1": "stem.conv", "bn1": "stem.bn", "conv2": "header.conv", "bn2": "header.bn", "linear": "fc"}
    out = renamed(state, *steps, *((rf"^{ours}\.", f"{theirs}.") for ours, theirs in ends.items()))
    return out | {"cells.0.act_quant_in1.scale_coef": torch.tensor(8.0), "act_quant1.scale_coef": torch.tensor(10.0)}


def pact_mobilenet(state: State) -> State:
    return renamed(state, (r"^conv1\.", "stem."), (r"^blocks\.", "layers."), (r"^conv2\.", "head."))


def quantized_resnet(state: State) -> State:
    return renamed(state, (r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc."))


FORMS = {
    "CAQ, GoogLeNet": (["model=googlenet_caq", "dataset.num_classes=10"], caq_googlenet, 14),
    "CAQ, SqueezeNet": (["model=squeezenet_face"], caq_squeezenet, 153),
    "PACT-Quantization, ResNet-20": (["model=resnet20b"], pact_resnet, None),
    "PACT-Quantization, ResNet-20 by its shortcut": (["model=resnet20", "model.net.shortcut=B"], pact_resnet, None),
    "PACT-Quantization, ToyNet": (["model=toynet"], pact_toynet, None),
    "PACT-Quantization, MobileNetV2": (["model=mobilenetv2"], pact_mobilenet, None),
    "Quantized_ResNet, 20": (["model=resnet20b"], quantized_resnet, None),
    "Quantized_ResNet, 56": (["model=resnet56", "model.net.shortcut=B"], quantized_resnet, None),
    "Quantized_ResNet, 110": (["model=resnet110", "model.net.shortcut=B"], quantized_resnet, None),
}


def network(cfg: DictConfig, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = instantiate(cfg.model.net).eval()
    for name, value in model.state_dict().items():
        if "running" in name:  # statistics, so that a swapped pair shows
            value.copy_(torch.rand_like(value) + 0.5)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_a_source_projects_checkpoint_loads_and_computes_the_same(tmp_path, form):
    overrides, name_as_theirs, moved = FORMS[form]
    cfg = config(*overrides)
    theirs, ours = network(cfg, 1), network(cfg, 2)
    state = theirs.state_dict()
    named = name_as_theirs(state)
    if moved is not None:
        assert len(set(state) - set(named)) == moved
    path = tmp_path / "weights.pth.tar"
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in named.items()}, "optimizer": optimizer}, path)
    load_weights(ours, path, cfg.model.key_map)
    x = torch.randn(2, *cfg.model.input_size)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("model", ALL_MODELS)
def test_a_key_map_leaves_the_networks_own_names_alone(model):
    cfg = config(f"model={model}")
    if not cfg.model.get("key_map"):
        pytest.skip("no key map")
    with torch.device("meta"):
        names = list(instantiate(cfg.model.net).state_dict())
    for pattern in cfg.model.key_map:
        assert not [name for name in names if re.search(pattern, name)]


def test_the_public_cifar_resnets_have_one_preprocessing():
    said = [config(f"model=resnet{depth}").model.preprocessing for depth in (20, 32, 44, 56, 110)]
    assert all(one == said[0] for one in said)
    for depth in (20, 110):
        data = config(f"model=resnet{depth}", "dataset=cifar10").dataset.data
        assert (data.mean, data.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
