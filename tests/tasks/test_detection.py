"""Detections of a network: which candidates stay, what the score counts, and the page that shows them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from qexp.data.annotations import Objects
from qexp.data.pictures import Picture
from qexp.errors import QexpError
from qexp.report.detections import write_detections
from qexp.report.point_pages import write_point_pages
from qexp.tasks.base import Score
from qexp.tasks.detection import Detection, select

BOXES = torch.tensor([[0.0, 0, 0.5, 0.5], [0.0, 0, 0.5, 0.45], [0.5, 0.5, 1, 1], [0.0, 0, 0.5, 0.48]])


def test_overlapping_boxes_of_one_class_are_one_and_of_two_classes_two():
    scores = torch.tensor([[0.9, 0.2], [0.8, 0.6], [0.3, 0.05], [0.05, 0.7]])
    boxes, labels, values = select(BOXES, scores, 0.1, 0.45, 10)
    assert labels.tolist() == [0, 1, 0] and values.tolist() == pytest.approx([0.9, 0.7, 0.3])
    assert torch.equal(boxes, BOXES[[0, 3, 2]])
    assert len(select(BOXES, scores, 0.1, 0.45, 2)[0]) == 2
    assert select(BOXES, scores, 0.9, 0.45, 10)[0].shape == (0, 4), "a score must be above, not at"


class Fixed(nn.Module):
    """A detector that returns what its images show: rows of four corners and two scores."""

    def forward(self, x):
        return x

    def decode(self, raw):
        return raw[..., :4], raw[..., 4:]

    def loss(self, raw, boxes, labels):
        return raw.sum() * 0 + sum(map(len, boxes))


def target(*rows):
    boxes = torch.tensor([r[:4] for r in rows]).reshape(-1, 4)
    return {
        "boxes": boxes,
        "labels": torch.tensor([r[4] for r in rows], dtype=torch.int64),
        "difficult": torch.tensor([r[5] for r in rows], dtype=torch.bool),
    }


def scored(**options) -> tuple[Score, list[float]]:
    task, losses = Detection(Fixed(), 2, **options), []
    task.log = lambda name, value, **_: losses.append(float(value))
    task.on_test_epoch_start()
    rows = torch.tensor([[0, 0, 0.5, 0.5, 0.9, 0], [0.5, 0.5, 1, 1, 0.8, 0], [0, 0, 1, 1, 0, 0.7]])
    first = target((0.0, 0, 0.5, 0.5, 0, False), (0.5, 0.5, 1.0, 1.0, 0, True))
    task.test_step((rows[None], [first]), 0)
    task.test_step((torch.stack([rows, rows]), [target((0.0, 0, 1, 1, 1, False)), target()]), 1)
    return task.score(), losses


def test_the_score_counts_images_and_leaves_difficult_objects_out_everywhere():
    score, losses = scored()
    assert losses == [1.0, 1.0], "easy objects alone reach the loss"
    assert (score.metric, score.n) == ("map_voc07", 3)
    # class 0: right at .9, then (image 1) ignored at .8, four wrong; class 1: wrong at .7 first, for ties keep their order
    assert score.outcomes["hit"].tolist() == [1, -1, 0, 0, 0, 1, 0, 0, 0]
    assert score.outcomes["class_ap"].tolist() == pytest.approx([1.0, 0.5])
    assert score.value == pytest.approx(0.75) and score.others["map_area"] == pytest.approx(0.75)
    assert score.low <= score.value <= score.high and "2 classes" in score.interval
    assert scored(least_boxes=2)[0].value != scored(least_boxes=2)[0].value, "no class has two objects: no number"


def test_the_page_draws_both_networks_on_the_images_that_changed(tmp_path):
    score, _ = scored()
    changed = {**score.outcomes, "hit": np.where(score.outcomes["image"] == 2, 0, score.outcomes["hit"])}
    changed = {k: (v[score.outcomes["image"] != 1] if len(v) == 9 else v) for k, v in changed.items()}
    quantized = Score("map_voc07", 0.5, 0.4, 0.6, "bootstrap", 3, {}, changed)
    box = torch.tensor([[0.0, 0, 0.5, 0.5]])
    objects = Objects(box, torch.tensor([0]), torch.tensor([False]))
    data = SimpleNamespace(
        class_names=("cat", "<dog>"),
        splits={"test": [Picture(f"{i}.jpg", None, (60, 30), objects) for i in range(3)]},
        decode=lambda _: Image.new("RGB", (60, 30), (9, 99, 199)),
    )
    Detection(Fixed(), 2).leave(tmp_path, quantized, score, data)
    content = json.loads((tmp_path / "detections.json").read_text())
    assert [image["name"] for image in content["images"]] == ["0.jpg", "1.jpg", "2.jpg"]
    assert len(content["images"][1]["float"]) == 3 and content["images"][1]["quantized"] == []
    assert not list(tmp_path.glob("*.html")), "the task leaves data; the page is made when the study is finished"
    assert write_point_pages(tmp_path) == ["detections.html"]
    page = (tmp_path / "detections.html").read_text()
    assert "75.00 % in float, 50.00 % quantized" in page
    assert page.count("<svg") == 6 and "&lt;dog&gt; 0.70" in page and "<dog>" not in page
    assert "http" not in page.replace("http-equiv", ""), "opens without a network"
    (tmp_path / "detections.json").write_text("{")
    with pytest.raises(QexpError, match="cannot be shown"):
        write_detections(tmp_path)
    assert write_point_pages(tmp_path) == ["detections.html"], "damaged data costs no more than its own page"
