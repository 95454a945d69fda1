"""What follows when a stage, a validation or the whole run has been judged: another rate, a search, the way back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from autotune.callbacks import _lr_words as words
from autotune.stage.machine import StageState
from autotune.stage.probe import Probe

if TYPE_CHECKING:
    from autotune.callbacks._lr_run import LRRun


class Verdicts:
    """Draws the consequences in one fit.

    Args:
        run: The fit.
    """

    def __init__(self, run: LRRun) -> None:
        self._run = run

    def settle(self, progress: float, probe: Probe, *, paid: bool = False) -> None:
        """A stage is over: it is judged, and the next begins.

        Args:
            progress: Now.
            probe: Of the present weights.
            paid: Whether it was paid as a forecast's.
        """
        run, before = self._run, self._run.state
        run.state, verdict, evidence = run.plan.machine.ended(before, probe, run.driver.level(run.plan.shape(progress)))
        self._judged(before, probe, evidence, cost=0.0 if paid else run.checks.paid)
        if verdict == "roll_back":
            self._roll_back(before, f"the stage ended at {probe.loss:.4g}, worse than the best")
            self._begin_again(progress, before)
            return
        if verdict == "decay":
            run.record("plateau", "decay", evidence[0], numbers=words.rate(run.state, before))
        elif verdict == "lower":
            run.record("setback", "lower", evidence[0], numbers=words.rate(run.state, before))
            run.climb.taken_back(before.lr, progress)
        elif verdict == "search":
            run.search(progress, "; ".join(evidence) or "a stage has ended")
        run.begin_stage(progress, probe)

    def recover(self, progress: float, why: str) -> None:
        """The run has diverged, or validation says that it got worse: it goes back, until that is seen not to help."""
        run, before = self._run, self._run.state
        run.watch.trouble = ""
        run.state, verdict = run.plan.machine.failed(before)
        if verdict == "roll_back":
            self._roll_back(before, why)
            self._begin_again(progress, before)
        else:
            run.validations.resign()
            run.record("rollback", "keep", f"{why}; going back does not help, so training goes on", numbers={})

    def end(self) -> None:
        """The run is over: it goes back if it has lost ground."""
        run = self._run
        if not run.state.index:
            return
        lost = run.validations.judge(last=True) if run.validations.pending else ""
        if run.checks.affordable():
            run.watch.read()
            probe = run.checks.make(last=True)
            self._judged(run.state, probe, (), cost=run.checks.paid)
            if run.validations.pending:
                lost = lost or run.validations.judge(last=True)
            # Validations may like best what a probe finds worse: there is nothing to go back to.
            worse = run.plan.machine.lost(run.state) and run.best.step != run.step
            if worse or not math.isfinite(probe.loss):
                lost = lost or f"the run ended at {probe.loss:.4g}, worse than its best"
        if lost:
            before = run.state
            run.state, verdict = run.plan.machine.failed(before, last=True)
            if verdict == "roll_back":
                self._roll_back(before, lost)

    def _judged(self, state: StageState, probe: Probe, evidence: tuple[str, ...], *, cost: float) -> None:
        reason, numbers = words.judged(state, self._run.step, probe, evidence)
        self._run.record("stage", "end", reason, numbers=numbers, cost=cost)

    def _roll_back(self, before: StageState, why: str) -> None:
        run = self._run
        run.best.restore()
        # What was said, or is not read yet, is of the updates that are undone.
        run.watch.read()
        run.watch.trouble = ""
        run.checks.forget()
        run.climb.taken_back(before.lr, run.plan.progress)
        run.validations.went_back()
        numbers = words.rolled_back(run.state, before, run.step, run.best.step)
        reason = f"{why}: back to the weights of step {run.best.step}, at a lower rate"
        run.record("rollback", "roll_back", reason, numbers=numbers, cost=numbers["lost_steps"])

    def _begin_again(self, progress: float, before: StageState) -> None:
        probe, cost = self._run.checks.after_return(before.best_probe)
        self._run.begin_stage(progress, probe, cost, returned=True)
