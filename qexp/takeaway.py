"""What a finished run is written as for others to use: a package, an ONNX file, an archive of torch.export, files of the FPGA tool.

Each is read back and compared with the network it was made of before the run's record speaks of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from qexp.calibration.calibrate import collect
from qexp.calibration.collectors import MaxMap
from qexp.errors import QexpError
from qexp.graph import facts
from qexp.integer import caq_files, onnx_file, package, torch_file
from qexp.integer.fast import Fast
from qexp.integer.lowering import Lowered
from qexp.layers.swap import baked_weights, evaluating

log = logging.getLogger(__name__)
GOLDEN = 8  # images of golden vectors
CLOSE = 1e-4  # of the greatest score: what other implementations of the same float operations may differ by


@dataclass(frozen=True)
class Taken:
    """A run that something is made of.

    Attributes:
        folder: The run's.
        model: Its network.
        data: Its images.
        count: How many test images an export is compared on.
        calibration: Batches its ranges were found on.
        lowered: Its integer program, where the form needs one.
    """

    folder: Path
    model: nn.Module
    data: LightningDataModule
    count: int
    calibration: Sequence[Tensor]
    lowered: Lowered | None = None

    def images(self, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the first test images and labels, in batches."""
        yield from first(self.data, self.count if count is None else count)

    def golden(self) -> Tensor:
        """Returns the images of golden vectors."""
        return torch.cat([x for x, _ in self.images(GOLDEN)])[:GOLDEN]


def first(data: LightningDataModule, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the first so many test images and labels, in batches."""
    left = count
    for images, labels in data.test_dataloader():
        yield images[:left].to(torch.float32), labels[:left]
        left -= len(images)
        if left <= 0:
            return


def take(form: str, run: Taken) -> dict[str, Any]:
    """Writes a run as `form`, tries it, and returns what the record says of it.

    Raises:
        QexpError: A layer has no such form, or what was read back is not what the run computes.
    """
    run.model.cpu()
    return FORMS[form](run)


def _package(run: Taken) -> dict[str, Any]:
    folder = run.folder / "package"
    manifest = package.write(run.lowered.program, folder, run.golden().numpy())
    found = package.check(folder)
    if found["differ"]:
        raise QexpError(f"{folder}: {found['differ']} golden scores are not the program's")
    log.info(
        "package: %s, weights %d bytes (%.1f times smaller than float); C: %s",
        folder,
        manifest["weight_bytes"],
        _float_bytes(run.model) / manifest["weight_bytes"],
        found["c"] or "no compiler at hand, not tried",
    )
    return {"package_bytes": manifest["weight_bytes"], "package_c": found["c"] or ""}


def _onnx(run: Taken) -> dict[str, Any]:
    path = run.folder / "model.onnx"
    made = onnx_file.write(run.lowered.program, path)
    session, fast = onnx_file.session(path), Fast(run.lowered.program, watched=())
    differ, right, seen = 0, 0, 0
    for x, labels in run.images():
        theirs = session.run(None, {"images": x.contiguous().numpy()})[0].argmax(1)
        ours = fast.run(run.lowered.program.encode(x.numpy())).argmax(1).numpy()
        differ, seen = differ + int((theirs != ours).sum()), seen + len(x)
        right += int((theirs == labels.numpy()).sum())
    _say("onnx", path, made["bytes"], run, seen, "onnxruntime", differ, "the integers'")
    codes = onnx_file.compare(run.lowered.program, path, run.golden().numpy())
    log.info(
        "onnx: %(differ)d of %(codes)d codes differ from the integers', by at most %(most)d (golden images)", codes
    )
    columns = {"onnx_bytes": made["bytes"], "onnx_images": seen, "onnx_predictions_differ": differ}
    columns |= {"onnx_codes_differ": 100 * codes["differ"] / max(codes["codes"], 1), "onnx_most": codes["most"]}
    return columns | {"value_onnx": 100 * right / max(seen, 1)}


@torch.no_grad()
def _torch(run: Taken) -> dict[str, Any]:
    folder = run.folder / "torch"
    made = torch_file.write(run.model, folder, run.golden())
    network, images, scores = torch_file.read(folder)
    again = network(images)
    if not torch.allclose(again, scores, rtol=0, atol=CLOSE * float(scores.abs().max())):
        worst = float((again - scores).abs().max())
        raise QexpError(f"{folder}: scores read back differ by up to {worst:.3g} from the network's")
    differ, seen = 0, 0
    with evaluating(run.model), baked_weights(run.model):
        for x, _ in run.images():
            differ += int((network(x).argmax(1) != run.model(x).argmax(1)).sum())
            seen += len(x)
    _say("torch", folder, made["bytes"], run, seen, "the archive", differ, "the network's")
    return {"torch_bytes": made["bytes"], "torch_images": seen, "torch_predictions_differ": differ}


def _fpga(run: Taken) -> dict[str, Any]:
    folder, structure = run.folder / "fpga", facts(run.model, run.calibration[0][:1].cpu())
    net = str(OmegaConf.load(run.folder / "config.yaml").model.name)
    caq_files.refuse(run.model, structure)
    maps = collect(run.model, run.calibration, progress=False, collectors=(MaxMap(),))
    written = caq_files.export(run.model, structure, folder, net, maps)
    found = caq_files.check(run.model, structure, folder, net)
    size = sum(p.stat().st_size for p in written)
    log.info(
        "fpga: %s, %d files, %d bytes: exponents of %d tensors, parameters, 4-bit weights of %d layers (%d bytes), maps of maxima; "
        "read back, all are the network's",
        folder,
        len(written),
        size,
        found["tensors"],
        found["layers"],
        found["weight_bytes"],
    )
    return {"fpga_bytes": size, "fpga_weight_bytes": found["weight_bytes"]}


def _say(form: str, path: Path, size: int, run: Taken, seen: int, who: str, differ: int, whose: str) -> None:
    log.info(
        "%s: %s, %d bytes (float weights: %d); of %d predictions of %s %d differ from %s",
        form,
        path,
        size,
        _float_bytes(run.model),
        seen,
        who,
        differ,
        whose,
    )


def _float_bytes(model: nn.Module) -> int:
    return 4 * sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear))


FORMS: dict[str, Callable[[Taken], dict[str, Any]]] = {
    "package": _package,
    "onnx": _onnx,
    "torch": _torch,
    "fpga": _fpga,
}
NEEDS: dict[str, Callable[[], None]] = {"onnx": onnx_file.check_installed}  # raise where packages are missing
OF_NETWORK = ("torch", "fpga")  # made of the simulated network, whether or not it can be lowered
