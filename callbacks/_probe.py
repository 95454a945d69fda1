"""Reading the loss off fixed probe batches: the monitored value where there is one, else the training loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from autotune.callbacks._trainer.data import Batches, examples_in, second_loader, single_loader
from autotune.callbacks._trainer.facts import validation_loader
from autotune.callbacks._trainer.horizon import batch_examples
from autotune.callbacks._trainer.side_loop import SideLoop
from autotune.errors import MonitorError
from autotune.stage.budget import EVALUATION_STEPS
from autotune.stage.machine import Probe

#: What a validation loss is usually called, most usual first.
_USUAL = ("val_loss", "val/loss", "valid_loss", "valid/loss", "validation_loss", "validation/loss", "loss/val")


def find_monitor(logged: list[str]) -> str | None:
    """The validation loss among ``logged`` names; None where no name, or more than one, could be meant.

    >>> find_monitor(["val_acc", "val/loss"]), find_monitor(["my_loss", "acc"]), find_monitor(["acc"])
    ('val/loss', 'my_loss', None)
    """
    for usual in _USUAL:
        if usual in logged:
            return usual
    candidates = [name for name in logged if "loss" in name.lower()]
    return candidates[0] if len(candidates) == 1 else None


class ProbeSet:
    """Fixed batches on which every candidate and every stage is judged.

    Args:
        trainer: In a running fit.
        monitor: A name that validation logs, or None to find one.
        mode: ``"min"`` or ``"max"``; losses are reported so that lower is better.
        seed: Chooses the batches.
        steps: What one evaluation may cost, in optimizer steps.
    """

    def __init__(self, trainer: Any, *, monitor: str | None, mode: str, seed: int, steps: float) -> None:
        self._trainer = trainer
        self._wanted = monitor
        self._sign = -1.0 if mode == "max" else 1.0
        self._seed = seed
        self._update_examples = batch_examples(trainer) * trainer.accumulate_grad_batches
        self._validation = validation_loader(trainer)
        self._parts = self._draw(steps)
        self.monitor: str | None = None
        self.why = ""
        self._resolved = False
        #: What one evaluation costs, in optimizer steps.
        self.cost = EVALUATION_STEPS * sum(part.examples for part in self._parts) / self._update_examples

    def _draw(self, steps: float) -> list[Batches]:
        if self._validation is not None:
            loaders = self._validation.flattened
            limits = self._trainer.fit_loop.epoch_loop.val_loop._max_batches
            largest = batch_examples(self._trainer)
            opened = [
                iter(single_loader(loader, self._seed + index, limit, largest))
                for index, (loader, limit) in enumerate(zip(loaders, limits, strict=True))
            ]
        else:
            combined = self._trainer.fit_loop._combined_loader
            training = second_loader(combined, self._seed + 7919, combined.limits)
            limits = [self._trainer.num_training_batches]
            opened = [_batches(training)]
        allowed = 3.0 * steps * self._update_examples / len(opened)
        return [self._take(source, allowed, limit) for source, limit in zip(opened, limits, strict=True)]

    def _take(self, source: Iterator[Any], examples: float, limit: float) -> Batches:
        taken: list[Any] = []
        count = 0
        for batch in islice(source, None if math.isinf(limit) else int(limit)):
            size = examples_in(batch) * int(self._trainer.world_size)
            if len(taken) >= 2 and count + size > examples:
                break
            taken.append(batch)
            count += size
            if len(taken) >= 32:
                break
        return Batches(taken, count)

    def __call__(self, loop: SideLoop) -> Probe:
        """Evaluates the present weights. Call under a snapshot: buffers and metrics move.

        Raises:
            MonitorError: The wanted name is not logged.
        """
        torch.manual_seed(self._seed)
        logged = loop.evaluate(self._validation, self._parts) if self._validation is not None else {}
        if not self._resolved:
            self._resolve(list(logged))
        if self.monitor is not None:
            value, batches = logged[self.monitor]
            return Probe(self._sign * value, tuple(self._sign * item for item in batches))
        if self._validation is not None:
            self._switch_to_training()
        losses = loop.training_losses(batch for part in self._parts for batch in part)
        return Probe(math.fsum(losses) / len(losses) if losses else math.nan, tuple(losses))

    def _resolve(self, logged: list[str]) -> None:
        self._resolved = True
        if self._wanted is not None:
            if self._wanted not in logged:
                where = "validation logs " + (", ".join(sorted(logged)) if logged else "nothing")
                if self._validation is None:
                    where = "there is no validation loader, so nothing is logged in validation"
                raise MonitorError(
                    f"AutoLRS(monitor={self._wanted!r}): this name is not logged in validation; {where}. "
                    f"Log it in validation_step by self.log({self._wanted!r}, ...), or leave monitor=None"
                )
            self.monitor, self.why = self._wanted, "as asked"
            return
        self.monitor = find_monitor(logged) if self._sign > 0 else None
        if self.monitor is not None:
            self.why = f"found among what validation logs ({', '.join(sorted(logged))})"
        elif self._validation is None:
            self.why = "no validation loader: the training loss on fixed batches serves, which are trained on too"
        else:
            self.why = (
                f"validation logs {', '.join(sorted(logged)) or 'nothing'}, in which no loss is recognised: the "
                "training loss on fixed batches serves, which are trained on too"
            )

    def _switch_to_training(self) -> None:
        steps = self.cost
        self._validation = None
        self._sign = 1.0
        self._parts = self._draw(steps)
        self.cost = EVALUATION_STEPS * sum(part.examples for part in self._parts) / self._update_examples


def _batches(combined: Any) -> Iterator[Any]:
    return (batch for batch, _, _ in combined)
