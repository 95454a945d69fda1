"""The batch of a logged run, played again: resized where the log says, without a measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

from autotune.batch.plan import Split, plan
from autotune.batch.scaling import scale_group_betas
from autotune.callbacks._growth import WayBack
from autotune.callbacks._trainer.accumulation import Windows
from autotune.callbacks._trainer.facts import warn, window_end
from autotune.callbacks._trainer.resize import ResizableLoader, align, move
from autotune.callbacks._trainer.schedules import ExampleSchedules
from autotune.decision import Decision
from autotune.replay import Schedule


class BatchPlayer:
    """One fit under the batch records of a log.

    What ``AdaptiveBatchSize`` does to the loader, the accumulation windows and, after a growth that was undone, to
    weights and optimizer is done at the same places of the loop. The learning rate that goes with it is the
    schedule's.

    Args:
        schedule: What to play.
        played: Called with each decision as it is played.
    """

    def __init__(self, schedule: Schedule, played: Callable[[Decision], None]) -> None:
        self._schedule, self._played = schedule, played
        self._records = [d for events in schedule.events.values() for d in events if d.kind == "batch"]
        self._next_record = 0
        self.loader = ResizableLoader()
        self._windows = Windows(self._sizes)
        self._schedules = ExampleSchedules(self.loader)
        self._split = Split(1, 1)
        self._before = self._split
        self._ceiling = 0
        self._coming: tuple[Split, int] | None = None
        self._undoable: WayBack | None = None
        self._trainer: Any = None

    def _sizes(self, batch_idx: int) -> list[int]:
        return self.loader.window_sizes(batch_idx, self._trainer.accumulate_grad_batches)

    @property
    def batch_size(self) -> int:
        """Global examples an update now."""
        return self._split.examples

    def attach(self, trainer: Any) -> None:
        """Before the optimizers are built: their builder may ask for the loader's length."""
        self._trainer = trainer
        self.loader.attach(trainer)

    def resume(self, trainer: Any, saved: dict[str, Any] | None) -> None:
        """The optimizers are built; ``saved`` is :meth:`state_dict` of a run that goes on here."""
        self.loader.resume(trainer, None if saved is None else saved["loader"])
        self._windows.attach(trainer)

    def start(self, trainer: Any, module: Any, saved: dict[str, Any] | None) -> None:
        """The loaders are set up: looks at the batch, or goes on where a resumed run stopped."""
        self.loader.start(trainer)
        self._schedules.attach(trainer)
        first, ranks = self.loader.first_size, trainer.world_size
        self._split = Split(first, trainer.accumulate_grad_batches, ranks)
        # As in the logged run no update is made of more than an epoch.
        self._ceiling = self.loader.sampler.examples // first * first * ranks
        largest = max((batch for _, batch in self._schedule.batches[1:]), default=0)
        if largest > (most := max(self._ceiling, self._split.examples)):
            warn(
                f"the logged batch grows to {largest} examples, more than an epoch here has: it is kept to {most} at "
                "most, and the learning rates are played as they were"
            )
        if saved is not None:
            self._go_on(trainer, module, saved)
        elif self._split.examples != (logged := self._schedule.batch_size(0)) and logged is not None:
            warn(
                f"the logged run began with {logged} examples an update, this one with {self._split.examples}: the "
                "learning rates are played as they were, and so are the batches from the first growth on"
            )

    def _go_on(self, trainer: Any, module: Any, saved: dict[str, Any]) -> None:
        self._next_record = saved["next_record"]
        self._split, self._before = Split(*saved["split"]), Split(*saved["before"])
        self._coming = None if saved["coming"] is None else (Split(*saved["coming"][0]), saved["coming"][1])
        self._windows.piece_limit = saved["piece_limit"]
        trainer.accumulate_grad_batches = saved["accumulate"]
        if saved["undoable"] is not None:
            self._undoable = WayBack(module, trainer.optimizers[0], saved["undoable"])

    def epoch_start(self, trainer: Any) -> None:
        """Lengths follow the size; an epoch's first batch opens a window of any length."""
        self.loader.epoch_start(trainer)
        self._align(trainer, 0)

    def epoch_end(self, trainer: Any) -> None:
        """The epoch is through."""
        self.loader.epoch_end(trainer)

    def batch_end(self, trainer: Any, module: Any, batch_idx: int) -> None:
        """After a batch: plays what was decided here, and lets a growth that is due take effect."""
        at_end, step = window_end(trainer), int(trainer.global_step)
        if at_end:
            self._align(trainer, batch_idx + 1)
        while self._next_record < len(self._records) and self._records[self._next_record].step <= step:
            record = self._records[self._next_record]
            self._next_record += 1
            self._play(trainer, record)
            self._played(record)
        if at_end and self._coming is not None and step >= self._coming[1]:
            self._take_effect(trainer, module)
        self.loader.batch_end(trainer)

    def _play(self, trainer: Any, record: Decision) -> None:
        if record.action == "grow":
            split = self._meant(record)
            self._coming = split, move(trainer, self.loader, self._split, split)
        elif record.action == "undo_growth":
            self._undo(trainer)
        elif record.action == "split" and isinstance(limit := record.numbers.get("piece_limit"), int):
            self._windows.piece_limit = limit

    def _meant(self, record: Decision) -> Split:
        """The split of a growth; on another number of ranks, or in a shorter epoch, the nearest batch there is."""
        micro, accumulate, batch = (record.numbers.get(key) for key in ("micro", "accumulate", "batch"))
        ranks = self._split.ranks
        if not isinstance(batch, int):
            return self._split
        if batch > self._ceiling:
            return plan(batch, self._split, max_examples=self._ceiling, unit=self.loader.first_size)
        if isinstance(micro, int) and isinstance(accumulate, int) and micro * accumulate * ranks == batch:
            return Split(micro, accumulate, ranks)
        return plan(batch, self._split)

    def _take_effect(self, trainer: Any, module: Any) -> None:
        assert self._coming is not None
        optimizer = trainer.optimizers[0]
        self._before, (self._split, _), self._coming = self._split, self._coming, None
        further = (record.action for record in self._records[self._next_record :])
        self._undoable = None
        if next((action for action in further if action != "split"), None) == "undo_growth":
            self._undoable = WayBack(module, optimizer)
        if self._schedule.scale_betas:
            scale_group_betas(optimizer, self._split.examples / self._before.examples)

    def _undo(self, trainer: Any) -> None:
        if self._undoable is None:
            return
        self._undoable.go()
        grown, self._split, self._coming, self._undoable = self._split, self._before, None, None
        if grown.micro != self._split.micro:
            self.loader.resize(trainer, self._split.micro)
        self._align(trainer, self.loader.ready(trainer))

    def _align(self, trainer: Any, ready: int) -> None:
        split = self._split if self._coming is None else self._coming[0]
        align(trainer, ready, split.accumulate)

    def detach(self, trainer: Any) -> None:
        """Leaves nothing of ours on the trainer."""
        self._windows.detach(trainer)
        self._schedules.detach(trainer)
        self.loader.detach(trainer)

    def state_dict(self, trainer: Any) -> dict[str, Any]:
        """Primitives and tensors."""
        return {
            "next_record": self._next_record,
            "split": list(astuple(self._split)),
            "before": list(astuple(self._before)),
            "coming": None if self._coming is None else [list(astuple(self._coming[0])), self._coming[1]],
            "piece_limit": self._windows.piece_limit,
            "undoable": None if self._undoable is None else self._undoable.state_dict(),
            "accumulate": self.loader.accumulate(trainer),
            "loader": self.loader.state_dict(trainer),
        }
