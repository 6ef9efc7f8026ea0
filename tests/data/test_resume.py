"""Under Lightning's own loop, a run that resumes after an epoch sees the batches of an uninterrupted one."""

import pytest
import pytorch_lightning as pl
import torch
from torch.nn.functional import cross_entropy

from qexp.data.digits import Digits


class Recorder(pl.LightningModule):
    """A linear classifier that writes down the labels and pixels of each batch by epoch."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(64, 10)
        self.seen: dict[int, list[tuple[list[int], float]]] = {}

    def training_step(self, batch, index):
        images, labels = batch
        self.seen.setdefault(self.current_epoch, []).append((labels.tolist(), float(images.sum())))
        return cross_entropy(self.fc(images.flatten(1)), labels)

    def validation_step(self, batch, index):
        self.log("loss", cross_entropy(self.fc(batch[0].flatten(1)), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(epochs, folder, checkpoint=None):
    torch.manual_seed(0)
    module = Recorder()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(module, datamodule=Digits(augment={"padding": 1}, seed=3), ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # inside Lightning
def test_resumed_epochs_are_those_of_the_uninterrupted_run(tmp_path):
    through = fit(3, tmp_path)
    fit(2, tmp_path)
    resumed = fit(3, tmp_path, tmp_path / "last.ckpt")
    assert sorted(resumed.seen) == [2] and resumed.seen[2] == through.seen[2]
    assert through.seen[0] != through.seen[1]
    assert torch.equal(resumed.fc.weight, through.fc.weight)
