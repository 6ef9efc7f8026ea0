"""What every test can use: composed configurations, whole runs in a scratch folder, tiny networks and a few real digits."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from omegaconf import DictConfig
from torch import Tensor

from qexp.run.settings import read

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # so that tests find `tests.networks` and `tests.strategies`, however pytest was started
    sys.path.insert(0, str(ROOT))

from tests.networks import Mixed, Residual  # noqa: E402 - needs the path

# The same examples on every machine, so that a test that fails was broken by a change; --hypothesis-profile=default draws others
settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, with the reason, what needs real data where none is named."""
    if "QEXP_DATA_DIR" not in os.environ:
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(pytest.mark.skip(reason="QEXP_DATA_DIR names no folder of real data"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from many threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def conf_dir() -> Path:
    return ROOT / "conf"


@pytest.fixture(scope="session")
def compose(conf_dir: Path) -> Callable[..., DictConfig]:
    """Call with overrides, as on the command line; returns the configuration a run would get."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from qexp.command.root import register

    register()

    def composed(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(conf_dir), version_base="1.3"):
            return hydra_compose("config", overrides=list(overrides))

    return composed


@pytest.fixture(scope="session")
def digits_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small digits network after four epochs in float: good enough for quantization to be seen."""
    from torch.nn.functional import cross_entropy

    from qexp.data.digits import Digits
    from qexp.models.digits_cnn import DigitsCNN
    from qexp.models.weights import save_weights

    torch.manual_seed(0)
    model, data = DigitsCNN(width=8), Digits()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for epoch in range(4):
        loader = data.train_dataloader()
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_weights(model.eval(), path)
    return path


@pytest.fixture
def digits(digits_weights: Path) -> list[str]:
    """Overrides of a run on the small trained digits network, quiet and on the CPU."""
    return [
        f"weights={digits_weights}",
        "model.net.width=8",
        "trainer=cpu",
        "trainer.enable_progress_bar=false",
        "kernels=reference",
        "max_samples=200",
        "n_calibrate=64",
    ]


@pytest.fixture
def run(compose: Callable[..., DictConfig], digits: list[str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Call with overrides; runs one point on the digits under `tmp_path / "runs"` and returns its metrics."""
    from qexp.run import pipeline

    def one(*overrides: str) -> dict[str, Any]:
        return pipeline.run(read(compose(*digits, f"runs_dir={tmp_path / 'runs'}", *overrides)))

    return one


@pytest.fixture(scope="session")
def digit_images() -> Tensor:
    """64 real digits, normalised, `[64, 1, 8, 8]`."""
    from qexp.data.digits import Digits

    return torch.cat(Digits().calibration_batches(64, 64, seed=0))


@pytest.fixture
def residual() -> Residual:
    """A traceable network with conv-BN-ReLU, depthwise and grouped convolutions, an Add and a classifier."""
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture
def mixed() -> Mixed:
    """Every other layer type that can carry quantizers, a Concat and a layer used twice."""
    torch.manual_seed(0)
    return Mixed().eval()
