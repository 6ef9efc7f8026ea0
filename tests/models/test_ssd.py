"""SSD: counts, priors, loss, decoding and weight layouts, exactly."""

import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn
from torchvision.models.detection import ssd300_vgg16

from qexp.command.root import register
from qexp.errors import QexpError
from qexp.models.detector import corners
from qexp.models.matching import match
from qexp.models.multibox import MultiBox, priors, ssd300_maps
from qexp.models.ssd import SSD300, L2Norm, SqueezeSSD, TorchvisionSSD

CONF = str(Path(__file__).parents[2] / "conf")
CHOICES = ("ssd300_vgg16", "ssd300_vgg16_tv", "ssd300_torchvision", "ssd300_squeezenet")


def config(choice: str):
    register()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", [f"model={choice}"])


@pytest.mark.parametrize("choice", CHOICES)
def test_names_in_the_file_exist_and_the_network_has_a_row_a_prior(choice):
    cfg = config(choice)
    net = instantiate(cfg.model.net)
    names = dict(net.named_modules())
    groups = [g for group in cfg.model.groups or [] for g in ([group] if isinstance(group, str) else group)]
    assert {cfg.model.first, *cfg.model.last, *groups} <= names.keys()
    with torch.no_grad():
        rows = net.multibox.priors.shape[0]
        assert net.to("meta").eval()(torch.zeros(2, 3, 300, 300, device="meta")).shape == (2, rows, 25)
    assert cfg.dataset.name == "voc2007"


@pytest.mark.parametrize("make", [SSD300, TorchvisionSSD])
def test_ssd300_has_the_published_counts(make, count):
    found = count(make(20).to("meta"), 3, 300, 300)
    assert (found.params, found.macs) == (26_285_486, 31_373_537_792)


def test_the_priors_are_the_published_ones():
    found = priors(ssd300_maps())
    assert found.shape == (8732, 4) and 0 <= float(found.min()) <= float(found.max()) <= 1
    half = 0.5 * 8 / 300
    first = [(0.1, 0.1), (math.sqrt(0.1 * 0.2),) * 2, (0.1 * 2**0.5, 0.1 / 2**0.5), (0.1 / 2**0.5, 0.1 * 2**0.5)]
    for row, (width, height) in zip(found[:4].tolist(), first):
        assert row == pytest.approx([half, half, width, height], abs=1e-7)
    assert found[4].tolist() == pytest.approx([3 * half, half, 0.1, 0.1], abs=1e-7), "across before down"
    second = found[38 * 38 * 4 :][:6]
    assert second[4].tolist() == pytest.approx([8 / 300, 8 / 300, 0.2 * 3**0.5, 0.2 / 3**0.5], abs=1e-7)
    assert found[-4].tolist() == pytest.approx([0.5, 0.5, 0.88, 0.88], abs=1e-7)
    assert found[-3].tolist() == pytest.approx([0.5, 0.5, math.sqrt(0.88 * 1.05), math.sqrt(0.88 * 1.05)], abs=1e-7)
    assert found[-2].tolist() == pytest.approx([0.5, 0.5, 1.0, 0.88 / 2**0.5], abs=1e-7), "clipped"


@pytest.mark.slow
def test_torchvisions_priors_are_ours_with_its_sizes():
    assert torch.allclose(
        priors(ssd300_maps("torchvision"), clip_centres=False), TorchvisionSSD(20).multibox.priors, atol=1e-6
    )


@pytest.mark.slow
def test_torchvisions_weights_fit_and_compute_the_same_through_the_key_maps():
    torch.manual_seed(0)
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=21).eval()
    nn.init.uniform_(theirs.backbone.scale_weight, 5, 30)
    x = torch.randn(1, 3, 300, 300)
    outputs = []
    for choice in ("ssd300_vgg16_tv", "ssd300_torchvision"):
        cfg = config(choice)
        net = instantiate(cfg.model.net).eval()
        net.load_state_dict(match(theirs.state_dict(), net, cfg.model.key_map, "torchvision"), strict=True)
        with torch.no_grad():
            outputs.append((net(x), net.decode(net(x))[0]))
    for one, other in zip(*outputs):
        assert torch.allclose(one, other, atol=1e-4)


