"""The user's step schedulers under a batch that grows.

A scheduler that steps with every update was planned for the updates of the first batch size. In a run that ends with
its epochs there are fewer of them after growth: left alone, a decay would never arrive. So an update of k times as many
examples steps it as often as the updates that it stands for would have, and the schedule is where it was meant to be at
each example. In a run that ends with ``max_steps`` an update stays a step.

Schedulers that step with the epoch, and those on a plateau, are Lightning's own affair: their moments do not change.
"""

from __future__ import annotations

from typing import Any

from autotune.callbacks._trainer.horizon import plan
from autotune.callbacks._trainer.resize import ResizableLoader


class ExampleSchedules:
    """Takes over the moment at which Lightning steps them; :meth:`attach` and :meth:`detach`."""

    def __init__(self, loader: ResizableLoader) -> None:
        self._loader = loader

    def attach(self, trainer: Any) -> None:
        """Does so where the run's end is not given in updates."""
        if plan(trainer).unit == "steps" or not trainer.lr_scheduler_configs:
            return
        loop = trainer.fit_loop.epoch_loop
        original = type(loop).update_lr_schedulers

        def update(interval: str, update_plateau_schedulers: bool) -> None:
            if interval != "step" or update_plateau_schedulers or not self._loader.grown(trainer):
                original(loop, interval, update_plateau_schedulers)
            elif not loop._should_accumulate():
                self._step(trainer, loop)

        loop.update_lr_schedulers = update

    def detach(self, trainer: Any) -> None:
        """Undoes :meth:`attach`."""
        vars(trainer.fit_loop.epoch_loop).pop("update_lr_schedulers", None)

    def _step(self, trainer: Any, loop: Any) -> None:
        configs = [c for c in trainer.lr_scheduler_configs if c.interval == "step" and not c.reduce_on_plateau]
        for batches in self._loader.planned_updates_done(trainer):
            for config in configs:
                if batches % config.frequency == 0:
                    loop.scheduler_progress.increment_ready()
                    trainer.lightning_module.lr_scheduler_step(config.scheduler, None)
                    loop.scheduler_progress.increment_completed()
