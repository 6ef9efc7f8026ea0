"""Files for the FPGA tool: what is written reads back as it was, in the documented layout."""

import struct

import numpy as np
import pytest
import torch
from torch import nn

from qexp.calibration.calibrate import calibrate, collect
from qexp.errors import QexpError
from qexp.integer import caq_files as files
from qexp.integer.caq_order import held, in_order
from qexp.models.cifar_resnet import CifarResNet
from qexp.network.facts import facts
from qexp.passes.fold_bn import fold_bn
from qexp.recipe import Recipe, apply, resolve
from qexp.statistics.collectors import MaxMap


def powers(*shape: int, n2: int = -6) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    sign = torch.randint(-1, 2, shape, generator=g).float()
    return sign * 2.0 ** torch.randint(n2, n2 + 7, shape, generator=g)


def test_codes_as_documented():
    w = torch.tensor([0.0, 1.0, -1.0, 2.0**-6, -(2.0**-6)])
    assert files.codes(w, -6).tolist() == [7, 8 + 6, 6, 8, 0]
    assert files.engine_bytes(w, -6).tolist() == [0x40, 6, 0x86, 0, 0x80]
    assert torch.equal(files.values(files.codes(w, -6), -6), w)


@pytest.mark.parametrize("kernel, words", [((1, 1), 2), ((2, 2), 10), ((3, 3), 15), ((5, 5), 50), ((7, 7), 105)])
def test_words_hold_as_many_codes_as_documented(kernel, words):
    w = powers(4, 5, *kernel)
    packed = files.pack(w, -6)
    assert packed.dtype == np.dtype("<u2") and packed.size == 4 * words
    assert torch.equal(files.unpack(packed, tuple(w.shape), -6), w)
    codes = files.codes(w, -6).reshape(4, -1)
    assert packed[0] & 15 == codes[0, 0] and (packed[0] >> 4) & 15 == codes[0, 1]


def referee(data: bytes) -> tuple[int, int, np.ndarray]:
    """Reads a file of weights as the layout is specified, apart from the code that writes it: exponent, type, values [N, C, H, W]."""
    n2, kind, *shape = struct.unpack("<bb4h", data[:10])
    n, c, h, w = shape
    if kind == 1:
        return n2, kind, np.array(struct.unpack(f"<{n * c * h * w}f", data[10:])).reshape(shape)
    words = iter(struct.unpack(f"<{(len(data) - 10) // 2}H", data[10:]))
    out = np.full((n, c * h * w), np.nan)
    runs = [4] * (c // 4) + ([c % 4] if c % 4 else []) if (h, w) == (1, 1) else None
    if runs is None:
        row = [2] * (w // 2) if w == 2 else [3] * (w // 3) + ([w % 3] if w % 3 else [])
        runs = row * (c * h)
    for filter_ in range(n):
        at = 0
        for count in runs:
            word = next(words)
            for k in range(4):
                nibble = word >> 4 * k & 15
                if k >= count:
                    assert nibble == 15, "places without a weight hold the unused code"
                    continue
                out[filter_, at] = 0 if nibble == 7 else (1 if nibble >= 8 else -1) * 2.0 ** ((nibble & 7) + n2)
                at += 1
    assert next(words, None) is None
    return n2, kind, out.reshape(shape)


@pytest.mark.parametrize("shape", [(3, 4, 3, 3), (2, 5, 1, 1), (4, 3, 2, 2), (2, 3, 5, 5), (2, 2, 7, 7), (5, 6)])
def test_a_layer_is_read_as_specified(tmp_path, shape):
    w = powers(*shape, n2=-9)
    files.write_weight(tmp_path / "conv.bin", w, -9)
    data = (tmp_path / "conv.bin").read_bytes()
    assert struct.unpack("<bb4h", data[:10]) == (-9, 0, *(*shape, 1, 1)[:4]), "char, char, four shorts"
    n2, kind, values = referee(data)
    assert (n2, kind) == (-9, 0) and np.array_equal(values.reshape(shape), w.numpy())
    assert torch.equal(files.read_weight(tmp_path / "conv.bin").reshape(shape), w)
    files.write_floats(tmp_path / "conv.bias.bin", w.flatten()[:7])
    data = (tmp_path / "conv.bias.bin").read_bytes()
    assert data[:10] == struct.pack("<bb4h", 0, 1, 7, 1, 1, 1) and len(data) == 10 + 7 * 4
    assert np.array_equal(referee(data)[2].ravel(), w.flatten()[:7].numpy())


def test_what_does_not_fit_the_header_is_refused(tmp_path):
    with pytest.raises(QexpError, match=r"shape \[40000, 1, 1, 1\] do not fit the header"):
        files.write_weight(tmp_path / "wide.bin", torch.ones(40000, 1, 1, 1), 0)
    (tmp_path / "old.bin").write_bytes(np.array([-6, 4, 1, 1, 1, 1], dtype="<i4").tobytes())
    with pytest.raises(QexpError, match="element type -1, expected 0"):
        files.read_weight(tmp_path / "old.bin")


@pytest.mark.parametrize("bad", [0.3, 2.0, 2.0**-7])
def test_what_has_no_code_is_refused(bad):
    with pytest.raises(QexpError, match="1 of 2 weights"):
        files.codes(torch.tensor([1.0, bad]), -6)


def test_exponents_are_lines_of_one_integer(tmp_path):
    files.write_exponents(tmp_path / "q", [3, -1, 0, 5])
    assert (tmp_path / "q").read_text() == "3\n-1\n0\n5\n"
    assert files.read_exponents(tmp_path / "q") == [3, -1, 0, 5]
    (tmp_path / "q").write_text("3\nx\n")
    with pytest.raises(QexpError, match="one integer per line"):
        files.read_exponents(tmp_path / "q")


def caq(model, images, weights=None, bn=True):
    """Returns the facts of a model that got CAQ's exponents; its batch norms are folded by default."""
    model.eval()
    if bn:
        fold_bn(model, facts(model, images[:1]))
    structure = facts(model, images[:1])
    spec = {"_target_": "qexp.quantizers.caq.CAQShift", "granularity": "channel"}
    rules = {"more": {"types": ["Add", "BatchNorm2d"], "optional": True, "input": spec, "output": spec}}
    apply(
        model,
        resolve(model, structure, Recipe({"input": spec, "weight": weights, "output": spec}, rules, wbit=4)),
        structure,
    )
    calibrate(model, [images], progress=False)
    return structure


def test_a_shortcut_stands_before_its_block():
    torch.manual_seed(0)
    model, images = CifarResNet(14, shortcut="B"), torch.randn(2, 3, 32, 32)
    structure = caq(model, images)
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1)]
    expected = ["data", "conv1"]
    for block in blocks:
        shortcut = [f"{block}.shortcut.0"] if block in ("layer2.0", "layer3.0") else []
        expected += [*shortcut, f"{block}.conv1", f"{block}.conv2"]
    assert [tensor.name for tensor in held(model, structure)] == [*expected, "linear"]


