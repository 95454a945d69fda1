"""A run in which every update tells which examples it was made of, and with what weight.

Example i is the unit vector e_i and the loss is the mean output of a linear layer: the gradient of its weight is,
coordinate by coordinate, the weight of each example in the update.
"""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autotune.callbacks.adaptive_batch_size import AdaptiveBatchSize

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Weighing(L.LightningModule):
    """``updates[t][i]`` is the weight of example i in update t."""

    def __init__(self, examples=100, epoch_scheduler=False, optimizer=torch.optim.SGD):
        super().__init__()
        self.layer = nn.Linear(examples, 1, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.epoch_scheduler = epoch_scheduler
        self.optimizer = optimizer
        self.updates, self.validated_at, self.batches, self.epoch_of_update = [], [], [], []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch[0].argmax(1).tolist())
        return self.layer(batch[0]).mean()

    def on_before_optimizer_step(self, optimizer):
        self.updates.append(self.layer.weight.grad.detach().clone().reshape(-1))
        self.epoch_of_update.append(self.current_epoch)

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.validated_at.append((self.current_epoch, sum(len(b) for b in self.batches)))

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=1e-3)
        if not self.epoch_scheduler:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "epoch"},
        }


def loader(examples=100, batch_size=4, shuffle=True, **kwargs):
    return DataLoader(TensorDataset(torch.eye(examples)), batch_size, shuffle=shuffle, **kwargs)


def validation():
    return DataLoader(TensorDataset(torch.eye(100)[:8]), 8)


def assert_every_update_is_a_mean(updates):
    """All examples of an update weigh the same, and together 1."""
    for weights in updates:
        present = weights[weights > 0]
        assert torch.allclose(present, torch.full_like(present, 1 / len(present)), rtol=1e-5)


def assert_once_an_epoch(model, examples=100, missing=0):
    for epoch in set(model.epoch_of_update):
        chosen = [w for w, e in zip(model.updates, model.epoch_of_update, strict=True) if e == epoch]
        counts = sum((weights > 0).int() for weights in chosen)
        assert counts.max() == 1
        assert int(counts.sum()) >= examples - missing


def fit(tmp_path, callback=None, model=None, train=None, val=None, extra=(), ckpt_path=None, **kwargs):
    """Trains with growth, by default under a norm rule that always asks for four times the batch here.

    Returns:
        Trainer, module and callback.
    """
    callback = callback or AdaptiveBatchSize(max_batch_size=16, rule="norm", every_n_steps=3)
    model = model or Weighing()
    options = {**QUIET, "max_epochs": 3, "default_root_dir": tmp_path, "num_sanity_val_steps": 0, **kwargs}
    trainer = L.Trainer(callbacks=[callback, *extra], **options)
    L.seed_everything(1, verbose=False)
    val = validation() if val is None else val
    resume = {} if ckpt_path is None else {"ckpt_path": ckpt_path, "weights_only": True}
    trainer.fit(model, loader() if train is None else train, val or None, **resume)
    return trainer, model, callback
