"""The schedule that a run found, read from its decision log: for the next run of the same kind, without a search.

=============  =========================================================  ==================
symbol         meaning                                                    unit
=============  =========================================================  ==================
``peak``       multiplier on the base shape; without a scheduler of the   learning rate of
               user's it is the first group's rate at the shape's top     the first group
``step``       real updates done before the coming one                    updates
``progress``   share of the run that is done                              1
=============  =========================================================  ==================
"""

from __future__ import annotations

import csv
import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar

from autotune._schedule_log import (
    Plan,
    accumulations_of,
    batches_of,
    epochs_of,
    is_batch_setup,
    is_lr_setup,
    peaks_of,
    plans_of,
    played,
    ratios_of,
)
from autotune.decision import Decision, read_decisions
from autotune.errors import ConfigurationError, LogFormatError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

_T = TypeVar("_T")

#: What a peak is: the rate itself, the rate at the top of the user's scheduler, or a multiplier on the user's rates.
Rates = Literal["lr", "peak_lr", "lr_multiplier"]


@dataclass(frozen=True)
class Schedule:
    """What a run's log says about every one of its updates.

    Attributes:
        plans: How long the run is and its rate's shape, with the update from which on each holds, ascending; empty
            for a run whose rate nobody controlled.
        peaks: (step, peak) from each step on, ascending.
        batches: (step, examples an update) from each step on, ascending; empty where the log does not say.
        accumulations: (step, micro-batches an update), likewise.
        steps: Updates that the log covers.
        rates: What the peaks are: ``"lr"``, ``"peak_lr"`` under a scheduler of the user's, or ``"lr_multiplier"``
            for a run in which only the batch was controlled.
        ratios: Each group's rate in units of the first group's.
        events: Decisions by the step at which they were taken, in the order of the log.
        returns: Steps whose weights the run went back to later.
        resizes: The run had ``AdaptiveBatchSize``, whose decisions are among the events.
        scale_betas: It changed Adam's betas with the batch.
        epoch_examples: Examples an epoch shows, micro-batches where no batch is known; None where the log does not say.
        drop_last: Whether an epoch ends where less than a micro-batch is left.
    """

    plans: tuple[Plan, ...]
    peaks: tuple[tuple[int, float], ...]
    batches: tuple[tuple[int, int], ...]
    steps: int
    rates: Rates = "lr"
    ratios: tuple[float, ...] = (1.0,)
    events: Mapping[int, tuple[Decision, ...]] = field(default_factory=dict)
    returns: frozenset[int] = frozenset()
    resizes: bool = False
    scale_betas: bool = False
    epoch_examples: int | None = None
    drop_last: bool = False
    accumulations: tuple[tuple[int, int], ...] = ()

    def peak(self, step: int) -> float:
        """The peak under which the update after ``step`` updates runs."""
        return _in_force(self.peaks, step)

    def batch_size(self, step: int) -> int | None:
        """Examples in the update after ``step`` updates, an epoch's last may hold fewer; None where unknown."""
        return _in_force(self.batches, step) if self.batches else None

    def plan(self, step: int) -> Plan:
        """The plan under which the update after ``step`` updates runs."""
        return self.plans[max(bisect_right([plan.start for plan in self.plans], step) - 1, 0)]

    def progress(self, step: int) -> float:
        """Share of the run that is done after ``step`` updates.

        Exact where the end is given in updates, or in examples and the log says how many an epoch has; apart from
        the share of an update that is made of micro-batches of two sizes, since workers had some ready. A run that was
        limited by time is spread evenly over its updates.
        """
        plan = self.plan(step)
        if plan.in_examples and self.epoch_examples is not None:
            while len(self._examples) <= step:
                self._examples.append(self._after(len(self._examples) - 1))
            return self._examples[step] / plan.total
        return step / plan.updates

    @cached_property
    def _examples(self) -> list[int]:
        """Examples done after n updates, for as many n as were asked for."""
        return [0]

    def _after(self, step: int) -> int:
        """Examples done after one more update: an epoch's last holds what is left, and what is dropped is done too."""
        assert self.epoch_examples is not None
        left = self.epoch_examples - self._examples[step] % self.epoch_examples
        rest = left - min(self._counted(step), left)
        if self.drop_last and rest < self._counted(step + 1) // self._accumulation(step + 1):
            rest = 0
        return self._examples[step] + left - rest

    def _counted(self, step: int) -> int:
        """What an update counts: examples, or micro-batches where the loader did not say how many they hold."""
        return self.batch_size(step) or self._accumulation(step)

    def _accumulation(self, step: int) -> int:
        return _in_force(self.accumulations, step) if self.accumulations else 1

    def rate(self, step: int) -> float:
        """The first group's learning rate in the update after ``step`` updates.

        Raises:
            ConfigurationError: The rate came from a scheduler, or from the user, and the log does not hold it.
        """
        if self.rates != "lr":
            raise ConfigurationError(_NO_RATE[self.rates])
        return self.peak(step) * self.plan(step).shape(self.progress(step))

    def lambda_lr(self, optimizer: Optimizer) -> LambdaLR:
        """The schedule as a plain torch scheduler, to be stepped after each update; needs nothing of ours later.

        Whatever rates the optimizer has are replaced, the ratios between its groups included where the log has as
        many; where only the batch was controlled they are multiplied. Rollbacks and batches cannot be replayed by a
        scheduler: use ``ReplaySchedule`` for a run that has them.

        Raises:
            ConfigurationError: The run had a scheduler of the user's.
        """
        from torch.optim.lr_scheduler import LambdaLR

        if self.rates == "lr_multiplier":
            return LambdaLR(optimizer, self.peak)
        self.rate(0)
        groups = optimizer.param_groups
        ratios = self.ratios if len(self.ratios) == len(groups) else (1.0,) * len(groups)
        for group, ratio in zip(groups, ratios, strict=True):
            group["lr"] = group["initial_lr"] = ratio
        return LambdaLR(optimizer, self.rate)

    def rows(self) -> list[dict[str, Any]]:
        """One row an update: ``step``, a column called as :attr:`rates`, ``batch_size`` where known."""
        value = self.rate if self.rates == "lr" else self.peak
        rows: list[dict[str, Any]] = []
        for step in range(self.steps):
            size = self.batch_size(step)
            rows.append({"step": step, self.rates: value(step), **({} if size is None else {"batch_size": size})})
        return rows

    def write_csv(self, file: TextIO) -> None:
        """Writes :meth:`rows` as CSV, floats in full."""
        rows = self.rows()
        names = list(rows[0]) if rows else ["step", self.rates]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    def write_json(self, file: TextIO) -> None:
        """Writes the rows, and what they were made from, as one JSON object."""
        plans = [
            {
                "step": plan.start,
                "unit": plan.unit,
                "total": plan.total if math.isfinite(plan.total) else None,
                "updates": plan.updates,
                "warmup": plan.shape.warmup,
                "decay": plan.shape.decay,
                "decay_from": plan.shape.decay_from,
            }
            for plan in self.plans
        ]
        found = {"plans": plans, "peaks": self.peaks, "batches": self.batches, "lr_ratios": self.ratios}
        epochs = {"epoch_examples": self.epoch_examples, "accumulations": self.accumulations}
        json.dump({**found, **epochs, "updates": self.rows()}, file, indent=1)
        file.write("\n")


