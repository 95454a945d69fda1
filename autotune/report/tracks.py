"""What the curves of a report are made of: losses, learning rate, batch, noise scale, and the examples axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from autotune.decision import Decision
from autotune.report.metrics import Series
from autotune.report.reading import Run
from autotune.report.values import mapping, number

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
        outcome: The loss that came, or None while it has not.
        inside: Whether the outcome fell into the interval.
    """

    made_at: int
    target_step: float
    prediction: float
    low: float | None
    high: float | None
    outcome: float | None
    inside: bool | None


def first(run: Run, kind: str) -> Decision | None:
    """The first decision of a kind."""
    return next((decision for decision in run.decisions if decision.kind == kind), None)


def losses(run: Run) -> dict[str, tuple[str, Series]]:
    """The run's loss curves by role: ``"train"`` and ``"validation"`` where they were logged.

    What the controller monitors is the validation curve; else names decide. Of Lightning's ``loss_step`` and
    ``loss_epoch`` the finer one is taken.
    """
    setup = first(run, "setup")
    monitor = setup.numbers.get("monitor") if setup else None
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
    return _held(run, "lr", kinds=("search", "rollback", "plateau", "finish"))


def batch_size(run: Run) -> Series | None:
    """Examples per update; changes take effect at their ``effective_step``."""
    if "autotune/batch_size" in run.metrics:
        return run.metrics["autotune/batch_size"]
    points = _batch_knots(run)
    return Series.of([*points, (float(run.last_step), points[-1][1])]) if points else None


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
    """Every prediction with its outcome.

    The record of a stage's end says what came true. Where none names the stage, the monitored loss nearest
    the target step serves, if the run got there.
    """
    outcomes: dict[float, Mapping[str, object]] = {}
    for decision in run.decisions:
        end = number(decision, "end_step")
        if decision.kind == "stage" and decision.action == "end" and end is not None:
            outcomes[end] = decision.numbers
    found = []
    for decision in run.decisions:
        prediction, target = number(decision, "prediction"), number(decision, "target_step")
        if decision.kind != "forecast" or prediction is None or target is None:
            continue
        low, high = number(decision, "low"), number(decision, "high")
        outcome = number(outcomes.get(target, {}), "loss")
        inside = None
        if outcome is not None and low is not None and high is not None:
            inside = low <= outcome <= high
        found.append(Forecast(decision.step, target, prediction, low, high, outcome, inside))
    return found


def horizon_steps(run: Run) -> float | None:
    """The planned length in updates, where the plan is in updates."""
    setup = first(run, "setup")
    plan = mapping(setup, "horizon") if setup else {}
    return number(plan, "total") if plan.get("unit") == "steps" else None


def _batch_knots(run: Run) -> list[tuple[float, float]]:
    knots: list[tuple[float, float]] = []
    setup = first(run, "setup")
    if setup is not None and (size := number(setup, "batch_size")) is not None:
        knots.append((0.0, size))
    for decision in run.decisions:
        size = number(decision, "batch_size")
        if decision.kind != "batch" or size is None:
            continue
        previous = number(decision, "previous_batch_size")
        if not knots and previous is not None:
            knots.append((0.0, previous))
        knots.append((float(decision.effective_step), size))
    return knots


def _held(run: Run, key: str, kinds: tuple[str, ...]) -> Series | None:
    points: list[tuple[float, float]] = []
    for decision in run.decisions:
        value = number(decision, key)
        if decision.kind not in kinds or value is None:
            continue
        at = float(decision.effective_step)
        if points and at > points[-1][0]:
            points.append((np.nextafter(at, -1.0), points[-1][1]))
        points.append((at, value))
    if not points:
        return None
    if run.last_step > points[-1][0]:
        points.append((float(run.last_step), points[-1][1]))
    return Series.of(points)
