"""One fit under learning-rate control: what the stage machine asks for, done on the trainer.

The machine (:mod:`autotune.stage.machine`) says *when*; the searches (:mod:`autotune.search`), the forecaster and the
snapshots say *what*; here they are put together, paid from one budget, and every outcome becomes a ``Decision``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from autotune.callbacks._lr_search import LRSearches, SearchOutcome
from autotune.callbacks._run_log import RunLog
from autotune.callbacks._trainer import horizon as horizons
from autotune.callbacks._trainer.facts import inform
from autotune.callbacks._trainer.rates import RateDriver
from autotune.callbacks._trials import Trials
from autotune.decision import Decision
from autotune.forecast.trace import LossTrace
from autotune.snapshot import OptimizerState, Weights
from autotune.stage.budget import Budget
from autotune.stage.machine import Probe, StageMachine, StageState
from autotune.stage.outlook import Outlook, look_ahead
from autotune.stage.schedule import Shape
from autotune.stage.settings import LRSettings

#: Losses are read from the device in lots: one wait for it in so many updates.
_LOT = 10


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
        self._settings = settings
        self.trainer = trainer
        self._log = RunLog.of(trainer)
        self.optimizer = optimizer = trainer.optimizers[0]
        scheduled = bool(trainer.lr_scheduler_configs)
        self.driver = RateDriver(optimizer, scheduled=scheduled, ratios_=None if saved is None else saved["ratios"])
        self.trials = Trials(
            trainer, module, set_rates=self.driver.trial, ratios=self.driver.ratios, seed=settings.seed
        )
        self._weights, self._optimizer_state = Weights(module), OptimizerState(optimizer)
        self.state = StageState()
        self.decisions = decisions
        self.trial_steps = 0
        self.spent = 0.0
        self._first_cost = 0.0
        self._search_seconds = 0.0
        self._pending: list[tuple[int, Tensor | float]] = []
        self._trace = LossTrace()
        self._first_loss = math.nan
        self._best_recent = math.inf
        self._trouble = ""
        self._outlook = Outlook(math.nan, math.nan, math.nan, "not yet")
        self._prepared = False
        self._plan()
        self._searches = LRSearches(settings, self)
        if saved is not None:
            self._load(saved)

    # ------------------------------------------------------------------ the plan

    def _plan(self) -> None:
        self.horizon = horizons.plan(self.trainer)
        known = self.horizon.known
        self.machine = StageMachine(search=self._settings.search, known_end=known)
        if self._settings.objective == "forecast":
            updates = self.horizon.updates if math.isfinite(self.horizon.updates) else 15000.0
            self.machine = replace(
                self.machine,
                known_end=False,
                first=min(1000.0 / updates, 1 / 15),
                longest=8000.0 / updates,
                worse=math.inf,
            )
        self._set_updates(self.horizon.updates)

    def _set_updates(self, updates: float) -> None:
        """``updates`` is the run's (assumed) length in optimizer steps; NaN until a step has been timed."""
        self.updates = updates
        planned = updates if self.horizon.known else math.inf
        self.budget = Budget(self._settings.search_budget, planned)
        resolution = 0.0 if math.isnan(updates) else 1.0 / max(updates, 1.0)
        decay = self.horizon.known and self._settings.objective == "annealed"
        self.shape = Shape(decay=decay, resolution=resolution)
        if self._settings.objective == "forecast":
            self.shape = Shape(warmup=0.0, decay=False)

    @property
    def progress(self) -> float:
        """Share of the run that is done; unbounded where the end is not known."""
        done = horizons.done(self.trainer, self.horizon)
        return done / (self.horizon.total if self.horizon.known else self.updates)

    @property
    def step(self) -> int:
        """Real updates done."""
        return int(self.trainer.global_step)

    @property
    def left(self) -> float:
        """Steps that searching may still cost now."""
        return self.budget.left(self.spent, self.step, self._first_cost)

    # ------------------------------------------------------------------ moves

    def before_update(self) -> None:
        """Everything that is due before the next update; then its rate is set."""
        if not self._prepared:
            self._prepare()
        progress = self.progress
        if self._trouble:
            self._recover(progress)
        while (due := self.machine.due(self.state, progress)) is not None:
            {"search": self._search, "forecast": self._predict, "end": self._end_stage}[due](progress)
        if self.state.lr is not None:
            self.driver.apply(self.state.lr, self.shape(progress))

    def after_update(self, loss: Tensor | None) -> None:
        """Takes in the training loss of an update that has been made (kept on the device until a lot is full)."""
        if loss is not None:
            self._pending.append((self.step, loss.detach()))
        if len(self._pending) >= _LOT:
            self._read_losses()

    def finish(self) -> None:
        """The run has ended: the last stage is judged, and the sum is written."""
        if self.state.index and self._outlook.trusted and self.left >= self.trials.probe_cost:
            self._judge(self._probe(), evidence=())
        numbers = {
            "lr": self.driver.last,
            "trial_steps": self.trial_steps,
            "real_steps": self.step,
            "cost_steps": self.spent,
            "search_seconds": self._search_seconds,
            "searches": self.state.searches,
        }
        share = self.spent / max(self.step, 1)
        self.record("finish", "end", f"searching cost {share:.1%} of {self.step} updates", numbers=numbers)

    def epoch_started(self) -> None:
        """An epoch of a loader without a length has been counted: the end may be known now."""
        if not self.horizon.known and self.state.index and horizons.plan(self.trainer).known:
            self._plan_anew()

    def describe(self) -> str:
        """The plan, in a sentence."""
        horizon = self.horizon
        if not horizon.known:
            return f"the end is not known ({horizon.reason}): the rate is held, and lowered on a plateau"
        count = "" if math.isnan(horizon.updates) else f", about {horizon.updates:.0f} updates"
        return f"the run ends at {horizon.total:g} {horizon.unit}{count}"

    def scalars(self) -> dict[str, float]:
        """What goes to the loggers at every logging step."""
        return {
            "lr": self.driver.last,
            "peak_lr": self.state.lr or math.nan,
            "stage": self.state.index,
            "trial_steps": self.trial_steps,
            "search_cost_steps": self.spent,
        }

    def request_search(self, reason: str) -> None:
        """Somebody else has a reason to search again, at the next update; the budget permitting."""
        self.state = self.machine.asked(self.state, reason)

    def rescale(self, factor: float) -> None:
        """Multiplies the peak (the batch has grown)."""
        if self.state.lr is not None:
            self.state = replace(self.state, lr=self.state.lr * factor)

    def plateau(self) -> None:
        """The user's early stopping is running out of patience: the stage ends now."""
        if not self.horizon.known:
            self.state = self.machine.cut(self.state, self.progress)

    # ------------------------------------------------------------------ pieces

    def _prepare(self) -> None:
        self._prepared = True
        if math.isnan(self.updates):
            seconds, steps = self.trials.time_a_step(0.0)
            horizons.exempt_from_time_limit(self.trainer, seconds * steps)
            self._pay(steps, steps)
            self._first_cost += steps
            self._set_updates(self.horizon.total / seconds)
        first = self.budget.first(self.updates)
        self.trials.prepare_probe(
            monitor=self._settings.monitor,
            mode=self._settings.mode,
            steps=self._searches.policy.probe_steps(first),
        )

    def _pay(self, cost: float, trial_steps: int = 0) -> None:
        self.spent += cost
        self.trial_steps += trial_steps

    def _probe(self) -> Probe:
        probe = self.trials.probe()
        self._pay(self.trials.probe_cost)
        return probe

    def _search(self, progress: float) -> None:
        why = self.state.request or "the first update is due"
        outcome = self._searches.run(progress, why)
        self._take(outcome, begin=self.state.index == 0, progress=progress)

    def _take(self, outcome: SearchOutcome, *, begin: bool, progress: float) -> None:
        if self.state.searches == 0:
            self._first_cost += outcome.cost
        self._pay(outcome.cost, outcome.trial_steps)
        self._search_seconds += outcome.seconds
        horizons.exempt_from_time_limit(self.trainer, outcome.seconds)
        previous = self.state.lr
        self.state = self.machine.searched(self.state, outcome.lr)
        numbers = {**outcome.numbers, "lr": outcome.lr, "previous_lr": previous, "index": self.state.searches - 1}
        self.record("search", outcome.action, outcome.reason, numbers=numbers, cost=outcome.cost)
        if begin:
            self._begin_stage(progress, outcome.start)

    def _begin_stage(self, progress: float, probe: Probe | None) -> None:
        self.state = self.machine.begun(self.state, progress, self.step, probe)
        self._weights.capture()
        self._optimizer_state.capture()
        self._trace = LossTrace()
        self._outlook = Outlook(math.nan, math.nan, math.nan, "not yet")
        numbers = {
            "index": self.state.index,
            "start_step": self.step,
            "end_progress": self.state.end,
            "end_step": self._end_step(),
            "loss": math.nan if probe is None else probe.loss,
            "lr": self.state.lr,
            "multiplier": self.state.lr,
        }
        self.record("stage", "begin", f"stage {self.state.index} begins", numbers=numbers)

    def _end_step(self) -> int:
        return round(self.step + (self.state.end - self.progress) * self.updates)

    def _predict(self, progress: float) -> None:
        self._read_losses()
        numbers: dict[str, Any] = {"stage": self.state.index, "at_step": self.step, "target_step": self._end_step()}
        # The probe here and the one at the stage's end.
        if self.left < 2 * self.trials.probe_cost:
            self.state = self.machine.predicted(self.state, None)
            self.record("forecast", "refuse", "the search budget has no room for the probes", numbers=numbers)
            return
        now = self._probe()
        self._outlook = look_ahead(self._trace, self.state.start_probe, now, self.step, self._end_step())
        if not self._outlook.trusted:
            self.state = self.machine.predicted(self.state, None)
            cost = self.trials.probe_cost
            self.record("forecast", "refuse", self._outlook.reason, numbers={**numbers, "loss": now.loss}, cost=cost)
            return
        value, low, high = self._outlook.value, self._outlook.low, self._outlook.high
        self.state = self.machine.predicted(self.state, (value, low, high))
        numbers |= {"prediction": value, "low": low, "high": high, "level": 0.8, "loss": now.loss}
        reason = f"the loss is {now.loss:.4g} and expected at {value:.4g} ({low:.4g} to {high:.4g}) at the stage's end"
        self.record("forecast", "predict", reason, numbers=numbers, cost=self.trials.probe_cost)

    def _end_stage(self, progress: float) -> None:
        self._read_losses()
        if self.left < self.trials.probe_cost:
            self._begin_stage(progress, None)
            return
        probe = self._probe()
        before = self.state
        self.state, verdict, evidence = self.machine.ended(self.state, probe)
        self._judge(probe, evidence, before)
        if verdict == "roll_back":
            self._roll_back(before, f"the stage ended at {probe.loss:.4g}, worse than it began")
            probe = before.start_probe or probe
        elif verdict == "decay":
            numbers = {"lr": self.state.lr, "multiplier": self.state.lr, "previous_lr": before.lr}
            self.record("plateau", "decay", evidence[0], numbers=numbers)
        if verdict in ("search", "roll_back") or (verdict == "decay" and self._settings.search == "every_stage"):
            why = "; ".join(evidence) or "a stage has ended"
            self._take(self._searches.run(progress, why), begin=False, progress=progress)
        self._begin_stage(progress, probe)

    def _judge(self, probe: Probe, evidence: tuple[str, ...], before: StageState | None = None) -> None:
        state = before or self.state
        prediction = state.prediction
        numbers: dict[str, Any] = {
            "index": state.index,
            "start_step": state.start_step,
            "end_step": self.step,
            "loss": probe.loss,
            "previous_loss": math.nan if state.start_probe is None else state.start_probe.loss,
            "evidence": list(evidence),
        }
        reason = f"stage {state.index} ends at a loss of {probe.loss:.4g}"
        if prediction is not None:
            value, low, high = prediction
            inside = low <= probe.loss <= high
            numbers |= {"prediction": value, "low": low, "high": high, "inside": inside}
            reason += f"; {value:.4g} was predicted, {'inside' if inside else 'outside'} {low:.4g} to {high:.4g}"
        self.record("stage", "end", reason, numbers=numbers, cost=self.trials.probe_cost)

    def _roll_back(self, before: StageState, why: str) -> None:
        self._weights.restore()
        self._optimizer_state.restore()
        lost = self.step - before.start_step
        numbers = {
            "to_step": before.start_step,
            "lost_steps": lost,
            "lr": self.state.lr,
            "multiplier": self.state.lr,
            "previous_lr": before.lr,
        }
        self.record(
            "rollback",
            "roll_back",
            f"{why}: back to step {before.start_step}, at a lower rate",
            numbers=numbers,
            cost=lost,
        )

    def _recover(self, progress: float) -> None:
        why, self._trouble = self._trouble, ""
        before = self.state
        self.state, verdict = self.machine.failed(self.state)
        if verdict == "roll_back":
            self._roll_back(before, why)
            self._begin_stage(progress, before.start_probe)
        else:
            self.record("rollback", "keep", f"{why}; going back has not helped, so training goes on", numbers={})

    # ------------------------------------------------------------------ losses

    def _read_losses(self) -> None:
        pending, self._pending = self._pending, []
        values = [(step, float(loss)) for step, loss in pending]
        for step, value in values:
            self._trace.add(step, value)
        if not values or not self.state.index:
            return
        bad = [step for step, value in values if not math.isfinite(value)]
        if bad and len(bad) > len(values) // 2:
            self._trouble = f"the training loss is not finite from step {bad[0]}"
            return
        finite = sorted(value for _, value in values if math.isfinite(value))
        middle = finite[len(finite) // 2]
        if math.isnan(self._first_loss):
            self._first_loss = middle
        self._best_recent = min(self._best_recent, middle)
        gained = self._first_loss - self._best_recent
        limit = self._first_loss + max(gained, 0.5 * abs(self._first_loss))
        if middle > limit:
            self._trouble = (
                f"the training loss has risen to {middle:.4g}, far above its start at {self._first_loss:.4g}"
            )
            return
        self._watch_interval(values[-1][0])

    def _watch_interval(self, step: int) -> None:
        passed = [high for place, high in self._outlook.watch if place <= step]
        if not passed:
            return
        self._outlook = replace(self._outlook, watch=tuple(p for p in self._outlook.watch if p[0] > step))
        recent, error = self._trace.recent(2 * _LOT)
        if math.isfinite(error) and recent - 3.0 * error > passed[-1]:
            inform(f"the training loss {recent:.4g} has left the forecast's interval (up to {passed[-1]:.4g})")
            self.state = self.machine.cut(self.state, self.progress)

    # ------------------------------------------------------------------ records and state

    def record(self, kind: str, action: str, reason: str, *, numbers: dict[str, Any], cost: float = 0.0) -> Decision:
        """Writes a decision everywhere."""
        decision = Decision(kind, action, reason, self.step, numbers=numbers, cost_steps=float(cost))
        self.decisions.append(decision)
        self._log.write(decision)
        return decision

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold: primitives and tensors."""
        staged = self.state.index > 0
        return {
            "ratios": list(self.driver.ratios),
            "stage": self.state.to_dict(),
            "trial_steps": self.trial_steps,
            "spent": self.spent,
            "first_cost": self._first_cost,
            "search_seconds": self._search_seconds,
            "pending": [[step, float(loss)] for step, loss in self._pending],
            "trace": self._trace.state_dict(),
            "first_loss": self._first_loss,
            "best_recent": self._best_recent,
            "trouble": self._trouble,
            "outlook": [self._outlook.value, self._outlook.low, self._outlook.high, self._outlook.reason],
            "watch": [list(point) for point in self._outlook.watch],
            "updates": self.updates,
            "horizon": [self.horizon.unit, self.horizon.total],
            "monitor": None if self.trials.probe_set is None else self.trials.probe_set.state_dict(),
            "searches": self._searches.state_dict(),
            "weights": self._weights.state_dict() if staged else [],
            "optimizer": self._optimizer_state.state_dict() if staged else {},
            "last_lr": self.driver.last,
        }

    def _load(self, saved: dict[str, Any]) -> None:
        self.state = StageState.from_dict(saved["stage"])
        self.trial_steps, self.spent = saved["trial_steps"], saved["spent"]
        self._first_cost, self._search_seconds = saved["first_cost"], saved["search_seconds"]
        self._pending = [(int(step), float(loss)) for step, loss in saved["pending"]]
        self._trace.load_state_dict(saved["trace"])
        self._first_loss, self._best_recent = saved["first_loss"], saved["best_recent"]
        self._trouble = saved["trouble"]
        self._outlook = Outlook(*saved["outlook"], watch=tuple((a, b) for a, b in saved["watch"]))
        if self.horizon.unit == "seconds":
            self._set_updates(saved["updates"])
        if self.state.index:
            self._weights.load_state_dict(saved["weights"])
            self._optimizer_state.load_state_dict(saved["optimizer"])
            self._replan(saved)
        self._searches.load_state_dict(saved["searches"])

    def _plan_anew(self) -> None:
        """The end, unknown until now, is known: the clock goes on in shares of it."""
        before = self.updates
        self._plan()
        self._move_clock(before / self.updates, "became known")

    def _replan(self, saved: dict[str, Any]) -> None:
        """A resumed run may have another end: the clock is moved to where the same work stands now."""
        unit, total = saved["horizon"]
        same_unit = unit == self.horizon.unit and self.horizon.known
        if same_unit and total != self.horizon.total:
            self._move_clock(total / self.horizon.total, f"was {total:g}")

    def _move_clock(self, scale: float, was: str) -> None:
        state, progress = self.state, self.progress
        end = state.end * scale
        if not progress < end < 1.0 or state.end >= 1.0:
            end = min(progress + self.machine.length(state.index - 1), 1.0)
        self.state = replace(state, start=state.start * scale, end=end, forecast_due=state.forecast_due * scale)
        numbers = {"unit": self.horizon.unit, "total": self.horizon.total}
        reason = f"the run's end is {self.horizon.total:g} {self.horizon.unit} (it {was}): the rest is planned anew"
        self.record("setup", "replan", reason, numbers=numbers)
