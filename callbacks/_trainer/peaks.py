"""The rates that a user's schedulers are going to set: where their top lies, before a step is made.

A multiplier on a schedule needs to know what the schedule's top is. For most it is the rate that the optimizer was
built with, or the ``max_lr`` of a cycle; a ``LambdaLR`` may return anything, the absolute rates of "Attention is all
you need" included. So copies of the schedulers are stepped through the run that is planned, when Lightning would step
them, on an optimizer without weights.

Functions are not copied with the schedulers that call them. What they change of the module (attributes, buffers,
``requires_grad``) and the generators are put back; what they count elsewhere, as in a closure's own variables, is not.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from autotune.callbacks._trainer.horizon import plan, updates_an_epoch
from autotune.callbacks._trainer.rates import current_rates, initial_rates
from autotune.pystate import Attributes, save
from autotune.randomness import random_state, set_random_state
from autotune.snapshot import MODULE_INTERNALS

#: Updates times groups that are looked ahead at most (some seconds' worth), and where nothing says how many there are.
_AHEAD, _AHEAD_UNLIMITED = 500_000, 50_000
#: Updates that are looked ahead however many groups there are.
_LEAST_AHEAD = 5_000
#: A top that falls between two updates is missed by less than this share.
_CLOSE = 0.01


def peak_rates(trainer: Any) -> list[float]:
    """Each group's highest rate in the run that is planned, under the user's schedulers; else as it was built.

    Schedulers that follow a monitored value only lower rates, and are left out. A run without a limit of updates is
    looked at until the first group's rate comes down. The rates that the optimizer was built with stand in where the
    schedulers cannot be copied or stepped without the run, where the module steps them in ``lr_scheduler_step``, where
    the first group's rate would be 0 to the run's end, and, if they are higher, where the rate still rises as far as is
    looked (500,000 updates, divided by the number of groups).
    """
    optimizer = trainer.optimizers[0]
    built = initial_rates(optimizer)
    configs = [config for config in trainer.lr_scheduler_configs if not config.reduce_on_plateau]
    if not configs or _steps_them_itself(trainer):
        return built
    with _put_back(trainer.lightning_module):
        found = _highest(trainer, optimizer, configs)
    if found is None or found[0][0] <= 0.0:
        return built
    ahead, rising = found
    if rising:
        ahead = [max(pair) for pair in zip(ahead, built, strict=True)]
    close = all(math.isclose(one, other, rel_tol=_CLOSE) for one, other in zip(ahead, built, strict=True))
    return built if close else ahead


def _highest(trainer: Any, optimizer: Any, configs: list[Any]) -> tuple[list[float], bool] | None:
    """Each group's highest rate, and whether the first one's still rises where nobody has looked on; None: unknown."""
    apart = _without_weights(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # steps of a scheduler without any of its optimizer
        # A scheduler of the user's own may do anything when it is copied, or stepped, apart from its run.
        try:
            schedulers = copy.deepcopy([config.scheduler for config in configs], _shared(trainer, optimizer, apart))
        except Exception:
            return None
        limit = _updates_left(trainer)
        most = (_AHEAD_UNLIMITED if math.isinf(limit) else _AHEAD) // len(apart.param_groups)
        updates = int(min(limit, max(most, _LEAST_AHEAD)))
        highest = rates = middle = current_rates(apart)
        for update, due in zip(range(updates), _due(trainer, configs), strict=False):
            rates = current_rates(apart)
            highest = [max(pair) for pair in zip(highest, rates, strict=True)]
            if math.isinf(limit) and rates[0] < (1.0 - _CLOSE) * highest[0]:
                return highest, False
            if update == updates // 2:
                middle = rates
            try:
                for scheduler in (schedulers[index] for index in due):
                    scheduler.step()
            except Exception:
                return (highest, False) if update else None
    return highest, updates < limit and rates[0] > (1.0 + _CLOSE) * middle[0]


def _due(trainer: Any, configs: list[Any]) -> Iterator[list[int]]:
    """For each update to come, the schedulers that Lightning steps after it.

    It counts an epoch's batches, or the epochs, and asks whenever an update is made, or an epoch ends.
    """
    an_epoch, batches, accumulate = (
        updates_an_epoch(trainer), trainer.num_training_batches, int(trainer.accumulate_grad_batches)
    )  # fmt: skip
    epoch, inside = int(trainer.current_epoch), int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
    update = inside // accumulate if inside < batches else 0
    while True:
        done = min((update + 1) * accumulate, batches)
        ended = update + 1 >= an_epoch
        count = {"step": done, "epoch": epoch + 1 if ended else math.inf}
        yield [i for i, config in enumerate(configs) if count[config.interval] % config.frequency == 0]
        epoch, update = (epoch + 1, 0) if ended else (epoch, update + 1)


def _updates_left(trainer: Any) -> float:
    """Updates that the run can still make; infinite where nothing limits them, or only the clock does."""
    horizon = plan(trainer)
    limit = horizon.updates if horizon.known else horizon.most
    return math.inf if math.isnan(limit) else max(limit - trainer.global_step, 0.0)


def _steps_them_itself(trainer: Any) -> bool:
    hook = type(trainer.lightning_module).lr_scheduler_step
    return not hook.__module__.startswith(("lightning.", "pytorch_lightning."))


def _without_weights(optimizer: Any) -> torch.optim.Optimizer:
    """An optimizer with the same groups and defaults, and one number in each group."""
    groups = []
    for group in optimizer.param_groups:
        settings = {key: _own(value) for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({**settings, "params": [torch.zeros((), requires_grad=True)]})
    apart = torch.optim.SGD(groups, lr=1.0)
    apart.defaults = dict(optimizer.defaults)
    return apart


def _own(value: Any) -> Any:
    """A rate that is a tensor is written in place; nobody writes into what else a group has."""
    return value.detach().clone() if isinstance(value, Tensor) and value.numel() == 1 else value


def _shared(trainer: Any, optimizer: Any, apart: torch.optim.Optimizer) -> dict[int, Any]:
    """What copies of schedulers refer to in place of copies of their own: nothing of the run is copied with them."""
    module = trainer.lightning_module
    run = (trainer, getattr(trainer, "datamodule", None), trainer.train_dataloader, *trainer.callbacks)
    model = (*module.modules(), *module.parameters(), *module.buffers())
    known: dict[int, Any] = {id(part): part for part in (*run, *model) if part is not None}
    known |= {id(optimizer): apart, id(optimizer.param_groups): apart.param_groups}
    known |= {id(group): own for group, own in zip(optimizer.param_groups, apart.param_groups, strict=True)}
    return known


@contextmanager
def _put_back(module: torch.nn.Module) -> Iterator[None]:
    """Whatever functions of the user's do to the module or the generators here is undone."""
    before, trained = random_state(), [(one, one.requires_grad) for one in module.parameters()]
    attributes, buffers = Attributes(module.modules(), skip=MODULE_INTERNALS), save(list(module.buffers()))
    attributes.capture()
    try:
        yield
    finally:
        buffers()
        attributes.restore()
        for parameter, required in trained:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
        set_random_state(before)
