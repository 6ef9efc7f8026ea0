"""Settings of Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qexp.errors import QexpError
from qexp.run.settings.checks import (
    limit,
    none_or,
    specification,
    text,
    truth,
    whole,
)
from qexp.system.objects import TARGET

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
OWN = ("channels_last", "fused_norms", "tf32", "threads", "nice")  # options that are not Lightning's
# options that a run sets itself, so that a value given here would have no effect, and what to use instead
DECIDED = {
    "logger": "every run writes its curves and figures into its own folder; logger=tensorboard (csv, mlflow, wandb) sends them there too",
    "callbacks": "name them in callbacks.NAME",
    "max_epochs": "set schedule.epochs",
    "max_steps": "set schedule.max_steps",
    "gradient_clip_val": "set schedule.gradient_clip",
    "enable_checkpointing": "trainings keep their last and best state in the run's folder",
    "default_root_dir": "set runs_dir and study",
    "enable_model_summary": "layers.csv in the run's folder lists every layer",
    "num_sanity_val_steps": "recipes and devices are checked before any work",
}


@dataclass(frozen=True)
class TrainerOptions:
    """Settings of Lightning's Trainer."""

    options: Mapping[str, Any]  # the node as it is: options of the Trainer, with `_target_`, and those named in `OWN`
    accelerator: str = "auto"
    devices: Any = 1  # auto, or how many processes share a point
    num_nodes: int = 1
    strategy: str = "ddp"  # Lightning's strategy where several processes share a point
    precision: str = "32-true"
    progress: bool = True  # show progress bars
    channels_last: bool | None = (
        None  # channels innermost in memory; None = on a GPU, where convolutions are faster that way
    )
    fused_norms: bool = True  # on a CPU, a batch norm computes the sum and the ReLU after it too
    tf32: bool = False  # let a GPU round the factors of float32 products to 11 bits
    threads: int | None = None  # threads of a CPU for one point; None = those the process starts with
    nice: int = 0  # how far a run stands back behind other work on the machine, 0 to 19

    @classmethod
    def of(cls, node: Any) -> TrainerOptions:
        """Returns the trainer options of a `trainer` node."""
        node = specification(node, "trainer")
        for key, instead in DECIDED.items():
            if (given := node.get(key)) not in (None, False):
                shown = given.get(TARGET, "...") if isinstance(given, Mapping) else given
                raise QexpError(f"trainer.{key}={shown} is not allowed, since a run sets it itself; {instead}")
        precision = str(node.get("precision") or "32-true")
        precision = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}.get(precision, precision)
        if precision not in PRECISIONS:
            raise QexpError(
                f"trainer.precision={node['precision']} is not allowed; use {', '.join(PRECISIONS)}: codes, scales and statistics are "
                "computed in float32 for any precision of products"
            )
        for split in ("train", "val", "test"):
            none_or(limit, node.get(f"limit_{split}_batches"), f"trainer.limit_{split}_batches")
        layout = node.get("channels_last", "auto")
        return cls(
            options=node,
            accelerator=text(node.get("accelerator", "auto"), "trainer.accelerator"),
            devices=node.get("devices", 1),
            num_nodes=whole(node.get("num_nodes", 1), "trainer.num_nodes", 1),
            strategy=text(node.get("strategy", "ddp"), "trainer.strategy"),
            precision=precision,
            progress=truth(node.get("enable_progress_bar", True), "trainer.enable_progress_bar"),
            channels_last=None if layout in (None, "auto") else truth(layout, "trainer.channels_last"),
            fused_norms=truth(node.get("fused_norms", True), "trainer.fused_norms"),
            tf32=truth(node.get("tf32", False), "trainer.tf32"),
            threads=none_or(whole, node.get("threads"), "trainer.threads", 1),
            nice=whole(node.get("nice", 0), "trainer.nice", 0, 19),
        )
