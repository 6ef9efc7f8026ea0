"""What goes into an exported network and comes out: codes of pixels, real scores, in every file."""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch

from qexp.data.tensors import Normalize
from qexp.integer import ends, package
from qexp.integer.lowering import lower
from tests.networks import Residual

HALF = {"mean": [0.5] * 3, "std": [0.5] * 3, "max_value": 255.0, "channel_order": "rgb"}
OTHER = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "max_value": 255.0, "channel_order": "bgr"}


@pytest.fixture(params=[HALF, OTHER], ids=["ties", "channels"])
def pixels(request, deployed):
    """A program that knows how pixels are prepared, bytes `[N, C, H, W]`, and what the network takes for them."""
    how = request.param
    torch.manual_seed(0)
    given = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8)
    given[0, :, :2] = torch.tensor([0, 255]).repeat(3, 2, 4)
    images = Normalize(how["mean"], how["std"])(given)
    _, model, _ = deployed(Residual())
    model.stem.input_quantizer.scale.fill_((images.max() - images.min()).item() / 255)
    model.stem.input_quantizer.zero_point.fill_(127)
    return lower(model, images[:1], {"preprocessing": how}, as_runtimes=True).program, given, images


def test_pixels_are_prepared_as_the_data_set_does(pixels):
    program, given, images = pixels
    table = ends.normalized_pixels(program.about["preprocessing"])
    values = np.stack([table[given[:, c], c, 0, 0] for c in range(3)], 1)
    assert np.array_equal(values, images.numpy())
    codes = ends.pixel_codes(program)
    found = np.stack([codes[c][given[:, c]] for c in range(3)], 1)
    assert np.array_equal(found, program.encode(images.numpy()))
    assert ends.pixel_codes(lower_without(program)) is None


def lower_without(program):
    from dataclasses import replace

    return replace(program, about={})


def test_a_file_says_what_feeds_it_and_puts_ties_where_the_program_does(pixels, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from qexp.integer import onnx_file

    program, _, images = pixels
    onnx_file.write(program, tmp_path / "m.onnx")
    assert onnx_file.compare(program, tmp_path / "m.onnx", images.numpy()).equal
    notes = {note.key: json.loads(note.value) for note in onnx.load(tmp_path / "m.onnx").metadata_props}
    given, start = notes["qexp.input"], program.tensors[program.input]
    assert given["name"] == "images" and given["scale"] == start.unit[0] and given["zero_point"] == 127
    assert given["preprocessing"] == program.about["preprocessing"] and notes["qexp.output"]["name"] == "scores"


def test_the_order_of_rounding_and_zero_point_is_seen(deployed):
    """Every pixel is k + 1/2 of a step: with an odd zero point the two orders part in half of them."""
    from qexp.integer.onnx_graph import Graph
    from qexp.integer.onnx_nodes import FORMS
    from qexp.integer.onnx_products import looked_up

    pytest.importorskip("onnx")
    _, model, images = deployed(Residual())
    model.stem.input_quantizer.scale.fill_(2 / 255)
    for zero, matters in ((127, True), (0, False)):
        model.stem.input_quantizer.zero_point.fill_(zero)
        program = lower(model, images[:1], {"preprocessing": HALF}, as_runtimes=True).program
        assert Graph(program, FORMS, looked_up)._order_matters(program.tensors[program.input]) is matters


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is at hand")
def test_c_takes_bytes_and_gives_predictions(pixels, tmp_path):
    program, given, images = pixels
    manifest = package.write(program, tmp_path / "p", images[:4].numpy())
    assert manifest["input"]["preprocessing"] == program.about["preprocessing"] and manifest["output"]["scale"]
    scores = program.decode(package.Reference(program).run(program.encode(images[:4].numpy())))
    numbers = ", ".join(map(str, given[:4].flatten().tolist()))
    (tmp_path / "p" / "c" / "main.c").write_text(
        '#include <stdio.h>\n#include "ends.h"\n'
        f"static const uint8_t pixels[] = {{{numbers}}};\n"
        "int main(void) {\n    static q64 in[NETWORK_INPUT], out[NETWORK_OUTPUT];\n    for (int n = 0; n < 4; n++) {\n"
        "        network_encode(pixels + n * NETWORK_INPUT, in);\n        network(in, out);\n"
        '        printf("%d %.9g\\n", network_argmax(out), network_decode(out, 1));\n    }\n    return 0;\n}\n'
    )
    sources = sorted(str(p) for p in (tmp_path / "p" / "c").glob("*.c"))
    flags = ["-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic"]
    subprocess.run(["cc", *flags, *sources, "-o", str(tmp_path / "run")], check=True)
    printed = [
        line.split()
        for line in subprocess.run([str(tmp_path / "run")], capture_output=True, text=True).stdout.splitlines()
    ]
    assert [int(p) for p, _ in printed] == scores.argmax(1).tolist()
    assert np.allclose([float(s) for _, s in printed], scores[:, 1], rtol=1e-7)
