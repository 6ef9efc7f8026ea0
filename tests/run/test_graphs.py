"""Runs of networks whose graph is not a chain of modules: each run names what it loses and computes correct results."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qexp.models.digits_cnn import DigitsCNN
from qexp.run import outcome


class Deciding(DigitsCNN):
    """Which calls are made depends on the images."""

    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else super().forward(x * 1.0)


class Blurred(DigitsCNN):
    """A fixed filter before the network."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.register_buffer("filter", torch.full((1, 1, 3, 3), 1 / 9), persistent=False)

    def forward(self, x):
        return super().forward(nn.functional.conv2d(x, self.filter, padding=1))


def test_a_network_without_a_graph_is_quantized_layer_by_layer(run, caplog):
    metrics = run("study=s", "bits=w8a8", f"model.net._target_={__name__}.Deciding")
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["quantized_macs"] == 100 and abs(metrics["drop"]) <= 2
    assert "Deciding has no graph (the calls depend on the images" in caplog.text
    assert "quantized layer by layer, without what needs a graph: folding of batch norms" in caplog.text


@pytest.mark.parametrize("bn", ["fold", "keep"])
def test_products_that_stay_in_float_stand_beside_the_widths(run, caplog, bn):
    metrics = run("study=s", "bits=w8a8", f"bn={bn}", f"model.net._target_={__name__}.Blurred")
    assert metrics["status"] == "ok", metrics["error"]
    outside = 64 * 9
    assert metrics["quantized_macs"] == pytest.approx(100 * (1 - outside / metrics["macs"]), abs=1e-3)
    assert metrics["bops"] == 64 * (metrics["macs"] - outside) + 1024 * outside
    assert "of the products are quantized, in float stay Blurred (conv2d)" in caplog.text
    assert "Blurred (conv2d)" in metrics["left_float"]
    assert outcome.line(metrics).endswith("% of the products are quantized")
