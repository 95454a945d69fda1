"""Training and evaluating beside the run: Lightning's own step path on scratch loops.

Inside :func:`side_loop` the trainer has another epoch loop (own results, own counters that continue from the real
ones), another logger connector (which knows the real one's metrics), callbacks that hear nothing, silent loggers and no
profiler. A step goes through ``automatic_optimization.run`` as in training, so overrides, clipping, accumulation and
precision are the user's; an evaluation is a whole run of Lightning's validation loop over the probe batches. Leaving
the block puts every one of them back. Tensors, generators and the module's own state are :mod:`autotune.snapshot`'s
affair.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from autotune.callbacks._trainer.namespaces import sibling
from autotune.callbacks._trainer.quiet import stand_ins
from autotune.callbacks._trainer.rates import averaged

_SWAPPED = ("callbacks", "_logger_connector", "_loggers", "profiler", "should_stop", "_last_val_time")


class SideLoop:
    """Steps and evaluations on the trainer's model that the run never hears of; see :func:`side_loop`."""

    def __init__(self, trainer: Any, epoch_loop: Any) -> None:
        self._trainer = trainer
        self._loop = epoch_loop
        self._start = copy.deepcopy(epoch_loop.automatic_optimization.optim_progress)
        self._batch_idx = -1
        self._watch = _BatchWatch()
        trainer.callbacks = [self._watch, *stand_ins(trainer)]

    def rewind(self) -> None:
        """Counters go back to where the run is: every candidate sees the same ``global_step``."""
        self._loop.automatic_optimization.optim_progress = copy.deepcopy(self._start)
        self._batch_idx = -1

    def train_step(self, window: Sequence[Any]) -> float:
        """One optimizer step on an accumulation window of batches, exactly as training would make it.

        Returns:
            The mean loss over the window; NaN where ``training_step`` returned none.
        """
        losses = [self._micro_step(batch, index + 1, len(window)) for index, batch in enumerate(window)]
        known = [loss for loss in losses if loss is not None]
        return float(torch.stack(known).mean()) if known else math.nan

    def _micro_step(self, batch: Any, ready: int, size: int) -> Tensor | None:
        trainer, loop = self._trainer, self._loop
        call = _calls(trainer)
        self._batch_idx += 1
        batch_idx = self._batch_idx
        batch = self._on_device(batch)
        loop.batch_progress.current.ready = ready
        loop.batch_progress.is_last_batch = ready == size
        trainer._logger_connector.on_batch_start(batch)
        call._call_lightning_module_hook(trainer, "on_train_batch_start", batch, batch_idx)
        kwargs = loop._build_kwargs(OrderedDict(), batch, batch_idx)
        outputs = loop.automatic_optimization.run(trainer.optimizers[0], batch_idx, kwargs)
        call._call_lightning_module_hook(trainer, "on_train_batch_end", outputs, batch, batch_idx)
        loop._results.batch = None
        loss = outputs.get("loss")
        return loss.detach().float() if isinstance(loss, Tensor) else None

    def training_losses(self, batches: Iterable[Any]) -> list[float]:
        """The training loss on ``batches``, in training mode, with no gradient and no step."""
        trainer, loop = self._trainer, self._loop
        call = _calls(trainer)
        losses = []
        for index, batch in enumerate(batches):
            batch = self._on_device(batch)
            trainer._logger_connector.on_batch_start(batch)
            with torch.no_grad():
                kwargs = loop._build_kwargs(OrderedDict(), batch, index)
                output = call._call_strategy_hook(trainer, "training_step", *kwargs.values())
            loss = output.get("loss") if isinstance(output, Mapping) else output
            losses.append(math.nan if loss is None else float(loss))
        return losses

    def _on_device(self, batch: Any) -> Any:
        trainer = self._trainer
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return _calls(trainer)._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)

    def evaluate(
        self, combined: Any, batches: Sequence[Any], limits: Sequence[float] | None = None
    ) -> dict[str, tuple[float, list[float]]]:
        """Runs the user's validation over ``batches``: one collection, or loader, a validation loader.

        Args:
            combined: The trainer's validation loader.
            batches: What to evaluate on in the place of its loaders.
            limits: How many of each at most; None for all.

        Returns:
            What ``validation_step`` and the epoch-end hooks logged, by name: the value over all batches, and
            its value on every single batch where it is a plain mean over batches (else an empty list).
        """
        trainer, loop = self._trainer, self._loop.val_loop
        probe = copy.copy(combined)
        probe._iterator = None
        probe.flattened = list(batches)
        loop._combined_loader = probe
        loop._max_batches = [len(part) for part in batches] if limits is None else list(limits)
        loop._last_val_dl_reload_epoch = trainer.current_epoch
        connector = trainer._logger_connector
        first_loop_iter = connector._first_loop_iter
        before = _metrics(connector)
        self._watch.begin()
        trainer.validating = True
        try:
            with averaged(trainer.optimizers):
                loop.run()
            known = before["_callback_metrics"]
            logged = {
                name: value for name, value in connector._callback_metrics.items() if known.get(name) is not value
            }
        finally:
            trainer.training = True
            connector._first_loop_iter = first_loop_iter
            vars(connector).update(before)
        singles = self._watch.batch_values
        return {name: (float(value), singles.get(name, [])) for name, value in logged.items() if value.numel() == 1}


