"""Networks named on the command line: of torchvision, of timm, and of the user's own package; no YAML is written for them."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qexp
from qexp.command.choices import rules_added
from qexp.errors import QexpError
from qexp.models.imported import imported
from qexp.models.published import preprocessing
from qexp.models.timm_networks import timm_model
from qexp.models.weights import load_weights, save_weights
from qexp.models.zoo import torchvision_model
from qexp.run import pipeline
from qexp.run.settings import read

ROOT = Path(__file__).parents[2]
timm = pytest.importorskip("timm")


class Net(nn.Module):
    """A user's network, whose constructor has its own word for the number of classes."""

    def __init__(self, n_classes: int = 3, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, n_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def small(**options) -> Net:
    return Net(10, **options)


OWN = f"{__name__}.Net"


@pytest.mark.parametrize(
    ("name", "weights"),
    [("resnet50", "IMAGENET1K_V1"), ("resnet50", None), ("regnet_y_400mf", "file.pt"), ("vgg11", "DEFAULT")],
)
def test_torchvisions_images_are_prepared_as_the_weights_metadata_says(name, weights):
    from torchvision import models

    asked = weights if weights and weights.isupper() else "DEFAULT"
    theirs = models.get_model_weights(name)[asked].transforms()
    ours = preprocessing("torchvision", name, weights)
    assert ours["input_size"] == [3, *theirs.crop_size * 2] and ours["resize"] == theirs.resize_size[0]
    assert (ours["mean"], ours["std"]) == (theirs.mean, theirs.std)
    assert ours["interpolation"] == theirs.interpolation.value


def test_weights_that_differ_in_their_images_are_told_apart():
    first, second = (preprocessing("torchvision", "resnet50", f"IMAGENET1K_V{i}")["resize"] for i in (1, 2))
    assert (first, second) == (256, 232)
    assert preprocessing("torchvision", "googlenet")["mean"] == [0.5] * 3, (
        "what its own builder does inside the network"
    )


@pytest.mark.parametrize(
    "name",
    [
        "resnet18.a1_in1k",
        "resnet18",
        "mobilenetv4_conv_small.e1200_r224_in1k",
        "beit_base_patch16_224",
        "tf_efficientnet_b0",
    ],
)
def test_timms_images_are_prepared_as_timm_does(name):
    theirs = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    )
    resize, crop, _, normalize = theirs.transforms
    ours = preprocessing("timm", name)
    assert ours["resize"] == (list(resize.size) if isinstance(resize.size, tuple) else resize.size)
    assert ours["input_size"][1:] == list(crop.size)
    assert (ours["mean"], ours["std"]) == (normalize.mean.tolist(), normalize.std.tolist()) or all(
        math.isclose(a, b, rel_tol=1e-6) for a, b in zip(ours["mean"] + ours["std"], [*normalize.mean, *normalize.std])
    )
    assert ours["interpolation"] == resize.interpolation.value


def test_a_square_that_is_squashed_has_two_sides():
    squashed = next(n for n in timm.list_pretrained("convnext*") if timm.get_pretrained_cfg(n).crop_mode == "squash")
    size = timm.get_pretrained_cfg(squashed).input_size[1]
    crop = timm.get_pretrained_cfg(squashed).crop_pct
    assert preprocessing("timm", squashed)["resize"] == [math.floor(size / crop)] * 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=timm"], "name the network too, such as model.name=resnet18.a1_in1k"),
        (["model=torchvision"], "name the network too, such as model.name=resnet18"),
        (["model=import"], "name the class too, such as model.target=mypkg.nets.Net"),
        (["model=timm", "model.name=resnt18"], "did you mean 'resnet18'"),
        (["model=timm", "model.name=resnet18.a1_in"], "did you mean 'resnet18.a1_in1k'"),
        (["model=torchvision", "model.name=resnet81"], "did you mean 'resnet18'"),
    ],
)
def test_a_name_that_is_missing_or_wrong_is_answered_before_anything_runs(compose, overrides, words):
    with pytest.raises(QexpError, match=words.replace(".", r"\.")):
        read(compose(*overrides))


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["model=timm", "model.name=resnet10t", "model.net.in_chans=1", "model.input_size=null"], "resnet10t"),
        (
            ["model=torchvision", "model.name=squeezenet1_1", "model.net.dropout=0.1", "model.input_size=[3,32,32]"],
            "squeezenet1_1",
        ),
        (["model=import", f"model.target={OWN}", "model.net.width=6"], "Net"),
        (["model=import", f"model.target={__name__}.small"], "small"),
    ],
)
def test_a_network_is_named_in_one_line_runs_and_is_loaded_back(compose, tmp_path, overrides, label, monkeypatch):
    more = ["trainer=cpu", "trainer.enable_progress_bar=false", "kernels=reference", "debug=fast", "weights=random"]
    if label == "squeezenet1_1":  # three channels
        monkeypatch.setenv("QEXP_DATA_DIR", str(_colours(tmp_path)))
        more += ["dataset=cifar10", "dataset.data.calibration_size=20"]
    found = pipeline.run(read(compose(*rules_added(overrides), *more, f"runs_dir={tmp_path}")))
    assert found["status"] == "ok", found.get("error")
    assert found["model"] == label and found["weights"] == "random" and found["point"]
    folder = tmp_path / found["study"] / found["point"]
    model = qexp.load(folder)
    assert [q for q in model.modules() if type(q).__name__ == "Uniform"]


