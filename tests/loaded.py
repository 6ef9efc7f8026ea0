"""What a network made of some images when a run evaluated it, to be compared with the network that is loaded back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qexp.layers.swap import baked_weights
from qexp.run import training


def evaluated(patched: pytest.MonkeyPatch, images: Tensor, run: Callable[[], dict[str, Any]]) -> tuple[dict, Tensor]:
    """Returns the metrics of a run, and its quantized network's outputs on the images as it was evaluated."""
    seen, evaluate = {}, training.evaluate

    def watching(model, data, settings, phase, *rest):
        if phase != "float":
            with torch.no_grad(), baked_weights(model):
                seen["outputs"] = model.eval()(images)
        return evaluate(model, data, settings, phase, *rest)

    with patched.context() as inside:
        inside.setattr(training, "evaluate", watching)
        metrics = run()
    assert metrics["status"] == "ok", metrics["error"]
    return metrics, seen["outputs"]
