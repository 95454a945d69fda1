"""How long the run is, in the unit its end is given in, and how much of it is done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from autotune.batch.sampler import ResizableBatchSampler
from autotune.callbacks._trainer.namespaces import sibling
from autotune.callbacks._trainer.ranks import Agreement

#: What Lightning puts in for a ``max_epochs`` that nobody set.
_UNSET_EPOCHS = 1000


@dataclass(frozen=True)
class Horizon:
    """The end of the run.

    Attributes:
        unit: ``"steps"`` (updates), ``"examples"``, ``"seconds"``, or ``"none"`` where the end is not known.
        total: In that unit; infinite where the end is not known.
        updates: The optimizer updates this comes to; for an unknown end an assumption that only sizes the
            first search, for a time limit unknown (NaN) until a step has been timed.
        reason: Why the end is not known; empty where it is.
        most: Updates that a run whose end is not known can make; infinite where nothing limits them.
    """

    unit: str
    total: float
    updates: float
    reason: str = ""
    most: float = math.inf

    @property
    def known(self) -> bool:
        """Whether a decay can be planned."""
        return self.unit != "none"


def batch_examples(trainer: Any) -> int:
    """Examples in one micro-batch on all ranks (1 where the loader does not say)."""
    return max(_micro_batches(trainer), default=1) * int(trainer.world_size)


def _micro_batches(trainer: Any) -> list[int]:
    """Of each loader that says it, on one rank."""
    sizes = []
    for loader in trainer.fit_loop._combined_loader.flattened:
        size = getattr(loader, "batch_size", None)
        if size is None:
            size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        sizes += [int(size)] if size else []
    return sizes


def updates_an_epoch(trainer: Any) -> float:
    """Optimizer updates in one epoch, as first planned; infinite where the loader has no length."""
    batches = trainer.num_training_batches
    sampler = _resizable(trainer)
    if sampler is not None and sampler.planned_updates is not None:
        # A run is planned, and budgeted, once: resuming after growth must not plan it anew.
        return sampler.planned_updates
    return math.inf if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)


def plan(trainer: Any) -> Horizon:
    """Reads the trainer's limits. Of several, the one that is reached first counts."""
    per_epoch = updates_an_epoch(trainer)
    max_epochs = trainer.fit_loop.max_epochs
    unset = max_epochs in (None, -1) or (max_epochs == _UNSET_EPOCHS and trainer.max_steps == -1)
    epoch_updates = math.inf if unset else per_epoch * max_epochs
    step_updates = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    updates = min(epoch_updates, step_updates)
    seconds = _time_limit(trainer)
    assumed = updates if math.isfinite(updates) else max(1000.0, 10 * per_epoch) if math.isfinite(per_epoch) else 1000.0
    if trainer.early_stopping_callbacks:
        return Horizon("none", math.inf, assumed, "EarlyStopping may end the run at any time", most=updates)
    if seconds is not None and math.isinf(updates):
        return Horizon("seconds", seconds, math.nan)
    if math.isinf(updates):
        why = "the loader has no length" if not unset else "neither max_steps, max_epochs nor max_time is set"
        if unset and max_epochs == _UNSET_EPOCHS:
            why += ": Lightning puts in max_epochs=1000 then; if you mean 1000, set max_epochs=1001 or max_steps"
        return Horizon("none", math.inf, assumed, why)
    if epoch_updates <= step_updates:
        return Horizon("examples", float(_epoch_examples(trainer) * max_epochs), updates)
    return Horizon("steps", step_updates, updates)


def done(trainer: Any, horizon: Horizon) -> float:
    """How much of the run is done, in the horizon's unit (updates where the end is not known)."""
    if horizon.unit == "seconds":
        # Rank zero's clock: two clocks never agree, and everything follows from the progress.
        return Agreement(trainer).of_zero(float(_timer(trainer).time_elapsed()))
    if horizon.unit == "examples":
        epochs = trainer.fit_loop.epoch_progress.current.processed
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if batches >= trainer.num_training_batches:
            return float(max(epochs, 1) * _epoch_examples(trainer))
        sampler = _resizable(trainer)
        inside = batches * batch_examples(trainer) if sampler is None else sampler.seen(batches) * trainer.world_size
        return float(epochs * _epoch_examples(trainer) + inside)
    return float(trainer.global_step)


def _resizable(trainer: Any) -> ResizableBatchSampler | None:
    """The sampler of a batch that may grow: then batches are no measure of examples."""
    samplers = (getattr(loader, "batch_sampler", None) for loader in trainer.fit_loop._combined_loader.flattened)
    return next((sampler for sampler in samplers if isinstance(sampler, ResizableBatchSampler)), None)


def _epoch_examples(trainer: Any) -> int:
    sampler = _resizable(trainer)
    if sampler is not None:
        return int(sampler.examples * trainer.world_size)
    return int(trainer.num_training_batches * batch_examples(trainer))


def epoch_numbers(trainer: Any) -> dict[str, Any]:
    """What an update counts in :func:`done`, for the log: what is not known is left out."""
    accumulate, sampler = int(trainer.accumulate_grad_batches), _resizable(trainer)
    found: dict[str, Any] = {"accumulate": accumulate, "drop_last": sampler is not None and bool(sampler.drop_last)}
    if _micro_batches(trainer):
        found["batch"] = batch_examples(trainer) * accumulate
    if math.isfinite(trainer.num_training_batches):
        found["epoch_examples"] = _epoch_examples(trainer)
    return found


def _timer(trainer: Any) -> Any:
    kind = sibling(trainer, "callbacks.timer").Timer
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)


def _time_limit(trainer: Any) -> float | None:
    timer = _timer(trainer)
    return None if timer is None else timer._duration


def exempt_from_time_limit(trainer: Any, seconds: float) -> None:
    """Takes time spent in trials off the trainer's timer: ``max_time`` counts real training."""
    timer = _timer(trainer)
    if timer is not None:
        timer._offset -= seconds
