"""Passes over exponents: residual groups share a vector, refinement moves what errs most and keeps what gains."""

import pytest
import torch

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.models.cifar_resnet import CifarResNet
from qexp.network.facts import facts
from qexp.network.quantizer_before import arriving
from qexp.numerics import PerChannel
from qexp.passes import refine_exponents
from qexp.passes.base import PassContext
from qexp.passes.fold_bn import fold_bn
from qexp.passes.refine_exponents import RefineExponents
from qexp.passes.shared_exponents import SharedExponents, residual_groups, share
from qexp.quantizers.caq import CAQShift
from qexp.recipe import Recipe, apply, resolve
from qexp.statistics.stats import TensorStats
from qexp.tasks.classification import Classification

SPEC = {"_target_": "qexp.quantizers.caq.CAQShift", "granularity": "channel"}


def quantized(model, images, bits=8):
    """Returns the model with exponents on every result and on what is added, and its facts; batch norm folded."""
    model.eval()
    fold_bn(model, facts(model, images[:1]))
    structure = facts(model, images[:1])
    spec = SPEC | {"bits": bits}
    rules = {"adds": {"types": ["Add"], "input": spec, "output": spec}}
    recipe = Recipe({"input": SPEC, "weight": None, "output": SPEC}, rules, abit=bits)
    apply(model, resolve(model, structure, recipe), structure)
    calibrate(model, [images], progress=False)
    return model, structure


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    return CifarResNet(depth=14)


def test_each_stage_of_a_residual_network_is_one_group(resnet, images):
    model, structure = quantized(resnet, images)
    groups = residual_groups(model, structure)
    assert [g[0].scale.numel() for g in groups] == [16, 32, 64]
    names = [{q.name for q in g} for g in groups]
    assert names[0] == {"conv1 (output)"} | {f"layer1.{i}.{n} (output)" for i in (0, 1) for n in ("conv2", "add")}
    assert "layer2.0.add (input.1)" in names[1], (
        "the padded shortcut arrives on another grid and gets its own quantizer"
    )
    assert {id(q) for g in groups for q in g}.isdisjoint({id(model.linear.output_quantizer)})


@pytest.mark.parametrize("take", ["min", "last"])
def test_groups_share_one_vector(resnet, images, take):
    model, structure = quantized(resnet, images)
    before = [[q.exponents for q in g] for g in residual_groups(model, structure)]
    context = PassContext(structure, [images], {})
    SharedExponents(take).on_fitted(model, context)
    for group, old in zip(residual_groups(model, structure), before):
        asked = torch.stack([torch.where(q.counted, e, 99) for q, e in zip(group, old)]).amin(0)
        wanted = asked.where(asked < 99, 0) if take == "min" else old[-1]
        assert all(torch.equal(q.exponents, wanted) for q in group)
    assert context.findings["shared_exponents"] == 3


def test_channels_that_a_shortcut_pads_with_zeros_do_not_coarsen_the_sum(resnet, images):
    model, _ = quantized(resnet, images)
    padded, branch = model.layer2[0].add.site("input.1"), model.layer2[0].conv2.output_quantizer
    assert padded.counted.tolist() == [False] * 8 + [True] * 16 + [False] * 8
    branch.set_exponents(torch.full((32,), 4))
    share([padded, branch])
    assert branch.exponents[~padded.counted].tolist() == [4] * 16


def test_a_clip_to_the_mean_of_the_maxima_outlives_other_exponents():
    def fitted(scale: float) -> CAQShift:
        x = scale * torch.tensor([0.1, 0.2, 0.9, 0.4]).reshape(1, 1, 2, 2)
        seen = TensorStats.of(x, PerChannel(1))
        seen.extra = {"max_map": x.abs().amax(0)}
        q = CAQShift(8, (1, 1, 2, 2), granularity=PerChannel(1), exponent_mean="activation_mean")
        q.fit(seen)
        return q

    fine, coarse = fitted(1), fitted(16)  # clipped at 0.4 and at 6.4, exponents 8 and 4
    loud = torch.tensor([-0.9, -0.3, 0.3, 0.9]).reshape(4, 1, 1, 1)
    assert fine.codes(loud).flatten().tolist() == [-102, -77, 77, 102]
    share([fine, coarse])
    assert fine.exponents.tolist() == coarse.exponents.tolist() == [4]
    assert fine(loud).flatten().tolist() == [-0.375, -0.3125, 0.3125, 0.375], "round(0.4 * 16) is code 6"
    assert coarse(loud * 16).flatten().tolist() == [-6.375, -4.8125, 4.8125, 6.375]
    fine.set_exponents(torch.tensor([8]))
    assert fine.codes(loud).flatten().tolist() == [-102, -77, 77, 102], "nothing was lost on the way"
    fine.set_exponents(torch.tensor([10]))  # as `take: last` may: the width ends before the clip
    assert fine.codes(loud).flatten().tolist() == [-128, -128, 127, 127]
    again = CAQShift(8, (1, 1, 2, 2), granularity=PerChannel(1), exponent_mean="activation_mean")
    again.load_state_dict(coarse.state_dict())
    assert torch.equal(again(loud * 16), coarse(loud * 16))


