"""The climb of the held rate in one fit: its state, when it is due, and what it makes of the peak."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autotune.callbacks import _lr_words as words
from autotune.stage.climb import Climb, ClimbState

if TYPE_CHECKING:
    from autotune.callbacks._lr_run import LRRun


class HeldRate:
    """Moves the peak of a run while it is held (:mod:`autotune.stage.climb`).

    Args:
        run: The fit.
    """

    def __init__(self, run: LRRun) -> None:
        self._run = run
        self._state = ClimbState()

    @property
    def rule(self) -> Climb | None:
        """How the rate moves; None where it does not, as under a user's scheduler, which moves it itself."""
        return None if self._run.driver.scheduled else self._run.plan.climb

    @property
    def start(self) -> float:
        """The share of what a search says with which the run begins."""
        return 1.0 if self.rule is None else self.rule.start

    def move(self, progress: float) -> None:
        """Where a window is over: the rate rises, falls or stays, and a move is recorded."""
        run, rule, before = self._run, self.rule, self._run.state
        if rule is None or before.lr is None or not rule.is_due(self._state, progress):
            return
        loss, error = run.watch.empty_window()
        self._state, factor = rule.step(self._state, loss, error, progress, rise=not before.bad)
        lr = run.settings.clip(before.lr * factor)
        # A grown batch may have taken the rate past the user's bounds, where it stays.
        lr = max(lr, before.lr) if factor > 1.0 else min(lr, before.lr) if factor < 1.0 else before.lr
        if lr != before.lr:
            run.state = replace(before, lr=lr)
            reason, numbers = words.climbed(run.state, before, loss, self._state.best)
            run.record("climb", "raise" if lr > before.lr else "lower", reason, numbers=numbers)

    def searched(self, before: float | None, gain: float, progress: float) -> None:
        """A search has been made, and may have set the rate anew, to so much of what it says."""
        if self.rule is not None and self._run.state.lr != before:
            self._state = self.rule.searched(self._state, gain, progress)

    def taken_back(self, progress: float) -> None:
        """The run has gone back, or its rate was lowered."""
        if self.rule is not None:
            self._state = self.rule.taken_back(self._state, progress)

    def clock_moved(self, scale: float) -> None:
        """The run's end has moved."""
        self._state = replace(self._state, due=self._state.due * scale)

    def state_dict(self) -> dict[str, Any]:
        """As primitives."""
        return self._state.to_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._state = ClimbState(**saved)
