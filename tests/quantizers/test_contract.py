"""The contract of every quantizer of `conf/quant`, on many kinds of tensors; the test finds a new YAML file by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pydoc import locate

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qexp.command.contracts.quantizer import EXPLAINED, broken_promises, lost_state, wrong_gradients, wrong_values
from qexp.command.listing import offered
from qexp.command.root import register
from qexp.errors import QexpError
from qexp.quantizers.base import Quantizer
from qexp.statistics.stats import NonFinite
from tests.strategies import KINDS, tensors, values

CONF = Path(__file__).parents[2] / "conf"
SITES = ("input", "weight", "bias", "output")
ELSEWHERE = {"qexp.quantizers.dorefa_gradient.DoReFaGradient"}  # sits on gradients: test_dorefa_gradient.py


def recipes() -> dict[str, tuple[str, dict]]:
    """Every distinct (site, spec) that a file of `conf/quant` names, for its sites and in its rules."""
    found: dict[str, tuple[str, dict]] = {}
    seen: set[str] = set()
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for choice in offered([CONF], "quant"):
            quant = OmegaConf.to_container(compose("config", overrides=[f"quant={choice}"]).quant, resolve=False)
            parts = {"": quant} | {f"{name}.": rule or {} for name, rule in (quant.get("rules") or {}).items()}
            for prefix, part in parts.items():
                for site in SITES:
                    if isinstance(part.get(site), str):
                        continue  # a reference to another tensor's quantizer, tried there
                    spec = dict(part.get(site) or {})
                    spec.pop("bits", None)
                    key = json.dumps([site, spec], sort_keys=True)
                    if "_target_" in spec and key not in seen:
                        seen.add(key)
                        found[f"{choice}-{prefix}{site}"] = (site, spec)
    return found


RECIPES = recipes()
every = pytest.mark.parametrize(("site", "spec"), RECIPES.values(), ids=RECIPES)
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_every_quantizer_that_a_file_names_is_tried():
    text = [line.split("#")[0] for file in (CONF / "quant").rglob("*.yaml") for line in file.read_text().splitlines()]
    named = {name for line in text for name in re.findall(r"qexp\.quantizers\.[\w.]+", line)}
    assert {spec["_target_"] for _, spec in RECIPES.values()} == named - ELSEWHERE and named >= ELSEWHERE


def width(spec: dict, bits: int) -> int:
    """Returns the width nearest to `bits` that the method is made for (a binary method has one)."""
    low, high = locate(spec["_target_"]).bits_allowed
    return min(max(bits, low), high)


def widths(spec: dict, least: int = 2) -> st.SearchStrategy[int]:
    return st.integers(width(spec, least), width(spec, 8))


def make(fitted, spec: dict, bits: int, x: torch.Tensor, site: str, **changes) -> Quantizer | None:
    """Returns the fitted quantizer, or None where the method refuses this width and names the allowed ones."""
    try:
        return fitted(spec, bits, x, site, **changes)
    except QexpError as error:
        assert bits < 2 or bits != width(spec, bits), error
        assert "bits" in str(error) and "allowed" in str(error), error
        return None


def rows(quantizer: Quantizer, x: torch.Tensor) -> torch.Tensor:
    return quantizer.granularity.rows(x.detach())


@every
@few
@given(data=st.data())
def test_shape_dtype_codes_and_levels(site, spec, fitted, data):
    x = data.draw(tensors(site))
    bits = data.draw(widths(spec, 1))
    q = make(fitted, spec, bits, x, site)
    if q is None:
        return
    assert not list(wrong_values(q, x))


@every
@few
@given(data=st.data())
def test_declared_properties_hold(site, spec, fitted, data):
    x = data.draw(tensors(site))
    q = fitted(spec, data.draw(widths(spec)), x, site)
    assert not list(broken_promises(q, x))


@every
def test_undeclared_properties_are_explained(site, spec, fitted):
    q = fitted(spec, width(spec, 4), values("normal", (2, 3, 4, 4) if site != "bias" else (6,), 0), site)
    text = " ".join(type(q).__doc__.split()).lower()
    for name, word in EXPLAINED.items():
        assert name in q.properties or word in text, f"{type(q).__name__} does not promise {name} and says not why"


@every
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_a_dense_ramp_reaches_all_documented_levels(site, spec, bits, low, fitted):
    n = 100 * 2**bits + 1
    halvings = torch.logspace(0, -63, 127, base=2)  # levels that crowd around zero

    def ramp(first: float, last: float) -> torch.Tensor:
        near_zero = torch.cat([halvings * last, halvings * (first if first < 0 else last), torch.zeros(1)])
        line = torch.cat([torch.linspace(first, last, n), near_zero]).sort().values
        m = len(line)
        return line if site == "bias" else line.repeat(2).reshape((2, m, 1, 1) if site == "weight" else (1, 2, m, 1))

    q = make(fitted, spec, bits, ramp(low, 1.0), site)
    if q is None:
        return
    ends = (torch.tensor(q.limits) - q.zero_point.max()) * q.scale.detach().max()
    reach = 1.1 * max(1.0, float(ends.abs().max()))
    far = ramp(-reach, reach)
    q.on_optimizer_step(far if site == "weight" else None)  # a method with memory reads the current weights
    assert {len(row.unique()) for row in rows(q, q(far))} == {q.levels}
    assert q.describe()["levels"] == q.levels and q.levels - 2**bits in q.level_counts


@every
@few
@given(data=st.data())
def test_state_copies_and_pickles_are_exact_and_independent(site, spec, build, fitted, data):
    x = data.draw(tensors(site))
    bits = data.draw(widths(spec))
    assert not list(lost_state(fitted(spec, bits, x, site), build(spec, bits, x, site), x))


@every
def test_low_precision_and_layouts_give_the_same_codes(site, spec, fitted):
    if site == "bias":
        pytest.skip("a bias has one dimension")
    x = values("laplace", (4, 6, 5, 5), 3)
    q = fitted(spec, width(spec, 4), x, site)
    y, codes = q(x), q.codes(x)
    for same in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(q(same), y) and torch.equal(q.codes(same), codes)
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        assert q(low).dtype == dtype
        assert torch.equal(q.codes(low), q.codes(low.float())), "codes are computed in float32"
        assert torch.equal(q(low), q.dequantize(q.codes(low)).to(dtype))


@every
def test_autocast_changes_neither_codes_nor_scales_nor_gradients(site, spec, fitted):
    """In `trainer.precision=bf16-mixed` convolutions run in bfloat16; a quantizer computes as without it."""
    x = values("laplace", (4, 6, 5, 5) if site != "bias" else (60,), 3)

    def seen(given: torch.Tensor, dtype: torch.dtype | None) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            q = fitted(spec, width(spec, 4), x, site)
            q.train()
            leaf = given.clone().requires_grad_()
            y = q(leaf)
            assert y.dtype == given.dtype
            codes = q.codes(given)
        (y.float() * torch.linspace(-1, 1, x.numel()).reshape(x.shape)).sum().backward()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            q.on_optimizer_step(x if site == "weight" else None)
        state = [*q.parameters(), *(b for b in q.buffers() if b.is_floating_point())]
        assert all(t.dtype in (torch.float32, torch.float64) for t in state), "scales and statistics are never narrower"
        grads = [p.grad for p in q.parameters() if p.requires_grad]
        assert all(g is not None and g.dtype == torch.float32 for g in grads)
        return (y.detach(), codes, leaf.grad, *state, *grads)

    for tensor_in in (x, x.bfloat16()):
        for one, two in zip(seen(tensor_in, torch.bfloat16), seen(tensor_in, None), strict=True):
            assert torch.equal(one, two)


@every
@few
@given(data=st.data())
def test_gradients_are_finite(site, spec, fitted, data):
    x = data.draw(tensors(site))
    assert not list(wrong_gradients(fitted(spec, data.draw(widths(spec)), x, site), x))


@every
def test_use_before_calibration_is_refused(site, spec, build):
    x = values("normal", (2, 3, 4, 4) if site != "bias" else (6,), 0)
    q = build(spec, width(spec, 4), x, site)
    if "needs_calibration" not in q.properties:
        q(x)
        return
    q.name = "layer1.conv (input)"
    for use in (q, q.codes):
        with pytest.raises(QexpError, match=r"layer1.conv \(input\): used before calibration"):
            use(x)


@every
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_the_statistics_is_refused(site, spec, fitted, bad):
    x = values("normal", (2, 3, 4, 4) if site != "bias" else (6,), 0)
    x.view(-1)[1] = bad
    with pytest.raises(NonFinite, match="NaN or infinite"):
        fitted(spec, width(spec, 4), x, site)


@every
def test_widths_outside_the_range_are_refused(site, spec, build):
    x = values("normal", (2, 3, 4, 4) if site != "bias" else (6,), 0)
    for bits in (0, 17, 2.5, True):
        with pytest.raises(QexpError, match=r"bits=.*allowed are"):
            build(spec, bits, x, site)


@pytest.mark.parametrize("kind", KINDS)
def test_the_strategies_make_what_they_say(kind):
    x = values(kind, (2, 3, 4, 4), 1)
    assert x.dtype == torch.float32 and torch.isfinite(x).all()
    assert torch.equal(x, values(kind, (2, 3, 4, 4), 1))
