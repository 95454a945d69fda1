"""What a callback may ask a running ``Trainer``: counters, warnings."""

from __future__ import annotations

import logging
import platform
import warnings
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from torch import Tensor

from autotune.callbacks._trainer.bar import beside_bars
from autotune.callbacks._trainer.ranks import Agreement
from autotune.randomness import RandomState

_LOGGER = logging.getLogger("autotune")


def warn(message: str) -> None:
    """Warns once per place, and in words that name us."""
    with beside_bars():
        warnings.warn(f"autotune: {message}", UserWarning, stacklevel=3)


def inform(message: str) -> None:
    """An informational line through the ``autotune`` logger."""
    if _LOGGER.isEnabledFor(logging.INFO):
        with beside_bars():
            _LOGGER.info(message)


def callbacks_named(trainer: Any, *names: str) -> list[Any]:
    """The trainer's callbacks of these classes, or of ones derived from them; of either of Lightning's packages."""
    return [item for item in trainer.callbacks if any(cls.__name__ in names for cls in type(item).__mro__)]


def logging_step(trainer: Any) -> int:
    """The step under which Lightning logs its own rows now (other counters shift or drop rows)."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def window_start(trainer: Any, batch_idx: int) -> bool:
    """Whether the batch that is about to run opens an accumulation window."""
    return bool(batch_idx % trainer.accumulate_grad_batches == 0)


def window_end(trainer: Any) -> bool:
    """Whether the batch that has just run closed an accumulation window, that is, made an update."""
    return not trainer.fit_loop._should_accumulate()


def validation_loader(trainer: Any) -> Any:
    """The trainer's combined validation loader, asked for now if it was not before; None without validation."""
    if not trainer.enable_validation:
        return None
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    if val_loop._combined_loader is None:
        generators = RandomState()
        generators.capture()
        trainer.validating = True
        try:
            val_loop.setup_data()
        finally:
            trainer.training = True
            generators.restore()
    return None if not sum(val_loop._max_batches) else val_loop._combined_loader


def surroundings(trainer: Any) -> list[Any]:
    """Objects beside the module and its data whose plain attributes a step may change: scaler, schedulers."""
    objects = [getattr(trainer.precision_plugin, "scaler", None)]
    objects += [config.scheduler for config in trainer.lr_scheduler_configs]
    return [item for item in objects if item is not None]


def logs_now(trainer: Any) -> bool:
    """Whether Lightning writes a row of its own for the present step."""
    return bool(trainer._logger_connector.should_update_logs)


def training_loss(outputs: Any) -> Tensor | None:
    """The loss that ``on_train_batch_end`` is given, on its device; None where the step returned none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) else None


def early_stopping_waits(trainer: Any) -> bool:
    """Whether an early stopping callback has just used up half of its patience."""
    waits = any(
        callback.wait_count == max(1, (callback.patience + 1) // 2) for callback in trainer.early_stopping_callbacks
    )
    return bool(trainer.early_stopping_callbacks) and Agreement(trainer).any(waits)


def validates_averages(trainer: Any) -> bool:
    """Whether a callback of Lightning's exchanges the weights for their average while the trainer validates."""
    return bool(callbacks_named(trainer, "WeightAveraging"))


def versions() -> dict[str, str]:
    """The versions a run's figures depend on."""
    names = ("lightning-autotune", "torch", "lightning", "botorch", "gpytorch")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return {**found, "python": platform.python_version()}
