"""A workload is plain data (so that its hash names its results) and builds a LightningModule.

The same definition runs under a Lightning Trainer and in a bare loop: ``module.loss(batch)`` needs no Trainer.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from data import SOURCES, Batch, TensorBatches, as_is
from models import NETWORKS
from torch import Tensor, nn
from torch.utils.data import DataLoader

_NAMES = ["SGD", "Adam", "AdamW", "NAdam", "RMSprop", "Adagrad", "Adamax", "RAdam", "Adadelta", "Adafactor", "ASGD"]
OPTIMIZERS = {name: getattr(torch.optim, name) for name in _NAMES}
REVISION = 1  # raise it when a change in code that no hash sees changes results


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean over all positions; works for class labels and for language models."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def brier(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of the probabilities: bounded, so a far too large LR saturates it and never explodes it."""
    return (output.softmax(-1) - F.one_hot(target, output.shape[-1])).square().sum(-1).mean()


def elbo(output: Tensor, target: Tensor) -> Tensor:
    """Negative evidence lower bound in nats an image, of the pixels' logits and the code's means and log variances."""
    pixels = target.shape[1]
    mean, log_variance = output[:, pixels:].chunk(2, 1)
    read = F.binary_cross_entropy_with_logits(output[:, :pixels], target, reduction="sum")
    told = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum()
    return (read + told) / len(target)


def summed(output: Tensor, target: Tensor) -> Tensor:
    """:func:`cross_entropy`, summed over the batch and its positions."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="sum")


def faint(output: Tensor, target: Tensor) -> Tensor:
    """A thousandth of :func:`cross_entropy`, as a part of a loss of many terms may be weighted."""
    return 1e-3 * cross_entropy(output, target)


LOSSES = {
    "cross_entropy": cross_entropy,
    "mse": F.mse_loss,
    "brier": brier,
    "smooth_l1": F.smooth_l1_loss,
    "elbo": elbo,
    "summed": summed,
    "faint": faint,
}


class Task(L.LightningModule):
    """A network, a loss and an optimizer; logs ``train_loss`` and ``val_loss``, as a user's module would."""

    def __init__(self, network: nn.Module, loss: str, optimizer: str, options: Mapping[str, Any], lr: float) -> None:
        super().__init__()
        self.network, self.criterion = network, LOSSES[loss]
        self.optimizer_name, self.options, self.lr = optimizer, dict(options), lr
        self.recipe: Callable[[Task], Any] | None = None

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of one batch."""
        return self.criterion(self.network(batch[0]), batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))

    def plain_optimizer(self) -> torch.optim.Optimizer:
        """The workload's own optimizer at ``lr``."""
        return OPTIMIZERS[self.optimizer_name](self.parameters(), lr=self.lr, **self.options)

    def configure_optimizers(self) -> Any:
        return self.plain_optimizer() if self.recipe is None else self.recipe(self)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of the suite. ``steps`` is T, optimizer steps; ``batch_size`` is in examples."""

    name: str
    source: str
    network: str
    loss: str
    optimizer: str
    steps: int
    batch_size: int
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shape: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    clip: float | None = None
    pretrain: Mapping[str, Any] | None = None
    gpu: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def scaled(self, scale: str) -> Workload:
        """This workload, or its larger twin for ``scale="gpu"``."""
        if scale == "cpu":
            return self
        twin = {k: dict(getattr(self, k), **v) if isinstance(v, Mapping) else v for k, v in self.gpu.items()}
        return dataclasses.replace(self, name=f"{self.name}-gpu", gpu={}, **twin)

    def cut(self, steps: int | None) -> Workload:
        """This workload, or its short twin of ``steps`` optimizer steps; None leaves it as it is."""
        if steps is None:
            return self
        return dataclasses.replace(self, name=f"{self.name}-{steps}", steps=steps)

    def key(self) -> str:
        """Hash of what decides this workload's numbers, but for helpers of its source and network (see REVISION)."""
        parts = (inspect.unwrap(SOURCES[self.source]), NETWORKS[self.network], LOSSES[self.loss])
        # Through the syntax tree: comments and formatting change no result and so must not change the hash.
        code = [ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(part)))) for part in parts]
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k != "gpu"}
        return hashlib.sha256(json.dumps([REVISION, fields, code], sort_keys=True).encode()).hexdigest()[:12]

    def sets(self) -> tuple[TensorBatches, TensorBatches]:
        """Training and validation sets, cached in memory."""
        return SOURCES[self.source](**self.data)

    def build(self, seed: int, lr: float = 1e-3) -> Task:
        """A fresh module whose initial weights depend on ``seed`` alone."""
        state = torch.get_rng_state()
        torch.manual_seed(1000 + seed)
        task = Task(NETWORKS[self.network](**self.shape), self.loss, self.optimizer, self.options, lr)
        if self.pretrain is not None:
            task.network.load_state_dict(pretrained(self, seed))
        torch.set_rng_state(state)
        return task

    def train_loader(self, seed: int) -> DataLoader[Any]:
        """Shuffled training batches; the order depends on ``seed`` alone."""
        generator = torch.Generator().manual_seed(2000 + seed)
        return DataLoader(
            self.sets()[0], self.batch_size, shuffle=True, drop_last=True, generator=generator, collate_fn=as_is
        )

    def val_loader(self) -> DataLoader[Any]:
        """The whole validation set, in order."""
        return DataLoader(self.sets()[1], self.batch_size, collate_fn=as_is)


_PRETRAINED: dict[tuple[str, int], dict[str, Tensor]] = {}


def pretrained(workload: Workload, seed: int) -> dict[str, Tensor]:
    """Weights of the same network after AdamW on a neighbouring data set (``pretrain``: data, steps, lr)."""
    found = (workload.key(), seed)
    if found not in _PRETRAINED:
        plan = dict(workload.pretrain or {})
        train = SOURCES[workload.source](**plan["data"])[0]
        task = Task(NETWORKS[workload.network](**workload.shape), workload.loss, "AdamW", {}, plan["lr"])
        optimizer = task.configure_optimizers()
        generator = torch.Generator().manual_seed(seed)
        for step in range(plan["steps"]):
            optimizer.param_groups[0]["lr"] = plan["lr"] * (1 - step / plan["steps"])
            rows = torch.randint(len(train), (workload.batch_size,), generator=generator)
            optimizer.zero_grad()
            task.loss(train.__getitems__(rows)).backward()
            optimizer.step()
        _PRETRAINED[found] = {k: v.clone() for k, v in task.network.state_dict().items()}
    return _PRETRAINED[found]