def test_an_add_of_shared_exponents_is_an_integer_add(resnet, images):
    model, structure = quantized(resnet, images)
    SharedExponents().on_fitted(model, PassContext(structure, [images], {}))
    add, seen = model.layer1[0].add, {}
    add.register_forward_hook(lambda _, args, y: seen.update(a=args[0], b=args[1], y=y))
    model(images)
    q = add.output_quantizer
    a, b = (t / q.scale for t in (seen["a"], seen["b"]))
    assert torch.equal(a, a.round()) and torch.equal(b, b.round())
    assert torch.equal(seen["y"] / q.scale, (a + b).clamp(*q.limits))


def test_where_a_tensor_was_quantized(resnet, images):
    model, structure = quantized(resnet, images)
    assert arriving(model, structure, "conv1").name == "conv1 (input)"
    assert arriving(model, structure, "layer1.0.conv2").name == "layer1.0.conv1 (output)"
    assert arriving(model, structure, "layer1.1.conv1").name == "layer1.0.add (output)"
    assert arriving(model, structure, "layer1.0.add", 1).name == "conv1 (output)"


def varied(seed: int = 1) -> torch.Tensor:
    """Returns images that a random network does not decide all alike."""
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(96, 3, 1, 1, generator=g) + torch.randn(96, 3, 8, 8, generator=g)


@pytest.mark.parametrize("off", [6, -3], ids=["saturating", "too coarse"])
def test_refinement_gains(residual, images, off):
    many = varied()
    model, structure = quantized(residual, many, bits=5)
    for q in (model.conv.output_quantizer, model.depthwise.output_quantizer):
        q.set_exponents(q.exponents + off)

    def agreement(seed: int) -> float:
        context = PassContext(structure, [varied(seed)], {}, judge=Classification(model, 5))
        RefineExponents(max_iters=0).on_fitted(model, context)
        return context.findings["refine_agreement"]

    before, unseen = agreement(1), agreement(2)
    context = PassContext(structure, [many], {}, judge=Classification(model, 5))
    RefineExponents(tolerance=0.0, max_iters=40).on_fitted(model, context)
    gain = agreement(1) - before
    assert gain == pytest.approx(context.findings["refine_gain"]) and gain >= 5 and context.findings["refine_kept"] >= 2
    assert agreement(1) == context.findings["refine_agreement"], "the network ends in the best state"
    assert agreement(2) > unseen, "images it has not seen gain too"


def test_refinement_of_what_calibration_found_gains_too(residual, images):
    """Where nothing saturates only finer exponents help; what does not help is undone."""
    many = varied()
    model, structure = quantized(residual, many, bits=3)
    SharedExponents().on_fitted(model, PassContext(structure, [many], {}))
    groups = residual_groups(model, structure)
    context = PassContext(structure, [many], {}, judge=Classification(model, 5))
    RefineExponents(tolerance=0.0, max_iters=60).on_fitted(model, context)
    assert context.findings["refine_gain"] > 0, context.findings
    assert all(torch.equal(q.exponents, group[0].exponents) for group in groups for q in group)


def test_refinement_stops_at_once_where_nothing_is_missing(residual, images):
    model, structure = quantized(residual, images, bits=16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    context = PassContext(structure, [images], {}, judge=Classification(model, 5))
    RefineExponents().on_fitted(model, context)
    assert context.findings["refine_rounds"] == 0 and context.findings["refine_agreement"] >= 99
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_refinement_looks_at_what_a_relu_lets_through(residual, images):
    model, structure = quantized(residual, images)
    assert "stem" in structure.followed_by_relu
    q, context = model.stem.output_quantizer, PassContext(structure, [images], {})
    before_relu = refine_exponents._before_relu(model, context)
    assert id(q) in before_relu and id(model.stem.input_quantizer) not in before_relu
    wanted = refine_exponents._scores(model, [images])
    model.stem.bias -= 100  # what saturates is negative
    (error,), _ = refine_exponents._errors(model, [[q]], PassContext(None, [images], {}), wanted, before_relu)
    (all_of_it,), _ = refine_exponents._errors(model, [[q]], PassContext(None, [images], {}), wanted, set())
    assert error == 0 and all_of_it > 50


def test_bad_options_are_refused():
    with pytest.raises(QexpError, match="allowed are"):
        SharedExponents(take="max")
    with pytest.raises(QexpError, match="allowed are"):
        RefineExponents(layers_per_iter=0)