_NO_RATE = {
    "peak_lr": "the logged run multiplied a learning-rate scheduler of your own, so the log alone has no learning "
    "rate: use ReplaySchedule(path) beside the same scheduler",
    "lr_multiplier": "the logged run controlled the batch only, so the log has multipliers on your own learning rate "
    "and not the rate: use ReplaySchedule(path) beside the same optimizer, or lambda_lr(optimizer), which multiplies",
}


def _in_force(starts: tuple[tuple[int, _T], ...], step: int) -> _T:
    return starts[max(bisect_right(starts, step, key=lambda pair: pair[0]) - 1, 0)][1]


def load_schedule(path: str | os.PathLike[str]) -> Schedule:
    """Reads the schedule out of a decision log.

    Args:
        path: A ``decisions.jsonl``, or the directory that holds it.

    Raises:
        LogFormatError: The log cannot be read, or is of a run in which nothing was controlled.
    """
    return schedule_of(read_decisions(path), str(path))


def schedule_of(decisions: list[Decision], name: str = "the log") -> Schedule:
    """The schedule in a list of decisions.

    Raises:
        LogFormatError: There is no setup record, no decision sets a learning rate, or a plan cannot be one.
    """
    setup = next((decision for decision in decisions if is_lr_setup(decision)), None)
    batch = next((decision for decision in decisions if is_batch_setup(decision)), None)
    if setup is None and batch is None:
        raise LogFormatError(
            f"{name} has no setup record of AutoLRS (with a shape) or of AdaptiveBatchSize: was either of them among "
            "the trainer's callbacks?"
        )
    steps = max(decision.step for decision in decisions)
    peaks = peaks_of(decisions, math.nan if setup is not None else 1.0)
    if not peaks:
        raise LogFormatError(f"{name} has no decision that sets a learning rate: the run ended before its first search")
    rates: Rates = "lr_multiplier" if setup is None else "peak_lr" if setup.numbers.get("scheduler") is True else "lr"
    examples, drop_last = epochs_of(decisions)
    return Schedule(
        plans=plans_of(decisions, steps),
        peaks=peaks,
        batches=batches_of(decisions),
        steps=steps,
        rates=rates,
        ratios=ratios_of(setup),
        events=played(decisions),
        returns=frozenset(
            step for d in decisions if d.action == "roll_back" and isinstance(step := d.numbers.get("to_step"), int)
        ),
        resizes=batch is not None,
        scale_betas=batch is not None and batch.numbers.get("scale_betas") is True,
        epoch_examples=examples,
        drop_last=drop_last,
        accumulations=accumulations_of(decisions),
    )
