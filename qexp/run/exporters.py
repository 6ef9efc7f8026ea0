"""Exporters: write a finished run as a C package, ONNX file, torch.export archive or files of the FPGA tool.

Each export is read back and compared with the network before its results enter the run's record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp.calibration.calibrate import collect
from qexp.data.contract import DataSet
from qexp.errors import QexpError
from qexp.integer import caq_files, onnx_file, package, torch_file
from qexp.integer.fast import Fast
from qexp.integer.lowered import Lowered
from qexp.layers.swap import baked_weights, evaluating
from qexp.network.facts import facts
from qexp.results.judging import Judge, Judging, differing, total
from qexp.statistics.collectors import MaxMap

log = logging.getLogger(__name__)
GOLDEN = 8  # images that have golden vectors
CLOSE = 1e-4  # tolerance for other implementations of the same float operations, as a share of the greatest score


@dataclass(frozen=True)
class ExportedRun:
    """A run to export.

    Attributes:
        folder: Folder of the run.
        name: Name of its network.
        model: Its network.
        data: Its images.
        count: How many test images an export is compared on.
        calibration: The batches on which its ranges were found.
        lowered: Its integer program, where the form needs one.
        judge: Its task, which turns outputs into decisions and scores; None compares numbers alone.
    """

    folder: Path
    name: str
    model: nn.Module
    data: DataSet
    count: int
    calibration: Sequence[Tensor]
    lowered: Lowered | None = None
    judge: Judge | None = None

    def images(self, count: int | None = None) -> Iterator[tuple[Tensor, Any]]:
        """Yields the first test images and targets, in batches."""
        yield from first(self.data, self.count if count is None else count)

    def golden(self) -> Tensor:
        """Returns the images of golden vectors."""
        return torch.cat([x for x, _ in self.images(GOLDEN)])[:GOLDEN]

    def differing(self, one: Tensor, other: Tensor) -> int | None:
        """Returns for how many images two outputs lead to different decisions; None where the task decides nothing per image."""
        return None if self.judge is None else differing(self.judge.decisions(one), self.judge.decisions(other))


def first(data: DataSet, count: int) -> Iterator[tuple[Tensor, Any]]:
    """Yields the first `count` test images and targets, in batches."""
    left = count
    for images, targets in data.test_dataloader():
        yield images[:left].to(torch.float32), None if targets is None else targets[:left]
        left -= len(images)
        if left <= 0:
            return


def take(form: str, run: ExportedRun) -> dict[str, Any]:
    """Exports a run as `form`, verifies the export, and returns the metrics to record.

    Raises:
        QexpError: A layer cannot be exported in this form, or the export read back does not compute what the run computes.
    """
    run.model.cpu()
    return FORMS[form](run)


def _package(run: ExportedRun) -> dict[str, Any]:
    folder = run.folder / "package"
    manifest = package.write(run.lowered.program, folder, run.golden().numpy())
    found = package.check(folder)
    if found["differ"]:
        raise QexpError(f"{folder}: {found['differ']} golden scores differ from the program's")
    log.info(
        "package: %s, weights %d bytes (%.1f times smaller than float); C: %s",
        folder,
        manifest["weight_bytes"],
        _float_bytes(run.model) / manifest["weight_bytes"],
        found["c"] or "no C compiler found, not tried",
    )
    return {"package_bytes": manifest["weight_bytes"], "package_c": found["c"] or ""}


def _onnx(run: ExportedRun, int4: bool = False) -> dict[str, Any]:
    """Exports an ONNX file whose codes onnxruntime reproduces exactly, or raises."""
    path, unproven = run.folder / "model.onnx", run.folder / "unproven.onnx"
    try:
        made = onnx_file.write(run.lowered.program, unproven, int4)
        compare, session = onnx_file.comparison(run.lowered.program, unproven), onnx_file.session(unproven)
        fast = Fast(run.lowered.program, watched=())
        gaps, seen, judging = [], 0, Judging(run.judge)
        for x, targets in run.images():
            found = compare(x.numpy())
            theirs = torch.from_numpy(session.run(None, onnx_file.fed(run.lowered.program, x.numpy()))[0])
            ours = run.lowered.program.decode(fast.run(run.lowered.program.encode(x.numpy())).numpy())
            gaps.append(run.differing(theirs, torch.from_numpy(ours)))
            judging.add(theirs, targets)
            seen += len(x)
        log.info("%s", found.line())
        if not found.equal:
            raise QexpError(f"export=onnx: {found.line()}; {onnx_file.why(run.lowered.program, int4)}")
        unproven.replace(path)
    finally:
        unproven.unlink(missing_ok=True)
    saturates = onnx_file.saturating(run.lowered.program)
    if saturates:
        log.warning(
            "onnx: x86 processors without VNNI (Intel before Ice Lake, AMD before Zen 4) add pairs of products in 16 bits, which "
            "saturate in %d layers (%s first): onnxruntime computes other codes there; 7-bit weights never saturate (bits=w7a8)",
            len(saturates),
            saturates[0],
        )
    differ = total(gaps)
    _say("onnx", path, made["bytes"], run, seen, "onnxruntime", differ, "the integers'")
    columns = {
        "onnx": "equal",
        "onnx_saturates_without_vnni": len(saturates),
        "onnx_bytes": made["bytes"],
        "onnx_images": seen,
        "onnx_predictions_differ": differ,
    }
    columns |= {"onnx_codes_differ": 100 * found.differ / max(found.codes, 1), "onnx_most": found.most}
    return columns | {"value_onnx": judging.stored}


def _onnx_int4(run: ExportedRun) -> dict[str, Any]:
    return _onnx(run, int4=True)


@torch.no_grad()
def _torch(run: ExportedRun) -> dict[str, Any]:
    folder = run.folder / "torch"
    made = torch_file.write(run.model, folder, run.golden())
    network, images, scores = torch_file.read(folder)
    again = network(images)
    if not torch.allclose(again, scores, rtol=0, atol=CLOSE * float(scores.abs().max())):
        worst = float((again - scores).abs().max())
        raise QexpError(f"{folder}: scores read back differ by up to {worst:.3g} from the network's")
    gaps, seen = [], 0
    with evaluating(run.model), baked_weights(run.model):
        for x, _ in run.images():
            gaps.append(run.differing(network(x), run.model(x)))
            seen += len(x)
    differ = total(gaps)
    _say("torch", folder, made["bytes"], run, seen, "the archive", differ, "the network's")
    return {"torch_bytes": made["bytes"], "torch_images": seen, "torch_predictions_differ": differ}


def _fpga(run: ExportedRun) -> dict[str, Any]:
    folder, structure = run.folder / "fpga", facts(run.model, run.calibration[0][:1].cpu())
    caq_files.refuse(run.model, structure)
    maps = collect(run.model, run.calibration, progress=False, collectors=(MaxMap(),))
    written = caq_files.export(run.model, structure, folder, run.name, maps)
    found = caq_files.check(run.model, structure, folder, run.name)
    size = sum(p.stat().st_size for p in written)
    log.info(
        "fpga: %s, %d files, %d bytes: exponents of %d tensors, parameters, 4-bit weights of %d layers (%d bytes), maps of maxima; "
        "read back, all equal the network's",
        folder,
        len(written),
        size,
        found["tensors"],
        found["layers"],
        found["weight_bytes"],
    )
    return {"fpga_bytes": size, "fpga_weight_bytes": found["weight_bytes"]}


def _say(
    form: str, path: Path, size: int, run: ExportedRun, seen: int, who: str, differ: int | None, whose: str
) -> None:
    tried = (
        f"tried on {seen} images of {who}, for which this task decides nothing"
        if differ is None
        else f"of {seen} predictions of {who} {differ} differ from {whose}"
    )
    log.info("%s: %s, %d bytes (float weights: %d); %s", form, path, size, _float_bytes(run.model), tried)


def _float_bytes(model: nn.Module) -> int:
    return 4 * sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear))


FORMS: dict[str, Callable[[ExportedRun], dict[str, Any]]] = {
    "package": _package,
    "onnx": _onnx,
    "onnx_int4": _onnx_int4,
    "torch": _torch,
    "fpga": _fpga,
}
NEEDS: dict[str, Callable[[], None]] = dict.fromkeys(
    ("onnx", "onnx_int4"), onnx_file.check_installed
)  # each raises where packages are missing
OF_NETWORK = ("torch", "fpga")  # exported from the simulated network, whether or not it can be lowered
