"""What a user planned in updates or epochs means the same after growth."""

import lightning as L
import pytest
import torch

from autotune.callbacks.adaptive_batch_size import AdaptiveBatchSize
from tests.batch.toys import QUIET, Weighing, loader, validation

pytestmark = [pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")]


class Save(L.Callback):
    def __init__(self, path, batches):
        self.path, self.batches, self.count = path, batches, 0

    def on_train_batch_end(self, trainer, *_):
        self.count += 1
        if self.count == self.batches:
            trainer.save_checkpoint(self.path)


class Scheduled(Weighing):
    """One step scheduler of the user's, as long as the trainer says the run is."""

    def __init__(self, frequency=1, **kwargs):
        super().__init__(**kwargs)
        self.frequency, self.rates, self.planned = frequency, [], 0

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        self.planned = self.trainer.estimated_stepping_batches // self.frequency
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.planned)
        return [optimizer], [{"scheduler": decay, "interval": "step", "frequency": self.frequency}]


def fit(path, model, *extra, ckpt=None, workers=0, batch=16, **kwargs):
    callback = AdaptiveBatchSize(max_batch_size=batch, rule="norm", every_n_steps=3, lr_scaling="none")
    options = {**QUIET, "max_epochs": 3, "default_root_dir": path, "num_sanity_val_steps": 0, **kwargs}
    trainer = L.Trainer(callbacks=[callback, *extra], **options)
    L.seed_everything(1, verbose=False)
    resume = {"ckpt_path": ckpt, "weights_only": True} if ckpt else {}
    trainer.fit(model, loader(num_workers=workers), validation(), **resume)
    return trainer, callback


def test_the_length_is_the_planned_one_before_and_after_a_resume(tmp_path):
    """The loader is set up while the optimizer is built; an integer cadence is longer than a grown epoch."""
    whole, resumed = Scheduled(), Scheduled()
    _, callback = fit(tmp_path, whole, Save(tmp_path / "mid.ckpt", 12), val_check_interval=20)
    assert callback.batch_size == 16
    fit(tmp_path, resumed, ckpt=tmp_path / "mid.ckpt", val_check_interval=20)
    assert whole.planned == resumed.planned == 75
    assert resumed.rates == whole.rates[12:]
