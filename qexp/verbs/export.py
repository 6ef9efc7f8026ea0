"""`qexp.export`: a quantized network as files for others, read back and compared before they are handed over."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from qexp.errors import QexpError, near
from qexp.run import exporters
from qexp.run.exporters import ExportedRun
from qexp.verbs.images import GivenImages
from qexp.verbs.quantize import QuantizedNetwork
from qexp.verbs.verify import judge_of, lowered_of, network_of

WRITTEN = {
    "onnx": "model.onnx",
    "onnx_int4": "model.onnx",
}  # what an exporter leaves in its folder; else a folder of the form's name
MARKS = (
    "package.json",
    "model.pt2",
    "param.bin",
)  # a folder that holds one of these is an earlier export, which may be replaced


@dataclass
class Export:
    """Files that were written, and what they were compared with.

    Attributes:
        form: `package`, `onnx`, `onnx_int4`, `torch` or `fpga`.
        path: The file or folder.
        images: Number of images on which the export was compared with the network or its integer program.
        found: The exporter's counts: bytes, predictions and codes that differ.
    """

    form: str
    path: Path
    images: int
    found: dict[str, Any] = field(default_factory=dict)


def export(
    model: nn.Module | QuantizedNetwork, form: str, path: str | Path, images: Any = None, most: int = 1000
) -> Export:
    """Writes a quantized network as files and returns what was written; each file is read back and compared first.

    Args:
        model: The result of `qexp.quantize` or of `qexp.load`.
        form: `package` (packed weights, the integer program, C99), `onnx` or `onnx_int4` (a file that onnxruntime computes to the last
            code; needs `deploy=int8`), `torch` (an archive of `torch.export`), `fpga` (the files of CAQ's engine).
        path: The file (`onnx`) or the folder to write; an earlier export in its place is replaced.
        images: Images on which the export is compared, in a form that `qexp.verify` takes; by default the calibration images of the
            network that `qexp.quantize` returned.
        most: Compare at most this many images.

    Raises:
        QexpError: The form does not exist, its packages are not installed, a layer has no such form, or the file read back computes
            something else; nothing is written then.

    Example:
        >>> import tempfile, torch, qexp
        >>> from qexp.models.digits_cnn import DigitsCNN
        >>> images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> found = qexp.quantize(DigitsCNN(width=4), images, "mse", "w4a8", "deploy=integer")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = qexp.export(found, "package", f"{folder}/digits")
        ...     sorted(file.name for file in written.path.iterdir())[-4:]
        ['golden.safetensors', 'package.json', 'program.json', 'weights.bin']
    """
    if form not in exporters.FORMS:
        known = list(exporters.FORMS)
        raise QexpError(f"form={form}{near(str(form), known)} is not allowed; use {', '.join(known)}")
    if form in exporters.NEEDS:
        exporters.NEEDS[form]()
    path = Path(path)
    _check_place(path, form)
    if images is None and not isinstance(model, QuantizedNetwork):
        raise QexpError(
            f"images: export of a {type(model).__name__} needs some, to compare the files on; give images=..."
        )
    data = GivenImages(model.images if images is None else images, most)
    if form in exporters.OF_NETWORK:
        network, lowered = network_of(model), None
    else:
        network, lowered = lowered_of(model, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as scratch:
        run = ExportedRun(
            Path(scratch),
            type(network).__name__.lower(),
            network,
            data,
            len(data),
            data.calibration_batches(0, 0, 0),
            lowered,
            judge_of(network, data),
        )
        found = exporters.take(form, run)
        if path.is_dir():
            shutil.rmtree(path)
        (Path(scratch) / WRITTEN.get(form, form)).replace(path)
    return Export(form, path, len(data), found)


def _check_place(path: Path, form: str) -> None:
    """Raises if something else than an earlier export lies where the files should go."""
    if form in WRITTEN and path.is_dir():
        raise QexpError(f"path={path} is a folder; name a file, such as {path / WRITTEN[form]}")
    if form not in WRITTEN and path.is_file():
        raise QexpError(f"path={path} is a file; name a folder for export={form}")
    if path.is_dir() and any(path.iterdir()) and not any((path / mark).exists() for mark in MARKS):
        raise QexpError(f"path={path} holds other files; name a new folder")
