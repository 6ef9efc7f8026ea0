"""Batch norms measured again: their statistics are those of the quantized network, and nothing else has changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.layers.swap import quantizers_off
from qexp.network.facts import facts
from qexp.passes.base import PassContext
from qexp.passes.bn_reestimate import BnReestimate
from qexp.recipe import Recipe, apply, resolve

UNIFORM = {"_target_": "qexp.quantizers.uniform.Uniform", "granularity": "tensor"}


def network() -> tuple[nn.Sequential, PassContext]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6),
    ).eval()
    images = [torch.randn(16, 3, 10, 10) for _ in range(3)]
    structure = facts(model, images[0][:1])
    apply(
        model, resolve(model, structure, Recipe(sites={"input": UNIFORM, "weight": UNIFORM}, wbit=2, abit=8)), structure
    )
    calibrate(model, images, progress=False)
    return model, PassContext(structure, images, {}, progress=False)


def met(model: nn.Sequential, context: PassContext, at: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and variance, by channel, of what a batch norm meets."""
    seen = {}
    handle = model[at].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    with torch.no_grad():
        model(torch.cat(context.images))
    handle.remove()
    return seen["x"].mean((0, 2, 3)), seen["x"].var((0, 2, 3))


def test_statistics_move_by_what_quantization_moved_them():
    model, context = network()
    nn.init.uniform_(model[1].running_mean, -3, 3)  # of a training on other images
    nn.init.uniform_(model[1].running_var, 0.5, 3)
    mean, var = model[1].running_mean.clone(), model[1].running_var.clone()
    with quantizers_off(model):
        mean_f, var_f = met(model, context, 1)
    mean_q, var_q = met(model, context, 1)
    BnReestimate(batch=48).on_fitted(model, context)
    torch.testing.assert_close(model[1].running_mean, mean + mean_q - mean_f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[1].running_var, var * var_q / var_f, rtol=1e-4, atol=1e-4)


def test_without_quantization_nothing_moves():
    model, context = network()
    nn.init.uniform_(model[1].running_mean, -3, 3)
    mean, var = model[1].running_mean.clone(), model[1].running_var.clone()
    with quantizers_off(model):
        BnReestimate().on_fitted(model, context)
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, var, rtol=1e-5, atol=1e-5)


def test_statistics_can_be_those_of_the_quantized_network():
    model, context = network()
    weights = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k and "tracked" not in k}
    modes = [m.training for m in model.modules()]
    BnReestimate(batch=48, relative=False).on_fitted(model, context)
    assert [m.training for m in model.modules()] == modes
    mean, var = met(model, context, 1)
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, var, rtol=1e-4, atol=1e-5)
    assert context.findings["reestimated_norms"] == 2 and context.findings["largest_norm_shift"] > 0.1
    assert all(m.momentum == 0.1 for m in model if isinstance(m, nn.BatchNorm2d))
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in weights.items())


def test_batches_are_averaged_alike_and_a_second_time_changes_nothing():
    model, context = network()
    edit = BnReestimate(batch=16, relative=False, after_training=True)
    edit.on_fitted(model, context)
    first = model[1].running_mean.clone()
    assert int(model[1].num_batches_tracked) == 3
    edit.on_trained(model, context)
    assert torch.equal(model[1].running_mean, first)
    model[1].running_mean.zero_()
    BnReestimate(batch=16).on_trained(model, context)
    assert not model[1].running_mean.any(), "a training's own statistics stay by default"


def test_what_has_no_batch_norm_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    context = PassContext(facts(model, torch.ones(1, 3, 4, 4)), [torch.ones(2, 3, 4, 4)], {})
    with pytest.raises(QexpError, match="run with bn=keep"):
        BnReestimate().on_fitted(model, context)
    with pytest.raises(QexpError, match="use 2 or more"):
        BnReestimate(batch=1)
    model, context = network()
    context.images = [torch.ones(1, 3, 10, 10)]
    with pytest.raises(QexpError, match="at least 2 calibration images"):
        BnReestimate().on_fitted(model, context)


def test_a_run_says_which_passes_ran(run):
    metrics = run("quant=mse", "bits=w4a4", "bn=keep", "passes=[bn_reestimate,bias_correction]", "study=s")
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["passes"] == "bn_reestimate + bias_correction"
    assert metrics["quant"] == "mse + bn_reestimate + bias_correction"
    norms = metrics["reestimated_norms"]
    assert norms > 0 and metrics["corrected_biases"] == 5 - norms, (
        "what a batch norm has corrected is not corrected twice"
    )
    plain = run("quant=mse", "bits=w4a4", "bn=keep", "study=s")
    assert plain["passes"] == "" and plain["quant"] == "mse"
