"""Validations in one fit: the trainer's own, which cost nothing, where they come often; else looks that are paid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autotune.callbacks import _lr_words as words
from autotune.callbacks._trainer.facts import validates_averages
from autotune.callbacks._trainer.ranks import Agreement
from autotune.callbacks._trainer.resume import validation_due
from autotune.stage.probe import Probe
from autotune.stage.validations import Validations, ValidationState

if TYPE_CHECKING:
    from autotune.callbacks._lr_run import LRRun

_KEPT_PROBES = 2  # of a stage's end and the run's, which a look must leave paid


class OwnValidations:
    """Keeps what validations say of a fit (:mod:`autotune.stage.validations`).

    Args:
        run: The fit.
    """

    def __init__(self, run: LRRun) -> None:
        self._run = run
        self._ranks = Agreement(run.trainer)
        self._rule = Validations()
        self._state = ValidationState()
        self._before: Any = None
        self._pending: tuple[int, float] | None = None
        self._ended_at = self._probed_at = -1
        self._missed = False
        # Where weights are averaged, validation may be of others than those that a rollback brings back.
        self._read = run.plan.machine.guard and not run.plan.averages and not validates_averages(run.trainer)

    @property
    def pending(self) -> bool:
        """Whether one has been made that nothing has been made of yet."""
        return self._pending is not None

    @property
    def current(self) -> bool:
        """Whether the run is judged by them now, and not by its stages' probes."""
        return self._rule.current(self._state, self._run.plan.progress)

    @property
    def looking(self) -> bool:
        """Whether looks have taken their place."""
        return self._state.looking

    def plan_looks(self, progress: float) -> None:
        """The run begins: what the first search has left over may pay for looks."""
        run, best = self._run, self._run.state.best_probe
        self._state = replace(self._state, start=progress)
        all_seen = best is not None and best.share >= run.plan.machine.nearly_all
        if self._read and all_seen and run.plan.shape.decay and run.plan.machine.search == "on_evidence":
            self._state = self._rule.planned(self._state, run.checks.spare)

    def look_due(self, progress: float) -> bool:
        """Whether a look is to be made before the next update."""
        return self._rule.is_due(self._state, progress)

    def look(self, progress: float) -> None:
        """Probes the present weights in the place of a validation, if that can be paid."""
        run, best = self._run, self._run.state.best_probe
        self._state = self._rule.looked(self._state, progress)
        # Validations that have ceased have chosen weights of which no probe was made.
        known = best is not None and run.best.step == run.state.best_step
        if best is None or not known or not run.checks.affordable(1 + _KEPT_PROBES):
            return
        if not self.looking:
            self._state = self._rule.begun(self._state, best.loss, run.state.best_step)
        probe = run.checks.look()
        reason, numbers = words.looked(run.state, probe)
        run.record("stage", "look", reason, numbers=numbers, cost=run.checks.paid)

    def probed(self, probe: Probe) -> None:
        """The present weights have been probed: where looks are made every probe is one, once an update."""
        if self.looking and self._probed_at != self._run.step:
            self._pending, self._probed_at = (self._run.step, probe.loss), self._run.step

    def began(self, metrics: Mapping[str, Any]) -> None:
        """The trainer begins to validate.

        Args:
            metrics: What it has for its callbacks, earlier validations' values among it.
        """
        self._before = self._run.trials.monitored(metrics)

    def ended(self, metrics: Mapping[str, Any]) -> None:
        """The trainer has validated, on every rank.

        Args:
            metrics: What it has for its callbacks now; nothing is made of it where the monitored name is not new.
        """
        if not self._read or self._missed or self.looking:
            return
        self._ended_at = self._run.step
        value = self._run.trials.monitored(metrics)
        new, self._before = value is not self._before, None
        self._take(self._run.trials.lower_is_better(value) if new else None)

    def catch_up(self) -> None:
        """Where the run was cut off between an update and the end of its validation, that is made up."""
        if self._missed:
            self._take(self._run.trials.validate())
            self._missed = False

    def _take(self, loss: float | None) -> None:
        loss, missing = self._ranks.mean([0.0, 1.0] if loss is None else [loss, 0.0])
        if not missing:
            self._pending = (self._run.step, loss)

    def judge(self, *, last: bool = False) -> str:
        """Takes in the one that is pending; the weights are kept if they are the best.

        Args:
            last: Whether the run is over.

        Returns:
            Why the run has to go back; empty while all is well.
        """
        assert self._pending is not None
        run, best, best_step = self._run, self._state.best, self._state.best_step
        progress, level = run.plan.progress, 0.0 if last else run.level
        (step, loss), self._pending = self._pending, None
        # In the middle of an accumulation window it was of weights that are gone.
        if step != run.step or not (last or self.looking or self._rule.counts(self._state, progress)):
            return ""
        self._state = self._rule.seen(self._state, loss, step, progress, level)
        if self._state.best < best and not self.looking:
            run.best.capture(step)
        if not self._rule.lost(self._state, level):
            return ""
        when = "at the end" if last else "with the rate coming down"
        who = "a look" if self.looking else "validation"
        return f"{who} says {loss:.4g} {when}, where it said {best:.4g} at step {best_step}"

    def went_back(self) -> None:
        """The weights are the best ones again."""
        self._state, self._pending = self._rule.went_back(self._state), None
        # A look would say of them what is known.
        if self.look_due(self._run.plan.progress):
            self._state = self._rule.looked(self._state, self._run.plan.progress)

    def resign(self) -> None:
        """Going back does not help."""
        self._state = replace(self._state, resigned=True)

    def clock_moved(self, scale: float) -> None:
        """The run's end has moved: the same work is ``scale`` times as much progress."""
        self._state = self._rule.moved(self._state, scale, known=self._run.plan.shape.decay)

    def state_dict(self) -> dict[str, Any]:
        """As primitives."""
        read = self._read and not self.looking
        due = read and self._ended_at != self._run.step and validation_due(self._run.trainer)
        pending = None if self._pending is None else list(self._pending)
        return {"state": self._state.to_dict(), "pending": pending, "missed": self._missed or due}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        pending = saved["pending"]
        self._state = ValidationState.from_dict(saved["state"])
        self._pending = None if pending is None else (int(pending[0]), float(pending[1]))
        self._missed = saved["missed"]
