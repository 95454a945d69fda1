"""``ReplaySchedule``: a saved decision log, played again without a search."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import replace
from typing import Any

from lightning.pytorch.callbacks import Callback

from autotune.callbacks._batch_player import BatchPlayer
from autotune.callbacks._rate_player import RatePlayer
from autotune.callbacks._run_log import RunLog
from autotune.callbacks._saved import check_origin, stamp
from autotune.callbacks._trainer import horizon as horizons
from autotune.callbacks._trainer.facts import callbacks_named, logs_now, warn, window_end, window_start
from autotune.callbacks._trainer.guards import refuse_optimizers, refuse_unsupported
from autotune.callbacks._trainer.resume import DataPosition
from autotune.decision import Decision, encode, read_decisions
from autotune.errors import ConfigurationError, StateError, UnsupportedSetupError
from autotune.replay import Schedule, schedule_of

_STATE_VERSION = 2
#: What a decision says of trials.
_TRIALS = frozenset({"candidates", "posterior", "legs", "trial_steps", "seconds"})


class ReplaySchedule(Callback):
    """Trains with the learning rates and batches that an earlier run found, without a trial or a measurement.

    With the same seeds, model, data and trainer arguments the run is the logged one bit for bit: the batch grows where
    it grew, and weights that were gone back to are remembered, and gone back to again. With other seeds, or a longer
    run, it is a plain schedule. A run that was limited by time is replayed by its updates, since a clock never ticks
    twice the same.

    The replay writes a decision log of its own, without the trials, which can be shown and replayed in turn.

    Args:
        path: A ``decisions.jsonl``, or the directory that holds it.

    Raises:
        ConfigurationError: At construction, for what is no path.
        LogFormatError: At construction, for a log that cannot be read or of a run in which nothing was controlled.
        UnsupportedSetupError: When a fit starts, for a setup that cannot be served.
        StateError: When a fit goes on from a checkpoint without a replay's state, or with that of another log's.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        if not isinstance(path, (str, os.PathLike)):
            raise ConfigurationError(f"path names a run's directory or its decisions.jsonl; got {path!r}")
        self.path = os.fspath(path)
        logged = read_decisions(path)
        self._schedule = schedule_of(logged, self.path)
        self._first_step = min(decision.step for decision in logged)
        digest = hashlib.sha256("\n".join(map(encode, logged)).encode()).hexdigest()
        self._settings = {"log": f"{len(logged)} decisions, SHA-256 {digest[:12]}"}
        self._rates: RatePlayer | None = None
        self._batches: BatchPlayer | None = None
        self._position: DataPosition | None = None
        self._trainer: Any = None
        self._log: RunLog  # of the fit, from its start on
        self._decisions: list[Decision] = []
        self._lr: float | None = None
        self._saved: dict[str, Any] | None = None
        self._ended: dict[str, Any] = {}
        self._fits = True

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

    # ------------------------------------------------------------------ the fit

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be served, and starts to watch the data's position."""
        self._fits, self._saved = stage == "fit", None
        if not self._fits:
            return
        self._ended = {}
        self._rates = self._batches = self._position = None
        refuse_unsupported(trainer, self)
        self._refuse_controllers(trainer)
        self._trainer = trainer
        if self._schedule.resizes:
            self._batches = BatchPlayer(self._schedule, self._record)
            self._batches.attach(trainer)
        if not callbacks_named(trainer, "AdaptiveBatchSize"):  # which restores the position itself
            self._position = DataPosition()
            self._position.attach(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The state to resume is known, the loaders are not set up yet."""
        refuse_optimizers(trainer, self)
        saved, self._log = self._saved, RunLog.of(trainer)
        self._decisions = []
        self._take_history()
        if self._batches is not None:
            self._batches.resume(trainer, None if saved is None else saved["batches"])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Looks at the optimizer and opens the log."""
        self._refuse_other_scheduling(trainer)
        self._refuse_to_begin_later(trainer)
        self._take_history()  # under FSDP2 callbacks are restored later than elsewhere
        self._rates = rates = RatePlayer(
            self._schedule, trainer, pl_module, None if self._saved is None else self._saved["rates"]
        )
        self._lr = None
        saved, self._saved = self._saved, None
        if self._batches is not None:
            self._batches.start(trainer, pl_module, None if saved is None else saved["batches"])
        self._compare_length(trainer)
        if saved is not None:
            rates.load_state_dict(saved["rates"])
            if self._position is not None and saved["position"] is not None:
                self._position.restore(trainer, saved["position"])
            if self._batches is not None:
                self._batches.loader.after_restore(trainer)
        self._log.open()

    def _take_history(self) -> None:
        if self._saved is not None and not self._decisions:
            self._decisions = self._log.restore(self._saved["decisions"])

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Lengths follow the batch; remembers where the epoch's order comes from."""
        if self._batches is not None:
            self._batches.epoch_start(trainer)
        if self._position is not None:
            self._position.epoch_start(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before an update: what the log says happened here, then the rate."""
        if self._rates is not None and window_start(trainer, batch_idx):
            for decision in self._rates.before_update():
                self._record(decision)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an update: its rate goes to the loggers, and the batch is changed if it was then."""
        if self._rates is not None and window_end(trainer):
            self._lr = self._rates.last
            if logs_now(trainer):
                self._log.scalars({"lr": self._lr, **self._batch_in_use()})
        if self._batches is not None:
            self._batches.batch_end(trainer, pl_module, batch_idx)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The epoch is through."""
        if self._batches is not None:
            self._batches.epoch_end(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Goes back to the best weights if the logged run ended so, and writes the last record."""
        step = int(trainer.global_step)
        for decision in self._rates.play(step) if self._rates is not None else ():
            self._record(decision)
        numbers = {"lr": self._lr, "trial_steps": 0, "real_steps": step}
        reason = f"the schedule of {self.path} was replayed without a trial"
        self._record(Decision("finish", "end", reason, step, numbers=numbers))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lets go of optimizer, loader and log; whoever saves a checkpoint after the fit has its state still."""
        if stage == "fit":
            self._ended = self.state_dict()
            self._detach(trainer)
            self._rates = self._batches = self._position = self._trainer = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Hooks come off. The state stays: who saves a checkpoint on an exception comes after us."""
        self._detach(trainer)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a resumed replay needs: position, batch, and the weights that are still to be gone back to."""
        if self._rates is None:
            return self._ended
        trainer, position, batches = self._trainer, self._position, self._batches
        return {
            **stamp(_STATE_VERSION, self._settings),
            "decisions": self._log.saved(self._decisions),
            "rates": self._rates.state_dict(),
            "position": None if position is None else position.state_dict(trainer),
            "batches": None if batches is None else batches.state_dict(trainer),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a saved state when training starts; a checkpoint that is only evaluated says nothing to us.

        Raises:
            StateError: The state is another version's, or of the replay of another log.
        """
        if state_dict and self._fits:
            check_origin("ReplaySchedule", _STATE_VERSION, self._settings, state_dict)
            self._saved = state_dict

    # ------------------------------------------------------------------ pieces

    def _record(self, decision: Decision) -> None:
        """Writes a decision again: what it says of trials did not happen here and is left out."""
        numbers = {key: value for key, value in decision.numbers.items() if key not in _TRIALS}
        if decision.kind == "setup":
            numbers |= {"controller": "ReplaySchedule", "replay_of": self.path}
        cost = decision.cost_steps if decision.kind == "rollback" else 0.0
        played = replace(decision, numbers=numbers, cost_steps=cost)
        self._decisions.append(played)
        self._log.write(played)

    def _batch_in_use(self) -> dict[str, float]:
        return {} if self._batches is None else {"batch_size": self._batches.batch_size}

    def _refuse_controllers(self, trainer: Any) -> None:
        if callbacks_named(trainer, "AutoLRS"):
            raise UnsupportedSetupError("ReplaySchedule and AutoLRS both set the learning rate: keep one of them")
        if self._schedule.resizes and callbacks_named(trainer, "AdaptiveBatchSize"):
            raise UnsupportedSetupError(
                "ReplaySchedule and AdaptiveBatchSize both set the batch, since the log has one that grew: keep one of "
                "them"
            )

    def _refuse_other_scheduling(self, trainer: Any) -> None:
        scheduled = bool(trainer.lr_scheduler_configs)
        if self._schedule.rates != "lr_multiplier" and scheduled != (self._schedule.rates == "peak_lr"):
            had, has = ("none", "one") if scheduled else ("one", "none")
            raise UnsupportedSetupError(
                f"the logged run had {had} learning-rate scheduler from configure_optimizers, this module has {has}: "
                "what the log holds does not fit; use the same configure_optimizers"
            )

    def _refuse_to_begin_later(self, trainer: Any) -> None:
        if self._saved is None and trainer.global_step > self._first_step:
            raise StateError(
                f"the run goes on after {trainer.global_step} updates from a checkpoint that holds no state of "
                f"ReplaySchedule, so what {self.path} says of the updates before was not played: start without a "
                "checkpoint, resume one that a replay has written, or take load_schedule(path).lambda_lr(optimizer)"
            )

    def _compare_length(self, trainer: Any) -> None:
        if not self._schedule.plans:
            return
        planned, logged = horizons.plan(trainer), self._schedule.plans[-1].updates
        if planned.known and math.isfinite(planned.updates) and planned.updates != logged:
            warn(
                f"the log's schedule is over {logged:.0f} updates and this run will make {planned.updates:.0f}: it is "
                "played as it was, and its last rate is held beyond its end"
            )

    def _detach(self, trainer: Any) -> None:
        if self._rates is not None:
            self._rates.remove()
        if self._batches is not None:
            self._batches.detach(trainer)
        if self._position is not None:
            self._position.detach(trainer)
        RunLog.end(trainer)
