"""The run's own probes: how large they are, whether they can be paid, and what they make of its state."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from autotune.stage.policy import SearchPolicy
from autotune.stage.probe import Probe

if TYPE_CHECKING:
    from autotune.callbacks._lr_run import LRRun


class Checks:
    """Looks at the present weights of one fit, at a price.

    Args:
        run: The fit.
        policy: How the budget is divided.
    """

    def __init__(self, run: LRRun, policy: SearchPolicy) -> None:
        self._run = run
        self._policy = policy
        self._last: tuple[int, Probe] | None = None
        #: What the latest one has cost.
        self.paid = 0.0

    @property
    def cost(self) -> float:
        """What one of them costs, in steps."""
        return self._run.trials.probe_cost

    def affordable(self, count: int = 1) -> bool:
        """Whether the budget pays for so many now."""
        return self._run.left >= count * self.cost

    @property
    def spare(self) -> int:
        """How many the budget pays for, of the whole run, beyond those that its stages make."""
        left = self._run.plan.searchable - self._run.costs.spent
        return int(left / self.cost) - self._policy.stage_checks if self.cost > 0.0 else 0

    def prepare(self) -> None:
        """Chooses the examples; a first search's trials are judged on them too."""
        run = self._run
        allowed = self._policy.probe_steps(run.plan.searchable)
        run.trials.prepare_probe(run.settings, steps=allowed, saved=run.saved.probe)

    def begin(self, start: Probe | None) -> tuple[Probe | None, float]:
        """What the first search has left over pays for more examples from here on.

        Args:
            start: The first search's probe of the present weights; None where none was made.

        Returns:
            The probe that the first stage begins with, and what it has cost in steps.
        """
        run, machine = self._run, self._run.plan.machine
        if start is None or machine.search != "on_evidence":
            return start, 0.0
        earned = run.plan.budget.earned(machine.first * machine.forecast_at * run.plan.updates)
        left = run.plan.searchable - run.costs.spent
        if not run.trials.enlarge_probe(self._policy.check_steps(left, earned)):
            return start, 0.0
        probe = run.trials.probe()
        run.costs.pay(self.cost, first=True)
        # A trial's end was read on fewer examples: what it promised is its progress.
        run.state = replace(run.state, promised=run.state.promised + probe.loss - start.loss)
        return probe, self.cost

    def make(self, *, last: bool = False) -> Probe:
        """A probe of the present weights, counted by the machine; the best weights so far are kept."""
        run, validations = self._run, self._run.validations
        probe = self._probe()
        # What a low rate leaves of a setback is for validations to see, where there are any.
        level = 0.0 if last else 1.0 if validations.current else run.level
        best = run.state.best_probe
        run.state = run.plan.machine.checked(run.state, probe, run.watch.recent(), run.step, level)
        self._keep(probe, best)
        if validations.current and run.best.step == run.step:
            # What validation likes best is no setback, whatever a probe makes of it.
            run.state = replace(run.state, bad=0)
        return probe

    def look(self) -> Probe:
        """A probe in the place of a validation, which the machine is not asked about."""
        run = self._run
        probe, best = self._probe(), run.state.best_probe
        run.state = run.plan.machine.noted(run.state, probe, run.watch.recent(), run.step)
        self._keep(probe, best)
        return probe

    def forget(self) -> None:
        """The weights are others now."""
        self._last = None

    def _probe(self) -> Probe:
        run = self._run
        if self._last is None or self._last[0] != run.step:
            self._last, self.paid = (run.step, run.trials.probe()), self.cost
            run.costs.pay(self.paid)
        else:
            self.paid = 0.0
        return self._last[1]

    def _keep(self, probe: Probe, best: Probe | None) -> None:
        """The weights of the best probe are kept, unless validations choose; they may choose this one."""
        run, validations = self._run, self._run.validations
        if validations.looking or not validations.current:
            if run.state.best_probe is not best:
                run.best.capture(run.step)
            validations.probed(probe)

    def after_return(self, best: Probe | None) -> tuple[Probe | None, float]:
        """A probe of the best weights, which the run has gone back to, and what it has cost in steps.

        Args:
            best: The best probe.
        """
        if self._run.best.step == self._run.state.best_step:
            return best, 0.0
        # Validations chose the weights, of which no probe was made.
        if not self.affordable():
            return None, 0.0
        self._run.costs.pay(self.cost)
        return self._run.trials.probe(), self.cost
