"""What a network and a data set from outside must keep, and a recipe as a whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qexp.calibration.calibrate import calibrate
from qexp.data.contract import DataSet
from qexp.errors import QexpError
from qexp.layers.swap import check_all_ran
from qexp.network.facts import facts
from qexp.recipe import apply, resolve
from qexp.run import pipeline
from qexp.run.datasets import load_data
from qexp.run.settings import Settings
from qexp.system.objects import make

DEFAULT_SIZE = (3, 32, 32)  # of images, for a network whose file names no size


def network_faults(settings: Settings) -> Iterator[str]:
    """Yields what is wrong with a network: it does not return one score per class, or cannot carry quantizers."""
    classes, size = settings.data.num_classes, tuple(settings.network.input_size or DEFAULT_SIZE)
    model = make(settings.network.net, where="model.net").eval()
    images = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = model(images)
    if getattr(scores, "shape", None) != (4, classes):
        got = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        yield f"returns {got} for 4 images {list(size)}; [4, {classes}] is needed, one score for each of the data set's classes"
    found = facts(model, images[:1])
    plan = resolve(model, found, pipeline.recipe(settings))
    if not any(entry.spec for entry in plan):
        yield "has no layer that carries quantizers"
    apply(model, plan, found)
    calibrate(model, [images], progress=False)
    check_all_ran(model, images)
    if found.trace_error:
        yield f"has no graph ({found.trace_error}); it is quantized layer by layer, and has no integer program"


def dataset_faults(settings: Settings) -> Iterator[str]:
    """Yields what is wrong with a data set: its class, its batches, its number of classes, or images that are in two parts."""
    data = load_data(settings.data.module)
    if not isinstance(data, DataSet):
        yield f"{type(data).__name__} is no subclass of qexp.data.contract.DataSet"
        return
    example = data.example()
    if example.ndim != 4 or len(example) != 1 or not example.is_floating_point():
        yield f"example() returns {example.dtype} {list(example.shape)}; one image [1, C, H, W], normalised, is needed"
    if (classes := getattr(data, "num_classes", settings.data.num_classes)) != settings.data.num_classes:
        yield f"has {classes} classes, its file says dataset.num_classes={settings.data.num_classes}"
    seen: dict[str, set[bytes]] = {}
    for part in ("train", "val", "test"):
        seen[part] = set()
        for number, (images, targets) in enumerate(getattr(data, f"{part}_dataloader")()):
            if images.shape[1:] != example.shape[1:] or len(images) != len(targets):
                yield f"{part}: a batch is {list(images.shape)} with {len(targets)} targets; the example is {list(example.shape)}"
            if part != "train":  # whose images are augmented
                seen[part] |= {image.numpy().tobytes() for image in images}
            if number == 20:
                break
    if both := seen["val"] & seen["test"]:
        yield f"{len(both)} images are in the calibration part and in the test part"
    drawn = data.calibration_batches(8, 4, 0)
    if sum(map(len, drawn)) not in range(1, 9):
        yield f"calibration_batches(8, 4, 0) returns {sum(map(len, drawn))} images"
    if data.fingerprint() != data.content_hash():
        yield "content_hash() returns something else at a second call"


def no_fault(error: Exception) -> str:
    """Returns an exception as a sentence."""
    return str(error) if isinstance(error, QexpError) else f"raises {type(error).__name__}: {error}"
