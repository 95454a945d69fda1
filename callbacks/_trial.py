"""One trial: a candidate's rate annealed over a few steps, watched, stopped where hopeless, read off at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autotune.callbacks._trainer.bar import SearchBar
from autotune.forecast.published import published_forecast
from autotune.randomness import RandomState
from autotune.search import Outcome, Recommendation, Search, SearchState, TrialStopper
from autotune.search.observation import Status
from autotune.stage.probe import Probe
from autotune.stage.schedule import TrialShape


@dataclass(frozen=True)
class PlannedLeg:
    """How the candidates of one leg of a search are tried.

    Attributes:
        searcher: Makes what proposes them, given the answer of the leg before (None for the first).
        begin: Makes its first state from the probe of the present weights and the search's trials so far.
        candidates: How many are planned at most.
        shape: Of a trial's rate; its ``steps`` are the trial's length.
        level: Share of its peak at which the run's rate stands now; a candidate is a peak.
        forecast_to: Extrapolate each trial's training loss to this step (AutoLRS as published); None reads the probe.
        evaluations: Probes spread over each trial, whose series is extrapolated instead (AutoLRS late in a run).
        stop_early: Whether hopeless candidates are stopped.
    """

    searcher: Callable[[Recommendation | None], Search]
    begin: Callable[[Search, Probe, tuple[Outcome, ...]], SearchState]
    candidates: int
    shape: TrialShape
    level: float = 1.0
    forecast_to: int | None = None
    evaluations: int = 0
    stop_early: bool = True

    def probes_made(self, steps: int) -> int:
        """Probes in a trial that has made ``steps`` steps."""
        if self.evaluations:
            return steps * self.evaluations // self.shape.steps
        return int(self.forecast_to is None and steps == self.shape.steps)


def run_trial(
    leg: PlannedLeg,
    log_lr: float,
    best: Outcome | None,
    step: Callable[[float], float],
    probe: Callable[[], float],
    bar: SearchBar,
) -> tuple[Outcome, str]:
    """Tries one candidate.

    Args:
        leg: How.
        log_lr: The candidate.
        best: The leg's best trial so far, on the same batches.
        step: Makes one optimizer step at a rate and returns its loss.
        probe: The loss on the probe batches.
        bar: Shows every step.

    Returns:
        The outcome, and why the trial was stopped (empty where it was not).
    """
    stopper = TrialStopper()
    steps, lr = leg.shape.steps, math.exp(log_lr)
    curve: list[float] = []
    # Arrays, filled as the trial goes on: every step is judged, and a long trial's lists would be read again each time.
    losses, rival = np.empty(steps), None if best is None else np.asarray(best.curve)
    probes: list[float] = []
    for number in range(steps):
        curve.append(step(lr * leg.level * leg.shape(number)))
        losses[number] = curve[-1]
        bar.step()
        verdict = stopper.judge(losses[: number + 1], rival, steps, curve[0])
        if verdict.stop and (leg.stop_early or verdict.status == "diverged"):
            loss = _stopped_at(curve, best)
            how: Status = "diverged" if verdict.status == "diverged" else "stopped"
            return Outcome(log_lr, steps, loss, len(curve), how, tuple(curve)), verdict.reason
        if leg.evaluations and (number + 1) * leg.evaluations // steps > len(probes):
            probes.append(_aside(probe))
    if leg.forecast_to is None:
        loss = probe()
    elif probes:
        loss = _expected(probes, round(leg.forecast_to * len(probes) / steps), training=False)
    else:
        loss = _expected(curve, leg.forecast_to, training=True)
    status: Status = "finished" if math.isfinite(loss) else "diverged"
    return Outcome(log_lr, steps, loss, len(curve), status, tuple(curve)), ""


def _expected(losses: Sequence[float], at: int, *, training: bool) -> float:
    """The published forecast; where there is none, as of a few losses, what they ended at."""
    forecast = published_forecast(losses, at, training=training)
    recent = losses[-max(1, len(losses) // 5) :]
    return forecast if math.isfinite(forecast) else math.fsum(recent) / len(recent)


def _aside(probe: Callable[[], float]) -> float:
    """A probe in the middle of a trial, which goes on under its own randomness."""
    generators = RandomState()
    generators.capture()
    loss = probe()
    generators.restore()
    return loss


def _stopped_at(curve: Sequence[float], best: Outcome | None) -> float:
    """Where a stopped trial would have ended: as far behind the best one's probe as it was on the same batches."""
    if best is None or len(curve) > len(best.curve):
        return math.nan
    recent = max(1, len(curve) // 5)
    behind = [own - other for own, other in zip(curve[-recent:], best.curve[len(curve) - recent :], strict=False)]
    return best.loss + math.fsum(behind) / len(behind)
