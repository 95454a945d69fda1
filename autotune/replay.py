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
from typing import TYPE_CHECKING, Any, TextIO

from autotune.decision import Decision, read_decisions
from autotune.errors import ConfigurationError, LogFormatError
from autotune.stage.schedule import Shape

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

#: Kinds of decision that put a peak in force; a stage's beginning repeats the one it runs under.
_PEAK_KINDS = ("search", "rollback", "plateau", "stage")


@dataclass(frozen=True)
class Schedule:
    """What a run's log says about every one of its updates.

    Attributes:
        starts: Steps from which the peaks of :attr:`peaks` hold, ascending.
        peaks: Peak from each start on.
        shape: Base shape over progress.
        unit: Unit of the run's end: ``"steps"``, ``"examples"``, ``"seconds"`` or ``"none"``.
        total: The run's end in that unit; infinite where it is not known.
        updates: The updates that progress 1 comes to.
        steps: Updates that the log covers.
        ratios: Each group's rate in units of the first group's.
        scheduled: The run had a scheduler of the user's: peaks multiply it, and there is no shape.
        events: Decisions by the step before which they take effect, in the order they were taken.
        returns: Steps whose weights the run went back to later.
    """

    starts: tuple[int, ...]
    peaks: tuple[float, ...]
    shape: Shape
    unit: str
    total: float
    updates: float
    steps: int
    ratios: tuple[float, ...] = (1.0,)
    scheduled: bool = False
    events: Mapping[int, tuple[Decision, ...]] = field(default_factory=dict)
    returns: frozenset[int] = frozenset()

    def peak(self, step: int) -> float:
        """The peak under which the update after ``step`` updates runs."""
        return self.peaks[max(bisect_right(self.starts, step) - 1, 0)]

    def progress(self, step: int) -> float:
        """Share of the run that is done after ``step`` updates.

        Exact where the end is given in updates, or in examples and every update takes as many; a run that was
        limited by time is spread evenly over its updates.
        """
        return step / self.updates

    def rate(self, step: int) -> float:
        """The first group's learning rate in the update after ``step`` updates.

        Raises:
            ConfigurationError: The run had a scheduler, without which there is no rate.
        """
        self._needs_no_scheduler()
        return self.peak(step) * self.shape(self.progress(step))

    def lambda_lr(self, optimizer: Optimizer) -> LambdaLR:
        """The schedule as a plain torch scheduler, to be stepped after each update; needs nothing of ours later.

        Whatever rates the optimizer has are replaced, the ratios between its groups included where the log has as
        many. Rollbacks cannot be replayed by a scheduler: use ``ReplaySchedule`` for a run that has them.

        Raises:
            ConfigurationError: The run had a scheduler of the user's.
        """
        from torch.optim.lr_scheduler import LambdaLR

        self._needs_no_scheduler()
        groups = optimizer.param_groups
        ratios = self.ratios if len(self.ratios) == len(groups) else (1.0,) * len(groups)
        for group, ratio in zip(groups, ratios, strict=True):
            group["lr"] = group["initial_lr"] = ratio
        return LambdaLR(optimizer, self.rate)

    def rows(self) -> list[dict[str, Any]]:
        """One row an update: ``step``, ``lr`` (or ``multiplier`` under a scheduler), ``batch_size`` where known."""
        name = "multiplier" if self.scheduled else "lr"
        batch: float | None = None
        found = []
        for step in range(self.steps):
            for decision in self.events.get(step, ()):
                size = decision.numbers.get("batch_size", decision.numbers.get("batch"))
                batch = size if isinstance(size, int) and decision.kind in ("batch", "setup") else batch
            value = self.peak(step) if self.scheduled else self.rate(step)
            found.append({"step": step, name: value, **({} if batch is None else {"batch_size": batch})})
        return found

    def write_csv(self, file: TextIO) -> None:
        """Writes :meth:`rows` as CSV, floats in full."""
        rows = self.rows()
        names = list(dict.fromkeys(name for row in rows for name in row)) or ["step", "lr"]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    def write_json(self, file: TextIO) -> None:
        """Writes the rows, and what they were made from, as one JSON object."""
        shape = {"warmup": self.shape.warmup, "decay": self.shape.decay, "updates": self.updates}
        peaks = [list(pair) for pair in zip(self.starts, self.peaks, strict=True)]
        horizon = {"unit": self.unit, "total": self.total if math.isfinite(self.total) else None}
        found = {"horizon": horizon, "shape": shape, "peaks": peaks, "lr_ratios": list(self.ratios)}
        json.dump({**found, "updates": self.rows()}, file, indent=1)
        file.write("\n")

    def _needs_no_scheduler(self) -> None:
        if self.scheduled:
            raise ConfigurationError(
                "the logged run multiplied a learning-rate scheduler of your own, so the log alone has no learning "
                "rate: use ReplaySchedule(path) beside the same scheduler"
            )


