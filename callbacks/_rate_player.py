"""The learning rate of a logged run, played again: the peaks, the shape, and the ways back."""

from __future__ import annotations

import math
from typing import Any

from autotune.callbacks._lr_ledger import BestWeights
from autotune.callbacks._trainer import horizon as horizons
from autotune.callbacks._trainer.peaks import peak_rates
from autotune.callbacks._trainer.rates import RateDriver, ScaledSteps, current_rates
from autotune.decision import Decision
from autotune.replay import Schedule


class RatePlayer:
    """One fit: the optimizer's rates, and the weights to go back to.

    Args:
        schedule: What to play.
        trainer: In a running fit.
        module: Its module.
        saved: :meth:`state_dict` of a run that goes on.
    """

    def __init__(self, schedule: Schedule, trainer: Any, module: Any, saved: dict[str, Any] | None) -> None:
        self._schedule, self._trainer = schedule, trainer
        self._optimizer = optimizer = trainer.optimizers[0]
        self._driver: RateDriver | None = None
        self._peaks: list[float] = []
        self._scaled: ScaledSteps | None = None
        if schedule.rates == "lr_multiplier":
            self._scaled = ScaledSteps(optimizer)
        else:
            ratios = list(schedule.ratios) if len(schedule.ratios) == len(optimizer.param_groups) else None
            scheduled = schedule.rates == "peak_lr"
            # A run that goes on has the top of a user's schedule behind it, perhaps.
            self._peaks = peak_rates(trainer) if saved is None else list(saved["peaks"])
            self._driver = RateDriver(optimizer, self._peaks, scheduled=scheduled, ratios_=ratios)
        self._best = BestWeights(module, optimizer)
        self._begun = False
        self._played = -1  # the last update before which the log was looked at

    @property
    def last(self) -> float:
        """The first group's rate in the last update."""
        if self._driver is not None:
            return self._driver.last
        effective = [] if self._scaled is None else self._scaled.effective
        return float((effective or current_rates(self._optimizer))[0])

    def before_update(self) -> tuple[Decision, ...]:
        """Does what the log says happened before this update, sets its rate, and returns what was played."""
        step = int(self._trainer.global_step)
        played = self.play(step)
        peak = self._schedule.peak(step)
        if self._driver is not None:
            self._driver.apply(peak, self._schedule.plan(step).shape(self._progress(step)))
        elif self._scaled is not None:
            self._scaled.multiplier = peak
        return played

    def play(self, step: int) -> tuple[Decision, ...]:
        """Remembers weights that will be gone back to, and goes back, as the log says; returns what was played.

        Nothing a second time: a checkpoint may have been written in the update after it.
        """
        if step <= self._played:
            return ()
        self._played = step
        events = tuple(d for d in self._schedule.events.get(step, ()) if d.kind not in ("batch", "finish"))
        if step in self._schedule.returns:
            self._best.capture(step)
            self._begun = True
        for decision in events:
            if decision.kind == "rollback" and decision.action == "roll_back" and self._begun:
                self._best.restore()
        return events

    def remove(self) -> None:
        """Takes hooks off the optimizer."""
        for driver in (self._driver, self._scaled):
            if driver is not None:
                driver.remove()

    def state_dict(self) -> dict[str, Any]:
        """The weights to go back to, what was played, and where the user's schedule is highest."""
        best = self._best.state_dict() if self._begun else None
        return {"played": self._played, "best": best, "peaks": self._peaks}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._played = saved["played"]
        if saved["best"] is not None:
            self._best.load_state_dict(saved["best"])
            self._begun = True

    def _progress(self, step: int) -> float:
        # A run whose end was given in examples counts them, so that a short last window of an epoch counts as
        # short as it did then. A stream has no length to count them by, and goes by its updates.
        plan = self._schedule.plan(step)
        if plan.in_examples and math.isfinite(self._trainer.num_training_batches):
            horizon = horizons.Horizon(plan.unit, plan.total, plan.updates)
            return float(horizons.done(self._trainer, horizon) / plan.total)
        return self._schedule.progress(step)
