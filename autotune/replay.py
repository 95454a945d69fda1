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

from autotune._schedule_log import Plan, batches_of, is_batch_setup, is_lr_setup, peaks_of, plans_of, played, ratios_of
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
        steps: Updates that the log covers.
        rates: What the peaks are: ``"lr"``, ``"peak_lr"`` under a scheduler of the user's, or ``"lr_multiplier"``
            for a run in which only the batch was controlled.
        ratios: Each group's rate in units of the first group's.
        events: Decisions by the step at which they were taken, in the order of the log.
        returns: Steps whose weights the run went back to later.
        resizes: The run had ``AdaptiveBatchSize``, whose decisions are among the events.
        scale_betas: It changed Adam's betas with the batch.
        epoch_examples: Examples an epoch shows; None where the log does not say.
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

    def peak(self, step: int) -> float:
        """The peak under which the update after ``step`` updates runs."""
        return _in_force(self.peaks, step)

    def batch_size(self, step: int) -> int | None:
        """Examples in the update after ``step`` updates; None where the log does not say."""
        return _in_force(self.batches, step) if self.batches else None

    def plan(self, step: int) -> Plan:
        """The plan under which the update after ``step`` updates runs."""
        return self.plans[max(bisect_right([plan.start for plan in self.plans], step) - 1, 0)]

    def progress(self, step: int) -> float:
        """Share of the run that is done after ``step`` updates.

        Exact where the end is given in updates, or in examples and every update takes as many, or the log says how
        many an epoch has. A run that was limited by time is spread evenly over its updates.
        """
        plan = self.plan(step)
        if plan.in_examples and len(self.batches) > 1:
            beyond = max(step - self.steps, 0) * (self.batch_size(step) or 0)
            return (self._examples[min(step, self.steps)] + beyond) / max(plan.total, self._examples[-1])
        return step / plan.updates

    @cached_property
    def _examples(self) -> list[int]:
        """Examples in the first n updates, for every n; an epoch's last update may hold fewer than the others."""
        done = [0]
        for step in range(self.steps):
            batch = self.batch_size(step) or 0
            left = batch if self.epoch_examples is None else self.epoch_examples - done[-1] % self.epoch_examples
            done.append(done[-1] + min(batch, left))
        return done

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
        json.dump({**found, "updates": self.rows()}, file, indent=1)
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
    examples = None if batch is None else batch.numbers.get("epoch_examples")
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
        epoch_examples=examples if isinstance(examples, int) and examples > 0 else None,
    )
