"""Every recipe of the shelf: it lowers to integers that compute the same, or the error names the tensor and the reason."""

from __future__ import annotations

import re

import pytest
import torch

from qexp.calibration.calibrate import calibrate
from qexp.command.folders import CONF
from qexp.command.listing import offered
from qexp.errors import QexpError
from qexp.integer.lowering import lower
from qexp.integer.verify import verify
from qexp.models.digits_cnn import DigitsCNN
from qexp.network.facts import facts
from qexp.passes.fold_bn import fold_bn
from qexp.recipe import apply, resolve
from qexp.run import pipeline
from qexp.run.settings import read
from tests.shelf import own

RECIPES = offered([CONF], "quant")
OTHER_NETWORKS = ("placed/toynet", "placed/mobilenetv2")  # rules that name layers this network lacks
NARROW = {"apot": "bits=w4a4", "exponential": "bits=w4a4", "inq": "bits=w4a8", "inq_shift": "bits=w4a8"}
KEEPS_NORMS = {"mpact_integer_bn", "inq_shift"}
QUICK = ("minmax", "fixed_point", "caq_winograd", "mpact_integer_bn", "fixed_point_per_op")  # the rest is marked slow
SHELF = [
    pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in RECIPES if not n.startswith(OTHER_NETWORKS)
]
REASONS = (  # and who may give it
    (
        "aciq/|cnn_quantization|caq_simple|kmeans|midtread",
        "channels have different scales|channels have different widths",
    ),
    ("exponential|playground|tanh|log|apot", "not evenly spaced|no code for zero"),
    ("lsq_plus", "LSQPlus has no code for zero"),
    ("adabin", "no code for zero"),
    ("xnor", "scales its sums by real numbers|no code for zero|not evenly spaced"),
)


@pytest.mark.parametrize("name", SHELF)
def test_recipes_become_integers_or_say_why_not(name, compose, digit_images):
    bits = (NARROW[name],) if name in NARROW else own(name, 8)
    cfg = read(compose(f"quant={name}", "schedule=ptq", "deploy=integer", *bits))
    torch.manual_seed(0)
    model, images = DigitsCNN(width=4).eval(), digit_images[:32]
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.bias, -0.3, 0.3)
    structure = facts(model, images[:1])
    if name not in KEEPS_NORMS:
        fold_bn(model, structure)
        structure = facts(model, images[:1])
    plan = resolve(model, structure, pipeline.recipe(cfg))
    apply(model, plan, structure)
    calibrate(model, [images], progress=False)
    try:
        lowered = lower(model, images[:1])
    except QexpError as error:
        assert re.search(r"^[\w.]+: cannot be lowered to integers: .*; .+", str(error)), error
        reasons = [reason for who, reason in REASONS if re.search(who, name)]
        assert any(re.search(reason, str(error)) for reason in reasons), (
            f"{name} was expected to become integers: {error}"
        )
        return
    verdict = verify(model, lowered, [(images, None)], progress=False)
    assert verdict.equal, verdict.line()
    assert verdict.share < 6, "what few codes differ from real scales"
