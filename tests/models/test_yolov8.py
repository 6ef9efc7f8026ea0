"""YOLOv8: published sizes, boxes from distributions of distances, task-aligned targets, and a network that learns two images."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from qexp.command.folders import CONF
from qexp.command.root import register
from qexp.errors import QexpError
from qexp.models.aligned import AlignedBoxes
from qexp.models.yolov8 import YOLOv8


@pytest.mark.parametrize(("size", "published"), [("n", 3_157_184), ("s", 11_166_544), ("m", 25_902_624)])
def test_the_published_counts_for_80_classes(size, published):
    """As released, but for the 16 fixed numbers 0..15 that the release counts as weights of a layer."""
    with torch.device("meta"):
        net = YOLOv8(80, size, (640, 640))
    assert sum(p.numel() for p in net.parameters()) == published


def test_the_configuration_names_layers_that_exist_and_the_rows_follow_the_pixels():
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["model=yolov8", "model.input_size=[3,64,96]"])
    net = instantiate(cfg.model.net).eval()
    assert {cfg.model.first, *cfg.model.last} <= dict(net.named_modules()).keys()
    rows = 8 * 12 + 4 * 6 + 2 * 3
    with torch.no_grad():
        assert net(torch.zeros(2, 3, 64, 96)).shape == (2, rows, 64 + 20)


@pytest.mark.parametrize("options", [{"size": "x"}, {"pixels": (320, 300)}])
def test_wrong_sizes_are_refused(options):
    with pytest.raises(QexpError, match=r"(is|are) not allowed"):
        YOLOv8(20, **options)


def boxes_of(distances: torch.Tensor, bins: int) -> torch.Tensor:
    """Returns logits whose softmax is all at one bin for each distance `[P, 4]`."""
    return 50 * F.one_hot(distances.long(), bins).float().flatten(1)


def test_a_box_is_the_mean_distance_in_cells_from_its_cell():
    one = AlignedBoxes([(2, 4)], bins=4, classes=1)
    distances = torch.zeros(8, 4)
    distances[5] = torch.tensor([1.0, 0, 2, 1])  # cell (down 1, across 1): centre (1.5 / 4, 1.5 / 2)
    found = one.boxes(boxes_of(distances, 4)[None])[0]
    assert found[5].tolist() == pytest.approx([0.5 / 4, 1.5 / 2, 3.5 / 4, 2.5 / 2], abs=1e-5)
    assert found[0].tolist() == pytest.approx([0.5 / 4, 0.5 / 2, 0.5 / 4, 0.5 / 2], abs=1e-5)
    halfway = torch.zeros(8, 16)  # all bins alike: their mean, 1.5
    assert one.boxes(halfway[None])[0, 5].tolist() == pytest.approx([0, 0, 3 / 4, 3 / 2], abs=1e-5)


def test_targets_by_hand():
    """Four cells in a row, one true box over cells 1 and 2; overlaps 0.5 and 1 there, class scores 0.25 and 0.16."""
    one = AlignedBoxes([(1, 4)], bins=4, classes=2, top=2)
    true = torch.tensor([[0.25, 0.0, 0.75, 1.0]])
    boxes = torch.tensor([[0.0, 0, 0.25, 1], [0.25, 0, 0.5, 1], [0.25, 0, 0.75, 1], [0.75, 0, 1, 1]])
    scores = torch.tensor([[0.9, 0.9], [0.0, 0.25], [0.0, 0.16], [0.9, 0.9]])
    which, target = one.assign(scores, boxes, true, torch.tensor([1]))
    assert which.tolist() == [-1, 0, 0, -1]
    first, second = 0.5 * 0.5**6, 0.4 * 1.0
    assert target.tolist() == pytest.approx([0, first / second, 1.0, 0], rel=1e-5)


def test_a_cell_that_two_boxes_want_predicts_the_one_it_overlaps_more_and_the_smallest_box_has_a_cell():
    one = AlignedBoxes([(2, 2)], bins=4, classes=1, top=4)
    large, part, tiny = [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.6, 0.6], [0.49, 0.01, 0.5, 0.02]
    boxes = torch.tensor([part, large, large, large])
    which, target = one.assign(
        torch.full((4, 1), 0.5), boxes, torch.tensor([large, part]), torch.zeros(2, dtype=torch.int64)
    )
    assert which.tolist() == [1, 0, 0, 0] and bool((target > 0).all())
    which, _ = one.assign(torch.full((4, 1), 0.5), boxes, torch.tensor([tiny]), torch.zeros(1, dtype=torch.int64))
    assert which.tolist() == [0, -1, -1, -1], "the box holds no cell's centre; the nearest cell predicts it"


def test_an_image_without_objects_trains_its_scores_down_and_nothing_else():
    one = AlignedBoxes([(2, 2)], bins=4, classes=3)
    raw = torch.randn(1, 4, 19, requires_grad=True)
    loss = one.loss(raw, [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)])
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * F.softplus(raw[..., 16:]).sum().item(), rel=1e-5)
    assert bool((raw.grad[..., :16] == 0).all()) and bool((raw.grad[..., 16:] > 0).all())


def test_the_distance_loss_splits_a_true_distance_between_its_two_bins():
    one = AlignedBoxes([(1, 1)], bins=4, classes=1)
    raw = torch.zeros(1, 17)
    raw[0, 3], raw[0, 8 + 1] = 2.0, 1.0  # the left side's last bin, the right side's second
    goal = torch.tensor([[0.5 - 1.25, 0.5, 0.5 + 0.5, 0.5 + 2.0]])  # distances 1.25, 0, 0.5, 2
    left = math.log(3 + math.exp(2.0))
    right = math.log(3 + math.e)
    entropies = [left, math.log(4), right - 0.5, math.log(4)]
    assert one.spread_loss(raw, torch.tensor([True]), goal).tolist() == pytest.approx([sum(entropies) / 4], rel=1e-5)


def test_the_network_learns_two_images():
    torch.manual_seed(0)
    net = YOLOv8(3, "n", (64, 64))
    images = torch.rand(2, 3, 64, 64)
    boxes = [torch.tensor([[0.1, 0.2, 0.5, 0.6]]), torch.tensor([[0.3, 0.3, 0.32, 0.32], [0.5, 0.1, 0.9, 0.9]])]
    labels = [torch.tensor([2]), torch.tensor([0, 1])]
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    first = None
    for _ in range(25):
        optimizer.zero_grad()
        loss = net.loss(net(images), boxes, labels)
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < first / 3
    found, scores = net.decode(net(images))
    best = scores[0, :, 2].argmax()
    assert found[0, best].tolist() == pytest.approx([0.1, 0.2, 0.5, 0.6], abs=0.1)
