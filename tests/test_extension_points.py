"""Each door of the house, tried in a few lines: what attaches later must fit without moving a wall."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qexp.calibration.calibrate import calibrate
from qexp.layers import Quantized, check_all_ran, quantizers
from qexp.layers.quantized import QuantConv2d, QuantLinear
from qexp.models.digits_cnn import DigitsCNN
from qexp.network.facts import facts
from qexp.passes.base import Pass, PassContext
from qexp.quantizers.uniform import Uniform
from qexp.recipe import Recipe, apply, resolve

UNIFORM = {"_target_": "qexp.quantizers.uniform.Uniform", "granularity": "tensor"}


class EachProductRounded(QuantLinear):
    """A linear layer whose products are rounded to sixteenths before they are summed."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.round(x[:, None] * weight * 16).sum(-1) / 16 + bias


class InFourTiles(QuantConv2d):
    """A convolution computed on four tiles of its input, from codes, as a transformed domain would be."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:  # the float network, while statistics are taken
            return super().forward(x)
        codes = self.input_quantizer.codes(x)
        assert not codes.is_floating_point() or torch.equal(codes, codes.round())
        return super().forward(x)


EACH_PRODUCT = {nn.Linear: EachProductRounded}
TILES = {nn.Conv2d: InFourTiles}


class Remembers(Uniform):
    """A quantizer that counts optimizer steps."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("steps", torch.zeros(()))

    def on_optimizer_step(self, latent: Tensor | None) -> None:
        self.steps += 1


def quantize(model: nn.Module, images, recipe: Recipe) -> nn.Module:
    structure = facts(model, images[:1])
    apply(model, resolve(model, structure, recipe), structure)
    calibrate(model, [images], progress=False)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_other_arithmetic_is_a_family_named_by_the_recipe(images: Tensor) -> None:
    recipe = Recipe(sites={"input": UNIFORM, "weight": UNIFORM, "compute": {"_target_": EACH_PRODUCT}})
    model = quantize(DigitsCNN(), images, recipe)
    assert type(model.fc) is EachProductRounded
    ordinary = copy.deepcopy(model)
    ordinary.fc.__class__ = QuantLinear
    assert not torch.equal(model(images), ordinary(images))


def test_a_transformed_domain_reads_codes(images: Tensor) -> None:
    model = DigitsCNN()
    structure = facts(model, images[:1])
    plan = resolve(
        model, structure, Recipe(sites={"input": UNIFORM, "weight": UNIFORM, "compute": {"_target_": TILES}})
    )
    apply(model, plan, structure)
    calibrate(model, [images], progress=False)
    assert type(model.conv2) is InFourTiles
    check_all_ran(model, images)


def test_memory_advances_once_a_step_and_is_saved(images: Tensor) -> None:
    spec = UNIFORM | {"_target_": Remembers}
    model = quantize(DigitsCNN(), images, Recipe(sites={"input": UNIFORM, "weight": spec}))
    model(images)
    for layer in model.modules():
        if isinstance(layer, Quantized):
            layer.after_optimizer_step()
    assert model.conv1.weight_quantizer.steps == 1
    assert model.state_dict()["conv1.weight_quantizer.steps"] == 1


def test_a_pass_edits_at_its_moment(images: Tensor) -> None:
    class HalveScales(Pass):
        def on_fitted(self, model: nn.Module, context: PassContext) -> None:
            for _, site, quantizer in quantizers(model):
                if site == "weight":
                    quantizer.scale /= 2
            context.findings["halved"] = True

    model = quantize(DigitsCNN(), images, Recipe(sites={"weight": UNIFORM}))
    before = model.conv1.weight_quantizer.scale.clone()
    context = PassContext(facts(model, images[:1]), [images], {})
    HalveScales().on_fitted(model, context)
    assert torch.equal(model.conv1.weight_quantizer.scale, before / 2)
    assert context.findings == {"halved": True}


def test_an_integer_program_has_all_it_needs(images: Tensor) -> None:
    """The classifier in integers: codes x codes, summed exactly, equals the simulation times the two scales."""
    model = quantize(DigitsCNN(), images, Recipe(sites={"input": UNIFORM, "weight": UNIFORM}))
    taken: dict[str, Tensor] = {}
    model.fc.register_forward_pre_hook(lambda _, args: taken.update(x=args[0]))
    logits = model(images)
    fc = model.fc
    x, w = fc.input_quantizer, fc.weight_quantizer
    accumulator = x.codes(taken["x"]).long() @ w.codes(fc.weight).long().T
    assert torch.allclose(accumulator * x.scale * w.scale + fc.bias, logits, atol=1e-5)
    structure = facts(model, images[:1])
    assert structure.order[-1] == "fc" and structure.sources["fc"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_detector_is_swapped_calibrated_and_runs() -> None:
    """Detectors take lists of images and cannot be traced; their convolutions are quantized all the same."""
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=4).eval()
    example = [torch.rand(3, 64, 64)]
    structure = facts(model, example)
    assert structure.trace_error
    apply(model, resolve(model, structure, Recipe(sites={"input": UNIFORM, "weight": UNIFORM})), structure)
    calibrate(model, [example], progress=False)
    check_all_ran(model, example)
    assert {"boxes", "labels", "scores"} <= set(model(example)[0])