class _BatchWatch(Callback):
    """The side loop's only callback: reads off each validation batch's share of a logged mean."""

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        self.batch_values: dict[str, list[float]] = {}
        self._before: dict[str, tuple[float, float]] = {}

    def on_validation_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        for item in trainer._results.values():
            meta = getattr(item, "meta", None)
            if meta is None or not item.is_tensor or not meta.is_mean_reduction:
                continue
            total, weight = float(item.value), float(item.cumulated_batch_size)
            total_before, weight_before = self._before.get(meta.name, (0.0, 0.0))
            self._before[meta.name] = (total, weight)
            if weight > weight_before:
                value = (total - total_before) / (weight - weight_before)
                self.batch_values.setdefault(meta.name, []).append(value)


def _calls(trainer: Any) -> Any:
    return sibling(trainer, "trainer.call")


def _metrics(connector: Any) -> dict[str, dict[str, Any]]:
    """Copies of what a logger connector holds for whoever asks the trainer for its metrics."""
    names = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
    return {name: dict(getattr(connector, name)) for name in names}


class _Aside:
    """Where files go that hooks write into the log's directory meanwhile: made when asked for, and removed."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def path(self) -> str:
        """The directory."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="autotune-trial-")
        return self._folder.name

    def remove(self) -> None:
        """And all that is in it."""
        if self._folder is not None:
            self._folder.cleanup()


def _silent_logger(trainer: Any, real: Any, aside: _Aside) -> Any:
    """Logs nothing, and has the name and version of a real one and a directory."""

    class Silent(sibling(trainer, "loggers.logger").DummyLogger):  # type: ignore[misc]
        name = property(lambda self: real.name)
        version = property(lambda self: real.version)
        save_dir = log_dir = root_dir = property(lambda self: aside.path)

    return Silent()


def _scratch_loop(trainer: Any) -> Any:
    """An epoch loop of our own whose counters go on from the real one's."""
    real = trainer.fit_loop.epoch_loop
    loop = type(real)(trainer, min_steps=real.min_steps, max_steps=real.max_steps)
    progress = copy.deepcopy(real.automatic_optimization.optim_progress)
    loop.automatic_optimization.optim_progress = progress
    loop._batches_that_stepped = real._batches_that_stepped
    return loop


class _Parts:
    """What a side loop exchanges on the trainer, as it was when this was made."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._loop = trainer.fit_loop.epoch_loop
        self._saved = {name: getattr(trainer, name) for name in _SWAPPED if hasattr(trainer, name)}
        self._stage = trainer.state.stage
        self._current_fx = trainer.lightning_module._current_fx_name

    def put_back(self) -> None:
        trainer = self._trainer
        trainer.fit_loop.epoch_loop = self._loop
        for name, value in self._saved.items():
            setattr(trainer, name, value)
        trainer.state.stage = self._stage
        trainer.lightning_module._current_fx_name = self._current_fx


def _saves_training(trainer: Any, real: _Parts, aside: Callable[[], AbstractContextManager[None]]) -> Any:
    """``trainer.save_checkpoint`` while a side loop is open: a signal handler may call it in the middle of a trial."""

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        present = _Parts(trainer)
        real.put_back()
        try:
            with aside():
                type(trainer).save_checkpoint(trainer, *args, **kwargs)
        finally:
            present.put_back()

    return save_checkpoint


@contextmanager
def side_loop(trainer: Any, aside: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[SideLoop]:
    """Opens a :class:`SideLoop`; whatever of the trainer it exchanges is put back, however it is left.

    Args:
        trainer: In a running fit.
        aside: A context in which model, optimizer and generators are those of training: whoever saves a checkpoint
            while the loop is open saves these.
    """
    fit_loop = trainer.fit_loop
    real = _Parts(trainer)
    folder = _Aside()
    trainer.save_checkpoint = _saves_training(trainer, real, aside)
    fit_loop.epoch_loop = _scratch_loop(trainer)
    metrics = _metrics(trainer._logger_connector)
    trainer._logger_connector = type(trainer._logger_connector)(trainer)
    vars(trainer._logger_connector).update(metrics)
    trainer._loggers = [_silent_logger(trainer, logger, folder) for logger in trainer._loggers]
    trainer.profiler = sibling(trainer, "profilers").PassThroughProfiler()
    trainer.training = True
    try:
        yield SideLoop(trainer, fit_loop.epoch_loop)
    finally:
        real.put_back()
        vars(trainer).pop("save_checkpoint", None)
        folder.remove()
