"""The climb of the held rate in one fit: its state, when it is due, and what it makes of the peak."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autotune.callbacks import _lr_words as words
from autotune.callbacks._losses import LOT
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

    def start_at(self, progress: float) -> float:
        """The share of what a search says with which a run begins that begins there."""
        return 1.0 if self.rule is None else self.rule.start_at(progress)

    def move(self, progress: float) -> None:
        """Where a window is over: the rate rises, falls or stays, and a move is recorded."""
        run, rule, before = self._run, self.rule, self._run.state
        if rule is None or before.lr is None:
            return
        if self._state.first == math.inf and run.watch.in_window >= LOT:
            self._state = rule.begun(self._state, *run.watch.empty_window())
        if progress < rule.begin:
            run.watch.empty_window()
        # Fewer losses than were planned come of a batch that has grown, or of a time limit: the window waits for them.
        if not rule.is_due(self._state, progress) or run.watch.in_window < LOT:
            return
        past = self._state
        loss, error = run.watch.empty_window()
        self._state, factor = rule.step(past, loss, error, progress, rise=not before.bad)
        # A grown batch may have taken the rate past the user's bounds.
        low, high = min(run.settings.low, before.lr), max(run.settings.high, before.lr)
        lr = min(max(before.lr * factor, low), high)
        self._state = replace(self._state, gain=past.gain * lr / before.lr)
        if lr != before.lr:
            run.state = replace(before, lr=lr)
            stuck = rule.on_plateau(self._state, progress)
            reason, numbers = words.climbed(run.state, before, loss, past.best, stuck=stuck)
            run.record("climb", "raise" if lr > before.lr else "lower", reason, numbers=numbers)

    def searched(self, before: float | None, gain: float, progress: float, reach: float = 1.0) -> None:
        """A search has been made, and may have set the rate anew, to so much of what it says.

        Args:
            before: The rate before it.
            gain: The rate now as a share of what the search says.
            progress: Now.
            reach: The highest rate that did a trial no harm, the same way.
        """
        if self._run.state.lr != before:
            self._state = replace(self._state, reach=reach)
            self._begin(gain, progress)

    def taken_back(self, before: float | None, progress: float) -> None:
        """The rate was lowered because it was too high, or because the run went back: from now on it only falls."""
        lr = self._run.state.lr
        factor = 1.0 if before is None or lr is None else lr / before
        self._state = replace(self._state, capped=True)
        self._begin(self._state.gain * factor, progress)

    def clock_moved(self, progress: float) -> None:
        """The run's end has moved: windows have another length, and losses before them another rate's shape."""
        self._begin(self._state.gain, progress)

    def _begin(self, gain: float, progress: float) -> None:
        """Little is known of the loss: what was read is of other weights, another rate or another plan."""
        self._run.watch.empty_window()
        self._state = replace(self._state, gain=gain, best=math.inf, best_error=0.0, better=0, worse=0)
        if self.rule is not None:
            self._state = replace(self._state, due=self.rule.first_due(progress))

    def state_dict(self) -> dict[str, Any]:
        """As primitives."""
        return self._state.to_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._state = ClimbState(**saved)
