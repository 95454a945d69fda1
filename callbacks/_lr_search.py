"""A learning-rate search from plan to decision: legs, searchers, acceptance, and what to do when nothing is found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autotune.callbacks import _lr_words as words
from autotune.callbacks._lr_peaks import Answer, RunPeaks
from autotune.callbacks._trial import PlannedLeg
from autotune.callbacks._trials import SearchResult
from autotune.search import (
    BracketSearch,
    GridSearch,
    LogSpace,
    LRSearch,
    Outcome,
    PublishedSearch,
    Recommendation,
    Search,
    SearchState,
)
from autotune.search.state import highest_harmless
from autotune.search.surrogate import SurrogatePrior
from autotune.search.usual import usual_lr
from autotune.stage.policy import Leg, SearchPolicy
from autotune.stage.probe import Probe
from autotune.stage.schedule import TrialShape
from autotune.stage.settings import LRSettings

if TYPE_CHECKING:
    from autotune.callbacks._lr_run import LRRun

#: AutoLRS as published: candidates of a search, a stage's length in trials, validations of a late candidate.
_PUBLISHED_CANDIDATES, _PUBLISHED_RATIO, _PUBLISHED_EVALUATIONS = 10, 10, 16
#: Drift with no preferred sign (a preferred one was harmful), and horizons whose levels lie close together.
_PRIOR = SurrogatePrior(drift=0.0, drift_sd=0.15, offset_sd=0.1)
#: A later search changes the rate only for this share of a trial's progress, and for more than its deviation.
_WORTH_CHANGING = 0.05
#: What the short trials take off the loss, as a share of it, says nothing of rates below this.
_SOME_PROGRESS = 1e-3
#: The first rates that are tried where nothing is known.
_FIRST_TRIED = (1e-3, 1e-1)


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
        promised: Loss at the end of the trial nearest to ``lr`` among the longest; NaN where there is none.
        gain: ``lr`` as a share of what the search, or what is usual, says.
        reach: The highest rate that did a trial no harm, the same way; 1 where it is not known.
    """

    lr: float
    action: str
    reason: str
    numbers: dict[str, Any] = field(default_factory=dict)
    start: Probe | None = None
    cost: float = 0.0
    trial_steps: int = 0
    seconds: float = 0.0
    promised: float = math.nan
    gain: float = 1.0
    reach: float = 1.0


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
        self.policy = SearchPolicy()
        self._peaks = RunPeaks(settings, run, 0.0)

    def run(self, progress: float, why: str) -> SearchOutcome:
        """Searches now, if the budget has room for it."""
        run, self._peaks = self._run, RunPeaks(self._settings, self._run, progress)
        current = run.state.lr
        legs, allowance = self._legs()
        if not legs:
            return self._skipped(why)
        planned = [self._planned(leg, index, current, progress) for index, leg in enumerate(legs)]
        result = run.trials.search(planned, index=run.state.searches, allowance=allowance)
        why = f"{why}{words.levelled(self._peaks.family, planned[-1].shape.shares)}"
        return self._decided(result, legs, current, why)

    def _legs(self) -> tuple[list[Leg], float]:
        """The search that is due now, and what it may cost."""
        run, probe = self._run, self._run.trials.probe_cost
        whole = run.plan.searchable
        if self._settings.objective == "forecast":
            return self._published_leg(whole if run.state.searches == 0 else run.left)
        if run.state.searches == 0:
            left = whole - run.costs.spent
            usual = usual_lr(self._peaks.family)
            known = usual is not None and self._space.contains(math.log(usual))
            centred = known and self._settings.proposals != "grid"
            return self.policy.first(left, probe, centred=centred, idle=self._peaks.idle), left
        left = min(run.left, whole)
        every = self._settings.search == "every_stage"
        leg = self.policy.later_leg(left, run.step, probe, at_any_length=every)
        return [] if leg is None else [leg], left

    def _published_leg(self, left: float) -> tuple[list[Leg], float]:
        probe = self._run.trials.probe_cost * (_PUBLISHED_EVALUATIONS if self._run.state.index >= 2 else 0)
        affordable = int((left - self._run.trials.probe_cost) / _PUBLISHED_CANDIDATES - probe)
        steps = min(self._stage_steps() // _PUBLISHED_RATIO, affordable)
        return [Leg(_PUBLISHED_CANDIDATES, steps)] if steps >= self.policy.shortest_coarse else [], left

    def _stage_steps(self) -> int:
        plan = self._run.plan
        return max(1, round(plan.machine.length(self._run.state.index) * plan.updates))

    def _planned(self, leg: Leg, index: int, current: float | None, progress: float) -> PlannedLeg:
        run, settings = self._run, self._settings
        published = settings.objective == "forecast"
        left = (1.0 - min(progress, 1.0)) * run.plan.updates
        target = max(leg.steps, round(left)) if run.plan.horizon.known else leg.steps
        log_current = None if current is None or published else math.log(self._settings.clip(current))

        def searcher(before: Recommendation | None) -> Search:
            return self._searcher(leg, before, current)

        def begin(search: Search, start: Probe, outcomes: tuple[Outcome, ...]) -> SearchState:
            return search.init(start.loss, leg.steps, target, log_current, outcomes)

        level = 1.0 if current is None else max(run.driver.level(run.plan.shape(progress)), 1e-3)
        return PlannedLeg(
            searcher=searcher,
            begin=begin,
            candidates=leg.candidates,
            shape=TrialShape(
                leg.steps,
                constant=published or run.plan.averages,
                shares=() if published else self._peaks.trial_shares(leg.steps, target),
                idle=0 if published else self._peaks.idle,
            ),
            level=level,
            forecast_to=self._stage_steps() if published else None,
            evaluations=_PUBLISHED_EVALUATIONS if published and run.state.index >= 2 else 0,
            stop_early=settings.stop_early and not published,
        )

    def _searcher(self, leg: Leg, before: Recommendation | None, current: float | None) -> Search:
        if self._settings.objective == "forecast":
            seed = self._settings.seed + self._run.state.searches
            return PublishedSearch(self._space, candidates=leg.candidates, seed=seed)
        if current is not None:
            return BracketSearch(current, self._space, candidates=leg.candidates, prior=_PRIOR)
        if self._settings.proposals == "grid":
            return self._grid(leg, before)
        if leg.walk:
            usual = self._peaks.usual
            # Where the short trials got nowhere, longer ones at what is usual say more than a second look everywhere.
            centre = usual
            known = before is not None and math.isfinite(before.log_lr)
            if before is not None and known and (usual is None or before.progress_fraction > _SOME_PROGRESS):
                centre = math.exp(before.log_lr_trial_optimum)
            if centre is not None:
                centre = self._settings.clip(centre)
                return BracketSearch(centre, self._space, candidates=leg.candidates, usual=usual, prior=_PRIOR)
        tried = [lr for lr in _FIRST_TRIED if self._space.low <= lr <= self._space.high]
        return LRSearch(
            self._space, candidates=leg.candidates, initial_points=tried or None, min_progress=0.0, prior=_PRIOR
        )

    def _grid(self, leg: Leg, before: Recommendation | None) -> Search:
        """The ablation: as many trials of the same lengths, at fixed places; the second leg's in the best cell."""
        space = self._space
        if before is not None and math.isfinite(before.log_lr):
            space = space.around(before.log_lr, (space.high / space.low) ** (1.0 / self.policy.coarse))
        return GridSearch(space, candidates=leg.candidates, drift=0.0)

    # ------------------------------------------------------------------ answers

    def _decided(self, result: SearchResult, legs: list[Leg], current: float | None, why: str) -> SearchOutcome:
        found = result.recommendation
        lr, action, reason, gain = self._fallback(result, current)
        if found is not None and math.isfinite(found.log_lr):
            lr, action, reason, gain = self._answer(found, current)
        reason = f"{reason} (searched because {why})"
        numbers = words.searched(result, legs)
        return SearchOutcome(
            lr,
            action,
            reason,
            numbers,
            result.start,
            result.cost,
            result.trial_steps,
            result.seconds,
            self._promised(result, legs[-1], lr),
            gain,
            self._reach(result, lr / gain) if current is None else 1.0,
        )

    def _reach(self, result: SearchResult, answer: float) -> float:
        """The highest rate that did no trial harm, as a run's peak, over the answer; 1 where it is lower."""
        if self._settings.objective == "forecast":
            return 1.0
        return max(1.0, math.exp(highest_harmless(result.outcomes, result.start.loss)) * self._peaks.share / answer)

    def _promised(self, result: SearchResult, leg: Leg, lr: float) -> float:
        # The published trials' losses are extrapolations; a rate that climbs begins below every trial's.
        if self._settings.objective == "forecast" or self._run.climb.rule is not None:
            return math.nan
        ends = [o for o in result.outcomes if o.status == "finished" and o.horizon_steps == leg.steps]
        nearest = min(ends, key=lambda o: abs(o.log_lr - math.log(lr)), default=None)
        return math.nan if nearest is None else nearest.loss

    def _answer(self, found: Recommendation, current: float | None) -> Answer:
        lr = self._settings.clip(math.exp(found.log_lr))
        if self._settings.objective == "forecast":
            return lr, "set_lr", found.reason, 1.0
        if current is None:
            return self._peaks.opening(lr, found.reason)
        promised = f"{found.gap:.2f} +- {found.gap_sd:.2f} of a trial's progress"
        if math.isfinite(found.gap) and found.gap > max(_WORTH_CHANGING, found.gap_sd):
            return lr, "set_lr", f"a change promises {promised}: {found.reason}", 1.0
        return current, "keep_lr", f"a change promises only {promised}", 1.0

    def _fallback(self, result: SearchResult, current: float | None) -> Answer:
        """Without a recommendation: the current rate, the best finished trial, a default by optimizer family."""
        if not math.isfinite(result.start.loss):
            problem = f"the loss is {result.start.loss} before any trial, so there is nothing to search by"
        else:
            problem = result.problem or "no trial could be ranked"
        if current is not None:
            return current, "keep_lr", f"{problem}: the current rate stays", 1.0
        finished = [outcome for outcome in result.outcomes if outcome.status == "finished"]
        if finished:
            best = min(finished, key=lambda outcome: outcome.loss)
            return self._peaks.opening(math.exp(best.log_lr), f"{problem}: the best finished trial's rate")
        lr = self._peaks.default
        exploded = min((o.log_lr for o in result.outcomes if o.status == "diverged"), default=math.inf)
        if math.log(lr) >= exploded:
            lr = self._settings.clip(math.exp(exploded) / 10.0)
            return lr, "set_lr", f"{problem}: a tenth of the lowest rate that exploded", 1.0
        return lr, "set_lr", f"{problem}: {lr:g} is a usual rate for {self._peaks.family}", self._peaks.start

    def _skipped(self, why: str) -> SearchOutcome:
        current = self._run.state.lr
        missing = f"a search was due because {why}, but the budget does not pay for trials long enough to tell"
        if current is not None:
            return SearchOutcome(current, "skip", f"{missing}: the current rate stays")
        lr = self._peaks.default
        start, cost = None, 0.0
        # It stands in for the first search, before which nothing is "left" yet: a monitor that nothing logs is refused.
        if self._run.plan.searchable - self._run.costs.spent >= self._run.trials.probe_cost:
            start, cost = self._run.trials.probe(), self._run.trials.probe_cost
        reason = f"{missing} (the run is too short): {lr:g} is a usual rate for {self._peaks.family}"
        return SearchOutcome(lr, "skip", reason, start=start, cost=cost, gain=self._peaks.start)
