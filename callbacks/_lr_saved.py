"""What a checkpoint holds of a fit under learning-rate control, and how a resumed one takes it up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from autotune.callbacks._lr_ledger import Costs
from autotune.decision import Decision
from autotune.stage.machine import StageState

if TYPE_CHECKING:
    from autotune.callbacks._lr_run import LRRun


class SavedRun:
    """Saves and loads the state of one fit.

    Args:
        run: The fit.
    """

    def __init__(self, run: LRRun) -> None:
        self._run = run
        self._memo: dict[str, Any] | None = None
        #: How a resumed run's probe batches were drawn.
        self.probe: dict[str, Any] | None = None

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Moves that a checkpoint holds wholly or not at all: cut off in a trial, they are made again on resuming."""
        self._memo = {**self._evolving(), "decisions": len(self._run.decisions)}
        yield
        self._memo = None

    @property
    def decisions(self) -> list[Decision]:
        """Those that belong to :meth:`state_dict`."""
        decisions = self._run.decisions
        return decisions if self._memo is None else decisions[: self._memo["decisions"]]

    def _evolving(self) -> dict[str, Any]:
        run, probe = self._run, self._run.trials.probe_set
        return {
            "stage": run.state.to_dict(),
            "climb": run.climb.state_dict(),
            "validations": run.validations.state_dict(),
            "costs": run.costs.state_dict(),
            "watch": run.watch.state_dict(),
            "plan": run.plan.state_dict(),
            "probe": self.probe if probe is None else probe.state_dict(),
        }

    def state_dict(self, *, best: bool = True) -> dict[str, Any]:
        """Primitives and tensors.

        Args:
            best: With the best weights, which make a checkpoint about twice as large. Without them a run that goes on
                takes those it begins with for the best.
        """
        evolving = self._evolving() if self._memo is None else self._memo
        weights = self._run.best.state_dict() if best and evolving["stage"]["index"] else {}
        driver = self._run.driver
        return {**evolving, "ratios": list(driver.ratios), "reference": driver.reference, "best": weights}

    def load_state_dict(self, saved: dict[str, Any]) -> float | None:
        """The inverse of :meth:`state_dict`.

        Returns:
            The saved run's length in units of this one's; None where its end has not moved.
        """
        run = self._run
        run.state, run.costs = StageState.from_dict(saved["stage"]), Costs(**saved["costs"])
        run.climb.load_state_dict(saved["climb"])
        run.validations.load_state_dict(saved["validations"])
        run.watch.load_state_dict(saved["watch"])
        self.probe = saved["probe"]
        if saved["best"]:
            run.best.load_state_dict(saved["best"])
        elif run.state.index:
            run.best.capture(run.step)
        return run.plan.load_state_dict(saved["plan"])
