"""Where a stage will end: the validation loss predicted from the training curve, and a watch on the way there.

The training loss is free and dense, the validation loss costs; so the curve is fitted to the former and carried
over to the latter by the two probes the stage has: its start and now. With ``f`` the fitted training curve and
``p`` the probes,

    prediction = p(now) + slope * (f(end) - f(now)),    slope = (p(now) - p(start)) / (f(now) - f(start)) >= 0,

so that a validation loss that no longer follows the training loss (slope 0) is predicted to stay. The interval is wide
where the fit is unsure, and at least :data:`WANDER` times what the stage has changed the loss so far: weights that are
trained at a rate that is held wander, and of that two probes and a mean curve say nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autotune.forecast._profile import Family
from autotune.forecast.curve import CurveFit, fit_curve
from autotune.forecast.trace import LossTrace
from autotune.stage.probe import Probe, compare

#: Slopes beyond this come from a training curve that hardly moved; they would blow the interval up.
_STEEPEST = 3.0
_LEVEL = 0.8
#: Half of the interval's least width, as a share of \|p(now) - p(start)\|: on the benchmark's developing seeds it takes
#: this for the 80 % interval to hold in 80 % of cases.
WANDER = 0.6
_POINTS = 8


@dataclass(frozen=True)
class Outlook:
    """A stage's predicted end.

    Attributes:
        value: The monitored loss expected at the end, with the interval ``low`` to ``high`` at level 0.8;
            NaN where the forecaster refused.
        reason: Why it refused; empty otherwise.
        watch: Steps on the way and the highest training loss to be expected there.
    """

    value: float
    low: float
    high: float
    reason: str = ""
    watch: tuple[tuple[float, float], ...] = ()

    @property
    def interval(self) -> tuple[float, float, float]:
        """Value, low, high."""
        return self.value, self.low, self.high

    @property
    def trusted(self) -> bool:
        """Whether there is a prediction."""
        return not self.reason


def look_ahead(
    trace: LossTrace,
    start: Probe | None,
    now: Probe,
    step: float,
    end_step: float,
    family: Family = "exponential",
) -> Outlook:
    """Predicts the probe loss at ``end_step``.

    Args:
        trace: Training losses of the stage so far, by real step.
        start: The probe at the stage's start.
        now: The probe at ``step``.
        step: Real updates done.
        end_step: Real updates at the stage's end.
        family: Of the training curve. Which one foretells better is measured by
            ``examples/benchmark/forecast_table.py``.
    """
    steps, losses = trace.curve()
    nothing = math.nan
    if start is None or not (math.isfinite(start.loss) and math.isfinite(now.loss)):
        return Outlook(nothing, nothing, nothing, "no finite probe at the stage's start or now")
    bound = 0.0 if all(loss >= 0.0 for loss in losses) else None
    fit = fit_curve(steps, losses, family=family, lower_bound=bound)
    if not fit.trusted:
        return Outlook(nothing, nothing, nothing, fit.reason)
    end = fit.predict(end_step, _LEVEL, noisy=False)
    if not end.trusted:
        return Outlook(nothing, nothing, nothing, end.reason)
    at_now, at_start = fit.predict(step, _LEVEL, noisy=False).value, fit.predict(steps[0], _LEVEL, noisy=False).value
    slope = _slope(start, now, at_start, at_now)
    value = now.loss + slope * (end.value - at_now)
    _, error = compare(now, start)
    # The end is read on the same probe batches: what differs is how far the weights move until then.
    spread = math.hypot(1.28 * (error if math.isfinite(error) else 0.0), WANDER * (now.loss - start.loss))
    low = value - math.hypot(slope * (end.value - end.low), spread)
    high = value + math.hypot(slope * (end.high - end.value), spread)
    if bound is not None and now.loss >= bound:
        value, low = max(value, bound), max(low, bound)
    return Outlook(value, low, high, "", _watch(fit, step, end_step))


def _slope(start: Probe, now: Probe, at_start: float, at_now: float) -> float:
    fallen = at_now - at_start
    if fallen >= 0.0:
        return 0.0
    return min(max((now.loss - start.loss) / fallen, 0.0), _STEEPEST)


def _watch(fit: CurveFit, step: float, end_step: float) -> tuple[tuple[float, float], ...]:
    places = [step + (end_step - step) * (index + 1) / _POINTS for index in range(_POINTS)]
    return tuple((place, fit.predict(place, _LEVEL, noisy=False).high) for place in places)
