"""Times the convolutions of ResNet-18 with rounded products against PyTorch with the products materialised."""

import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..timing import Measure
from . import fixed_point_conv2d

# Input channels, input size, output channels, kernel, stride, how many: ResNet-18 on one 224 x 224 image.
LAYERS = (
    (3, 224, 64, 7, 2, 1),
    (64, 56, 64, 3, 1, 4),
    (64, 56, 128, 3, 2, 1),
    (64, 56, 128, 1, 2, 1),
    (128, 28, 128, 3, 1, 3),
    (128, 28, 256, 3, 2, 1),
    (128, 28, 256, 1, 2, 1),
    (256, 14, 256, 3, 1, 3),
    (256, 14, 512, 3, 2, 1),
    (256, 14, 512, 1, 2, 1),
    (512, 7, 512, 3, 1, 3),
)
FORMAT = {"bits": 16, "fraction_bits": 12}


def materialised(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Returns the convolution from the tensor of all its products, in float32."""
    one, limit = 2.0 ** FORMAT["fraction_bits"], 2.0 ** (FORMAT["bits"] - 1)
    columns = F.unfold(x, weight.shape[2:], 1, padding, stride)
    products = weight.flatten(1)[None, :, :, None] * columns[:, None]
    products = products.mul_(one).round_().clamp_(-limit, limit - 1)
    return products.sum(2).clamp_(-limit, limit - 1) / one


def convolutions(which: str, device: torch.device):
    """Returns a function that computes all convolutions of one image."""
    g = torch.Generator().manual_seed(0)
    work = []
    for channels, size, outputs, kernel, stride, count in LAYERS:
        x = torch.randn(1, channels, size, size, generator=g).to(device)
        w = (torch.randn(outputs, channels, kernel, kernel, generator=g) / 16).to(device)
        work += [(x, w, stride, kernel // 2)] * count

    def kernel_run():
        for x, w, stride, padding in work:
            fixed_point_conv2d(x, w, stride=stride, padding=padding, **FORMAT)

    def materialised_run():
        for arguments in work:
            materialised(*arguments)

    return kernel_run if which == "kernel" else materialised_run


def measures(device: torch.device) -> list[Measure]:
    """Returns the time for all convolutions of one image; the memory is printed by `python -m` on this module."""
    return [
        Measure(
            "ResNet-18 image, products rounded",
            convolutions("kernel", device),
            "products materialised in PyTorch",
            convolutions("materialised", device),
            1 / 20,
        )
    ]


def peak(which: str) -> float:
    """Returns the growth, in MiB, of a new process's peak memory while it computes one image."""
    code = f"import {__spec__.name} as b; b.report_growth({which!r})"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def report_growth(which: str) -> None:
    """Prints the growth of the peak memory of this process."""
    from ..loader import load

    load("cpp" if which == "kernel" else "reference")
    torch.ones(8).sum()
    run = convolutions(which, torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which the imports have set
    before = _memory("VmRSS")
    run()
    print(_memory("VmHWM") - before)


def _memory(kind: str) -> float:
    """Returns the resident memory of this process in MiB, now (`VmRSS`) or at its peak (`VmHWM`)."""
    return next(int(x.split()[1]) / 1024 for x in Path("/proc/self/status").read_text().splitlines() if kind in x)


if __name__ == "__main__":
    one, two = peak("kernel"), peak("materialised")
    print(f"peak memory of one image: kernel {one:.0f} MiB, materialised {two:.0f} MiB, ratio 1/{two / one:.0f}")
