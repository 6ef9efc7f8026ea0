"""Files for the FPGA tool: what is written reads back as it was, in the documented layout."""

import numpy as np
import pytest
import torch

from qexp.calibration.calibrate import calibrate, collect
from qexp.errors import QexpError
from qexp.integer import caq_files as files
from qexp.network.facts import facts
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


def test_a_layer_comes_back_from_its_file(tmp_path):
    w = powers(3, 4, 3, 3, n2=-9)
    files.write_weight(tmp_path / "conv.weight", w, -9)
    header = np.frombuffer((tmp_path / "conv.weight").read_bytes()[:24], dtype="<i4")
    assert header.tolist() == [-9, 4, 3, 4, 3, 3]
    assert torch.equal(files.read_weight(tmp_path / "conv.weight"), w)


@pytest.mark.parametrize("bad", [0.3, 2.0, 2.0**-7])
def test_what_has_no_code_is_refused(bad):
    with pytest.raises(QexpError, match="1 of 2 weights"):
        files.codes(torch.tensor([1.0, bad]), -6)


def test_exponents_are_lines_of_integers(tmp_path):
    files.write_exponents(tmp_path / "q.txt", {"conv1": [3, -1, 0], "fc": [5]})
    assert (tmp_path / "q.txt").read_text() == "3 -1 0\n5\n"
    assert files.read_exponents(tmp_path / "q.txt") == [[3, -1, 0], [5]]
    (tmp_path / "q.txt").write_text("3 x\n")
    with pytest.raises(QexpError, match="integers separated by spaces"):
        files.read_exponents(tmp_path / "q.txt")


def test_a_network_is_written_whole(residual, tmp_path):
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    structure = facts(residual, images[:1])
    exponents = {"_target_": "qexp.quantizers.caq.CAQShift", "granularity": "channel"}
    weights = {"_target_": "qexp.quantizers.power_of_two.INQ", "granularity": "tensor"}
    sites = {"input": exponents, "weight": weights, "output": exponents}
    apply(residual, resolve(residual, structure, Recipe(sites, wbit=4)), structure)
    calibrate(residual, [images], progress=False)
    seen = collect(residual, [images], progress=False, collectors=(MaxMap(),))
    written = files.export(residual, tmp_path, seen)
    lines, names = files.read_exponents(tmp_path / "exponents.txt"), (tmp_path / "layers.txt").read_text().split()
    assert lines[names.index("conv.output")] == residual.conv.output_quantizer.exponents.tolist()
    assert torch.equal(
        files.read_weight(tmp_path / "weights" / "grouped.bin"), residual.grouped.quantized_weight().detach()
    )
    assert files.read_weight(tmp_path / "weights" / "fc.bin").shape == (5, 12, 1, 1)
    stem = files.read_feature(tmp_path / "features" / "stem.input.bin", (3, 8, 8))
    assert torch.equal(stem, images.abs().amax(0)) and all(p.exists() for p in written)
    with pytest.raises(QexpError, match="holds 192 numbers"):
        files.read_feature(tmp_path / "features" / "stem.input.bin", (3, 8))
    with pytest.raises(QexpError, match="no maps of maxima"):
        files.write_features(tmp_path, collect(residual, [images], progress=False))
