"""What a decision log says about every update: the plans, the peaks and the batches in force, each with its start.

Decisions are read in the order in which they take effect, which is not the order of the log: a growth is decided
some updates before the first batch of the new size arrives, and what is decided in between comes first.

=============  =========================================================  ==================
symbol         meaning                                                    unit
=============  =========================================================  ==================
``start``      real updates done before the first one that is meant       updates
``peak``       see :mod:`autotune.replay`                                 learning rate
``batch``      global batch                                               examples
=============  =========================================================  ==================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.arguments import is_count, is_number
from autotune.decision import Decision
from autotune.errors import LogFormatError
from autotune.stage.schedule import Shape

#: Kinds of decision that put a peak in force; a stage's beginning repeats the one it runs under.
_PEAK_KINDS = ("search", "rollback", "plateau", "setback", "climb", "stage")


@dataclass(frozen=True)
class Plan:
    """How long the run is, and the shape of its rate, as they were believed from one update on.

    Attributes:
        start: The first update that is meant.
        unit: Of the run's end: ``"steps"``, ``"examples"``, ``"seconds"`` or ``"none"``.
        total: The run's end in that unit; infinite where it is not known.
        updates: The updates that progress 1 comes to.
        shape: Base shape over progress.
    """

    start: int
    unit: str
    total: float
    updates: float
    shape: Shape

    @property
    def in_examples(self) -> bool:
        """Whether progress counts examples."""
        return self.unit == "examples" and math.isfinite(self.total)


def is_lr_setup(decision: Decision) -> bool:
    """Whether the record is the plan of a run whose learning rate was controlled."""
    return decision.kind == "setup" and "shape" in decision.numbers and decision.action != "replan"


def is_batch_setup(decision: Decision) -> bool:
    """Whether the record is the plan of a run whose batch was controlled."""
    return decision.kind == "setup" and decision.action == "set_batch"


def plans_of(decisions: Sequence[Decision], steps: int) -> tuple[Plan, ...]:
    """The plan at the start, and each one that took its place: a resumed run may have got another end.

    Args:
        decisions: Of one log; the first plan is that of the first record for which :func:`is_lr_setup` holds.
        steps: Updates that the log covers: what a run that was limited by time came to.

    Raises:
        LogFormatError: A plan cannot be one.
    """
    plans: list[Plan] = []
    for decision in decisions:
        numbers = decision.numbers
        if is_lr_setup(decision) and not plans:
            plans.append(_plan(0, _mapping(numbers.get("horizon")), _mapping(numbers.get("shape")), steps))
        elif decision.kind == "setup" and decision.action == "replan" and plans:
            before = plans[-1]
            horizon = {"unit": before.unit, "total": before.total, "updates": before.updates, **numbers}
            if "updates" not in numbers and _float(numbers.get("total"), math.inf) < math.inf:
                horizon["updates"] = before.updates * _float(numbers.get("total"), 1.0) / before.total
            known = {"warmup": before.shape.warmup, "form": "linear" if before.shape.decay else "hold"}
            shape = {**known, "decay_from": before.shape.decay_from, **_mapping(numbers.get("shape"))}
            plans.append(_plan(decision.effective_step, horizon, shape, steps))
    return tuple(plans)


def _plan(start: int, horizon: Mapping[str, Any], shape: Mapping[str, Any], steps: int) -> Plan:
    unit, total = str(horizon.get("unit", "steps")), _float(horizon.get("total"), math.inf)
    updates = _float(horizon.get("updates"), total if unit == "steps" else math.nan)
    warmup = _float(shape.get("warmup"), 0.0)
    begins = _float(shape.get("decay_from"), 0.0)
    if not (total > 0.0 and 0.0 <= warmup < 1.0 and 0.0 <= begins < 1.0):
        raise LogFormatError(
            f"the plan in force from update {start} has total={total!r}, warmup={warmup!r} and decay_from={begins!r}: "
            "a run's end is above 0, the others are shares of it, below 1"
        )
    if unit == "seconds" or not 1.0 <= updates < math.inf:
        updates = float(max(steps, 1))
    form = Shape(warmup, shape.get("form") != "hold", 1.0 / updates, begins)
    return Plan(start, unit, total, updates, form)


def peaks_of(decisions: Sequence[Decision], first: float = math.nan) -> tuple[tuple[int, float], ...]:
    """(start, peak), ascending.

    Args:
        decisions: Of one log.
        first: The peak before any decision; NaN where there is none, which is left out of the answer.
    """
    found: list[tuple[int, float]] = [] if math.isnan(first) else [(0, first)]
    for decision in sorted(decisions, key=lambda decision: decision.effective_step):
        if decision.kind == "batch" and found:
            peak = found[-1][1] * _lr_factor(decision)
        elif decision.kind in _PEAK_KINDS:
            peak = _float(decision.numbers.get("lr"), math.nan)
        else:
            continue
        if math.isfinite(peak) and (not found or peak != found[-1][1]):
            if found and found[-1][0] == decision.effective_step:
                found.pop()
            found.append((decision.effective_step, peak))
    return tuple(found)


def _lr_factor(decision: Decision) -> float:
    numbers = decision.numbers
    return _float(numbers.get("lr_factor", numbers.get("lr_gain")), 1.0)


def batches_of(decisions: Sequence[Decision]) -> tuple[tuple[int, int], ...]:
    """(start, batch), ascending; empty where the log does not speak of the batch."""
    return _counts(decisions, ("batch_size", "batch"), ("previous_batch_size", "batch_before"))


def accumulations_of(decisions: Sequence[Decision]) -> tuple[tuple[int, int], ...]:
    """(start, micro-batches an update), ascending; empty where the log does not speak of them."""
    return _counts(decisions, ("accumulate",))


def _counts(
    decisions: Sequence[Decision], names: tuple[str, ...], before: tuple[str, ...] = ()
) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for decision in sorted(decisions, key=_batch_from):
        if decision.kind not in ("setup", "batch"):
            continue
        if not found and (first := _count(decision, before)) is not None:
            found.append((0, first))
        count = _count(decision, names)
        if count is not None and (not found or count != found[-1][1]):
            start = _batch_from(decision)
            if found and found[-1][0] == start:
                found.pop()
            found.append((start, count))
    return tuple(found)


def _batch_from(decision: Decision) -> int:
    """The first update of the new size: weights go back at once, batches that workers have ready are still made."""
    return _count(decision, ("batch_from",)) or decision.effective_step


def _count(decision: Decision, names: tuple[str, ...]) -> int | None:
    counts = (decision.numbers.get(name) for name in names)
    return next((count for count in counts if isinstance(count, int) and is_count(count)), None)


def epochs_of(decisions: Sequence[Decision]) -> tuple[int | None, bool]:
    """Examples an epoch shows, None where the log does not say; whether a last smaller micro-batch is left out."""
    setups = [decision for decision in decisions if is_lr_setup(decision) or is_batch_setup(decision)]
    examples = next((count for setup in setups if (count := _count(setup, ("epoch_examples",))) is not None), None)
    return examples, any(setup.numbers.get("drop_last") is True for setup in setups)


def ratios_of(setup: Decision | None) -> tuple[float, ...]:
    """Each group's rate in units of the first group's; (1,) where the log does not say.

    Raises:
        LogFormatError: They are no finite numbers.
    """
    ratios = None if setup is None else setup.numbers.get("lr_ratios")
    if ratios is None:
        return (1.0,)
    if not (isinstance(ratios, list) and ratios and all(map(is_number, ratios))):
        raise LogFormatError(f"lr_ratios are finite numbers, one a group; got {ratios!r}")
    return tuple(map(float, ratios))


def played(decisions: Sequence[Decision]) -> dict[int, tuple[Decision, ...]]:
    """Decisions by the step at which they were taken, in the order of the log."""
    found: dict[int, list[Decision]] = {}
    for decision in decisions:
        found.setdefault(decision.step, []).append(decision)
    return {step: tuple(events) for step, events in found.items()}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _float(value: Any, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else default
