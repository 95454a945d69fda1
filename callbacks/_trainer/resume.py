"""The position in the data and the random generators, so that a resumed run goes on where it stopped.

Lightning's checkpoints hold neither. An epoch's order is drawn in two moments: when ``iter()`` is called on the
loader (with workers the whole order, without them one draw for their seeds), and at the first ``next()`` (the
sampler, without workers). For epoch 0 the two lie far apart, with hooks between them; so the generators are
remembered at both, and a resume in the middle of an epoch opens the loader under the first, switches to the second,
passes over the batches that were trained on, and only then puts back the generators of the moment of saving. With
persistent workers only the first ``iter()`` draws, which creates the iterator: a resume creates or resets it likewise.

A loader with ``state_dict``/``load_state_dict`` of its own is restored by Lightning; it is left alone here. Orders
drawn batch by batch from a global generator (an unusual sampler of the user's own) cannot be replayed this way.
"""

from __future__ import annotations

from typing import Any

from autotune.callbacks._trainer.generators import (
    capture,
    distributed_samplers,
    generators_in,
    generators_of,
    put_back,
    set_epoch,
    training_loaders,
)
from autotune.callbacks._trainer.ranks import Agreement
from autotune.errors import StateError


class DataPosition:
    """Remembers where the main loader is and restores it; one for a callback and fit.

    Use: :meth:`attach` in ``setup``, :meth:`epoch_start` in ``on_train_epoch_start``, :meth:`state_dict` when a
    checkpoint is written, :meth:`restore` in ``on_train_start``.
    """

    def __init__(self) -> None:
        self._opened: dict[str, Any] | None = None
        self._first: dict[str, Any] | None = None
        self._validated: dict[str, Any] | None = None
        self._iterate_at_epoch_start = False
        self._val_opened = False

    def attach(self, trainer: Any) -> None:
        """Remembers the generators just before each ``iter()``: of the training loader, and of the validation's."""
        source = trainer.fit_loop._data_source
        original = type(source).dataloader

        def dataloader() -> Any:
            loader = original(source)
            self._opened = {**capture(generators_in(loader)), "created": True}
            return loader

        source.dataloader = dataloader
        val_loop = trainer.fit_loop.epoch_loop.val_loop

        def reset() -> None:
            if self._val_opened:
                self._val_opened = False
                _open_undrawn(val_loop._combined_loader.flattened)
            self._validated = capture(generators_of(trainer))
            if val_loop.restarted_mid_evaluation:
                # Lightning counts the step in which it was stopped again, and would take it for stopped ever after.
                val_loop.batch_progress.total.reset_on_restart()
            type(val_loop).reset(val_loop)

        val_loop.reset = reset

    def detach(self, trainer: Any) -> None:
        """Undoes :meth:`attach`, and what a resumed run's beginning has left."""
        vars(trainer.fit_loop._data_source).pop("dataloader", None)
        epoch_loop = trainer.fit_loop.epoch_loop
        vars(epoch_loop).pop("on_run_start", None)
        vars(epoch_loop.val_loop).pop("reset", None)
        vars(epoch_loop.val_loop).pop("increment_progress_to_evaluation_end", None)

    def epoch_start(self, trainer: Any) -> None:
        """An epoch begins: remembers the generators; after an epoch-end resume draws the order Lightning would not."""
        fit_loop = trainer.fit_loop
        will_open = _opens_loader(trainer)
        if self._iterate_at_epoch_start:
            self._iterate_at_epoch_start = False
            if not will_open:
                self._opened = _opening(trainer)
                iter(fit_loop._data_fetcher)
                self._first = capture(generators_of(trainer))
                return
        if will_open:
            self._opened, self._first = _opening(trainer), None
        else:
            self._first = capture(generators_of(trainer))

    def state_dict(self, trainer: Any) -> dict[str, Any]:
        """Position and generators, as primitives and tensors."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        # A batch that was fetched and not trained on (an exception came, in a trial perhaps) is fetched again.
        ready, done = progress.current.ready, progress.current.processed
        ended = done >= trainer.num_training_batches or (progress.is_last_batch and done == ready)
        inside = ready > 0 and not ended
        mine = {
            "opened": self._opened if inside else None,
            "first": self._first if inside else None,
            "now": (_inside_validation(trainer) and self._validated) or capture(generators_of(trainer)),
            "seeds": [sampler.seed for sampler in distributed_samplers(trainer)],
        }
        # With an exception on its way the ranks may not all be here.
        together = trainer.state.status.value != "interrupted"
        ranks = Agreement(trainer).gather(mine) if together else [mine]
        return {
            "batches": done if inside else 0,
            "inside": inside,
            "validation_due": validation_due(trainer),
            "val_opened": _val_opened(trainer),
            "ranks": ranks,
        }

    def restore(self, trainer: Any, saved: dict[str, Any]) -> None:
        """Brings loader and generators to where they were when ``saved`` was taken."""
        everyone = saved["ranks"]
        saved = {**saved, **everyone[trainer.global_rank if len(everyone) == trainer.world_size else 0]}
        if any(hasattr(loader, "load_state_dict") for loader in training_loaders(trainer)):
            put_back(saved["now"], generators_of(trainer))
            return
        self._val_opened = saved["val_opened"]
        for sampler, seed in zip(distributed_samplers(trainer), saved["seeds"], strict=False):
            # Lightning seeds it with the process's global seed, which need not be the first process's.
            sampler.seed = seed
        if saved["inside"] and saved["opened"] is not None:
            # Lightning keeps the flag where a run stopped inside an epoch's last batch, and would leave it out.
            trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = False
            self._opened, self._first = saved["opened"], saved["first"]
            self._fast_forward(trainer, saved["batches"])
        else:
            self._iterate_at_epoch_start = True
        if saved["batches"] or not saved["inside"]:
            # Else the epoch's first batch is fetched again, which draws the order.
            put_back(saved["now"], generators_of(trainer))
        fit_loop = trainer.fit_loop
        at_last_batch = fit_loop.restarted_mid_epoch and fit_loop.epoch_loop.restarted_on_train_batch_end
        if self._iterate_at_epoch_start and at_last_batch:
            self._begin_next_epoch(trainer, saved)
        elif not saved["validation_due"]:
            _pass_over_no_validation(trainer)

    def _begin_next_epoch(self, trainer: Any, saved: dict[str, Any]) -> None:
        """Saved at an epoch's last batch, before a validation after it.

        Lightning begins the next epoch without its start hook, without an iter(), and without counting it, so that a
        checkpoint of that epoch would be taken for one of the epoch before; and asks the new epoch whether a validation
        was due in the old one. Saved after the validation it does all of it.
        """
        self._iterate_at_epoch_start = False
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        if not epoch_loop.batch_progress.is_last_batch:
            # A growth made it the last after Lightning had looked.
            fit_loop.epoch_progress.increment_processed()
            fit_loop.epoch_progress.increment_completed()

        def on_run_start(fetcher: Any) -> None:
            vars(epoch_loop).pop("on_run_start")
            fit_loop.epoch_progress.increment_ready()
            fit_loop.epoch_progress.increment_started()
            generators = generators_of(trainer)
            put_back(saved["now"], generators)
            if saved["validation_due"]:
                # It comes before the opening, as it did in the run that was not broken.
                epoch_loop.val_loop.increment_progress_to_evaluation_end()
            _pass_over_no_validation(trainer)
            if trainer.reload_dataloaders_every_n_epochs == 1:
                # The run that was not broken has set the epoch's loader up first, and Lightning opens it for that.
                iter(fetcher)
            self._opened = _opening(trainer)
            iter(fetcher)
            self._first = capture(generators)
            epoch_loop.on_run_start(fetcher)

        epoch_loop.on_run_start = on_run_start

    def _fast_forward(self, trainer: Any, batches: int) -> None:
        fetcher = trainer.fit_loop._data_fetcher
        generators = generators_of(trainer)
        put_back(self._opened, generators)
        # Lightning tells the samplers only after this.
        set_epoch(trainer, trainer.fit_loop.epoch_progress.current.processed)
        if self._opened is not None and self._opened["created"]:
            trainer.fit_loop._combined_loader.reset()
        iter(fetcher)
        if self._first is not None:
            put_back(self._first, generators)
        for found in range(batches):
            try:
                next(fetcher)
            except StopIteration:
                raise StateError(
                    f"the checkpoint was written after {batches} batches of an epoch, and the training loader gives "
                    f"{found} batches an epoch now: resume with the data and the batch size of the run that wrote it"
                ) from None
        # The epoch loop adds the batches of the checkpoint's progress itself.
        fetcher.fetched, fetcher.done = 0, False


def validation_due(trainer: Any) -> bool:
    """Whether a checkpoint taken now lies between a batch and a validation after it: resuming passes over that."""
    fit_loop = trainer.fit_loop
    progress = fit_loop.epoch_loop.batch_progress.current
    between = progress.ready == progress.processed > 0
    return bool(between and fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher))


def _inside_validation(trainer: Any) -> bool:
    """Whether a checkpoint taken now lies in a step of a validation, with which resuming begins: its loader draws."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    inside_a_step = progress.ready == progress.started > progress.processed == progress.completed
    return bool(trainer.validating and inside_a_step)


