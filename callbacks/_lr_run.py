"""One fit under learning-rate control: what the stage machine asks for, done on the trainer.

The machine (:mod:`autotune.stage.machine`) says *when*; the searches (:mod:`autotune.search`), the forecaster and the
snapshots say *what*; here they are put together, paid from one budget, and every outcome becomes a ``Decision``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from autotune.callbacks import _lr_words as words
from autotune.callbacks._losses import LossWatch
from autotune.callbacks._lr_checks import Checks
from autotune.callbacks._lr_climb import HeldRate
from autotune.callbacks._lr_ledger import BestWeights, Costs
from autotune.callbacks._lr_plan import LRPlan
from autotune.callbacks._lr_saved import SavedRun
from autotune.callbacks._lr_search import LRSearches, SearchOutcome
from autotune.callbacks._lr_validations import OwnValidations
from autotune.callbacks._lr_verdicts import Verdicts
from autotune.callbacks._run_log import RunLog
from autotune.callbacks._trainer.facts import inform
from autotune.callbacks._trainer.horizon import exempt_from_time_limit
from autotune.callbacks._trainer.peaks import peak_rates
from autotune.callbacks._trainer.ranks import Agreement
from autotune.callbacks._trainer.rates import RateDriver, initial_rates
from autotune.callbacks._trials import Trials
from autotune.decision import Decision
from autotune.stage.machine import StageState
from autotune.stage.outlook import Outlook, look_ahead
from autotune.stage.probe import Probe
from autotune.stage.settings import LRSettings

_NOT_ASKED = Outlook(math.nan, math.nan, math.nan, "forecasts are off")


class LRRun:
    """The state and the moves of one fit.

    Args:
        settings: The user's.
        trainer: In a running fit.
        module: Its module.
        saved: A state to go on from, or None.
        decisions: Those before ``saved``; the run's own are appended.
    """

    def __init__(
        self,
        settings: LRSettings,
        trainer: Any,
        module: Any,
        saved: dict[str, Any] | None,
        decisions: list[Decision],
    ) -> None:
        self.settings = settings
        self.trainer = trainer
        self.decisions = decisions
        self.state = StageState()
        self.climb = HeldRate(self)
        self.costs = Costs()
        self.log = RunLog.of(trainer)
        self.optimizer = optimizer = trainer.optimizers[0]
        scheduled, begun = bool(trainer.lr_scheduler_configs), saved or {}
        # A run that goes on has its top behind it, perhaps.
        peaks = peak_rates(trainer) if saved is None else initial_rates(optimizer)
        self.driver = RateDriver(
            optimizer, peaks, scheduled=scheduled, ratios_=begun.get("ratios"), reference=begun.get("reference")
        )
        self.trials = Trials(
            trainer, module, set_rates=self.driver.trial, ratios=self.driver.ratios, seed=settings.seed
        )
        self.best = BestWeights(module, optimizer)
        self._ranks = Agreement(trainer)
        self.watch = LossWatch()
        self._prepared = False
        self.plan = LRPlan(settings, trainer)
        self._searches = LRSearches(settings, self)
        self.checks = Checks(self, self._searches.policy)
        self.validations = OwnValidations(self)
        self.verdicts = Verdicts(self)
        self.saved = SavedRun(self)
        if saved is not None:
            scale = self.saved.load_state_dict(saved)
            if self.state.index and scale is not None:
                self._move_clock(scale, "was another")

    @property
    def step(self) -> int:
        """Real updates done."""
        return int(self.trainer.global_step)

    @property
    def left(self) -> float:
        """Steps that searching may still cost now."""
        return self.plan.budget.left(self.costs.spent, self.step - self.plan.began, self.costs.first)

    @property
    def level(self) -> float:
        """The share of its peak to which the rate has come down; what is low in the first half is still warming up."""
        progress = self.plan.progress
        decays = self.plan.horizon.known and progress > 0.5
        return self.driver.level(self.plan.shape(progress)) if decays else 1.0

    # ------------------------------------------------------------------ moves

    def before_update(self) -> None:
        """Everything that is due before the next update; then its rate is set."""
        if not self._prepared:
            self._prepare()
        self.validations.catch_up()
        progress = self.plan.progress
        new = self.watch.trouble or self.watch.broken or self.validations.pending
        if new or self.validations.look_due(progress) or self.plan.machine.due(self.state, progress):
            with self.saved.as_one():
                self._do_what_is_due(progress)
        self.climb.move(progress)
        assert self.state.lr is not None
        self.driver.apply(self.state.lr, self.plan.shape(progress))

    def _do_what_is_due(self, progress: float) -> None:
        self._judge(progress)
        if self.watch.broken:
            inform(self.watch.broken)
            self.watch.broken = ""
            self.state = self.plan.machine.cut(self.state, progress)
        if self.validations.look_due(progress):
            self.watch.read()
            if not self.watch.trouble:
                self.validations.look(progress)
            self._judge(progress)
        while (due := self.plan.machine.due(self.state, progress)) is not None:
            {"search": self._search, "forecast": self._predict, "end": self._end_stage}[due](progress)
            self._judge(progress)

    def _judge(self, progress: float) -> None:
        """Goes back where a validation or the training loss says so."""
        worse = self.validations.judge() if self.validations.pending else ""
        if worse or self.watch.trouble:
            self.verdicts.recover(progress, worse or self.watch.trouble)

    def after_update(self, loss: Tensor | None) -> None:
        """Takes in the training loss of an update that has been made."""
        loss = self._ranks.mean_loss(loss)
        if loss is not None:
            self.watch.add(self.step, loss)

    def finish(self) -> None:
        """The run has ended: the last stage is judged, and undone if it lost ground; then the sum is written."""
        if self.state.index and not self._prepared:
            # Resumed from a checkpoint after the last update: there was none left to make.
            self._prepare()
        if self.state.index:
            self.validations.catch_up()
        with self.saved.as_one():
            self.verdicts.end()
        reason, numbers = words.finished(self.costs, self.state, self.step, self.plan.began)
        self.record("finish", "end", reason, numbers={"lr": self.driver.last, **numbers})

    def epoch_started(self) -> None:
        """An epoch of a loader without a length has been counted: the end may be known now."""
        if self.state.index and not self.plan.horizon.known:
            before = self.plan.updates
            if self.plan.renewed():
                self._move_clock(before / self.plan.updates, "was not known")

    def request_search(self, reason: str) -> None:
        """Somebody else has a reason to search again, at the next update; the budget permitting."""
        self.state = self.plan.machine.asked(self.state, reason)

    def rescale(self, factor: float) -> None:
        """Multiplies the peak (the batch has grown)."""
        if self.state.lr is not None:
            self.state = replace(self.state, lr=self.state.lr * factor)

    def plateau(self) -> None:
        """The user's early stopping is running out of patience: the stage ends now."""
        if not self.plan.horizon.known:
            self.state = self.plan.machine.cut(self.state, self.plan.progress)

    def _prepare(self) -> None:
        self._prepared = True
        if math.isnan(self.plan.updates):
            seconds, steps = self.trials.time_a_step(0.0)
            exempt_from_time_limit(self.trainer, seconds * steps)
            self.costs.pay(steps, steps, first=True)
            self.plan.set_updates(self.plan.horizon.total / seconds)
            reason = f"an update takes {seconds:.3g} s, so that the run will make about {self.plan.updates:.0f}"
            self._replan(reason, cost=steps)
        self.checks.prepare()

    def _search(self, progress: float) -> None:
        outcome = self.search(progress, self.state.request or "the first update is due")
        if self.state.index == 0:
            self.begin_stage(progress, *self.checks.begin(outcome.start))
            self.validations.plan_looks(progress)

    def search(self, progress: float, why: str) -> SearchOutcome:
        """A search is made, paid and recorded; the rate is what it says."""
        outcome = self._searches.run(progress, why)
        self.costs.pay(outcome.cost, outcome.trial_steps, first=self.state.searches == 0)
        self.costs.seconds += outcome.seconds
        exempt_from_time_limit(self.trainer, outcome.seconds)
        before = self.state
        self.state = self.plan.machine.searched(self.state, outcome.lr, outcome.promised)
        found = {"index": before.searches, "monitor": self.trials.monitor}
        numbers = {**outcome.numbers, **words.rate(self.state, before), **found}
        self.record("search", outcome.action, outcome.reason, numbers=numbers, cost=outcome.cost)
        self.climb.searched(before.lr, outcome.gain, progress, outcome.reach)
        return outcome

    def begin_stage(self, progress: float, probe: Probe | None, cost: float = 0.0, *, returned: bool = False) -> None:
        best = self.state.best_probe
        self.state = self.plan.machine.begun(self.state, progress, self.step, probe, self.watch.recent())
        better = self.state.best_probe is not best and not (returned or self.validations.current)
        if better or self.state.index == 1:
            self.best.capture(self.step)
        if math.isnan(self.state.first_train):
            self.state = replace(self.state, first_train=self.watch.first)
        self.watch.begin_stage()
        numbers = words.begun(self.state, self.step, self._end_step(), probe)
        self.record("stage", "begin", f"stage {self.state.index} begins", numbers=numbers, cost=cost)

    def _end_step(self) -> int:
        return round(self.step + (self.state.end - self.plan.progress) * self.plan.updates)

    def _predict(self, progress: float) -> None:
        self.watch.read()
        numbers: dict[str, Any] = {"stage": self.state.index, "at_step": self.step, "target_step": self._end_step()}
        # A score that is to rise is predicted as a loss, with its sign turned.
        numbers["sign"] = self.trials.lower_is_better(1.0)
        if not self.checks.affordable(2):  # here and at the stage's end
            self.state = self.plan.machine.predicted(self.state, None)
            self.record("forecast", "refuse", "the search budget has no room for the probes", numbers=numbers)
            return
        now = self.checks.make()
        outlook = _NOT_ASKED
        if self.settings.forecasts:
            outlook = look_ahead(self.watch.trace, self.state.start_probe, now, self.step, self._end_step())
            outlook = self._ranks.of_zero(outlook)
        self.state = self.plan.machine.predicted(self.state, outlook.interval if outlook.trusted else None)
        if outlook.trusted:
            self.watch.expect(outlook.watch)
        reason, more = words.expected(outlook, now)
        action = "predict" if outlook.trusted else "refuse"
        self.record("forecast", action, reason, numbers=numbers | more, cost=self.checks.paid)
        if self.plan.machine.lost(self.state):
            self.verdicts.settle(progress, now, paid=True)

    def _end_stage(self, progress: float) -> None:
        self.watch.read()
        if self.checks.affordable():
            self.verdicts.settle(progress, self.checks.make())
        else:
            self.begin_stage(progress, None)

    def record(self, kind: str, action: str, reason: str, *, numbers: dict[str, Any], cost: float = 0.0) -> Decision:
        """Writes a decision everywhere; of a peak under a user's scheduler also the multiplier that it comes to."""
        if self.driver.scheduled and "lr" in numbers and kind != "finish":
            numbers = {**numbers, "multiplier": numbers["lr"] / self.driver.reference}
        decision = Decision(kind, action, reason, self.step, numbers=numbers, cost_steps=float(cost))
        self.decisions.append(decision)
        self.log.write(decision)
        return decision

    def scalars(self) -> dict[str, float]:
        """What goes to the loggers at every logging step."""
        return {"lr": self.driver.last, **words.scalars(self.costs, self.state)}

    def _move_clock(self, scale: float, was: str) -> None:
        """The run's end has moved: the clock stands where the same work stands on the new scale."""
        self.state = self.plan.moved(self.state, scale)
        self.climb.clock_moved(self.plan.progress)
        self.validations.clock_moved(scale)
        self._replan(f"{self.plan.describe()} (its end {was}): the rest is planned anew")

    def _replan(self, reason: str, *, cost: float = 0.0) -> None:
        numbers = {**self.plan.numbers(), "shape": self.plan.shape_numbers()}
        self.record("setup", "replan", reason, numbers=numbers, cost=cost)