def load_schedule(path: str | os.PathLike[str]) -> Schedule:
    """Reads the schedule out of a decision log.

    Args:
        path: A ``decisions.jsonl``, or the directory that holds it.

    Raises:
        LogFormatError: The log cannot be read, or holds no learning-rate decision.
    """
    return schedule_of(read_decisions(path), str(path))


def schedule_of(decisions: list[Decision], name: str = "the log") -> Schedule:
    """The schedule in a list of decisions.

    Raises:
        LogFormatError: There is no setup record, or no decision sets a learning rate.
    """
    setup = next((d for d in decisions if d.kind == "setup" and "shape" in d.numbers), None)
    if setup is None:
        raise LogFormatError(f"{name} has no setup record with a shape: was AutoLRS among the trainer's callbacks?")
    starts, peaks = _peaks(decisions)
    if not starts:
        raise LogFormatError(f"{name} has no decision that sets a learning rate: the run ended before its first search")
    steps = max(decision.step for decision in decisions)
    horizon = _mapping(setup.numbers.get("horizon"))
    for decision in decisions:  # a resumed run may have got another end
        if decision.kind == "setup" and decision.action == "replan":
            horizon = {**horizon, **decision.numbers}
    unit, total = str(horizon.get("unit", "steps")), _float(horizon.get("total"), math.inf)
    updates = _float(horizon.get("updates"), total if unit == "steps" else math.nan)
    if unit == "seconds" or not math.isfinite(updates) or updates <= 0:
        updates = float(max(steps, 1))
    shape = _mapping(setup.numbers.get("shape"))
    ratios = setup.numbers.get("lr_ratios")
    return Schedule(
        starts=tuple(starts),
        peaks=tuple(peaks),
        shape=Shape(_float(shape.get("warmup"), 0.0), shape.get("form") != "hold", 1.0 / updates),
        unit=unit,
        total=total,
        updates=updates,
        steps=steps,
        ratios=tuple(float(ratio) for ratio in ratios) if isinstance(ratios, list) and ratios else (1.0,),
        scheduled=bool(setup.numbers.get("scheduler", False)),
        events=_events(decisions),
        returns=frozenset(int(_float(d.numbers.get("to_step"), -1)) for d in decisions if d.action == "roll_back"),
    )


def _peaks(decisions: list[Decision]) -> tuple[list[int], list[float]]:
    starts: list[int] = []
    peaks: list[float] = []
    for decision in decisions:
        if decision.kind == "batch" and peaks:
            peak = peaks[-1] * _lr_factor(decision)
        elif decision.kind in _PEAK_KINDS:
            peak = _float(decision.numbers.get("multiplier", decision.numbers.get("lr")), math.nan)
        else:
            continue
        if math.isfinite(peak) and (not peaks or peak != peaks[-1]):
            if starts and starts[-1] == decision.effective_step:
                peaks[-1] = peak
            else:
                starts.append(decision.effective_step)
                peaks.append(peak)
    return starts, peaks


def _lr_factor(decision: Decision) -> float:
    numbers = decision.numbers
    return _float(numbers.get("lr_factor", numbers.get("lr_gain")), 1.0)


def _events(decisions: list[Decision]) -> dict[int, tuple[Decision, ...]]:
    found: dict[int, list[Decision]] = {}
    for decision in decisions:
        found.setdefault(decision.effective_step, []).append(decision)
    return {step: tuple(events) for step, events in found.items()}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _float(value: Any, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else default
