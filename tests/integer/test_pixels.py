"""Networks that take pixels as they are stored: the same scores as before, and files that take bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.integer.lowering import lower
from qexp.integer.reference import Reference
from qexp.network.facts import facts
from qexp.passes.pixel_input import PixelGrid, fold_pixels, readers
from qexp.recipe import Recipe, apply, resolve
from tests.integer.conftest import CHANNELS, INT8, UNIFORM

HOW = {"mean": (123 / 255, 0.2, 0.4), "std": (0.229, 0.224, 0.3), "max_value": 255.0}  # pixels 123, 51 and 102 are zero


class Colours(nn.Module):
    def __init__(self, groups: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=(1, 2), groups=groups, bias=bias)
        self.relu, self.fc = nn.ReLU(), nn.Linear(6 * 4 * 5, 5)

    def forward(self, x):
        return self.fc(self.relu(self.conv(x)).flatten(1))


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(HOW[k]).view(3, 1, 1) for k in ("mean", "std"))
    return (pixels / HOW["max_value"] - mean) / std


def stored(pixels: torch.Tensor, grid: PixelGrid) -> torch.Tensor:
    return (pixels - torch.tensor(grid.zero).view(3, 1, 1)) * grid.unit


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (24, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize(("groups", "bias"), [(1, False), (3, True)])
def test_scores_stay_and_files_take_bytes(pixels, groups, bias, tmp_path: Path):
    onnx_file = pytest.importorskip("qexp.integer.onnx_file")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, grid = Colours(groups, bias).eval(), PixelGrid.of(**HOW)
    before = model(normalized(pixels))
    names = readers(model, pixels[:1])
    assert names == ["conv"] and grid.zero == (123, 51, 102)
    fold_pixels(model, names, grid, HOW)
    images = stored(pixels, grid)
    assert torch.allclose(model(images), before, atol=1e-4)

    structure = facts(model, images[:1])
    rules = {**INT8, "pixels": grid.rule(names)}
    apply(
        model,
        resolve(model, structure, Recipe(sites={"input": UNIFORM, "weight": CHANNELS}, wbit=8, abit=8, rules=rules)),
        structure,
    )
    calibrate(model, [images], progress=False)
    program = lower(model, images[:1], {"pixels": True}, as_runtimes=True).program
    codes = program.encode(images.numpy())
    assert np.array_equal(codes, pixels.numpy().astype(np.int64))
    onnx_file.write(program, tmp_path / "m.onnx")
    found = onnx_file.compare(program, tmp_path / "m.onnx", images.numpy())
    assert found.equal and found.codes > 4000, found.line()
    bytes_in = onnx_file.session(tmp_path / "m.onnx").run(None, {"pixels": pixels.numpy().astype(np.uint8)})[0]
    ours = program.decode(Reference(program).run(codes))
    assert np.allclose(bytes_in, ours, atol=1e-5) and np.abs(bytes_in - before.detach().numpy()).max() < 0.1


def test_a_border_between_two_codes_is_refused_or_nearest(pixels):
    how = HOW | {"mean": (0.485, 0.456, 0.406)}  # 123.675, 116.28, 103.53
    grid, model = PixelGrid.of(**how), Colours().eval()
    with pytest.raises(
        QexpError,
        match=r"conv pads images with their mean, which is pixel 103.53 in channel 2 .*nearest pads with 104",
    ):
        fold_pixels(model, ["conv"], grid, how)
    fold_pixels(model, ["conv"], grid, how, "nearest")
    inner = Colours().eval()
    inner.conv.padding, inner.fc = (0, 0), nn.Identity()
    mean, std = (torch.tensor(how[k]).view(3, 1, 1) for k in ("mean", "std"))
    before = inner((pixels / 255 - mean) / std)
    fold_pixels(inner, ["conv"], grid, how)  # nothing is padded: exact for every mean
    assert torch.allclose(inner(stored(pixels, grid)), before, atol=1e-4)


def test_images_that_something_else_reads_are_refused(pixels):
    model = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 3))
    with pytest.raises(QexpError, match="0 reads the images and is no ordinary Conv2d"):
        readers(model.eval(), pixels[:1])


def test_a_run_takes_pixels_and_its_file_is_equal(run, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    refused = run("quant=minmax", "deploy=int8_pixels", "verify=20")
    assert (
        refused["status"] == "failed" and "conv1 pads images with their mean, which is pixel 4.896" in refused["error"]
    )
    done = run("quant=minmax", "deploy=int8_pixels", "quant.pixels=nearest", "verify=20")
    assert done["status"] == "ok" and done["verify"] == "equal" and done["drop"] < 3, done
    (folder,) = (f.parent for f in (tmp_path / "runs").glob("*/*/state.safetensors"))
    sent = run(f"weights={folder}", "export=onnx", "verify=200")
    assert sent.get("onnx") == "equal" and sent["onnx_codes_differ"] == 0, sent
