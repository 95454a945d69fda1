"""The plan of a fit: its end, the shape of the rate up to it, the stages' clock, and what searching may cost."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from autotune.callbacks._losses import LOT
from autotune.callbacks._trainer import horizon as horizons
from autotune.callbacks._trainer.rates import averages_weights
from autotune.stage.budget import Budget
from autotune.stage.climb import Climb
from autotune.stage.machine import StageMachine, StageState
from autotune.stage.schedule import Shape
from autotune.stage.settings import LRSettings

#: The peak is held for half of the run. Half a decade below the best rate that gains 2 to 22 % over a decay from the
#: start, at the best rate 1.5 %; above it, it mostly loses, up to 10 % (``examples/benchmark/FINDINGS.md``).
DECAY_FROM = 0.5
#: AutoLRS as published: stages double from 1000 steps to 8000, which makes 15000 until they stay.
_PUBLISHED_FIRST, _PUBLISHED_LONGEST, _PUBLISHED_DOUBLING = 1000.0, 8000.0, 15000.0


class LRPlan:
    """What follows from the trainer's limits and the user's settings.

    Attributes:
        horizon: The run's end.
        began: Updates that had been made when the run came under our control; 0 but for a plain checkpoint's.
        updates: The run's (assumed) length in optimizer steps; NaN until a step has been timed.
        budget: What searching may cost.
        shape: Of the rate.
        machine: The stages' clock.
        climb: How the held rate moves; None where it does not.
        averages: Whether the optimizer is schedule-free: then rates are held, in trials too.
    """

    def __init__(self, settings: LRSettings, trainer: Any) -> None:
        self._settings = settings
        self._trainer = trainer
        self.averages = averages_weights(trainer.optimizers[0])
        self.began = int(trainer.global_step)
        self._renew()

    def _renew(self) -> None:
        self.horizon = horizons.plan(self._trainer)
        self.set_updates(self.horizon.updates)

    def renewed(self) -> bool:
        """Looks again at a run whose end was not known; whether it is now."""
        if not horizons.plan(self._trainer).known:
            return False
        self._renew()
        return True

    def set_updates(self, updates: float) -> None:
        """Sets the run's length in optimizer steps."""
        self.updates = updates
        known = self.horizon.known
        resolution = 0.0 if math.isnan(updates) else 1.0 / max(updates, 1.0)
        most = updates if known else self.horizon.most
        self.budget = Budget(self._settings.search_budget, max(most - self.began, 1.0))
        if self._settings.objective == "forecast":
            self.shape = Shape(warmup=0.0, decay=False)
            self.machine = self._published_machine(updates)
        else:
            decays = known and not self.averages
            self.shape = Shape(decay=decays, resolution=resolution, decay_from=DECAY_FROM)
            self.machine = StageMachine(search=self._settings.search, known_end=known)
        self.climb = self._climb(resolution) if self._settings.climb and self.shape.decay else None

    def _climb(self, resolution: float) -> Climb:
        """While the peak is held. A window holds a lot of losses; a short run begins where it can come back from."""
        lot = LOT * resolution  # after which the last loss of the warm-up has been read
        climb = Climb(begin=self.shape.warmup + lot, end=self.shape.decay_from)
        window = max(climb.window, lot)
        moves = int((climb.end - climb.begin) / window) // (climb.patience + 1)
        return replace(climb, window=window, start=max(climb.start, climb.factor**-moves))

    def _published_machine(self, updates: float) -> StageMachine:
        """AutoLRS's clock. On runs too short for it the stages keep their ratios: 1, 2, 4, 8 of fifteen parts."""
        length = updates if math.isfinite(updates) else _PUBLISHED_DOUBLING
        scale = min(1.0, length / _PUBLISHED_DOUBLING) / length
        return StageMachine(
            search="every_stage",
            known_end=False,
            first=_PUBLISHED_FIRST * scale,
            longest=_PUBLISHED_LONGEST * scale,
            forecast_at=math.inf,
            guard=False,
            decay=1.0,
        )

    @property
    def progress(self) -> float:
        """Share of the run that is done; unbounded where the end is not known."""
        done = horizons.done(self._trainer, self.horizon)
        return done / (self.horizon.total if self.horizon.known else self.updates)

    @property
    def searchable(self) -> float:
        """Steps that searching may cost in the whole (assumed) run."""
        return self.budget.first(self.updates)

    def moved(self, state: StageState, scale: float) -> StageState:
        """A stage of a run whose end has moved: on the new clock, where the same work is ``scale`` times as much."""
        progress, end = self.progress, state.end * scale
        last = 1.0 if self.horizon.known else math.inf
        if state.end >= 1.0 or not progress < end < last:
            end = min(progress + self.machine.length(state.index - 1), last)
        return replace(state, start=state.start * scale, end=end, forecast_due=state.forecast_due * scale)

    def describe(self) -> str:
        """The plan, in a sentence."""
        horizon = self.horizon
        if not horizon.known:
            return f"the end is not known ({horizon.reason}): the rate is held, and lowered on a plateau"
        count = "" if math.isnan(horizon.updates) else f", about {horizon.updates:.0f} updates"
        return f"the run ends at {horizon.total:g} {horizon.unit}{count}"

    def numbers(self) -> dict[str, Any]:
        """The run's end, for the log; without its updates until they are known."""
        return {key: value for key, value in self.state_dict().items() if value == value}

    def shape_numbers(self) -> dict[str, Any]:
        """The rate's shape, for the log."""
        known = {"decay_from": self.shape.decay_from} if self.shape.decay else {}
        return {"form": "linear" if self.shape.decay else "hold", "warmup": self.shape.warmup, **known}

    def state_dict(self) -> dict[str, Any]:
        """As primitives."""
        end = {"unit": self.horizon.unit, "total": self.horizon.total, "updates": self.updates}
        return {**end, "began": self.began}

    def load_state_dict(self, saved: dict[str, Any]) -> float | None:
        """Takes up a saved plan.

        Returns:
            The saved run's length in units of the present one's; None where the end has not moved.
        """
        unit, total, self.began = saved["unit"], saved["total"], saved["began"]
        self.set_updates(self.updates)
        if unit == self.horizon.unit and self.horizon.known:
            if math.isnan(self.updates):
                self.set_updates(saved["updates"] * self.horizon.total / total)
            scale = total / self.horizon.total
            return None if scale == 1.0 else float(scale)
        if unit == self.horizon.unit:
            return None
        # Of an end in another unit updates are the common measure; in seconds nobody knows how many they will be.
        if math.isnan(self.updates):
            self.set_updates(saved["updates"])
        scale = saved["updates"] / self.updates
        return float(scale) if math.isfinite(scale) else 1.0
