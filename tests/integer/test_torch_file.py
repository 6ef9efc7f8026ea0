"""An archive of torch.export computes what the network does, for any batch, in a program that has no qexp."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qexp.errors import QexpError
from qexp.integer import torch_file
from tests.integer.conftest import FIXED
from tests.networks import Residual

WITHOUT_US = """
import sys
import torch
from safetensors.torch import load_file
golden = load_file(sys.argv[1] + "/golden.safetensors")
network = torch.export.load(sys.argv[1] + "/model.pt2").module()
print(float((network(golden["images"]) - golden["scores"]).abs().max()), len(network(golden["images"][:1])))
assert not [name for name in sys.modules if name.startswith("qexp")]
"""


def test_the_archive_is_the_network_without_us(quantize, tmp_path):
    model, images = quantize(Residual(), 4, 6, weight=FIXED)
    expected = model(images)
    made = torch_file.write(model, tmp_path / "t", images[:5])
    assert torch.equal(model(images), expected), "the network is left as it was"
    assert made["bytes"] == (tmp_path / "t" / "model.pt2").stat().st_size and made["operations"] > 20
    archive = (tmp_path / "t" / "model.pt2").read_bytes()
    assert b"torch_file.py" not in archive and b"site-packages" not in archive, "nothing of the machine it was made on"
    network, golden, scores = torch_file.read(tmp_path / "t")
    assert torch.equal(golden, images[:5]) and torch.equal(scores, model(images[:5]))
    assert torch.allclose(network(images), expected, rtol=0, atol=1e-5)
    ran = subprocess.run([sys.executable, "-I", "-c", WITHOUT_US, str(tmp_path / "t")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    worst, count = ran.stdout.split()
    assert float(worst) < 1e-5 and count == "1"


def test_a_network_that_looks_at_its_data_is_refused(quantize, tmp_path):
    class Looks(Residual):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model, images = quantize(Residual())
    model.__class__ = Looks
    with pytest.raises(QexpError, match=r"export=torch: Looks cannot be traced by torch\.export"):
        torch_file.write(model, tmp_path / "t", images[:2])
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("name", ["model.pt2", "golden.safetensors"])
def test_a_damaged_archive_is_refused(name, quantize, tmp_path):
    model, images = quantize(Residual())
    torch_file.write(model, tmp_path / "t", images[:2])
    path = tmp_path / "t" / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(QexpError, match=r"is missing, cut short or damaged .*; export the run again"):
        torch_file.read(tmp_path / "t")
