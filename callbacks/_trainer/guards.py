"""Setups that cannot be served, refused by name at the start of a fit, with what to do instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.nn.parameter import is_lazy

from autotune.callbacks._trainer.facts import callbacks_named
from autotune.callbacks._trainer.namespaces import namespace_of
from autotune.errors import UnsupportedSetupError


def refuse_unsupported(trainer: Any, controller: Any) -> None:
    """Checks what is known in ``setup``: module, callbacks and strategy.

    Raises:
        UnsupportedSetupError: Naming what is in the way and what to do.
    """
    name = type(controller).__name__
    for found, message in _CHECKS.values():
        if found(trainer, controller):
            raise UnsupportedSetupError(f"{name}: {message}")
    _refuse_a_mix(trainer, name)


def refuse_optimizers(trainer: Any, controller: Any) -> None:
    """Checks what is known once the optimizers exist.

    Raises:
        UnsupportedSetupError: There is not exactly one optimizer.
    """
    name = type(controller).__name__
    count = len(trainer.optimizers)
    if count != 1:
        raise UnsupportedSetupError(
            f"{name} drives exactly one optimizer, configure_optimizers returned {count}: put the parameters into "
            "the groups of one optimizer (their learning-rate ratios are kept)"
        )
    if not getattr(trainer.optimizers[0], "param_groups", None):
        raise UnsupportedSetupError(f"{name}: configure_optimizers returned no optimizer, so there is nothing to tune")


def refuse_lazy(trainer: Any, controller: Any) -> None:
    """Checks what is known when training starts.

    Raises:
        UnsupportedSetupError: Modules have no weights yet; the first trial would give them theirs.
    """
    named = trainer.lightning_module.named_parameters()
    lazy = [name for name, parameter in named if is_lazy(parameter)]
    if lazy:
        raise UnsupportedSetupError(
            f"{type(controller).__name__}: {', '.join(lazy)}: lazy modules have no weights yet, so there is no state "
            "that trials could go back to; run a batch through the model before the fit, or leave Lightning its sanity "
            "check (num_sanity_val_steps above 0)"
        )


def _manual(trainer: Any, _: Any) -> bool:
    return not trainer.lightning_module.automatic_optimization


def _second(trainer: Any, controller: Any) -> bool:
    return any(type(item) is type(controller) and item is not controller for item in trainer.callbacks)


def _dataloader_iter(trainer: Any, _: Any) -> bool:
    return "dataloader_iter" in inspect.signature(trainer.lightning_module.training_step).parameters


def _handles_accumulation(trainer: Any, _: Any) -> bool:
    return bool(trainer.strategy.handles_gradient_accumulation)


def _refuse_a_mix(trainer: Any, name: str) -> None:
    # Lightning itself refuses a module or datamodule of the other name. A callback is taken and half ignored: no
    # checkpoint is its last callback, no early stopping is known to be one.
    own = namespace_of(trainer)
    for item in trainer.callbacks:
        other = namespace_of(item)
        if own is not None and other not in (None, own):
            raise UnsupportedSetupError(
                f"{name}: the Trainer comes from {own} and {type(item).__name__} from {other}, which are two copies of "
                f"one code base and do not know each other's classes; import {type(item).__name__} from {own} too "
                f"({name} serves either)"
            )


_CHECKS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "manual": (
        _manual,
        "manual optimization (automatic_optimization=False) makes its own steps, which a trial cannot repeat; use "
        "automatic optimization, or leave the callback out",
    ),
    "second": (_second, "there are two of this callback in the Trainer and they would fight; keep one"),
    "finder": (
        lambda trainer, _: bool(callbacks_named(trainer, "LearningRateFinder")),
        "LearningRateFinder sets the same learning rate; remove it (the search needs no start value)",
    ),
    "batch_finder": (
        lambda trainer, _: bool(callbacks_named(trainer, "BatchSizeFinder")),
        "BatchSizeFinder runs its own trials inside the fit and breaks resuming; remove it, or run "
        "Tuner(trainer).scale_batch_size(...) in a separate script before",
    ),
    "swa": (
        lambda trainer, _: bool(callbacks_named(trainer, "StochasticWeightAveraging")),
        "StochasticWeightAveraging exchanges the learning-rate scheduler; remove it (the rate is decayed to zero, "
        "which does what averaging is for)",
    ),
    "accumulation": (
        lambda trainer, _: bool(callbacks_named(trainer, "GradientAccumulationScheduler")),
        "GradientAccumulationScheduler changes the size of an update while its learning rate is being judged; set "
        "Trainer(accumulate_grad_batches=k) instead",
    ),
    "finetuning": (
        lambda trainer, controller: hasattr(controller, "lr") and bool(callbacks_named(trainer, "BaseFinetuning")),
        "BaseFinetuning callbacks (BackboneFinetuning) add parameter groups while the rate is searched, and set their "
        "rates; make all groups in configure_optimizers and remove it (requires_grad=False keeps a part frozen)",
    ),
    "pruning": (
        lambda trainer, _: bool(callbacks_named(trainer, "ModelPruning")),
        "ModelPruning exchanges the module's tensors while it trains, so that nobody can go back to earlier weights; "
        "prune in a fit of its own",
    ),
    "iterator": (
        _dataloader_iter,
        "training_step(dataloader_iter) fetches its own batches, so a trial cannot repeat them; take a batch instead",
    ),
    "deepspeed": (
        _handles_accumulation,
        "the strategy accumulates gradients by itself (DeepSpeed), so a trial cannot step as training does; use "
        "strategy='ddp'",
    ),
    "fsdp1": (
        lambda trainer, _: any(cls.__name__ == "FSDPStrategy" for cls in type(trainer.strategy).__mro__),
        "FSDPStrategy flattens the parameters and restores callbacks at another moment than the other strategies; "
        "use ModelParallelStrategy() with torch.distributed.fsdp.fully_shard in configure_model (FSDP2), or "
        "strategy='ddp'",
    ),
}
