"""Tiny modules and data, and observers that watch a run on the real Trainer from outside."""

from __future__ import annotations

import hashlib
import inspect
import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from autotune.callbacks import AutoLRS

FEATURES, CLASSES = 6, 3


def examples(count: int = 240, seed: int = 0) -> TensorDataset:
    """A classification problem that a small network learns in a few dozen steps, with some noise left."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    teacher = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(99))
    y = (x @ teacher + 0.5 * torch.randn(count, CLASSES, generator=generator)).argmax(dim=1)
    return TensorDataset(x, y)


class Noisy(Dataset[Any]):
    """The same examples with noise of the moment: whoever draws from torch's generator or ``random`` shows in it."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return x + 0.05 * torch.randn(FEATURES) + 0.01 * random.random(), y


def loader(count: int = 240, batch: int = 4, *, noisy: bool = False, **kwargs: Any) -> DataLoader[Any]:
    """A shuffled training loader; ``generator=<int>`` gives it a generator of its own."""
    if isinstance(kwargs.get("generator"), int):
        kwargs["generator"] = torch.Generator().manual_seed(kwargs["generator"])
    data = Noisy(examples(count)) if noisy else examples(count)
    return DataLoader(data, batch, **{"shuffle": True, **kwargs})


def val_loader(count: int = 48, batch: int = 16, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(examples(count, seed=1), batch, **kwargs)


class Tiny(L.LightningModule):
    """A two-layer network; ``traits`` switch on what a run may have to withstand.

    Every trait that keeps state lets it flow into the loss, so that a trace of it shows in the weights.
    """

    def __init__(self, *traits: str, optimizer: str = "adamw", lr: float = 1e-3, scheduler: str = "") -> None:
        super().__init__()
        self.traits = frozenset(traits)
        self.optimizer, self.lr, self.scheduler = optimizer, lr, scheduler
        norm = nn.BatchNorm1d(12) if "batchnorm" in traits else nn.Identity()
        drop = nn.Dropout(0.2) if "dropout" in traits else nn.Identity()
        self.body = nn.Sequential(nn.Linear(FEATURES, 12), norm, nn.Tanh(), drop)
        self.head = nn.Linear(12, CLASSES)
        if "metrics" in traits:
            self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES)
            self.mean = torchmetrics.MeanMetric()
        if "state" in traits:
            self.steps = 0
            self.history: list[float] = []
            self.recent: deque[float] = deque(maxlen=5)
            self.seen: dict[str, Any] = {"largest": 0.0, "inner": {"count": 0}}
            self.register_buffer("ema", torch.zeros(FEATURES))
        if "frozen" in traits:
            self.body[0].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        if "random" in self.traits:
            x = x + 0.05 * random.random() * float(np.random.standard_normal())
        if "state" in self.traits:
            x = self._stateful(x)
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        if "metrics" in self.traits:
            self.accuracy(logits, y)
            self.mean.update(loss.detach())
            self.log("train_accuracy", self.accuracy, on_step=True, on_epoch=True)
            loss = loss * (1.0 + 0.1 * torch.tanh(self.mean.compute()))
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def _stateful(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        self.history.append(float(x.mean()))
        self.recent.append(float(x.std()))
        self.seen["largest"] = max(self.seen["largest"], float(x.max()))
        self.seen["inner"]["count"] += len(x)
        self.ema = 0.9 * self.ema + 0.1 * x.detach().mean(dim=0)
        drift = self.steps % 3 + len(self.history) % 2 + sum(self.recent) + self.seen["largest"]
        return x - 0.1 * self.ema + 0.01 * (drift + self.seen["inner"]["count"] % 7)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        groups: Any = [p for p in self.parameters() if p.requires_grad]
        if "groups" in self.traits:
            groups = [
                {"params": self.body.parameters(), "lr": self.lr},
                {"params": self.head.parameters(), "lr": 0.125 * self.lr, "weight_decay": 0.1},
            ]
        lr: Any = torch.tensor(self.lr) if "tensor_lr" in self.traits else self.lr
        optimizer = {
            "adamw": lambda: torch.optim.AdamW(groups, lr=lr),
            "sgd": lambda: torch.optim.SGD(groups, lr=lr, momentum=0.9),
        }[self.optimizer]()
        if not self.scheduler:
            return optimizer
        schedulers = {
            "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.02 * step)),
            "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3 * self.lr, total_steps=400),
            "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5),
        }
        config = {"scheduler": schedulers[self.scheduler](), "interval": "step", "monitor": "val_loss"}
        if self.scheduler == "plateau":
            config["interval"] = "epoch"
        return {"optimizer": optimizer, "lr_scheduler": config}


# ---------------------------------------------------------------------- what is compared


def digest(value: Any) -> str:
    """A hash of everything in ``value``: tensors and arrays bit for bit, containers in order, the rest by ``repr``."""
    state = hashlib.sha1()
    _feed(state, value)
    return state.hexdigest()


def _feed(state: Any, value: Any) -> None:
    state.update(type(value).__name__.encode())
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous()
        state.update(str((raw.dtype, tuple(raw.shape))).encode())
        state.update(raw.reshape(-1).view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    elif isinstance(value, np.ndarray):
        state.update(value.tobytes())
    elif isinstance(value, dict):
        for key in value:
            _feed(state, key)
            _feed(state, value[key])
    elif isinstance(value, (list, tuple, deque)):
        for item in value:
            _feed(state, item)
    else:
        state.update(repr(value).encode())


def optimizer_state(optimizer: Any) -> list[Any]:
    """Groups' settings (the rate apart) and every parameter's state, in the order of the groups."""
    apart = ("params", "lr")
    settings = [{key: value for key, value in group.items() if key not in apart} for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [settings, [dict(optimizer.state.get(parameter, {})) for parameter in parameters]]


def _scheduler_state(scheduler: Any) -> list[Any]:
    rates = [float(group["lr"]) for group in scheduler.optimizer.param_groups]
    return [rates, {key: value for key, value in scheduler.state_dict().items() if not callable(value)}]


def random_states(loaders: Any = ()) -> list[Any]:
    """Every generator's state: torch, numpy, random, and the loaders' own."""
    own = [one.generator.get_state() for one in loaders if one.generator is not None]
    return [torch.get_rng_state(), list(np.random.get_state()), random.getstate(), own]


def module_state(module: nn.Module) -> list[Any]:
    """Plain attributes, buffers that no state dict holds, metrics' own state, and gradients."""
    plain = (int, float, str, list, deque, dict, torch.Tensor)
    found: list[Any] = []
    for name, part in module.named_modules():
        values = {key: value for key, value in vars(part).items() if isinstance(value, plain) and key[0] != "_"}
        hidden = ("_update_count", "_computed", "_forward_cache") if isinstance(part, torchmetrics.Metric) else ()
        metric = {key: getattr(part, key) for key in hidden}
        found.append([name, values, dict(part._buffers), metric, part.training])
    found.append([None if p.grad is None else p.grad for p in module.parameters()])
    return found


class Witness(Callback):
    """Writes down what a run does, batch by batch, and what it is told.

    Attributes:
        lrs: Rates of all groups, as the optimizer used them, at each real update.
        states: One dictionary of digests a training batch.
        batches: Hash of every training batch, in order.
        calls: Every hook this callback was called by, with its plain arguments and ``global_step``.
        steps: Optimizer steps counted at the optimizer, trials included.
        forwards: Training-mode calls of ``training_step``, trials and probes included.
    """

    def __init__(self) -> None:
        self.lrs: list[list[float]] = []
        self.states: list[dict[str, Any]] = []
        self.batches: list[str] = []
        self.calls: list[Any] = []
        self.steps = 0
        self.forwards = 0
        self._real = False

    def observe(self, module: L.LightningModule) -> None:
        """Counts forward passes in training mode at the module itself."""
        original = module.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            self.forwards += module.training
            return original(*args, **kwargs)

        module.training_step = training_step  # type: ignore[method-assign]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        self.steps += 1
        if self._real:
            self.lrs.append([float(group["lr"]) for group in optimizer.param_groups])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._real = True
        self.batches.append(digest(batch))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._real = False
        loaders = [one for one in trainer.fit_loop._combined_loader.flattened if isinstance(one, DataLoader)]
        self.states.append(
            {
                "update": trainer.global_step,
                "weights": digest(dict(pl_module.state_dict())),
                "optimizer": digest(optimizer_state(trainer.optimizers[0])),
                "scheduler": digest([_scheduler_state(config.scheduler) for config in trainer.lr_scheduler_configs]),
                "random": digest(random_states(loaders)),
                "module": digest(module_state(pl_module)),
                "loss": digest(outputs),
                "metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("autotune/")},
            }
        )


def _spy(name: str) -> Any:
    def hook(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        plain = [arg for arg in args if isinstance(arg, (int, str))] + sorted(kwargs.items())
        seen = [digest(arg) for arg in args if isinstance(arg, (list, tuple, torch.Tensor))]
        self.calls.append([name, trainer.global_step, trainer.current_epoch, plain, seen])

    return hook


#: Sees every hook a callback can have that Lightning calls with the trainer first, apart from those of checkpoints.
Spy = type(
    "Spy",
    (Callback,),
    {
        name: _spy(name)
        for name, member in inspect.getmembers(Callback, inspect.isfunction)
        if (name.startswith("on_") or name in ("setup", "teardown")) and "checkpoint" not in name
    }
    | {"__init__": lambda self: setattr(self, "calls", [])},
)


class Save(Callback):
    """A checkpoint after so many batches."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches, self.count = path, batches, 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.count += 1
        if self.count == self.batches:
            trainer.save_checkpoint(self.path)


class Break(Callback):
    """An exception from the module's step after so many updates; saves whatever state it leaves."""

    def __init__(self, update: int, path: Path) -> None:
        self.update, self.path = update, path

    def on_exception(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        def training_step(*_: Any) -> None:
            del pl_module.training_step
            raise ZeroDivisionError

        if trainer.global_step == self.update:
            pl_module.training_step = training_step


class PlayRates(Callback):
    """The ten-line callback: uses recorded rates, one list a real update."""

    def __init__(self, lrs: list[list[float]], scheduled: bool) -> None:
        self.lrs, self.scheduled = iter(lrs), scheduled

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_pre_hook(self._set)
        trainer.optimizers[0].register_step_post_hook(self._put_back)

    def _set(self, optimizer: Any, *_: Any) -> None:
        self.before = [float(group["lr"]) for group in optimizer.param_groups]
        for group, lr in zip(optimizer.param_groups, next(self.lrs), strict=True):
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], torch.Tensor) else lr

    def _put_back(self, optimizer: Any, *_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, self.before if self.scheduled else [], strict=False):
            group["lr"] = lr


def trainer(folder: Path, *callbacks: Callback, **kwargs: Any) -> L.Trainer:
    """A quiet Trainer on one CPU that writes below ``folder``."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
    }
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**defaults, **kwargs})


def controller(**kwargs: Any) -> AutoLRS:
    """AutoLRS that searches several times in a short run."""
    return AutoLRS(**{"search": "every_stage", "search_budget": 0.5, **kwargs})


def searches(callback: AutoLRS) -> list[Any]:
    """The searches that tried candidates."""
    return [one for one in callback.decisions if one.kind == "search" and one.action != "skip"]


def fit(
    folder: Path,
    module: Any = None,
    train: Any = None,
    val: Any = True,
    callback: AutoLRS | None = None,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> tuple[AutoLRS, L.Trainer, Witness]:
    """Trains and returns controller, trainer and witness; the weights must come out finite."""
    L.seed_everything(3, verbose=False)
    callback = callback or controller(min_lr=1e-4, max_lr=3e-2)
    module, witness = Tiny() if module is None else module, Witness()
    witness.observe(getattr(module, "_orig_mod", module))
    validation = val_loader() if val is True else val or None
    runner = trainer(folder, callback, *callbacks, witness, **{"max_steps": 60, **settings})
    runner.fit(module, loader(batch=8) if train is None else train, validation)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    return callback, runner, witness
