"""One tensor at a time: the shelf sets the requested quantizer, and a replay equals a full run."""

import pytest
import torch

from qexp.calibration.calibrate import calibrate, fit
from qexp.errors import QexpError
from qexp.layers.quantized import quantizers
from qexp.layers.swap import evaluating, quantizers_off
from qexp.network.facts import facts
from qexp.recipe import Recipe, apply, resolve
from qexp.search.quantizers_by_width import QuantizersByWidth
from qexp.search.replay import Replay, bytes_an_image
from qexp.search.sensitivity import Comparison, ranked, sensitivity
from qexp.tasks.classification import Classification

UNIFORM = {"_target_": "qexp.quantizers.uniform.Uniform", "range": {"_target_": "qexp.ranges.MinMax"}}


def shelved(model, images, widths=(2, 4, 8), **recipe):
    found = facts(model, images[:1])
    plan = resolve(model, found, Recipe(sites={"input": UNIFORM, "weight": UNIFORM}, wbit=4, abit=4, **recipe))
    apply(model, plan, found)
    seen = calibrate(model, [images], progress=False)
    return QuantizersByWidth(model, plan, found, widths, lambda: fit(model, seen)), found


@pytest.fixture
def images():
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("network", ["residual", "mixed"])
def test_a_replay_is_the_full_run(network, images, request):
    model = request.getfixturevalue(network)
    shelf, found = shelved(model, images)
    replay = Replay(model, found)
    with evaluating(model):
        shelf.nothing()
        replay.first(images)
        for key in shelf.keys:
            shelf.alone(key, 2)
            assert torch.equal(replay.again(images, key[0]), model(images)), key


@torch.no_grad()
def test_a_replay_skips_what_lies_before(residual, images):
    shelf, found = shelved(residual, images)
    replay, ran = Replay(residual, found), []
    shelf.nothing()
    replay.first(images)
    inner = residual.stem._conv_forward
    residual.stem._conv_forward = lambda *args: (ran.append("stem"), inner(*args))[1]
    shelf.alone(("conv", "weight"), 2)
    replay.again(images, "conv")
    assert not ran
    replay.again(images, "stem")
    assert ran == ["stem"]
    assert "forward" not in residual.stem.__dict__


@torch.no_grad()
def test_alone_quantizes_one_tensor(residual, images):
    shelf, _ = shelved(residual, images)
    with evaluating(residual), quantizers_off(residual):
        target = residual(images)
    with evaluating(residual):
        shelf.nothing()
        assert torch.equal(residual(images), target)
        shelf.alone(("fc", "input"), 2)
        sites = [(name, site) for name, site, _ in quantizers(residual) if residual.get_submodule(name).enabled]
        assert sites == [("fc", "input")]
        assert not torch.equal(residual(images), target)
        shelf.restore()
        shelf.close()


@torch.no_grad()
def test_what_is_taken_is_what_a_plan_gives(residual, images):
    """The network with chosen widths computes what one that was built with these widths computes."""
    from copy import deepcopy

    other = deepcopy(residual)
    shelf, _ = shelved(residual, images)
    choice = {key: 2 if i % 2 else 8 for i, key in enumerate(shelf.keys)}
    with evaluating(residual):
        shelf.take(choice)
        got = residual(images)
    found = facts(other, images[:1])
    apply(other, shelf.plan_of(choice, "search"), found)
    calibrate(other, [images], progress=False)
    with evaluating(other):
        assert torch.equal(got, other(images))


def test_sensitivities_are_those_of_plain_evaluations(residual, images):
    shelf, found = shelved(residual, images)
    labels, task = torch.arange(6) % 5, Classification(residual, 5)
    memory = 2 * bytes_an_image(found) / 2**20  # two images at a time
    table = sensitivity(shelf, found, [(images, labels)], memory_mb=memory, progress=False, judge=task)
    assert len(table) == 3 * len(shelf.keys)
    with torch.no_grad(), evaluating(residual), quantizers_off(residual):
        target = residual(images)
    for row in table.itertuples():
        with torch.no_grad(), evaluating(residual):
            shelf.alone((row.layer, row.site), row.bits)
            score = Comparison(task)
            score.add(residual(images), target, labels)
        assert row.divergence == pytest.approx(score.row()["divergence"], rel=1e-4, abs=1e-9)
        assert row.value == score.row()["value"] and row.agree == score.row()["agree"]
    at = table.groupby("bits").divergence.sum()
    assert at[2] > at[4] > at[8] > 0
    assert ranked(table).divergence.is_monotonic_decreasing


def test_what_a_rule_settled_or_sites_share_is_not_searched(residual, images):
    rules = {"ends": {"layers": "@ends", "input": {"bits": 8}, "weight": {"bits": 8}}}
    shelf, _ = shelved(residual, images, rules=rules)
    assert {layer for layer, _ in shelf.keys} == {"depthwise", "grouped", "conv"}


@pytest.mark.parametrize("widths", [(), (0, 4), (4, 17)])
def test_widths_are_checked(residual, images, widths):
    with pytest.raises(QexpError, match=r"search\.widths"):
        shelved(residual, images, widths=widths)
