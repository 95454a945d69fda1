"""A small real training under AutoLRS, in under a second or two."""

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


class Net(L.LightningModule):
    def __init__(self, scheduler=False):
        super().__init__()
        self.scheduler = scheduler
        self.net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 3))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(
            [{"params": self.net[0].parameters(), "lr": 1e-3}, {"params": self.net[3].parameters(), "lr": 3e-3}]
        )
        if not self.scheduler:
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Bomb(L.Callback):
    """Blows the weights up once, so that a controller has something to roll back."""

    def __init__(self, at=60):
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.mul_(100.0)


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def train(folder, callbacks, scheduler=False, ckpt_path=None, stream=False, **kwargs):
    L.seed_everything(1, verbose=False)
    model = Net(scheduler)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(800, 8, generator=generator)
    labels = (inputs @ torch.randn(8, 3, generator=generator)).argmax(1)
    trainer = L.Trainer(
        **{
            "max_steps": 120,
            "accelerator": "cpu",
            "logger": CSVLogger(folder),
            "callbacks": callbacks,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **kwargs,
        }
    )
    train_set, val_set = TensorDataset(inputs[:600], labels[:600]), TensorDataset(inputs[600:], labels[600:])
    loader = DataLoader(Stream(train_set), 32) if stream else DataLoader(train_set, 32, shuffle=True)
    trainer.fit(model, loader, DataLoader(val_set, 100), ckpt_path=ckpt_path)
    return trainer, model