def test_the_public_implementations_names_are_ours():
    keys = set(SSD300(20).to("meta").state_dict())
    vgg = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28, 31, 33)
    names = [f"vgg.{i}" for i in vgg] + [
        f"{part}.{i}" for part, n in (("extras", 8), ("loc", 6), ("conf", 6)) for i in range(n)
    ]
    assert keys == {"L2Norm.weight", *(f"{name}.{kind}" for name in names for kind in ("weight", "bias"))}


def test_l2norm_gives_each_pixel_unit_length_times_twenty():
    y = L2Norm(8)(torch.randn(2, 8, 3, 3))
    assert torch.allclose(y.norm(dim=1), torch.full((2, 3, 3), 20.0), atol=1e-4)


def tiny() -> MultiBox:
    return MultiBox(
        torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5], [0.25, 0.75, 0.5, 0.5], [0.5, 0.5, 1, 1]])
    )


def test_decoding_undoes_encoding():
    box = tiny()
    true = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.5, 0.1, 0.9, 0.3], [0.0, 0.5, 0.3, 1.0], [0.2, 0.2, 0.7, 0.9]])
    raw = torch.zeros(1, 4, 7)
    raw[0, :, :4] = box.encode(true)
    raw[0, 1, 4:] = torch.tensor([0.0, math.log(2.0), 0.0])
    boxes, scores = box.decode(raw)
    assert torch.allclose(boxes[0], true, atol=1e-6)
    assert scores[0, 1].tolist() == pytest.approx([0.5, 0.25])
    assert torch.allclose(box.decode(torch.zeros(1, 4, 7))[0][0], corners(box.priors))


def test_every_object_has_a_prior_however_small_and_close_priors_answer_too():
    box = tiny()
    small, large = [0.05, 0.05, 0.15, 0.15], [0.5, 0.0, 1.0, 0.45]
    true, kind = box.assign(torch.tensor([small, large]), torch.tensor([1, 0]))
    assert kind.tolist() == [2, 1, 0, 0]
    assert true[0].tolist() == pytest.approx(small) and true[1].tolist() == pytest.approx(large)


def test_the_loss_by_hand_with_the_three_hardest_negatives():
    box = MultiBox(torch.cat([tiny().priors, tiny().priors[:3] * torch.tensor([1, 1, 0.01, 0.01])]))
    true = corners(box.priors[:1])
    raw = torch.zeros(1, 7, 6)
    raw[0, 0, :4] = torch.tensor([0.5, 0.0, 2.0, 0.0])  # smooth L1: 0.125 and 1.5
    raw[0, 1:, 4] = torch.tensor([3.0, -1.0, 2.0, -2.0, 0.0, 5.0])  # background's logit; the lowest are hardest
    entropy = [math.log(math.exp(b) + 1) - b for b in (-2.0, -1.0, 0.0)]
    expected = 0.125 + 1.5 + math.log(2) + sum(entropy)
    assert float(box.loss(raw, [true], [torch.tensor([0])])) == pytest.approx(expected, rel=1e-5)


def test_an_image_without_objects_costs_nothing():
    raw = torch.randn(2, 4, 7, requires_grad=True)
    loss = tiny().loss(raw, [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    loss.backward()
    assert float(loss.detach()) == 0.0 and raw.grad.isfinite().all()


def test_a_backbone_file_is_read_or_refused(tmp_path):
    from qexp.models.zoo import torchvision_model

    torch.manual_seed(1)
    state = torchvision_model("squeezenet1_1").state_dict()
    torch.save(state, tmp_path / "good.pt")
    net = SqueezeSSD(20, tmp_path / "good.pt")
    assert torch.equal(net.features[0].weight, state["features.0.weight"])
    torch.save({"features.0.weight": state["features.0.weight"]}, tmp_path / "short.pt")
    for name, says in (("none.pt", "no such file"), ("short.pt", "not weights of squeezenet1_1")):
        with pytest.raises(QexpError, match=says):
            SqueezeSSD(20, tmp_path / name)
