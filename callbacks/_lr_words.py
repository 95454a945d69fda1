"""The numbers and sentences of the learning-rate controller's decisions; no move is made here."""

from __future__ import annotations

import math
from typing import Any

from autotune.callbacks._lr_ledger import Costs
from autotune.callbacks._trials import SearchResult
from autotune.stage.machine import StageState
from autotune.stage.outlook import Outlook
from autotune.stage.policy import Leg
from autotune.stage.probe import Probe


def rate(state: StageState, before: StageState | None = None) -> dict[str, Any]:
    """The peak, and the one before where it has changed."""
    numbers: dict[str, Any] = {"lr": state.lr}
    return numbers if before is None else {**numbers, "previous_lr": before.lr}


def searched(result: SearchResult, legs: list[Leg]) -> dict[str, Any]:
    """What a search tried, what it saw, and what the surrogate makes of it."""
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


def _thinned(curve: tuple[float, ...], points: int = 100) -> list[list[float]]:
    """At most ``points`` of a curve as (step, loss), the last one among them."""
    stride = max(1, math.ceil(len(curve) / points))
    kept = {*range(0, len(curve), stride), len(curve) - 1} if curve else set()
    return [[float(step), curve[step]] for step in sorted(kept)]


def levelled(optimizer: str, shares: tuple[float, ...]) -> str:
    """That a trial's rates were lowered or raised, where they were, and why."""
    told = [share for share in shares if share > 0.0]
    lowest, highest = min(told, default=1.0), max(told, default=1.0)
    if lowest < 1.0 / 1.05:
        return (
            f"; {optimizer}'s first steps are up to {1.0 / lowest:.2g} times as long as the run's: the trials' are not"
        )
    if highest > 1.05:
        return f"; {optimizer}'s first steps are down to 1/{highest:.2g} of the run's: the trials' are not"
    return ""


def climbed(
    state: StageState, before: StageState, loss: float, best: float, *, stuck: bool
) -> tuple[str, dict[str, Any]]:
    """The held rate moves after windows of training loss, the last of them at ``loss``."""
    assert state.lr is not None
    assert before.lr is not None
    if state.lr > before.lr and stuck:
        reason = f"the training loss, {loss:.4g}, is not clearly below where it began: up to {state.lr:.3g}"
    elif state.lr > before.lr:
        reason = f"the training loss, {loss:.4g} where {best:.4g} was best, bears a higher rate: up to {state.lr:.3g}"
    else:
        reason = f"the training loss, {loss:.4g} where {best:.4g} was best, gets worse: down to {state.lr:.3g}"
    return reason, {"train_loss": loss, "best_train_loss": best, **rate(state, before)}


def scalars(costs: Costs, state: StageState) -> dict[str, float]:
    """The peak, the stage and the cost so far, for the loggers."""
    return {
        "peak_lr": math.nan if state.lr is None else state.lr,
        "stage": state.index,
        "trial_steps": costs.trial_steps,
        "search_cost_steps": costs.spent,
    }


def begun(state: StageState, step: int, end_step: int, probe: Probe | None) -> dict[str, Any]:
    """A stage begins at ``step`` and will end at ``end_step``."""
    return {
        "index": state.index,
        "start_step": step,
        "end_progress": state.end,
        "end_step": end_step,
        "loss": math.nan if probe is None else probe.loss,
        "probe_share": math.nan if probe is None else probe.share,
        **rate(state),
    }


def judged(state: StageState, step: int, probe: Probe, evidence: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """A stage ends at ``step``: the sentence and the numbers, its prediction's fate included."""
    numbers: dict[str, Any] = {
        "index": state.index,
        "start_step": state.start_step,
        "end_step": step,
        "loss": probe.loss,
        "previous_loss": math.nan if state.start_probe is None else state.start_probe.loss,
        "evidence": list(evidence),
    }
    reason = f"stage {state.index} ends at a loss of {probe.loss:.4g}"
    if state.prediction is not None:
        value, low, high = state.prediction
        inside = low <= probe.loss <= high
        numbers |= {"prediction": value, "low": low, "high": high, "inside": inside}
        reason += f"; {value:.4g} was predicted, {'inside' if inside else 'outside'} {low:.4g} to {high:.4g}"
    return reason, numbers


def looked(state: StageState, probe: Probe) -> tuple[str, dict[str, Any]]:
    """A probe in the place of a validation."""
    reason = f"a loss of {probe.loss:.4g} on {probe.share:.0%} of what validation is made on"
    return reason, {"index": state.index, "loss": probe.loss}


def rolled_back(state: StageState, before: StageState, step: int, to_step: int) -> dict[str, Any]:
    """The run goes back from ``step`` to the weights of ``to_step``."""
    return {"to_step": to_step, "lost_steps": step - to_step, **rate(state, before)}


def expected(outlook: Outlook, now: Probe) -> tuple[str, dict[str, Any]]:
    """What the forecaster says of the stage's end, or why it says nothing."""
    if not outlook.trusted:
        return outlook.reason, {"loss": now.loss}
    value, low, high = outlook.interval
    reason = f"a loss of {now.loss:.4g} now, {value:.4g} ({low:.4g} to {high:.4g}) expected at the stage's end"
    return reason, {"loss": now.loss, "prediction": value, "low": low, "high": high, "level": 0.8}


def finished(costs: Costs, state: StageState, step: int, began: int) -> tuple[str, dict[str, Any]]:
    """The sum at the run's end."""
    numbers: dict[str, Any] = {
        "trial_steps": costs.trial_steps,
        "real_steps": step,
        "cost_steps": costs.spent,
        "search_seconds": costs.seconds,
        "searches": state.searches,
    }
    made = step - began
    return f"searching cost {costs.spent / max(made, 1):.1%} of {made} updates", numbers
