"""A learning-rate search from plan to decision: legs, searchers, acceptance, and what to do when nothing is found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autotune.callbacks._trials import PlannedLeg, SearchResult
from autotune.search import GridSearch, LogSpace, LRSearch, Outcome, PublishedSearch, Search, SearchState
from autotune.search.surrogate import SurrogatePrior
from autotune.stage.machine import Probe
from autotune.stage.policy import Leg, SearchPolicy
from autotune.stage.schedule import TrialShape
from autotune.stage.settings import LRSettings

if TYPE_CHECKING:
    from autotune.callbacks._lr_run import LRRun

#: AutoLRS as published: candidates of a search, a stage's length in trials, validations of a late candidate.
_PUBLISHED_CANDIDATES, _PUBLISHED_RATIO, _PUBLISHED_EVALUATIONS = 10, 10, 16
#: A later search changes the rate only for a promised gain of this share of a trial's progress.
_WORTH_CHANGING = 0.05
#: Rates that usually train at all, by optimizer family; used only where no search could be made.
_DEFAULTS = {"sgd": 1e-2, "asgd": 1e-2, "adagrad": 1e-2, "adadelta": 1.0, "lion": 1e-4}
_DEFAULT = 1e-3


@dataclass(frozen=True)
class SearchOutcome:
    """What a search, or its impossibility, came to.

    Attributes:
        lr: The peak to go on with.
        action: ``"set_lr"``, ``"keep_lr"`` or ``"skip"``.
        reason: A sentence.
        numbers: For the log.
        start: The probe before it; None where none was made.
        cost: In steps.
        trial_steps: Optimizer steps made.
        seconds: Wall time.
    """

    lr: float
    action: str
    reason: str
    numbers: dict[str, Any] = field(default_factory=dict)
    start: Probe | None = None
    cost: float = 0.0
    trial_steps: int = 0
    seconds: float = 0.0


class LRSearches:
    """Plans and runs the searches of one fit.

    Args:
        settings: The user's.
        run: The fit they are for.
    """

    def __init__(self, settings: LRSettings, run: LRRun) -> None:
        self._settings = settings
        self._run = run
        self._space = LogSpace(settings.low, settings.high)
        self._fine_steps = 0
        self.policy = SearchPolicy()

    def run(self, progress: float, why: str) -> SearchOutcome:
        """Searches now, if the budget has room for it."""
        run = self._run
        current = run.state.lr
        first = run.state.searches == 0
        allowance = min(run.left, run.budget.first(run.updates)) if not first else self._first_allowance()
        legs = self._published(allowance) if self._settings.objective == "forecast" else self._legs(allowance, first)
        if not legs:
            return self._skipped(why, allowance)
        planned = [self._planned(leg, index, current, progress) for index, leg in enumerate(legs)]
        if first:
            self._fine_steps = legs[-1].steps
        result = run.trials.search(planned, index=run.state.searches, allowance=allowance)
        return self._decided(result, legs, current, why)

    def _first_allowance(self) -> float:
        return self._run.budget.first(self._run.updates) * self.policy.first_share

    def _legs(self, allowance: float, first: bool) -> list[Leg]:
        probe = self._run.trials.probe_cost
        if first:
            return self.policy.first(allowance, probe)
        return self.policy.later(allowance, probe, self._fine_steps)

    def _published(self, allowance: float) -> list[Leg]:
        probe = self._run.trials.probe_cost
        steps = min(self._stage_steps() // _PUBLISHED_RATIO, int((allowance - probe) / _PUBLISHED_CANDIDATES - probe))
        return [Leg(_PUBLISHED_CANDIDATES, steps)] if steps >= self.policy.shortest else []

    def _stage_steps(self) -> int:
        machine, index = self._run.machine, self._run.state.index
        return max(1, round(machine.length(index) * self._run.updates))

    def _planned(self, leg: Leg, index: int, current: float | None, progress: float) -> PlannedLeg:
        run, settings = self._run, self._settings
        published = settings.objective == "forecast"
        searcher = self._searcher(leg, index)
        target = max(leg.steps, round((1.0 - min(progress, 1.0)) * run.updates) if run.horizon.known else leg.steps)
        log_current = None if current is None or published else math.log(self._space_clip(current))

        def begin(start: Probe, outcomes: tuple[Outcome, ...]) -> SearchState:
            return searcher.init(start.loss, leg.steps, target, log_current, outcomes)

        level = 1.0 if current is None else max(run.driver.level(run.shape(progress)), 1e-3)
        late = published and run.state.index >= 2
        return PlannedLeg(
            searcher=searcher,
            begin=begin,
            shape=TrialShape(leg.steps, constant=published),
            level=level,
            forecast_to=self._stage_steps() if published else None,
            evaluations=_PUBLISHED_EVALUATIONS if late else 0,
            stop_early=settings.stop_early and not published,
        )

    def _searcher(self, leg: Leg, index: int) -> Search:
        seed = self._settings.seed
        if self._settings.objective == "forecast":
            return PublishedSearch(self._space, candidates=leg.candidates, seed=seed + self._run.state.searches)
        if self._settings.proposals == "grid":
            return GridSearch(self._space, candidates=leg.candidates)
        prior = SurrogatePrior(drift=self.policy.drift, drift_sd=self.policy.drift_sd, offset_sd=self.policy.offset_sd)
        return LRSearch(self._space, candidates=leg.candidates, initial_points=() if index else None, prior=prior)

    def _space_clip(self, lr: float) -> float:
        return min(max(lr, self._settings.low), self._settings.high)

    # ------------------------------------------------------------------ answers

    def _decided(self, result: SearchResult, legs: list[Leg], current: float | None, why: str) -> SearchOutcome:
        recommendation = result.recommendation
        numbers = self._numbers(result, legs)
        lr, action, reason = self._fallback(result, current)
        if recommendation is not None and math.isfinite(recommendation.log_lr):
            proposed = self._space_clip(math.exp(recommendation.log_lr))
            if current is None or self._settings.objective == "forecast":
                lr, action, reason = proposed, "set_lr", recommendation.reason
            elif self._settings.proposals == "grid" or self._worth_it(recommendation.gap, recommendation.gap_sd):
                gain = f"{recommendation.gap:.2f} +- {recommendation.gap_sd:.2f} of a trial's progress"
                lr, action, reason = proposed, "set_lr", f"promises {gain}: {recommendation.reason}"
            else:
                gain = f"{recommendation.gap:.2f} +- {recommendation.gap_sd:.2f} of a trial's progress"
                lr, action, reason = current, "keep_lr", f"the best of the others promises only {gain}"
        return SearchOutcome(
            lr,
            action,
            f"{reason} (searched because {why})",
            {**numbers, "multiplier": lr},
            result.start,
            result.cost,
            result.trial_steps,
            result.seconds,
        )

    @staticmethod
    def _worth_it(gap: float, gap_sd: float) -> bool:
        return math.isfinite(gap) and gap > max(_WORTH_CHANGING, gap_sd if math.isfinite(gap_sd) else 0.0)

    def _fallback(self, result: SearchResult, current: float | None) -> tuple[float, str, str]:
        """Without a recommendation: the current rate, the best finished trial, a default by optimizer family."""
        if not math.isfinite(result.start.loss):
            problem = f"the loss is {result.start.loss} before any trial, so there is nothing to search by"
        else:
            problem = "no trial could be ranked"
        if current is not None:
            return current, "keep_lr", f"{problem}: the current rate stays"
        finished = [outcome for outcome in result.outcomes if outcome.status == "finished"]
        if finished:
            best = min(finished, key=lambda outcome: outcome.loss)
            return math.exp(best.log_lr), "set_lr", f"{problem}: the best finished trial's rate"
        lr = self._default()
        return lr, "set_lr", f"{problem}: {lr:g} is a usual rate for {self._family()}"

    def _skipped(self, why: str, allowance: float) -> SearchOutcome:
        current = self._run.state.lr
        missing = f"a search was due because {why}, but {allowance:.0f} steps do not pay for one"
        if current is not None:
            return SearchOutcome(current, "skip", f"{missing}: the current rate stays", {"multiplier": current})
        lr = self._default()
        reason = f"{missing} (the run is too short): {lr:g} is a usual rate for {self._family()}"
        return SearchOutcome(lr, "skip", reason, {"multiplier": lr})

    def _family(self) -> str:
        return type(self._run.optimizer).__name__

    def _default(self) -> float:
        return self._space_clip(_DEFAULTS.get(self._family().lower(), _DEFAULT))

    def _numbers(self, result: SearchResult, legs: list[Leg]) -> dict[str, Any]:
        recommendation = result.recommendation
        table = () if recommendation is None else recommendation.table
        return {
            "horizon_steps": legs[-1].steps,
            "legs": [[leg.candidates, leg.steps] for leg in legs],
            "initial_loss": result.start.loss,
            "candidates": [
                {
                    "lr": math.exp(outcome.log_lr),
                    "horizon_steps": outcome.horizon_steps,
                    "steps": outcome.steps,
                    "loss": outcome.loss,
                    "status": outcome.status,
                    "reason": reason,
                    "curve": _thinned(outcome.curve),
                }
                for outcome, reason in zip(result.outcomes, result.reasons, strict=True)
            ],
            "posterior": {
                "lr": [row.lr for row in table],
                "mean": [row.mean for row in table],
                "sd": [row.sd for row in table],
                "acquisition": [row.acquisition for row in table],
            },
            "seconds": result.seconds,
            "trial_steps": result.trial_steps,
        }

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What later searches need of earlier ones."""
        return {"fine_steps": self._fine_steps}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._fine_steps = int(saved["fine_steps"])


def _thinned(curve: tuple[float, ...], points: int = 100) -> list[list[float]]:
    """At most ``points`` of a curve as (step, loss), the last one among them."""
    stride = max(1, math.ceil(len(curve) / points))
    kept = {*range(0, len(curve), stride), len(curve) - 1} if curve else set()
    return [[float(step), curve[step]] for step in sorted(kept)]
