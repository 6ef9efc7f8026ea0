"""Distillation: the loss in closed form, a teacher that is never trained, saved or copied, and one that does not fit refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qexp.data.tensors import Normalize
from qexp.errors import QexpError
from qexp.run.teacher import Renormalized
from qexp.tasks.classification import Classification
from qexp.tasks.distillation import Distillation, feature_distance, soft_divergence


def net(classes: int = 3, width: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, classes))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.5, 20))
def test_the_divergence_is_the_sum_over_classes(seed, temperature):
    """Against numpy in float64: `T^2 mean_n sum_c p (log p - log q)`."""
    rng = np.random.default_rng(seed)
    logits, target = rng.normal(0, 3, (2, 6, 5))

    def log_softmax(x):
        x = x / temperature
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    p, q = log_softmax(target), log_softmax(logits)
    expected = temperature**2 * (np.exp(p) * (p - q)).sum(1).mean()
    got = soft_divergence(torch.tensor(logits), torch.tensor(target), temperature)
    assert float(got) == pytest.approx(expected, rel=1e-4, abs=1e-5 * temperature**2)


def test_the_gradient_is_the_difference_of_the_probabilities():
    """dL/dz = T (softmax(z/T) - softmax(t/T)) / N, independent of T for large T up to the spread of the logits."""
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]], requires_grad=True)
    target = torch.tensor([[0.5, 2.5, 0.0], [1.0, 1.0, 1.0]])
    soft_divergence(logits, target, 4.0).backward()
    expected = 4.0 * (torch.softmax(logits.detach() / 4, 1) - torch.softmax(target / 4, 1)) / 2
    torch.testing.assert_close(logits.grad, expected)


def test_features_are_compared_relative_to_the_teachers_size():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])
    one, other = float(feature_distance([(a, b)])), float(feature_distance([(1000 * a, 1000 * b)]))
    assert one == pytest.approx(10 / 25) and other == pytest.approx(one)
    assert float(feature_distance([(a, b), (b, b)])) == pytest.approx(one / 2)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    student = net()
    distill = Distillation(copy.deepcopy(student), 1.0, 4.0, 1.0, ["0"])
    logits, loss = distill.step(student, torch.randn(8, 4))
    assert loss.item() == pytest.approx(0, abs=1e-6) and logits.shape == (8, 3)


def test_the_parts_are_weighed():
    student, teacher, images = net(), net(), torch.randn(8, 4)
    parts = {
        w: Distillation(teacher, w[0], 2.0, w[1], ["0"]).step(student, images)[1].item()
        for w in ((1.0, 0.0), (0.0, 1.0), (0.3, 2.0))
    }
    assert parts[0.3, 2.0] == pytest.approx(0.3 * parts[1.0, 0.0] + 2 * parts[0.0, 1.0], rel=1e-5)


def test_the_teacher_is_fixed_and_no_part_of_the_training_module():
    teacher = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).train()
    distill = Distillation(teacher)
    module = Classification(net(), 3, distill=distill)
    assert not any(m.training for m in teacher.modules()) and not any(p.requires_grad for p in teacher.parameters())
    assert {id(p) for p in module.parameters()}.isdisjoint({id(p) for p in teacher.parameters()})
    assert not any("teacher" in key or "distill" in key for key in module.state_dict())
    before = copy.deepcopy(teacher.state_dict())
    module.train()
    _, loss = distill.step(module.model, torch.randn(16, 4))
    loss.backward()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items()), "batch norms see nothing either"
    assert all(p.grad is None for p in teacher.parameters()) and all(
        p.grad is not None for p in module.model.parameters()
    )
    assert copy.deepcopy(module).distill is distill


def test_no_hooks_are_left_behind():
    student, teacher = net(), net()
    Distillation(teacher, features=1.0, layers=["0", "1"]).step(student, torch.randn(2, 4))
    assert not any(m._forward_hooks for network in (student, teacher) for m in network.modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.0}, "above 0"),
        ({"logits": -1.0}, "0 or more"),
        ({"features": 1.0}, "name modules"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(QexpError, match=said):
        Distillation(net(), **options)


@pytest.mark.parametrize(
    ("teacher", "layers", "said"),
    [
        (net(classes=5), [], r"has 5 classes, the data set has 3"),
        (net(), ["0.conv"], r"has no module '0.conv'"),
        (net(width=6), ["0"], r"\[1, 5\] in the network, \[1, 6\] in the teacher"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(teacher, layers, said):
    distill = Distillation(teacher, 1.0, 4.0, 1.0 if layers else 0.0, layers)
    student = net().train()
    with pytest.raises(QexpError, match=said):
        distill.check(student, torch.randn(1, 4), 3)


CAFFE = Normalize((104, 117, 123), (1, 1, 1), max_value=1, channel_order="bgr")
USUAL = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("given", "own"),
    [
        (Normalize((0.5, 0.2, 0.1), (0.25, 0.5, 1)), USUAL),
        (USUAL, CAFFE),
        (CAFFE, USUAL),
        (Normalize((1, 2, 3), (1, 2, 4), 1), Normalize((1, 2, 3), (1, 2, 4), 1, channel_order="bgr")),
    ],
)
def test_a_teacher_sees_images_as_it_was_trained(given, own):
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(
        Renormalized(nn.Identity(), given, own)(given(images)), own(images), rtol=1e-5, atol=1e-3
    )
