"""``ReplaySchedule``: a saved decision log, played again without a search."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

from lightning.pytorch.callbacks import Callback

from autotune.callbacks._run_log import RunLog
from autotune.callbacks._trainer import horizon as horizons
from autotune.callbacks._trainer.facts import logs_now, warn, window_end, window_start
from autotune.callbacks._trainer.guards import refuse_optimizers, refuse_unsupported
from autotune.callbacks._trainer.rates import RateDriver
from autotune.decision import Decision
from autotune.errors import UnsupportedSetupError
from autotune.replay import Schedule, load_schedule
from autotune.snapshot import OptimizerState, Weights

#: What a decision says of trials.
_TRIALS = frozenset({"candidates", "posterior", "legs", "trial_steps", "seconds"})


class ReplaySchedule(Callback):
    """Trains with the learning rates that an earlier run found, and makes no trial.

    With the same seeds, model, data and trainer arguments the run is the logged one bit for bit: weights
    that were gone back to are remembered, and gone back to again. With other seeds, or a longer run, it is a plain
    schedule. A run that was limited by time is replayed by its updates, since a clock never ticks twice the same.

    The replay writes a decision log of its own, without the trials, which can be shown and replayed in turn.

    Args:
        path: A ``decisions.jsonl``, or the directory that holds it.

    Raises:
        LogFormatError: At construction, for a log that cannot be read or that sets no learning rate.
        UnsupportedSetupError: When a fit starts, for a setup that cannot be served.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = os.fspath(path)
        self._schedule = load_schedule(path)
        self._player: _Player | None = None
        self._decisions: list[Decision] = []
        self._lr: float | None = None
        self._saved: dict[str, Any] | None = None

    @property
    def schedule(self) -> Schedule:
        """What the log says, as a plain object: also a torch ``LambdaLR``, CSV and JSON."""
        return self._schedule

    @property
    def lr(self) -> float | None:
        """The first group's rate in the last update; None before the first."""
        return self._lr

    @property
    def decisions(self) -> list[Decision]:
        """The decisions that have been played so far."""
        return list(self._decisions)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be served."""
        if stage != "fit":
            return
        refuse_unsupported(trainer, self)
        if any(type(callback).__name__ == "AutoLRS" for callback in trainer.callbacks):
            raise UnsupportedSetupError("ReplaySchedule and AutoLRS both set the learning rate: keep one of them")
        if any(decision.kind == "batch" for events in self._schedule.events.values() for decision in events):
            warn(
                "the log also changes the batch size, which ReplaySchedule does not: the learning rates are replayed "
                "as they were, so set the batch the run ended with, or use AdaptiveBatchSize again"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Looks at the optimizer and opens the log."""
        refuse_optimizers(trainer, self)
        self._refuse_other_scheduling(trainer)
        self._compare_length(trainer)
        self._player = player = _Player(self._schedule, trainer, pl_module)
        self._decisions, self._lr = [], None
        saved, self._saved = self._saved, None
        if saved is not None:
            self._decisions = [Decision.from_dict(record) for record in saved["decisions"]]
            RunLog.of(trainer).restore(self._decisions)
            player.load_state_dict(saved["player"])
        RunLog.of(trainer).open()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before an update: what the log says happened here, then the rate."""
        if self._player is not None and window_start(trainer, batch_idx):
            for decision in self._player.before_update():
                self._record(trainer, decision)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an update: its rate goes to the loggers."""
        if self._player is None or not window_end(trainer):
            return
        self._lr = self._player.driver.last
        if logs_now(trainer):
            RunLog.of(trainer).scalars({"lr": self._lr})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Goes back to the best weights if the logged run ended so, and writes the last record."""
        step = int(trainer.global_step)
        for decision in self._player.play(step) if self._player is not None else ():
            self._record(trainer, decision)
        numbers = {"lr": self._lr, "trial_steps": 0, "real_steps": step}
        reason = f"the schedule of {self.path} was replayed without a trial"
        self._record(trainer, Decision("finish", "end", reason, step, numbers=numbers))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lets go of the optimizer and the log."""
        if stage == "fit":
            self._release(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As at the end."""
        self._release(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What a rollback after a resume needs."""
        if self._player is None:
            return {}
        return {"decisions": [decision.to_dict() for decision in self._decisions], "player": self._player.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a saved state when training starts."""
        self._saved = state_dict or None

    def _record(self, trainer: Any, decision: Decision) -> None:
        """Writes a decision again: what it says of trials did not happen here and is left out."""
        numbers = {key: value for key, value in decision.numbers.items() if key not in _TRIALS}
        if decision.kind == "setup":
            numbers |= {"controller": "ReplaySchedule", "replay_of": self.path}
        cost = decision.cost_steps if decision.kind == "rollback" else 0.0
        played = replace(decision, numbers=numbers, cost_steps=cost)
        self._decisions.append(played)
        RunLog.of(trainer).write(played)

    def _refuse_other_scheduling(self, trainer: Any) -> None:
        scheduled = bool(trainer.lr_scheduler_configs)
        if scheduled != self._schedule.scheduled:
            had, has = ("one", "none") if self._schedule.scheduled else ("none", "one")
            raise UnsupportedSetupError(
                f"the logged run had {had} learning-rate scheduler from configure_optimizers, this module has {has}: "
                "what the log holds does not fit; use the same configure_optimizers"
            )

    def _compare_length(self, trainer: Any) -> None:
        planned = horizons.plan(trainer)
        if planned.known and math.isfinite(planned.updates) and planned.updates != self._schedule.updates:
            warn(
                f"the log's schedule is over {self._schedule.updates:.0f} updates and this run will make "
                f"{planned.updates:.0f}: it is played as it was, and its last rate is held beyond its end"
            )

    def _release(self, trainer: Any) -> None:
        if self._player is not None:
            self._player.driver.remove()
            self._player = None
        RunLog.end(trainer)


class _Player:
    """One fit: the optimizer, and the weights to go back to.

    Args:
        schedule: What to play.
        trainer: In a running fit.
        module: Its module.
    """

    def __init__(self, schedule: Schedule, trainer: Any, module: Any) -> None:
        optimizer = trainer.optimizers[0]
        ratios = list(schedule.ratios) if len(schedule.ratios) == len(optimizer.param_groups) else None
        self.driver = RateDriver(optimizer, scheduled=schedule.scheduled, ratios_=ratios)
        self._schedule, self._trainer = schedule, trainer
        self._horizon = horizons.Horizon(schedule.unit, schedule.total, schedule.updates)
        self._weights, self._optimizer = Weights(module), OptimizerState(optimizer)
        self._begun = False

    def before_update(self) -> tuple[Decision, ...]:
        """Does what the log says happened before this update, sets its rate, and returns what was played."""
        step = int(self._trainer.global_step)
        played = self.play(step)
        self.driver.apply(self._schedule.peak(step), self._schedule.shape(self._progress(step)))
        return played

    def play(self, step: int) -> tuple[Decision, ...]:
        """Remembers weights that will be gone back to, and goes back, as the log says; returns what was played."""
        events = tuple(d for d in self._schedule.events.get(step, ()) if d.kind != "finish")
        for decision in events:
            if decision.kind == "rollback" and decision.action == "roll_back" and self._begun:
                self._weights.restore()
                self._optimizer.restore()
            elif decision.kind == "stage" and decision.action == "begin" and step in self._schedule.returns:
                self._weights.capture()
                self._optimizer.capture()
                self._begun = True
        return events

    def state_dict(self) -> dict[str, Any]:
        """The weights to go back to, as primitives and tensors."""
        if not self._begun:
            return {}
        return {"weights": self._weights.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        if saved:
            self._weights.load_state_dict(saved["weights"])
            self._optimizer.load_state_dict(saved["optimizer"])
            self._begun = True

    def _progress(self, step: int) -> float:
        # A run whose end was given in examples counts them, so that a short last window of an epoch counts as
        # short as it did then.
        if self._schedule.unit == "examples" and math.isfinite(self._schedule.total):
            return float(horizons.done(self._trainer, self._horizon) / self._schedule.total)
        return self._schedule.progress(step)
