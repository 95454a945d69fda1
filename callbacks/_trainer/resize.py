"""The training loader with a size that may change, and everything in the loop that counts its batches.

=========  ============================================================  ========
symbol     meaning                                                       unit
=========  ============================================================  ========
``b0``     micro-batch of the user's loader                              examples
``N0``     batches of an epoch at that size                              batches
``c``      ``val_check_batch`` at that size                              batches
=========  ============================================================  ========

The loader is exchanged for a shallow copy with a :class:`ResizableBatchSampler` after Lightning has put its
distributed sampler in and before it asks for the length; the user's object is not touched. Lengths are kept in four
places (``max_batches``, ``limits``, the fetcher's ``length`` and ``done``, ``val_check_batch``), and all of them are
brought up to date when the size changes: left alone, validation and epoch schedulers are skipped without a word.

Validation cadence keeps its meaning in examples: what was due after every ``c`` batches is due after every ``c b0``
examples, and at the epoch's end where it was due there.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from autotune.batch.plan import Split
from autotune.batch.sampler import ResizableBatchSampler
from autotune.errors import UnsupportedSetupError

_INSTEAD = "give the Trainer a torch DataLoader over a data set with a length, built with batch_size=..."


class ResizableLoader:
    """The trainer's training loader under our control, from ``setup`` to the end of the fit."""

    def __init__(self) -> None:
        self._sampler: ResizableBatchSampler | None = None
        self._loader: Any = None
        self._saved: dict[str, Any] | None = None
        self._started = False
        self.first_size = 0
        self.first_batches = 0
        self.first_accumulate = 1
        self._check_every: float | None = None
        self._units = 0
        self._resized = False
        self._due: bool | None = None
        self._left: int | None = None

    @property
    def sampler(self) -> ResizableBatchSampler:
        """The batch sampler of this process."""
        if self._sampler is None:
            raise UnsupportedSetupError(f"there is no training loader to resize: {_INSTEAD}")
        return self._sampler

    def attach(self, trainer: Any) -> None:
        """Exchanges every training loader that Lightning prepares from now on; call before the optimizers are built.

        A module's ``configure_optimizers`` may ask for ``trainer.estimated_stepping_batches``, which sets the loaders
        up: they have the user's own size then, also in a run that goes on at a grown one, so that a schedule is built
        for the length that was planned.
        """
        connector, fit_loop = trainer._data_connector, trainer.fit_loop
        prepare_, setup_ = type(connector)._prepare_dataloader, type(fit_loop).setup_data

        def prepare(dataloader: object, shuffle: bool, mode: Any) -> object:
            ready = prepare_(connector, dataloader, shuffle=shuffle, mode=mode)
            return self._wrap(ready) if getattr(mode, "value", mode) == "train" else ready

        def setup_data() -> None:
            before = self._sampler
            setup_(fit_loop)
            if self._sampler is not before:
                self._set_up(trainer, before)

        connector._prepare_dataloader, fit_loop.setup_data = prepare, setup_data

    def detach(self, trainer: Any) -> None:
        """Undoes :meth:`attach`, and what a growth has made of the accumulation."""
        if self._started and self._left is None and self._sampler is not None:
            self._left = int(trainer.accumulate_grad_batches)
            trainer.accumulate_grad_batches = self.first_accumulate
        vars(trainer._data_connector).pop("_prepare_dataloader", None)
        vars(trainer.fit_loop).pop("setup_data", None)

    def _wrap(self, loader: object) -> object:
        sampler = _resizable(loader)
        clone: Any = copy.copy(loader)
        vars(clone).update(batch_sampler=sampler, batch_size=sampler.batch_size, _iterator=None)
        self._sampler, self._loader = sampler, clone
        return clone

    def _set_up(self, trainer: Any, before: ResizableBatchSampler | None) -> None:
        """Lightning has set a loader up: reads what limits and cadence mean, then puts the grown size back."""
        sampler = self.sampler
        if before is not None:
            # Reloaded every n epochs: the new loader goes on at the grown size.
            sampler.limit_examples, sampler.planned_updates = before.limit_examples, before.planned_updates
            # What Lightning has opened to count it is opened again when the epoch begins.
            sampler.end_epoch()
            position = before.not_begun()
            if position is not None:
                # A resumed run's, which asked for its loader twice before it trains.
                self._load(trainer, position)
            elif before.batch_size != sampler.batch_size:
                self.resize(trainer, before.batch_size)
            return
        batches = int(trainer.num_training_batches)
        self.first_size, self.first_batches = sampler.batch_size, batches
        if batches < len(sampler):
            sampler.limit_examples = batches * self.first_size
        self.first_accumulate = int(trainer.accumulate_grad_batches)
        sampler.planned_updates = -(-batches // self.first_accumulate)
        self._check_every = None if trainer.val_check_batch is None else float(trainer.val_check_batch)
        if self._started:
            self._apply_saved(trainer)

    def resume(self, trainer: Any, saved: dict[str, Any] | None) -> None:
        """The optimizers are built; ``saved`` is :meth:`state_dict` of a run that goes on here."""
        self._saved, self._started = saved, True
        if self._sampler is not None:
            self._apply_saved(trainer)

    def _apply_saved(self, trainer: Any) -> None:
        saved, self._saved = self._saved, None
        if saved is None:
            return
        # Whoever restores the position opens the loader anew; until then its lengths are those of a whole epoch.
        self.sampler.end_epoch()
        self._units, self._resized, self._due = saved["units"], saved["resized"], saved["due"]
        self._load(trainer, saved["sampler"])

    def _load(self, trainer: Any, position: dict[str, Any]) -> None:
        self.sampler.load_state_dict(position)
        vars(self._loader)["batch_size"] = self.sampler.batch_size
        self.after_restore(trainer)

    def start(self, trainer: Any) -> None:
        """Training begins.

        Raises:
            UnsupportedSetupError: There is more than one training loader.
        """
        count = len(trainer.fit_loop._combined_loader.flattened)
        if count != 1:
            raise UnsupportedSetupError(
                f"AdaptiveBatchSize resizes one training loader, and there are {count}: concatenate the data sets "
                "(torch.utils.data.ConcatDataset), or leave the callback out"
            )
        if self._resized:
            self._set_due(trainer, bool(self._due))

    def resize(self, trainer: Any, size: int) -> int:
        """Batches that are not under way yet hold ``size`` examples.

        Returns:
            The position in the epoch of the first of them; the epoch's length where none is left.
        """
        self._resized = True
        position = self.sampler.resize(size)
        vars(self._loader)["batch_size"] = size
        self.sync(trainer)
        return position

    def sync(self, trainer: Any) -> None:
        """Brings the loop's lengths up to date with the sampler."""
        sampler, fit_loop = self.sampler, trainer.fit_loop
        inside = sampler.emitted > 0
        total = sampler.epoch_batches() if inside else len(sampler)
        fit_loop.max_batches = total
        fit_loop._combined_loader.limits = [math.inf]
        fetcher = fit_loop._data_fetcher
        if fetcher is not None and fetcher.length is not None and inside:
            fetcher.length = total
            fetcher.done = fetcher.fetched >= total

    def epoch_start(self, trainer: Any) -> None:
        """A new epoch: its length is that of the present size."""
        if self._resized:
            self.sync(trainer)

    def epoch_end(self, trainer: Any) -> None:
        """The epoch was trained on to its end; said twice (after a resume) it counts once."""
        if self._at_end(trainer):
            self._units += self.first_batches
            self.sampler.end_epoch()

    def _at_end(self, trainer: Any) -> bool:
        """Whether the epoch's last batch is done and :meth:`epoch_end` has not said so yet."""
        return bool(self.sampler.emitted and self._done(trainer) >= trainer.num_training_batches)

    def _done(self, trainer: Any) -> int:
        """Batches of the present epoch that were trained on; one whose step is under way is not."""
        return int(trainer.fit_loop.epoch_loop.batch_progress.current.processed)

    def accumulate(self, trainer: Any) -> int:
        """Micro-batches an update; after a fit those at its end."""
        return int(trainer.accumulate_grad_batches) if self._left is None else self._left

    def after_restore(self, trainer: Any) -> None:
        """The position in the data was restored: lengths again, now that the batches are handed out."""
        if self._resized:
            self.sync(trainer)

    def ready(self, trainer: Any) -> int:
        """Batches of the present epoch that were begun: between steps, those that were trained on."""
        return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def batch_end(self, trainer: Any) -> None:
        """Decides whether validation is due now, once sizes differ from what the trainer planned with."""
        if self._resized and self._check_every is not None and math.isfinite(self._check_every):
            across = trainer.check_val_every_n_epoch is None
            base = self._units if across else 0
            ready = self.ready(trainer)
            now, before = base + self._units_at(trainer, ready), base + self._units_at(trainer, ready - 1)
            self._set_due(trainer, now // self._check_every > before // self._check_every)

    def _units_at(self, trainer: Any, batches: int) -> int:
        """Batches of the first size that the epoch's first ``batches`` come to; all of them at its end."""
        if batches >= trainer.num_training_batches:
            return self.first_batches
        return min(self.sampler.seen(batches) // self.first_size, self.first_batches)

    def grown(self, trainer: Any) -> bool:
        """Whether updates are not what the run was planned with."""
        return self._resized or int(trainer.accumulate_grad_batches) != self.first_accumulate

    def planned_updates_done(self, trainer: Any) -> list[int]:
        """The planned updates that the update just done stands for: for each, the planned batches up to its end."""
        ready, k = self.ready(trainer), int(trainer.accumulate_grad_batches)
        before = self._units_at(trainer, (ready - 1) // k * k)
        done = range(before + 1, self._units_at(trainer, ready) + 1)
        return [at for at in done if at % self.first_accumulate == 0 or at == self.first_batches]

    def _set_due(self, trainer: Any, due: bool) -> None:
        self._due = due
        loop = trainer.fit_loop.epoch_loop
        iteration = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
        # The loop validates where (iteration + 1) is a multiple of val_check_batch.
        trainer.val_check_batch = iteration + (1 if due else 2)

    def window_sizes(self, batch_idx: int, accumulate: int) -> list[int]:
        """Sizes of the micro-batches in the window of ``batch_idx``, on this rank."""
        return self.sampler.sizes(batch_idx - batch_idx % accumulate, accumulate)

    def state_dict(self, trainer: Any) -> dict[str, Any]:
        """Primitives; position in the epoch included."""
        return {
            "sampler": self.sampler.state_dict(self._done(trainer)),
            "units": self._units + (self.first_batches if self._at_end(trainer) else 0),
            "resized": self._resized,
            "due": bool(self._due),
        }


def move(trainer: Any, loader: ResizableLoader, now: Split, wanted: Split) -> int:
    """Moves loader and accumulation from one split of the batch to another.

    Returns:
        The first update that is wholly made of ``wanted``.
    """
    ready, length = loader.ready(trainer), int(trainer.accumulate_grad_batches)
    first = loader.resize(trainer, wanted.micro) if wanted.micro != now.micro else ready
    total = int(trainer.num_training_batches)
    start = min(-(-max(first, ready) // wanted.accumulate) * wanted.accumulate, total)
    align(trainer, ready, wanted.accumulate)
    return int(trainer.global_step) + -(-(start - ready) // length)


def align(trainer: Any, ready: int, accumulate: int) -> None:
    """Makes a window ``accumulate`` micro-batches long, where its new boundaries are boundaries of the old one too."""
    if trainer.accumulate_grad_batches != accumulate and ready % accumulate == 0:
        trainer.accumulate_grad_batches = accumulate


def _resizable(loader: object) -> ResizableBatchSampler:
    if not isinstance(loader, DataLoader):
        raise UnsupportedSetupError(f"AdaptiveBatchSize cannot resize the loader {type(loader).__name__}: {_INSTEAD}")
    if isinstance(loader.dataset, IterableDataset):
        raise UnsupportedSetupError(
            f"AdaptiveBatchSize cannot resize a stream ({type(loader.dataset).__name__} is an IterableDataset): "
            "batches are formed inside the workers there. Use a map-style data set (__getitem__ and __len__)"
        )
    sampler = loader.batch_sampler
    if isinstance(sampler, ResizableBatchSampler):
        return sampler
    if sampler is None:
        raise UnsupportedSetupError(
            "the loader has batch_size=None, so its data set forms the batches and they cannot be resized: "
            "return single examples from it and pass batch_size=..."
        )
    if type(sampler) is not BatchSampler:
        raise UnsupportedSetupError(
            f"AdaptiveBatchSize cannot resize the batch sampler {type(sampler).__name__}: write "
            "DataLoader(dataset, batch_sampler=ResizableBatchSampler(sampler, batch_size, drop_last)) with "
            "autotune.batch.ResizableBatchSampler, or pass sampler= and batch_size="
        )
    return ResizableBatchSampler(sampler.sampler, sampler.batch_size, sampler.drop_last)
