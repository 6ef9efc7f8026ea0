"""Darknet files: what is built from a `.cfg`, in which order numbers lie in `.weights`, where boxes come out, what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.models.darknet import Darknet
from qexp.models.weights import load_weights
from qexp.models.yolo import Head, Yolo
from qexp.network.facts import facts
from tests.darknet import write_cfg


@pytest.fixture
def cfg(tmp_path):
    return write_cfg(tmp_path)


def test_the_network_runs_in_the_order_of_the_file_with_adds_and_concatenations_as_modules(cfg):
    net = Darknet(cfg, 2).eval()
    raw = net(torch.randn(3, 3, 32, 32))
    assert raw.shape == (3, 2 * 8 * 8, 7)
    seen = facts(net, torch.zeros(1, 3, 32, 32))
    assert not seen.trace_error
    assert {"layers.2.add", "layers.6.concat"} <= set(seen.order)
    assert seen.bn_of == {
        "layers.0.conv": "layers.0.bn",
        "layers.1.conv": "layers.1.bn",
        "layers.7.conv": "layers.7.bn",
    }
    assert seen.last == "layers.8.conv"


def test_numbers_are_read_in_darknets_order(cfg, tmp_path):
    net = Darknet(cfg, 2)
    sizes = [*[8] * 4, 8 * 27, *[8] * 4, 8 * 9, *[16] * 4, 16 * 16 * 9, 14, 14 * 16]
    numbers = np.arange(sum(sizes), dtype="<f4")
    path = tmp_path / "tiny.weights"
    path.write_bytes(np.array([0, 2, 5], "<i4").tobytes() + np.array([7], "<i8").tobytes() + numbers.tobytes())
    load_weights(net, path)
    state, at = net.state_dict(), np.cumsum([0, *sizes])
    parts = ("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var", "conv.weight")
    names = [f"layers.{layer}.{part}" for layer in (0, 1, 7) for part in parts]
    for name, start in zip([*names, "layers.8.conv.bias", "layers.8.conv.weight"], at):
        assert state[name].flatten()[0] == start and state[name].is_contiguous(), name
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(QexpError, match=r"holds 2,957 numbers, the network has 2,958; the file is cut short"):
        load_weights(net, path)


def test_a_box_comes_out_where_its_cell_and_anchor_say():
    yolo = Yolo([Head((2, 4), [(8.0, 16.0)], 1.2)], (64, 32))
    raw = torch.zeros(1, 8, 7)
    raw[0, 5] = torch.tensor([0.0, 100.0, 0.0, np.log(0.5), 100.0, 0.0, 100.0])  # second row of cells, second column
    boxes, scores = yolo.decode(raw)
    x, y = (1 + 0.5) / 4, (1 + 1.2 - 0.1) / 2
    assert boxes[0, 5].tolist() == pytest.approx([x - 4 / 64, y - 4 / 32, x + 4 / 64, y + 4 / 32])
    assert scores[0, 5].tolist() == pytest.approx([0.5, 1.0]) and scores[0, 0].tolist() == pytest.approx([0.25, 0.25])


def test_a_perfect_prediction_costs_nothing_and_a_step_down_the_gradient_costs_less():
    yolo = Yolo([Head((4, 4), [(16.0, 16.0), (32.0, 8.0)])], (64, 64))
    true, label = torch.tensor([[0.25, 0.5, 0.5, 0.75]]), torch.tensor([1])
    row = int(yolo.responsible(true)[0])
    assert row == 2 * 4 + 1, "square, so the first anchor, in the third row and second column"
    raw = torch.full((1, 32, 7), -40.0)
    raw[..., :4] = 0.0
    raw[0, row, 4:] = torch.tensor([40.0, -40.0, 40.0])
    assert float(yolo.loss(raw, [true], [label])) == pytest.approx(0.0, abs=1e-5)
    start = torch.zeros(1, 32, 7, requires_grad=True)
    before = yolo.loss(start, [true], [label])
    before.backward()
    assert start.grad.isfinite().all()
    assert yolo.loss(start.detach() - 0.1 * start.grad, [true], [label]) < before


def test_an_image_without_objects_trains_towards_background_alone():
    yolo = Yolo([Head((2, 2), [(16.0, 16.0)])], (32, 32))
    raw = torch.zeros(2, 4, 7, requires_grad=True)
    loss = yolo.loss(raw, [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(8 * np.log(2))
    assert raw.grad[..., 4].gt(0).all() and not raw.grad[..., :4].any()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[shortcut]", "[local]", r"\[local\] is not known"),
        ("from=-2", "from=-9", "names no earlier layer"),
        ("filters=14", "filters=15", "need 14 filters before it, there are 15"),
        ("size=3", "size=three", "a number is needed"),
        ("activation=relu", "activation=magic", "use linear, relu"),
        ("[net]", "[convolutional]", r"\[net\] is needed"),
        ("width=32", "width", "neither"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(cfg, old, new, says):
    cfg.write_text(cfg.read_text().replace(old, new, 1))
    with pytest.raises(QexpError, match=says):
        Darknet(cfg, 2)


def test_anchors_that_are_not_there_and_sizes_that_do_not_divide_are_refused(cfg):
    text = cfg.read_text()
    cfg.write_text(text.replace("mask=", "mask=9,", 1))
    with pytest.raises(QexpError, match=r"there are \d+ anchors, from 0"):
        Darknet(cfg, 2)
    cfg.write_text(text)
    with pytest.raises(QexpError, match=r"multiples of \d+ are needed \(model\.input_size\)"):
        Darknet(cfg, 2, size=(33, 33))


def test_another_number_of_classes_and_a_missing_file_are_refused(cfg, tmp_path):
    with pytest.raises(QexpError, match="has 2 classes, the data set 20"):
        Darknet(cfg, 20)
    with pytest.raises(QexpError, match=r"model\.cfg=FILE"):
        Darknet(tmp_path / "none.cfg")


def test_pooling_keeps_the_size_where_darknet_does(cfg):
    text = cfg.read_text()
    same = text.replace("size=2\nstride=2", "size=2\nstride=1").replace("[upsample]\nstride=2", "[upsample]\nstride=1")
    cfg.write_text(same)
    pool = Darknet(cfg, 2).layers[3]
    assert isinstance(pool.pool, nn.MaxPool2d)
    x = torch.arange(4.0).view(1, 1, 2, 2)
    assert pool(x).tolist() == [[[[3, 3], [3, 3]]]], "a row and a column are added behind"
