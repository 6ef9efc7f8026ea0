"""One network through quantization, folding, lowering, the proof, ONNX and C99: `python -m experiments.coverage.one timm/resnet18`.

The last line that it prints is a JSON object, one cell a column: a number, or the reason why there is none.
"""

from __future__ import annotations

import copy
import json
import logging
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from experiments.coverage.networks import CONF, Network
from qexp.calibration.calibrate import calibrate
from qexp.integer import onnx_file, package
from qexp.integer.lowering import lower
from qexp.integer.program import Conv, Linear
from qexp.integer.verify import verify
from qexp.layers.swap import check_all_ran
from qexp.network.cost import layer_costs, quantized_macs
from qexp.network.facts import Facts, facts
from qexp.passes.base import PassContext
from qexp.passes.clear_sums import ClearSums
from qexp.passes.fold_bn import fold_bn, is_unfolded
from qexp.passes.unchanged import relative_change, results
from qexp.recipe import Recipe, apply, resolve

MEMORY = 14  # GiB
LARGE = 6_000_000  # weights; a compiler reads about a million in a second
ROUNDING = 4  # times what float32 itself moves the result: a network of 100 random layers spreads each rounding
COLUMNS = ("quantize", "fold", "lower", "equal", "onnx", "c99")
SITES = OmegaConf.to_container(OmegaConf.load(CONF / "quant/minmax.yaml"))
DEPLOY = {
    how: OmegaConf.to_container(OmegaConf.load(CONF / f"deploy/{how}.yaml").quant.rules) for how in ("integer", "int8")
}


def cells_of(key: str, large: int = LARGE, memory: int = MEMORY) -> dict[str, Any]:
    """Returns the cells of one network in `memory` GiB; networks of more than `large` weights are not exported."""
    resource.setrlimit(resource.RLIMIT_AS, (memory * 2**30, memory * 2**30))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    network = Network(*key.split("/"))
    model, images = network.build()
    return cells(model, images, network.scores, large)


def cells(model: nn.Module, images: Any, scores: bool = True, large: int = LARGE) -> dict[str, Any]:
    """Returns the cells of a network: what each column counts is said in `__main__`."""
    row: dict[str, Any] = {}
    settle(model, images)
    few = images[:1]
    row["fold"] = attempt(lambda: fold(model, images))
    found = facts(model, few)
    if not scores:
        row["quantize"] = attempt(lambda: share(model, quantize(model, images, found, {}), found))
        return row | dict.fromkeys(COLUMNS[2:], "its result is no single tensor of scores")
    small = sum(p.numel() for p in model.parameters()) <= large
    kept = copy.deepcopy(model) if small else None
    row["quantize"] = attempt(lambda: share(model, quantize(model, images, found, DEPLOY["integer"]), found))
    if isinstance(row["quantize"], str):
        return row | dict.fromkeys(COLUMNS[2:], "not quantized")
    row |= in_integers(model, images, large)
    if kept is None:
        return row | {"onnx": too_large(large)}
    return row | {"onnx": attempt(lambda: in_onnx(kept, images))}


def too_large(large: int) -> str:
    """Returns the reason for which a network is not exported."""
    return f"not tried: more than {large // 10**6} million weights"


def in_integers(model: nn.Module, images: Tensor, large: int) -> dict[str, Any]:
    """Returns the cells of a quantized network's integer program."""
    row: dict[str, Any] = {}
    lowered: list[Any] = []
    row["lower"] = attempt(lambda: len(lowered.append(lower(model, images[:1])) or lowered[0].program.ops))
    if not lowered:
        return row | {"equal": "not lowered", "c99": "not lowered"}
    row["equal"] = attempt(lambda: differing(model, lowered[0], images[:2]))
    if sum(op.weight.size for op in lowered[0].program.ops if isinstance(op, Conv | Linear)) > large:
        return row | {"c99": too_large(large)}
    return row | {"c99": attempt(lambda: in_c(lowered[0].program, images[:1]))}


def attempt(what: Callable[[], Any]) -> Any:
    """Returns a number, or the first sentence of what went wrong."""
    try:
        return what()
    except Exception as error:  # any network may fail in any way: the table says how
        text = f"{error}" if type(error).__name__ == "QexpError" else f"{type(error).__name__}: {error}"
        return " ".join(text.split())[:200]


@torch.no_grad()
def settle(model: nn.Module, images: Any) -> None:
    """Gives the batch norms of a random network the statistics of the images, in place."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with suppress(Exception):  # a norm of one value per channel has no statistics
        model.eval()
        for norm in norms:
            norm.train()
        model(images)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    model.eval()


def fold(model: nn.Module, images: Any) -> int:
    """Folds batch norms in place; returns how many are left.

    Of a detector, the maps are compared: which boxes it finds changes with the last bit of a score.
    """
    found = facts(model, images[:1])
    compared, images = (model, images) if isinstance(images, Tensor) else (model.backbone, torch.stack(images))
    before, kept = results(compared, images), copy.deepcopy(compared)
    if found.trace_error:
        raise RuntimeError(found.trace_error)
    fold_bn(model, found)
    moved = relative_change(before, results(compared, images))
    if moved > 1e-4 and moved > ROUNDING * relative_change(results(kept.double(), images.double()), before):
        raise RuntimeError(f"folding moved the float result by {moved:.1e}")
    return sum(map(is_unfolded, model.modules()))


def quantize(model: nn.Module, images: Any, found: Facts, rules: dict[str, Any]) -> Any:
    """Quantizes a network to 8 bits in place; returns the plan."""
    sites = {site: SITES[site] for site in ("input", "weight")}
    plan = resolve(model, found, Recipe(sites, rules=rules))
    apply(model, plan, found)
    batches = [images] if isinstance(images, Tensor) else [images[i : i + 1] for i in range(len(images))]
    calibrate(model, batches, progress=False, followed_by_relu=found.followed_by_relu)
    check_all_ran(model, batches[0])
    return plan


def share(model: nn.Module, plan: Any, found: Facts) -> float:
    """Returns the percentage of products that stay in float."""
    bits = plan.bits("weight"), plan.bits("input")
    part, _ = quantized_macs(layer_costs(model, found), found.products, *bits, plan.operand_bits())
    return round(100 - part, 2)


def differing(model: nn.Module, lowered: Any, images: Tensor) -> int:
    """Returns how many codes of the integer program differ from the network with the program's rounding."""
    verdict = verify(model, lowered, [(images, None)], reference=1, progress=False)
    return sum(c.differ for c in verdict.integer.values()) + verdict.reference_differ


def in_c(program: Any, images: Tensor) -> int:
    """Returns how many scores of the compiled C99 package differ from the program's: 0, or it fails."""
    with tempfile.TemporaryDirectory() as folder:
        package.write(program, Path(folder) / "package", images.numpy())
        package.compile_and_run(Path(folder) / "package")
    return 0


def in_onnx(model: nn.Module, images: Tensor) -> int:
    """Returns how many codes of onnxruntime differ from the program with `deploy=int8`."""
    found = facts(model, images[:1])
    quantize(model, images, found, DEPLOY["int8"])
    ClearSums().on_fitted(model, PassContext(found, [images], {}))
    program = lower(model, images[:1], as_runtimes=True).program
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        onnx_file.write(program, path)
        compared = onnx_file.compare(program, path, images[:2].numpy())
    return compared.differ + compared.scores


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(cells_of(sys.argv[1])))
