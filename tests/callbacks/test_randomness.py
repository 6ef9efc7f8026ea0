"""What a training draws belongs to its epoch, whichever loader brings the images."""

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from qexp.callbacks.randomness import EpochSeed


class Drawing(pl.LightningModule):
    """Draws a number a step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drawn = torch.nn.Linear(2, 1), []

    def training_step(self, batch, batch_idx):
        self.drawn.append((self.current_epoch, float(torch.rand(()))))
        return self.linear(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def fit(folder, epochs: int, checkpoint=None, seed: int = 0) -> tuple[list[tuple[int, float]], pl.Trainer]:
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[EpochSeed(seed)], default_root_dir=folder,
    )  # fmt: skip
    module = Drawing()
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(4, 2)), batch_size=2), ckpt_path=checkpoint)
    return module.drawn, trainer


def test_a_resumed_epoch_draws_what_an_uninterrupted_one_does(tmp_path):
    first, trainer = fit(tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    through, _ = fit(tmp_path, 2)
    resumed, _ = fit(tmp_path, 2, tmp_path / "one.ckpt")
    assert through == first + resumed
    assert len({number for _, number in through}) == 4
    assert fit(tmp_path, 1, seed=1)[0] != first
