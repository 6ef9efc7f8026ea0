"""The 700 real images: the public weights come out at their known accuracies, to the image."""

import os
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from qexp.models.weights import load_weights

pytestmark = [pytest.mark.data, pytest.mark.slow]

KNOWN = {  # right among the first one and five of 700
    "squeezenet1_1": ("imagenet_squeezenet1_1.pt", 424, 574),
    "mobilenet_v2": ("imagenet_mobilenet_v2_int8grid.npz", 579, 664),
}


@pytest.fixture
def hits(compose, tmp_path):
    """Call with a network's name and overrides; returns how many images are right among the first one and five, and the data."""

    @torch.no_grad()
    def count(model: str, *overrides: str):
        folder = Path(os.environ["QEXP_DATA_DIR"])
        if not (folder / "imagenet_sample").is_dir():
            pytest.skip("no imagenet_sample there")
        cfg = compose(f"model={model}", "dataset=imagenet_sample", f"dataset.data.pack_dir={tmp_path}", *overrides)
        data = instantiate(cfg.dataset.data, calibration_size=0)
        net = instantiate(cfg.model.net).eval()
        load_weights(net, folder / "weights" / KNOWN[model][0])
        found = [
            net(x).topk(5).indices.eq(y[:, None]).cumsum(1)[:, [0, 4]].clamp(max=1).sum(0)
            for x, y in data.test_dataloader()
        ]
        return torch.stack(found).sum(0).tolist(), data

    return count


@pytest.mark.parametrize("model", KNOWN)
def test_public_weights_reach_their_accuracy_to_the_image(hits, model):
    found, data = hits(model)
    assert found == list(KNOWN[model][1:])
    assert data.notes()["n_skipped"] == 0 and len(data.test_part) == 700


def test_planes_in_the_wrong_order_cost_accuracy(hits):
    right, _ = hits("squeezenet1_1", "max_samples=200")
    wrong, _ = hits("squeezenet1_1", "max_samples=200", "dataset.data.channel_order=bgr")
    assert wrong[0] < right[0] - 10
