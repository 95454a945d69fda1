"""Searches: candidates tried on the trainer's own model, from one saved state, on the same batches.

Everything a search changes is put back before the next real update: tensors, generators, counters and loaders by
:class:`~autotune.snapshot.Snapshot`, the trainer's inside by :func:`~autotune.callbacks._trainer.side_loop.side_loop`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from autotune.callbacks._probe import ProbePlan, ProbeSet
from autotune.callbacks._trainer.data import Replay, data_state, second_loader
from autotune.callbacks._trainer.facts import BarText, surroundings
from autotune.callbacks._trainer.ranks import Agreement
from autotune.callbacks._trainer.side_loop import SideLoop, side_loop
from autotune.forecast.published import published_forecast
from autotune.pystate import Attributes
from autotune.randomness import RandomState
from autotune.search import Outcome, Recommendation, Search, SearchState, TrialStopper
from autotune.search.observation import Status
from autotune.snapshot import Snapshot
from autotune.stage.machine import Probe
from autotune.stage.schedule import TrialShape
from autotune.stage.settings import LRSettings

#: Steps made to learn how long one takes; the median leaves the first, slow ones out.
_TIMING_STEPS = 5


@dataclass(frozen=True)
class PlannedLeg:
    """How the candidates of one leg of a search are tried.

    Attributes:
        searcher: Makes what proposes them, given the answer of the leg before (None for the first).
        begin: Makes its first state from the probe of the present weights and the search's trials so far.
        shape: Of a trial's rate; its ``steps`` are the trial's length.
        level: Share of its peak at which the run's rate stands now; a candidate is a peak.
        forecast_to: Extrapolate each trial's training loss to this step (AutoLRS as published); None reads the probe.
        evaluations: Probes spread over each trial, whose series is extrapolated instead (AutoLRS late in a run).
        stop_early: Whether hopeless candidates are stopped.
    """

    searcher: Callable[[Recommendation | None], Search]
    begin: Callable[[Search, Probe, tuple[Outcome, ...]], SearchState]
    shape: TrialShape
    level: float = 1.0
    forecast_to: int | None = None
    evaluations: int = 0
    stop_early: bool = True


@dataclass
class SearchResult:
    """What a search found and what it cost.

    Attributes:
        recommendation: None where no candidate could be tried.
        outcomes: One a candidate, in order.
        start: The probe before any trial.
        trial_steps: Optimizer steps made.
        cost: The same plus evaluations at their price.
        seconds: Wall time.
    """

    start: Probe
    recommendation: Recommendation | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    trial_steps: int = 0
    cost: float = 0.0
    seconds: float = 0.0


class Trials:
    """Runs searches and probes for one fit.

    Args:
        trainer: In a running fit.
        module: Its module.
        set_rates: Makes the optimizer use these rates (one a group) in the next step; None ends that.
        ratios: Each group's rate in units of the first group's.
        seed: Chooses trial and probe batches.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        *,
        set_rates: Callable[[list[float] | None], None],
        ratios: Sequence[float],
        seed: int,
    ) -> None:
        self._trainer = trainer
        self._ranks = Agreement(trainer)
        self._set_rates = set_rates
        self._ratios = list(ratios)
        self._seed = seed
        extras = [data_state(trainer.fit_loop._combined_loader), Attributes(surroundings(trainer))]
        self._snapshot = Snapshot.of_training(module, trainer.optimizers[0], extras)
        self.probe_set: ProbeSet | None = None

    def prepare_probe(self, settings: LRSettings, *, steps: float, saved: dict[str, Any] | None = None) -> None:
        """Chooses the probe batches, once a fit; those of a ``saved`` run again where it goes on."""
        if self.probe_set is None:
            plan = ProbePlan.of(self._trainer, steps) if saved is None else ProbePlan(**saved)
            chosen = {"monitor": settings.monitor, "mode": settings.mode, "seed": self._seed}
            with self._snapshot.rolled_back():
                self.probe_set = ProbeSet(self._trainer, plan=plan, **chosen)

    @property
    def monitor(self) -> list[str | None]:
        """The monitored name (None: the training loss) and how it was found; empty before the first probe."""
        probe = self.probe_set
        return [] if probe is None or not probe.why else [probe.monitor, probe.why]

    @property
    def probe_cost(self) -> float:
        """What one probe costs, in steps."""
        return 0.0 if self.probe_set is None else self.probe_set.cost

    def probe(self) -> Probe:
        """Evaluates the present weights on the probe batches and leaves no trace."""
        assert self.probe_set is not None
        with self._sealed() as loop:
            return self.probe_set(loop)

    @contextmanager
    def _sealed(self) -> Iterator[SideLoop]:
        self._snapshot.capture()
        try:
            with side_loop(self._trainer) as loop:
                yield loop
        finally:
            self._set_rates(None)
            self._snapshot.restore()

    def time_a_step(self, rate: float) -> tuple[float, int]:
        """Seconds one optimizer step takes, and the steps that were spent on timing it."""
        with self._sealed() as loop:
            source = iter(self._replay(self._seed + 15485863))
            self._set_rates([rate * ratio for ratio in self._ratios])
            times = []
            for _ in range(_TIMING_STEPS):
                began = time.monotonic()
                loop.train_step(list(islice(source, self._window())))
                times.append(time.monotonic() - began)
        return self._ranks.of_zero(max(sorted(times)[len(times) // 2], 1e-6)), _TIMING_STEPS

    def search(self, legs: Sequence[PlannedLeg], *, index: int, allowance: float) -> SearchResult:
        """Tries the candidates of one leg after the other, each leg knowing the trials of those before.

        Args:
            legs: At least one.
            index: The search's number in the run, from 0; chooses its batches.
            allowance: Steps the whole search may cost; a candidate that might not fit in is not begun.
        """
        assert self.probe_set is not None
        began = time.monotonic()
        bar = BarText(self._trainer)
        batches = self._replay(self._seed + 104729 * (index + 1))
        try:
            with self._sealed() as loop:
                result = SearchResult(self.probe_set(loop), cost=self.probe_set.cost)
                self._snapshot.restore()
                if math.isfinite(result.start.loss):
                    for leg in legs:
                        self._run_leg(loop, leg, batches, result, bar, f"AutoLRS search {index + 1}", allowance)
        finally:
            bar.clear()
        result.seconds = time.monotonic() - began
        return result

    def _run_leg(
        self,
        loop: SideLoop,
        leg: PlannedLeg,
        batches: Replay,
        result: SearchResult,
        bar: BarText,
        text: str,
        allowance: float,
    ) -> None:
        searcher = leg.searcher(result.recommendation)
        state = leg.begin(searcher, result.start, tuple(result.outcomes))
        best: Outcome | None = None
        tried = 0
        # Rank zero proposes and recommends: two machines' fits may differ in the last bit.
        while (proposal := self._ranks.of_zero(searcher.ask(state))) is not None:
            if result.cost + leg.shape.steps + max(1, leg.evaluations) * self.probe_cost > allowance:
                break
            tried += 1
            bar_text = f"{text}: trial {len(result.outcomes) + 1}"
            outcome, reason = self._trial(loop, proposal.log_lr, leg, batches, best, bar, bar_text)
            self._snapshot.restore()
            loop.rewind()
            result.outcomes.append(outcome)
            result.reasons.append(reason or proposal.reason)
            result.trial_steps += outcome.steps
            result.cost += outcome.steps + self._probes_made(leg, outcome) * self.probe_cost
            state = searcher.tell(state, outcome)
            if outcome.status == "finished" and (best is None or outcome.loss < best.loss):
                best = outcome
        if tried and any(outcome.status != "diverged" for outcome in result.outcomes):
            result.recommendation = self._ranks.of_zero(searcher.recommend(state))

    @staticmethod
    def _probes_made(leg: PlannedLeg, outcome: Outcome) -> int:
        if leg.evaluations:
            return outcome.steps * leg.evaluations // leg.shape.steps
        return int(leg.forecast_to is None and outcome.steps == leg.shape.steps)

    def _trial(
        self,
        loop: SideLoop,
        log_lr: float,
        leg: PlannedLeg,
        batches: Replay,
        best: Outcome | None,
        bar: BarText,
        text: str,
    ) -> tuple[Outcome, str]:
        assert self.probe_set is not None
        stopper = TrialStopper()
        steps, lr = leg.shape.steps, math.exp(log_lr)
        source = iter(batches)
        curve: list[float] = []
        probes: list[float] = []
        shown = 0.0
        for step in range(steps):
            rate = lr * leg.level * leg.shape(step)
            self._set_rates([rate * ratio for ratio in self._ratios])
            curve += self._ranks.mean([loop.train_step(list(islice(source, self._window())))])
            if time.monotonic() - shown > 0.2:
                shown = time.monotonic()
                bar.show(f"{text}, step {step + 1}/{steps}")
            verdict = stopper.judge(curve, None if best is None else list(best.curve), steps, curve[0])
            if verdict.stop and (leg.stop_early or verdict.status == "diverged"):
                loss = _stopped_at(curve, best)
                how: Status = "diverged" if verdict.status == "diverged" else "stopped"
                return Outcome(log_lr, steps, loss, len(curve), how, tuple(curve)), verdict.reason
            if leg.evaluations and (step + 1) * leg.evaluations // steps > len(probes):
                probes.append(self._aside(loop))
        if leg.forecast_to is None:
            loss = self.probe_set(loop).loss
        elif probes:
            loss = published_forecast(probes, round(leg.forecast_to * len(probes) / steps), training=False)
        else:
            loss = published_forecast(curve, leg.forecast_to)
        status: Status = "finished" if math.isfinite(loss) else "diverged"
        return Outcome(log_lr, steps, loss, len(curve), status, tuple(curve)), ""

    def _aside(self, loop: SideLoop) -> float:
        """A probe in the middle of a trial, which goes on under its own randomness."""
        assert self.probe_set is not None
        generators = RandomState()
        generators.capture()
        loss = self.probe_set(loop).loss
        generators.restore()
        return loss

    def _window(self) -> int:
        return int(min(self._trainer.accumulate_grad_batches, self._trainer.num_training_batches))

    def _replay(self, seed: int) -> Replay:
        combined = self._trainer.fit_loop._combined_loader
        limits = list(combined.limits)

        def open_stream() -> Iterator[Any]:
            return (batch for batch, _, _ in second_loader(combined, seed, limits))

        return Replay(open_stream)


def _stopped_at(curve: Sequence[float], best: Outcome | None) -> float:
    """Where a stopped trial would have ended: as far behind the best one's probe as it was on the same batches."""
    if best is None or len(curve) > len(best.curve):
        return math.nan
    recent = max(1, len(curve) // 5)
    behind = [own - other for own, other in zip(curve[-recent:], best.curve[len(curve) - recent :], strict=False)]
    return best.loss + math.fsum(behind) / len(behind)
