"""What a network may return: one tensor of class scores, wherever it lies; anything else is refused before training."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.tasks.class_scores import take_class_scores
from qexp.tasks.classification import Classification

Outputs = namedtuple("Outputs", ["logits", "aux"])


class Net(nn.Module):
    """Scores of 5 classes, returned in one of many ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.fc, self.aux = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor):
        x = self.norm(self.conv(x))
        features = self.drop(x.mean((2, 3)))
        y, aux = self.fc(features), self.aux(features)
        return {
            "plain": lambda: y,
            "dict": lambda: {"scores": y},
            "out": lambda: {"features": features, "aux": aux, "out": y},
            "tuple": lambda: (y, features),
            "list": lambda: [features, y],
            "named": lambda: Outputs(y, aux),
            "maps": lambda: y[..., None, None],
            "training tuple": lambda: (y, aux) if self.training else y,
            "training tuple, last": lambda: (aux, y) if self.training else y,
            "training dict": lambda: {"a": aux, "b": y} if self.training else y,
            "training maps": lambda: y[..., None, None] if self.training else y,
            "two": lambda: (y, aux),
            "none": lambda: {"features": features},
            "one": lambda: y[:, :1],
            "segments": lambda: x[:, :1].expand(-1, 5, -1, -1),
            "text": lambda: "scores",
        }[self.how]()


FINE = [
    *("plain", "dict", "out", "tuple", "list", "named", "maps"),
    *("training tuple", "training tuple, last", "training dict", "training maps"),
]


@pytest.mark.parametrize("how", FINE)
def test_scores_are_found_wherever_they_lie(how):
    torch.manual_seed(0)
    net, x = Net(how), torch.randn(3, 3, 8, 8)
    plain = copy.deepcopy(net)
    plain.how = "plain"
    state = copy.deepcopy(net.state_dict())
    Classification(net, 5).take_network(x[:1])
    assert net.training and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(net.eval()(x), plain.eval()(x))
    torch.manual_seed(1)
    got = net.train()(x)
    torch.manual_seed(1)
    assert torch.equal(got, plain.train()(x))
    assert bool(net._forward_hooks) == (how != "plain")
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("two", r"returns a tuple with 2 tensors of class scores \[N, 5\].*call them 'logits' or 'out'"),
        ("none", r"returns a dictionary with 0 tensors of class scores .*features: \[2, 4\]"),
        ("one", r"returns \[2, 1\] for 2 images, and the data set has 5 classes"),
        ("segments", r"returns \[2, 5, 6, 6\] for 2 images"),
        ("text", "returns str; class scores"),
    ],
)
def test_what_is_ambiguous_is_refused(how, message):
    with pytest.raises(QexpError, match=message):
        Classification(Net(how), 5).take_network(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("classes", [4, 6])
def test_other_classes_than_the_data_set(classes):
    with pytest.raises(QexpError, match=rf"returns \[2, 5\] for 2 images, and the data set has {classes} classes"):
        Classification(Net("plain"), classes).take_network(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(("name", "side"), [("googlenet", 64), ("inception_v3", 80)])
def test_auxiliary_heads_of_torchvision(name, side):
    """Inception's is too deep for these images, which matters in training alone."""
    from torchvision import models

    net, x = models.get_model(name, weights=None, num_classes=7, init_weights=False), torch.randn(2, 3, side, side)
    Classification(net, 7).take_network(x[:1])
    assert net.eval()(x).shape == (2, 7)
    if name == "googlenet":
        assert net.train()(x).shape == (2, 7)


class Squeezes(nn.Module):
    """Drops every dimension of one, that of a single image too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3), keepdim=True).squeeze())


def test_a_single_image_whose_dimension_is_squeezed_away_has_its_scores():
    model, image = Squeezes().eval(), torch.randn(1, 1, 6, 6)
    take_class_scores(model, image, 3)
    both = model(torch.cat([image, image]))
    assert both.shape == (2, 3) and torch.allclose(model(image), both[:1], atol=1e-6)
