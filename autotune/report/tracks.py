"""What the curves of a report are made of: losses, learning rate, batch, noise scale, and the examples axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autotune._schedule_log import batches_of, peaks_of
from autotune.decision import Decision
from autotune.report.metrics import Series
from autotune.report.reading import Run
from autotune.report.values import number, settings

#: Logged names of the learning rate, best first. LearningRateMonitor's begin with ``lr-``.
_LR_NAMES = ("autotune/lr", "lr", "learning_rate", "train/lr")
_VALIDATION = ("val", "valid", "validation", "eval", "dev")


@dataclass(frozen=True)
class Forecast:
    """A prediction of the loss at a later step, and what came true.

    Attributes:
        made_at: Step at which it was made.
        target_step: Step that it speaks of.
        prediction: Predicted loss; ``low`` to ``high`` is its interval.
        came_at: Step at which it was seen what came.
        outcome: The loss that came, or None while it has not.
        inside: Whether the outcome fell into the interval.
    """

    made_at: int
    target_step: float
    prediction: float
    low: float | None
    high: float | None
    came_at: int | None
    outcome: float | None
    inside: bool | None


def losses(run: Run) -> dict[str, tuple[str, Series]]:
    """The run's loss curves by role: ``"train"`` and ``"validation"`` where they were logged.

    What the controller monitors is the validation curve; else names decide. Of Lightning's ``loss_step`` and
    ``loss_epoch`` the finer one is taken.
    """
    monitor = settings(run.decisions).get("monitor")
    named = {name: series for name, series in run.metrics.items() if not name.startswith("autotune/")}
    found: dict[str, tuple[str, Series]] = {}
    if isinstance(monitor, str) and monitor in named:
        found["validation"] = (monitor, named[monitor])
    for name in sorted(named, key=lambda name: (-len(named[name].steps), name)):
        if "loss" not in name.lower() or name == monitor:
            continue
        words = name.lower().replace("/", "_").replace("-", "_").split("_")
        role = "validation" if any(word in _VALIDATION for word in words) else "train"
        if role == "train" and "test" in words:
            continue
        found.setdefault(role, (name, named[name]))
    return found


def learning_rate(run: Run) -> Series | None:
    """The learning rate of the first parameter group: as logged, else held from decision to decision."""
    for name in _LR_NAMES:
        if name in run.metrics:
            return run.metrics[name]
    monitored = [series for name, series in sorted(run.metrics.items()) if name.startswith("lr-")]
    if monitored:
        return monitored[0]
    return _held(run, peaks_of(run.decisions))


def batch_size(run: Run) -> Series | None:
    """Examples per update, from the update at which each change took effect; else as it was logged now and then."""
    points = _batch_knots(run)
    if not points:
        return run.metrics.get("autotune/batch_size")
    return Series.of([*points, (float(run.last_step), points[-1][1])])


def noise_scale(run: Run) -> Series | None:
    """The gradient noise scale in examples: as logged, else as the batch decisions quote it."""
    if "autotune/noise_scale" in run.metrics:
        return run.metrics["autotune/noise_scale"]
    points = [(d.step, value) for d in run.decisions if (value := number(d, "noise_scale")) is not None]
    return Series.of([(float(step), value) for step, value in points]) if points else None


def examples_axis(run: Run) -> list[tuple[float, float]] | None:
    """Knots (step, examples seen so far) of a piecewise linear map, or None where the batch is unknown."""
    knots = _batch_knots(run)
    if not knots:
        return None
    starts, sizes = [0.0, *[step for step, _ in knots[1:]]], [size for _, size in knots]
    ends = [*starts[1:], max(float(run.last_step), starts[-1] + 1.0)]
    axis, seen = [(0.0, 0.0)], 0.0
    for start, end, size in zip(starts, ends, sizes, strict=True):
        seen += max(end - start, 0.0) * size
        axis.append((end, seen))
    return axis


def forecasts(run: Run) -> list[Forecast]:
    """Every prediction with its outcome: what the record of the end of the same stage says came true.

    A stage may end earlier than planned; the outcome then speaks of another step than the prediction did, and both
    are drawn where it came. A score that is to rise was predicted as a loss; here it has its own sign, as in its curve.
    """
    ends = [d for d in run.decisions if d.kind == "stage" and d.action == "end"]
    found = []
    for decision in run.decisions:
        prediction, target = number(decision, "prediction"), number(decision, "target_step")
        if decision.kind != "forecast" or prediction is None or target is None:
            continue
        low, high = number(decision, "low"), number(decision, "high")
        end = next((e for e in ends if e.step >= decision.step and _same_stage(e, decision)), None)
        outcome = None if end is None else number(end, "loss")
        if number(decision, "sign") == -1.0:
            prediction, low, high, outcome = -prediction, _turned(high), _turned(low), _turned(outcome)
        inside = None
        if outcome is not None and low is not None and high is not None:
            inside = low <= outcome <= high
        came_at = None if end is None else end.step
        found.append(Forecast(decision.step, target, prediction, low, high, came_at, outcome, inside))
    return found


def _turned(value: float | None) -> float | None:
    return None if value is None else -value


def _same_stage(end: Decision, forecast: Decision) -> bool:
    stage = number(forecast, "stage")
    return stage is None or number(end, "index") in (None, stage)


def _batch_knots(run: Run) -> list[tuple[float, float]]:
    return [(float(start), float(size)) for start, size in batches_of(run.decisions)]


def _held(run: Run, knots: Sequence[tuple[int, float]]) -> Series | None:
    """A step function of (start, value); what the run ended at is its last point."""
    ended = [(d.step, value) for d in run.decisions if d.kind == "finish" and (value := number(d, "lr")) is not None]
    points: list[tuple[float, float]] = []
    # A run that was made longer goes on after what it had ended at.
    last = knots[-1][0] if knots else 0
    for start, value in (*knots, *(end for end in ended[-1:] if end[0] >= last)):
        at = float(start)
        if points and at > points[-1][0]:
            points.append((np.nextafter(at, -1.0), points[-1][1]))
        points.append((at, value))
    if not points:
        return None
    if run.last_step > points[-1][0]:
        points.append((float(run.last_step), points[-1][1]))
    return Series.of(points)