def _colours(folder: Path) -> Path:
    import numpy as np

    rng = np.random.default_rng(0)
    images = {split: rng.integers(0, 256, (100, 32, 32, 3), np.uint8) for split in ("train", "test")}
    labels = {split: (np.arange(100) % 10).astype(np.int64) for split in images}
    np.savez(
        folder / "cifar10.npz",
        train_images=images["train"],
        train_labels=labels["train"],
        test_images=images["test"],
        test_labels=labels["test"],
    )
    return folder


def test_the_number_of_classes_is_that_of_the_data_set():
    assert imported(OWN, 7).fc.out_features == 7
    assert imported(OWN, 7, n_classes=5).fc.out_features == 5
    assert imported(f"{__name__}.small", 7).fc.out_features == 10, "a builder that refuses the word keeps its own"
    assert timm_model("resnet10t", 7).fc.out_features == 7
    assert imported("torchvision.models.squeezenet1_1", 7).classifier[1].out_channels == 7, "a builder with **options"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: imported(f"{__name__}.Nett", 3), "has no 'Nett' .did you mean 'Net'"),
        (lambda: imported(OWN, 3, widht=4), "takes no argument 'widht' .did you mean 'width'"),
        (lambda: imported("collections.OrderedDict", 3), "makes a OrderedDict; a torch.nn.Module is needed"),
        (lambda: timm_model("resnet10t", in_chns=1), "unexpected keyword argument 'in_chns'"),
        (lambda: torchvision_model("resnet18", 10, widht=1), "unexpected keyword argument 'widht'"),
    ],
)
def test_an_argument_or_a_class_that_does_not_exist_is_named(build, words):
    with pytest.raises(QexpError, match=words):
        build()


def test_weights_of_timm_come_from_a_file_or_by_default(tmp_path):
    model, other = timm_model("resnet10t", 3), timm_model("resnet10t", 3)
    save_weights(model, tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    save_weights(model, tmp_path / "resnet10t.c3_in1k-model.safetensors")  # where a download would be kept
    fresh = timm_model("resnet10t", 3)
    assert load_weights(fresh, "DEFAULT", cache_dir=tmp_path).kind == "timm"
    assert torch.equal(fresh.fc.weight, model.fc.weight)
    with pytest.raises(QexpError, match=r"use weights=DEFAULT .the tag after the dot"):
        load_weights(model, "IMAGENET1K_V1")


def test_a_network_lies_beside_the_user_in_an_empty_folder(tmp_path):
    (tmp_path / "mypkg").mkdir()
    text = Path(__file__).read_text()
    source = text[text.index("class Net(") : text.index("def small(")]
    (tmp_path / "mypkg" / "nets.py").write_text(
        f"from __future__ import annotations\nimport torch\nfrom torch import nn\n{source}"
    )
    command = [sys.executable, str(ROOT / "run.py"), "model=import", "model.target=mypkg.nets.Net", "debug=fast"]
    more = ["trainer=cpu", "kernels=reference", "trainer.enable_progress_bar=false"]
    done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Net on digits" in done.stdout and (tmp_path / "runs" / "debug" / "results.csv").exists()


@pytest.mark.parametrize(
    ("made", "name"), [(torchvision_model, "squeezenet1_1"), (timm_model, "mnasnet_small")], ids=["torchvision", "timm"]
)
def test_training_starts_from_weights_for_other_classes(made, name, tmp_path):
    torch.manual_seed(1)
    published = made(name)
    save_weights(published, path := tmp_path / "w.safetensors")
    with pytest.raises(
        QexpError, match=r"of another shape: .*; to train a classifier for other classes, .*model\.net\.start=FILE"
    ):
        load_weights(made(name, num_classes=7), path)
    torch.manual_seed(2)
    model = made(name, num_classes=7, start=str(path))
    torch.manual_seed(2)
    fresh = made(name, num_classes=7).state_dict()
    before, after = published.state_dict(), model.state_dict()
    new = {key for key in after if after[key].shape != before[key].shape}
    assert new and all(after[key].shape[0] == 7 and torch.equal(after[key], fresh[key]) for key in new)
    assert all(torch.equal(after[key], before[key]) for key in after.keys() - new)


def test_a_start_that_does_not_fit_is_refused(tmp_path):
    save_weights(torchvision_model("squeezenet1_0"), path := tmp_path / "w.safetensors")
    with pytest.raises(QexpError, match=r"model\.net\.start: .*does not fit SqueezeNet"):
        torchvision_model("squeezenet1_1", 7, start=str(path))
    with pytest.raises(QexpError, match=r"model\.net\.start: .*no such file"):
        torchvision_model("squeezenet1_1", 7, start=str(tmp_path / "none.pt"))
