"""Every file of conf/model and conf/dataset composes, builds, and names modules that exist."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qexp.command.root import register
from qexp.network.facts import facts
from qexp.run.settings import read

CONF = Path(__file__).parents[2] / "conf"
HOWTO = CONF.parent / "docs" / "pages" / "howto" / "model.md"
BY_NAME = {"timm", "torchvision", "import"}  # choices that name a network on the command line: test_named_networks.py
ALL_MODELS = sorted({p.stem for p in (CONF / "model").glob("[!_]*.yaml")} - BY_NAME)
DATASETS = sorted(p.stem for p in (CONF / "dataset").glob("*.yaml"))
IMAGENET = {"num_classes": 1000}


@cache
def group(choice: str) -> dict:
    """A file of conf/, with its defaults, under the name of its group; interpolations unresolved."""
    name, _, file = choice.partition("/")
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return {name: OmegaConf.to_container(compose("config", [f"{name}={file}"]))[name]}


DETECTORS = [name for name in ALL_MODELS if "detect" in group(f"model/{name}")["model"]]
FACES = ["mobilefacenet", "squeezenet_face"]  # whose output is an embedding, not a score of each class
MODELS = [name for name in ALL_MODELS if name not in DETECTORS]


def config(model: str, dataset: str | dict) -> DictConfig:
    data = group(f"dataset/{dataset}") if isinstance(dataset, str) else {"dataset": dataset}
    return OmegaConf.create({"seed": 3, "max_samples": None, **group(f"model/{model}"), **data})


def build(cfg: DictConfig) -> nn.Module:
    # torchvision computes RegNet's widths with tensors, which meta has no values for
    with torch.device("cpu" if "regnet" in str(cfg.model.net.get("name")) else "meta"):
        return instantiate(cfg.model.net)


def inside(name: str, prefixes) -> bool:
    prefixes = [prefixes] if isinstance(prefixes, str) else prefixes
    return any(name == p or name.startswith(p + ".") for p in prefixes)


@pytest.mark.parametrize("model", MODELS)
def test_names_in_the_file_exist_and_groups_do_not_overlap(model):
    cfg = OmegaConf.to_container(config(model, IMAGENET), resolve=True)["model"]
    net = build(config(model, IMAGENET))
    names = dict(net.named_modules())
    groups, ends = cfg.get("groups") or [], [cfg[end] for end in ("first", "last") if cfg.get(end)]
    for name in [*ends, *(p for g in groups for p in ([g] if isinstance(g, str) else g))]:
        assert name in names
    layers = [n for n, m in names.items() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert cfg.get("first") in (None, layers[0])
    assert not cfg.get("last") or isinstance(names[cfg["last"]], nn.Linear | nn.Conv2d)
    for name in layers:
        assert sum(inside(name, g) for g in groups) <= 1
    assert all(any(inside(name, g) for name in layers) for g in groups)


@pytest.mark.parametrize(
    ("model", "length"),
    [("toynet", 13), ("mobilenetv2", 20), ("mobilenetv2_changed", 20), ("mobilenet_v2", 20), ("resnet20", 9)]
    + [("resnet20b", 9), ("cifar100_resnet20_kd", 9), ("resnet110", 54), ("resnet50", 16)],
)
def test_group_counts(model, length):
    assert len(config(model, IMAGENET).model.groups) == length


WHOLE = ["toynet", "mobilenetv2", "mobilenetv2_changed", "mobilenet_v2", "digits_cnn", "alexnet", "vgg16_bn"]


@pytest.mark.parametrize("model", [*WHOLE, "squeezenet1_1"])
def test_groups_that_include_the_ends_cover_every_layer(model):
    cfg = config(model, IMAGENET)
    layers = [n for n, m in build(cfg).named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert all(any(inside(name, g) for g in cfg.model.groups) for name in layers)


@pytest.mark.parametrize("model", MODELS)
def test_the_input_size_fits_the_network(model):
    cfg = config(model, {"num_classes": 7})
    if not cfg.model.get("input_size"):
        pytest.skip("the file names no size of images")
    with torch.no_grad():
        net = build(cfg).eval().to("meta")
        scores = net(torch.zeros(1, *cfg.model.input_size, device="meta"))
    if "num_classes" in cfg.model.net:
        assert scores.shape == (1, 7)
    elif model in FACES:
        assert scores.shape == (1, cfg.model.net.features)
    else:  # a network that fixes its number of classes; another task's pixels
        assert len(scores) == 1 and scores.ndim in (2, 4)


@pytest.mark.parametrize("dataset", DATASETS)
def test_data_modules_build_and_agree_with_their_file(dataset):
    cfg = config("digits_cnn", dataset)
    data = instantiate(cfg.dataset.data)
    if not dataset.startswith("lfw"):  # pairs of faces have no classes
        assert data.num_classes == cfg.dataset.num_classes == len(data.class_names)
    assert data.seed == 3
    assert {"float", "qat"} <= set(cfg.dataset.epochs) and {"float", "qat"} <= set(cfg.dataset.lr)


def test_normalisation_and_size_follow_the_model_where_it_names_them():
    own = instantiate(config("toynet", "cifar10").dataset.data).normalize
    public = instantiate(config("resnet20", "cifar10").dataset.data).normalize
    large = instantiate(config("resnet18", "cifar10").dataset.data).normalize
    assert (own.mean, own.size) == ((0.4914, 0.4822, 0.4465), 32)
    assert (public.mean, public.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert large.size == 224


IMAGENET_COUNTS = {  # parameters, MACs of one image
    "alexnet": (61_100_840, 714_188_480),
    "vgg16": (138_357_544, 15_470_264_320),
    "vgg16_bn": (138_365_992, 15_470_264_320),
    "vgg19": (143_667_240, 19_632_062_464),
    "resnet18": (11_689_512, 1_814_073_344),
    "resnet34": (21_797_672, 3_663_761_408),
    "resnet50": (25_557_032, 4_089_184_256),
    "resnet101": (44_549_160, 7_801_405_440),
    "resnet152": (60_192_808, 11_513_626_624),
    "squeezenet1_0": (1_248_424, 818_924_576),
    "squeezenet1_1": (1_235_496, 349_151_936),
    "mobilenet_v2": (3_504_872, 300_774_272),
    "googlenet": (6_624_904, 1_498_376_192),
    "googlenet_caq": (6_999_064, 1_582_671_872),
    "inception_v3": (27_161_264, 5_713_216_096),
}


@pytest.mark.parametrize("model", IMAGENET_COUNTS)
def test_imagenet_networks_have_the_published_counts(model, count):
    cfg = config(model, IMAGENET)
    assert count(build(cfg), *cfg.model.input_size)[:2] == IMAGENET_COUNTS[model]


@pytest.mark.parametrize(
    ("model", "params"),
    [("alexnet", 57_044_810), ("squeezenet1_1", 727_626), ("resnet18", 11_181_642), ("mobilenet_v2", 2_236_682)],
)
def test_ten_class_heads_have_the_published_counts(model, params):
    assert sum(p.numel() for p in build(config(model, {"num_classes": 10})).parameters()) == params


def test_caqs_googlenet_is_traced_whole_and_normalizes_two_convolutions():
    net = build(config("googlenet_caq", IMAGENET)).to_empty(device="cpu").eval()
    found = facts(net, torch.zeros(1, 3, 224, 224))
    assert not found.trace_error and set(found.bn_of) == {"conv1.conv", "conv3.conv"}
    assert {"inception3a.concat", "inception5b.concat"} <= set(found.order)
    assert net.inception4e.branch3[1].conv.kernel_size == (5, 5)


TORCHVISION = [
    m
    for m in MODELS
    if config(m, IMAGENET).model.net["_target_"].endswith("torchvision_model")
    and "preprocessing" in group(f"model/{m}")["model"]
]


@pytest.mark.parametrize("model", TORCHVISION)
def test_images_are_prepared_as_torchvisions_weights_ask(model):
    from torchvision import models

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"model={model}", "dataset=imagenet"])
    theirs = models.get_model_weights(cfg.model.net.name)["IMAGENET1K_V1"].transforms()
    ours = instantiate(cfg.dataset.data)
    assert [ours.resize.resize, ours.resize.crop] == [*theirs.resize_size, *theirs.crop_size]
    assert ours.resize.interpolation == theirs.interpolation.value
    # googlenet's and inception's own normalisation undoes ImageNet's: x -> 2x - 1 of images in 0..1
    own = model in ("googlenet", "inception_v3")
    assert list(ours.normalize.mean) == ([0.5] * 3 if own else theirs.mean)
    assert list(ours.normalize.std) == ([0.5] * 3 if own else theirs.std)


SHORT = {  # a model's file of one line, and those that the how-to page prints
    "own": "net: {_target_: qexp.models.digits_cnn.DigitsCNN, width: 4}\n",
    **{f"page{i}": text for i, text in enumerate(re.findall(r"```yaml\n(.*?)```", HOWTO.read_text(), re.S))},
}


@pytest.mark.parametrize("file", SHORT)
def test_what_a_models_file_need_not_say(file, tmp_path):
    """No groups, ends, size, weights or name: the configuration resolves, and settings have a name and a study."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(SHORT[file])
    register()
    given = ["model=mine", "dataset=imagenet", f"hydra.searchpath=[file://{tmp_path}]"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", given)
    settings = read(cfg)
    name = settings.network.name
    assert (
        name == (cfg.model.get("name") or cfg.model.net._target_.rpartition(".")[2])
        and settings.study == f"{name}-imagenet"
    )
    assert settings.weights is None and settings.network.key_map == {} and settings.network.groups is None
    with torch.device("cpu" if "regnet" in name else "meta"):
        assert isinstance(instantiate(cfg.model.net), nn.Module)


def test_files_that_are_parts_of_others_lie_beside_them():
    assert {f"_{part}" for part in ("torchvision", "cifar_resnet", "imagenet_norm")} <= {
        p.stem for p in (CONF / "model").glob("_*.yaml")
    }
    assert config("mobilenetv2_changed", IMAGENET).model.groups == config("mobilenetv2", IMAGENET).model.groups
