"""The 700 real images: the public weights come out at their known accuracies, to the image."""

import os
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from qexp.weights import load_weights

pytestmark = [pytest.mark.data, pytest.mark.slow]

KNOWN = {  # right among the first one and five of 700
    "squeezenet1_1": ("imagenet_squeezenet1_1.pt", 424, 574),
    "mobilenet_v2": ("imagenet_mobilenet_v2_int8grid.npz", 579, 664),
}


@pytest.mark.parametrize("model", KNOWN)
@torch.no_grad()
def test_public_weights_reach_their_accuracy_to_the_image(compose, model, tmp_path):
    file, top1, top5 = KNOWN[model]
    folder = Path(os.environ["QEXP_DATA_DIR"])
    if not (folder / "imagenet_sample").is_dir():
        pytest.skip("no imagenet_sample there")
    cfg = compose(f"model={model}", "dataset=imagenet_sample", f"dataset.data.pack_dir={tmp_path}")
    data = instantiate(cfg.dataset.data, calibration_size=0)
    net = instantiate(cfg.model.net).eval()
    load_weights(net, folder / "weights" / file)
    hits = [
        net(x).topk(5).indices.eq(y[:, None]).cumsum(1)[:, [0, 4]].clamp(max=1).sum(0)
        for x, y in data.test_dataloader()
    ]
    assert torch.stack(hits).sum(0).tolist() == [top1, top5]
    assert data.notes()["n_skipped"] == 0 and len(data.test_part) == 700