def _pass_over_no_validation(trainer: Any) -> None:
    """None was due: Lightning would pass over one on restarting where its counters look so, and that draws."""
    trainer.fit_loop.epoch_loop.val_loop.increment_progress_to_evaluation_end = lambda: None


def _opening(trainer: Any) -> dict[str, Any]:
    """The generators, and whether iter() is about to create iterators, which draws, or to reset persistent ones."""
    created = all(getattr(loader, "_iterator", None) is None for loader in training_loaders(trainer))
    return {**capture(generators_of(trainer)), "created": created}


def _val_opened(trainer: Any) -> bool:
    """Whether the next validation resets the iterators of an earlier one, or of the sanity check."""
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    if combined is None or trainer.reload_dataloaders_every_n_epochs:
        return False
    return any(getattr(loader, "_iterator", None) is not None for loader in combined.flattened)


def _open_undrawn(loaders: list[Any]) -> None:
    """Creates persistent iterators, and draws nothing."""
    generators = generators_in(loaders)
    before = capture(generators)
    for loader in loaders:
        if getattr(loader, "persistent_workers", False) and loader._iterator is None:
            iter(loader)
    put_back(before, generators)


def _opens_loader(trainer: Any) -> bool:
    """Whether the epoch loop is about to call ``iter()`` itself."""
    fit_loop = trainer.fit_loop
    return bool(trainer.current_epoch > 0 and not fit_loop.is_resuming and not fit_loop.epoch_loop.restarting)