def test_a_resnet50_holds_the_tensors_of_the_engine():
    from qexp.models.zoo import torchvision_model

    model, images = torchvision_model("resnet50", num_classes=10).eval(), torch.zeros(1, 3, 32, 32)
    order = in_order(model, facts(model, images))
    assert len(order) + 1 == 55, "the images, 53 convolutions and the classifier"
    assert order[:6] == ["conv1", "layer1.0.downsample.0", *(f"layer1.0.conv{i}" for i in (1, 2, 3)), "layer1.1.conv1"]
    channels = [model.get_submodule(n).weight.shape[0] for n in order]
    assert 3 + sum(channels) - 10 + 1000 == 27563, "as many lines as the published file of this network has"


@pytest.mark.parametrize("folded", [True, False])
def test_a_network_is_written_whole(residual, tmp_path, folded):
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    structure = caq(residual, images, {"_target_": "qexp.quantizers.power_of_two.INQ", "granularity": "tensor"}, folded)
    seen = collect(residual, [images], progress=False, collectors=(MaxMap(),))
    written = files.export(residual, structure, tmp_path, "net", seen)
    assert all(p.exists() for p in written)

    names = (tmp_path / "layers.txt").read_text().split()
    lines = [int(line) for line in (tmp_path / "net_q").read_text().splitlines()]
    each = [[int(v) for v in (tmp_path / "channel_q" / "net" / n).read_text().splitlines()] for n in names]
    assert names[0] == "data" and [e for vector in each for e in vector] == lines
    assert [list(map(int, line.split())) for line in (tmp_path / "exponents.txt").read_text().splitlines()] == each
    weighted = [n for n in structure.order if isinstance(residual.get_submodule(n), nn.Conv2d | nn.Linear)]
    assert sorted(names[1:]) == sorted(weighted), "one tensor for each weighted layer, and no others"
    normed = structure.bn_of.get("conv", "conv")
    assert each[names.index("conv")] == residual.get_submodule(normed).output_quantizer.exponents.tolist()

    _, _, grouped = referee((tmp_path / "weights" / "grouped.bin").read_bytes())
    assert np.array_equal(grouped, residual.grouped.quantized_weight().detach().numpy())
    parameters = np.fromfile(tmp_path / "param.bin", dtype="<f4")
    for name in names[1:]:
        layer = residual.get_submodule(name)
        parts = [layer.quantized_weight(), layer.bias]
        if name in structure.bn_of:
            norm = residual.get_submodule(structure.bn_of[name])
            parts += [norm.running_mean, norm.running_var, norm.weight, norm.bias]
        for part in parts:
            if part is not None:
                own, parameters = np.split(parameters, [part.numel()])
                assert np.array_equal(own, part.detach().numpy().ravel()), name
    assert parameters.size == 0
    stem = files.read_feature(tmp_path / "features" / "net" / "data.bin", (3, 8, 8))
    assert torch.equal(stem, images.abs().amax(0))
    with pytest.raises(QexpError, match="holds 192 numbers"):
        files.read_feature(tmp_path / "features" / "net" / "data.bin", (3, 8))
    with pytest.raises(QexpError, match="no maps of maxima"):
        files.write_features(tmp_path, held(residual, structure), collect(residual, [images], progress=False))
    found = files.check(residual, structure, tmp_path, "net")
    assert found["tensors"] == len(names) and found["layers"] == len(weighted)
    (tmp_path / "net_q").write_text("1\n" + (tmp_path / "net_q").read_text())
    with pytest.raises(QexpError, match="are not the network's"):
        files.check(residual, structure, tmp_path, "net")


def test_a_result_without_exponents_is_named(residual):
    images = torch.randn(2, 3, 8, 8)
    structure = caq(residual, images)
    residual.fc.output_quantizer = nn.Identity()
    with pytest.raises(QexpError, match=r"export=fpga: the results of fc have no power-of-two exponents"):
        files.refuse(residual, structure)
