"""Reading the loss off fixed probe batches: the monitored value where there is one, else the training loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch

from autotune.callbacks._trainer.batches import CACHE_BYTES, Batches, bytes_in, examples_in
from autotune.callbacks._trainer.data import second_batches, second_loader, share_of
from autotune.callbacks._trainer.facts import validation_loader
from autotune.callbacks._trainer.horizon import batch_examples
from autotune.callbacks._trainer.ranks import Agreement
from autotune.callbacks._trainer.side_loop import SideLoop
from autotune.errors import MonitorError
from autotune.stage.budget import EVALUATION_STEPS
from autotune.stage.probe import Probe

#: What a validation loss is usually called, most usual first.
_USUAL = ("val_loss", "val/loss", "valid_loss", "valid/loss", "validation_loss", "validation/loss", "loss/val")

#: Batches of one loader after :meth:`ProbeSet.enlarge`, at most.
_MANY = 1024


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


@dataclass(frozen=True)
class ProbePlan:
    """How the probe batches were drawn, so that a resumed run, whose batch may have grown, draws the same.

    Attributes:
        steps: What one evaluation may cost, in optimizer steps.
        batch: Examples in one micro-batch, on all ranks.
        update: Examples in one update, on all ranks.
        limit: Training batches of an epoch.
        batches: How many of one loader at most.
        resolved: Whether it is known what is monitored.
        monitor: The name; None for the training loss.
        why: How it was found.
        training: Whether validation logs nothing of use, so that training batches are drawn.
    """

    steps: float
    batch: int
    update: int
    limit: float
    batches: int = 32
    resolved: bool = False
    monitor: str | None = None
    why: str = ""
    training: bool = False

    @classmethod
    def of(cls, trainer: Any, steps: float) -> ProbePlan:
        """For a run that begins."""
        batch = batch_examples(trainer)
        return cls(float(steps), batch, batch * trainer.accumulate_grad_batches, float(trainer.num_training_batches))


class ProbeSet:
    """Fixed batches on which every candidate and every stage is judged.

    Args:
        trainer: In a running fit.
        monitor: A name that validation logs, or None to find one.
        mode: ``"min"`` or ``"max"``; losses are reported so that lower is better.
        seed: Chooses the batches.
        plan: How many and how large.
    """

    def __init__(self, trainer: Any, *, monitor: str | None, mode: str, seed: int, plan: ProbePlan) -> None:
        self._trainer = trainer
        self._ranks = Agreement(trainer)
        self._wanted = monitor
        self._seed = seed
        self._plan = plan
        self._validation = None if plan.training else validation_loader(trainer)
        self._sign = -1.0 if mode == "max" and not plan.training else 1.0
        self._limits: list[float] = []
        self._parts = self._draw(plan.steps)
        #: The share of what the trainer validates on that one evaluation is of; 0 where it cannot be told.
        self._share = self._shown()
        #: What one evaluation costs, in optimizer steps.
        self.cost = self._cost()

    def _cost(self) -> float:
        # Ranks may hold different numbers of examples, and have to agree on what they can afford.
        return EVALUATION_STEPS * self._ranks.total(sum(part.examples for part in self._parts)) / self._plan.update

    def _shown(self) -> float:
        if self._validation is None:
            return 0.0
        return min(self._ranks.gather(min((part.share for part in self._parts), default=0.0)))

    @property
    def monitor(self) -> str | None:
        """The monitored name; None for the training loss."""
        return self._plan.monitor

    @property
    def why(self) -> str:
        """How it was found; empty before the first evaluation."""
        return self._plan.why

    def monitored(self, metrics: Mapping[str, Any]) -> Any:
        """The monitored tensor of one element in what the trainer has logged; None where there is none.

        Nor is there one where the training loss serves, or before the first probe.
        """
        value = None if self.monitor is None else metrics.get(self.monitor)
        return None if value is None or value.numel() != 1 else value

    def lower_is_better(self, value: Any) -> float:
        """A monitored tensor as a loss."""
        return self._sign * float(value)

    def whole(self, loop: SideLoop) -> float | None:
        """The monitored value on all that the trainer validates on; None as for :meth:`monitored`. Call as a probe."""
        if self._validation is None or self.monitor is None:
            return None
        logged = loop.evaluate(self._validation, self._validation.flattened, self._limits)
        return self._sign * logged[self.monitor][0] if self.monitor in logged else None

    def state_dict(self) -> dict[str, Any]:
        """The plan, as primitives."""
        return asdict(self._plan)

    def _draw(self, steps: float) -> list[Batches]:
        if self._validation is not None:
            loaders = self._validation.flattened
            limits = self._limits = list(self._trainer.fit_loop.epoch_loop.val_loop._max_batches)
            opened = [
                second_batches(loader, self._seed + index, limit, self._plan.batch)
                for index, (loader, limit) in enumerate(zip(loaders, limits, strict=True))
            ]
        else:
            combined = self._trainer.fit_loop._combined_loader
            micro = self._plan.batch // int(self._trainer.world_size)
            loaders, limits = [None], [self._plan.limit]
            opened = [_batches(second_loader(combined, self._seed + 7919, combined.limits, micro), limits[0])]
        allowed, room = 3.0 * steps * self._plan.update / len(opened), CACHE_BYTES / len(opened)
        return [self._take(*one, allowed, room) for one in zip(opened, loaders, limits, strict=True)]

    def _take(self, source: Iterator[Any], loader: Any, limit: float, examples: float, room: float) -> Batches:
        taken: list[Any] = []
        count = 0
        for batch in source:
            size = examples_in(batch)
            room -= bytes_in(batch)
            too_much = room < 0 or (count + size) * int(self._trainer.world_size) > examples
            if len(taken) >= 2 and too_much:
                break
            taken.append(batch)
            count += size
            if len(taken) >= self._plan.batches:
                break
        share = share_of(len(taken), loader, limit, self._plan.batch)
        return Batches(taken, count, loader=loader, share=share)

    def enlarge(self, steps: float) -> bool:
        """Draws more batches, of which one evaluation may cost ``steps`` optimizer steps; whether there are more.

        Those of before are among them. Not where the training loss serves, nor where all is evaluated already.
        """
        if self._validation is None or self._share >= 1.0 or steps <= self.cost:
            return False
        self._plan, before = replace(self._plan, steps=steps, batches=_MANY), self.cost
        self._parts = self._draw(steps)
        self._share = self._shown()
        self.cost = self._cost()
        return self.cost > before

    def __call__(self, loop: SideLoop) -> Probe:
        """Evaluates the present weights. Call under a snapshot: buffers and metrics move.

        Raises:
            MonitorError: The wanted name is not logged, or no longer.
        """
        torch.manual_seed(self._seed)
        logged = loop.evaluate(self._validation, self._parts) if self._validation is not None else {}
        if not self._plan.resolved:
            self._resolve(self._ranks.common(list(logged)))
        if self.monitor is not None:
            if self.monitor not in logged:
                raise MonitorError(
                    f"AutoLRS judges the run by {self.monitor!r}, which validation logged when training began and does "
                    f"not log now (it logs {', '.join(sorted(logged)) or 'nothing'}): log it in every validation, or "
                    "name another by AutoLRS(monitor=...)"
                )
            value, batches = logged[self.monitor]
            return self._agreed(self._sign * value, [self._sign * item for item in batches])
        if self._validation is not None:
            self._switch_to_training()
        losses = loop.training_losses(batch for part in self._parts for batch in part)
        return self._agreed(math.fsum(losses) / len(losses) if losses else math.nan, losses)

    def _agreed(self, value: float, batches: list[float]) -> Probe:
        """The same on every rank: means over them; no single batches where ranks have unequally many."""
        if len(set(self._ranks.gather(len(batches)))) > 1:
            batches = []
        value, *batches = self._ranks.mean([value, *batches])
        return Probe(value, tuple(batches), self._share)

    def _resolve(self, logged: list[str]) -> None:
        monitor, why = self._asked(logged) if self._wanted is not None else self._found(logged)
        self._plan = replace(self._plan, resolved=True, monitor=monitor, why=why)

    def _asked(self, logged: list[str]) -> tuple[str | None, str]:
        if self._wanted in logged:
            return self._wanted, "as asked"
        where = "validation logs " + (", ".join(sorted(logged)) if logged else "nothing")
        if self._validation is None:
            where = "there is no validation loader, so nothing is logged in validation"
        elif self._ranks.size > 1:
            where += " on every rank (a name that only some ranks log does not count)"
        raise MonitorError(
            f"AutoLRS(monitor={self._wanted!r}): this name is not logged in validation; {where}. "
            f"Log it in validation_step by self.log({self._wanted!r}, ...), or leave monitor=None"
        )

    def _found(self, logged: list[str]) -> tuple[str | None, str]:
        names = ", ".join(sorted(logged))
        monitor = find_monitor(logged) if self._sign > 0 else None
        if monitor is not None:
            return monitor, f"found among what validation logs ({names})"
        if self._validation is None:
            return None, "no validation loader: the training loss on fixed batches serves, which are trained on too"
        return None, (
            f"validation logs {names or 'nothing'}, in which no loss is recognised: the "
            "training loss on fixed batches serves, which are trained on too"
        )

    def _switch_to_training(self) -> None:
        self._plan = replace(self._plan, steps=self.cost, training=True)
        self._validation = None
        self._share = 0.0
        self._sign = 1.0
        self._parts = self._draw(self._plan.steps)
        self.cost = self._cost()


def _batches(combined: Any, limit: float) -> Iterator[Any]:
    return (batch for batch, _, _ in islice(combined, None if math.isinf(limit) else int(limit)))
