"""What packing gains: `python -m experiments.imagenet_sample.measure WEIGHTS [--images 192]`.

Decoding against the pack, evaluation against a plain torchvision loop, both in one process and in turn, so that what else the
machine does falls on both alike; and the memory that evaluating a tenth and all of a 50,000-image pack takes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from pytorch_lightning import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import SqueezeNet1_1_Weights

from qexp.command.root import register
from qexp.data.decode import rgb
from qexp.data.listing import Listing
from qexp.data.pack import Pack, PackWriter
from qexp.data.tensors import Normalize, TensorLoader
from qexp.models.weights import load_weights
from qexp.run import training
from qexp.run.settings import read

CONF = Path(__file__).resolve().parents[2] / "conf"


class Plain(Dataset):
    """The evaluation of torchvision's references: decode, its weights' transforms, one image at a time."""

    def __init__(self, listing: Listing) -> None:
        self.listing, self.transform = listing, SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms()

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, i: int):
        return self.transform(rgb(self.listing.source.read(self.listing.names[i]))[0]), self.listing.labels[i]


@torch.inference_mode()
def plain_evaluation(model: nn.Module, listing: Listing) -> int:
    """The number of right answers, by a loop as everybody writes it."""
    loader = DataLoader(Plain(listing), 64)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)


def in_turn(rounds: int, variants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of each variant, one after the other in every round; the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            if number:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def memory() -> tuple[float, float]:
    """This process's memory of its own and mapped from files, in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))


def large_pack(folder: Path, images: int, side: int) -> Pack:
    """A pack of random images."""
    writer, rng = PackWriter(folder / "large.pack", (3, side, side)), np.random.default_rng(0)
    for _ in range(images // 100):
        writer.add(rng.integers(0, 256, (100, 3, side, side), dtype=np.uint8), [0] * 100, [], {})
    writer.finish({})
    return Pack(writer.path)


class Large(LightningDataModule):
    """The first images of a pack as a test set.

    Args:
        pack: The images.
        normalize: From uint8 to the network's input.
        images: How many.
    """

    def __init__(self, pack: Pack, normalize: Normalize, images: int) -> None:
        super().__init__()
        self.pack, self.normalize, self.images = pack, normalize, images

    def test_dataloader(self) -> TensorLoader:
        return TensorLoader(self.pack, self.pack.labels, 64, self.normalize, indices=torch.arange(self.images))


def most_memory(evaluate: Callable[[nn.Module], object]) -> float:
    """The most memory of its own, in MB above that before, that the process holds while a small network is evaluated."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1000)
    ).eval()
    most = [0.0]
    model.register_forward_hook(lambda *_: most.append(max(most.pop(), memory()[0])))
    gc.collect()
    before = memory()[0]
    evaluate(model)
    return most[0] - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="float weights of squeezenet1_1")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", type=int, default=50_000, help="images of the pack whose memory is measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    register()
    overrides = ["model=squeezenet1_1", "dataset=imagenet_sample", f"max_samples={args.images}", "trainer=cpu"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*overrides, "trainer.enable_progress_bar=false", "callbacks=default"])
    data = instantiate(cfg.dataset.data, calibration_size=0)
    model = instantiate(cfg.model.net).eval()
    load_weights(model, args.weights)
    listing, pack = data.listings[0].take(range(args.images)), data.arrays.test_images

    decode = lambda: [data.resize(rgb(listing.source.read(name))[0]) for name in listing.names]  # noqa: E731
    rates = in_turn(args.rounds, {"decode": decode, "pack": lambda: Pack(pack.path)[: args.images]})
    n = args.images
    print(
        f"decoding, one process: {n / rates['decode']:.0f} images/s; pack, checksums compared: {n / rates['pack']:.0f}/s"
    )

    with tempfile.TemporaryDirectory() as folder:
        ours = lambda: training.evaluate(model, data, read(cfg), "evaluate", Path(folder))  # noqa: E731
        rates = in_turn(args.rounds, {"plain": lambda: plain_evaluation(model, listing), "qexp": ours})
        print(f"evaluation: torchvision {n / rates['plain']:.1f} images/s, from the pack {n / rates['qexp']:.1f}/s")

    with tempfile.TemporaryDirectory() as folder:
        large = large_pack(Path(folder), args.large, 64)
        print(f"a pack of {args.large} images, {large.path.stat().st_size / 2**20:.0f} MB on disk")
        for part in (args.large // 10, args.large // 10, args.large):  # the first one pays for what is loaded once
            images = Large(large, data.normalize, part)
            more = most_memory(lambda model: training.evaluate(model, images, read(cfg), "evaluate", Path(folder)))  # noqa: B023
            print(
                f"evaluation of {part} images: {more:.1f} MB of own memory more at the peak, {memory()[1]:.0f} MB mapped"
            )


if __name__ == "__main__":
    main()
