"""The rates that a user's schedulers are going to set: where their top lies, before a step is made.

A multiplier on a schedule needs to know what the schedule's top is. For most it is the rate that the optimizer was
built with, or the ``max_lr`` of a cycle; a ``LambdaLR`` may return anything, the absolute rates of "Attention is all
you need" included. So copies of the schedulers are stepped through the run that is planned, on an optimizer without
weights.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch

from autotune.callbacks._trainer.horizon import plan, updates_an_epoch
from autotune.callbacks._trainer.rates import current_rates, initial_rates
from autotune.randomness import random_state, set_random_state

#: Updates that are looked ahead at most, half a second's worth; warm-ups are shorter.
_AHEAD = 50_000
#: A top that falls between two updates is missed by less than this share.
_CLOSE = 0.01


def peak_rates(trainer: Any) -> list[float]:
    """Each group's rate where the first group's is highest, under the user's schedulers; else as it was built.

    Schedulers that follow a monitored value only lower rates, and are left out. Where one cannot be copied or stepped
    without the run, the rates that the optimizer was built with stand in.
    """
    optimizer = trainer.optimizers[0]
    built = initial_rates(optimizer)
    configs = [config for config in trainer.lr_scheduler_configs if not config.reduce_on_plateau]
    if not configs:
        return built
    before = random_state()
    try:
        ahead = _highest(trainer, optimizer, configs)
    # A scheduler of the user's own may do anything when it is stepped apart from its run.
    except Exception:
        return built
    finally:
        set_random_state(before)
    close = all(math.isclose(one, other, rel_tol=_CLOSE) for one, other in zip(ahead, built, strict=True))
    return built if close else ahead


def _highest(trainer: Any, optimizer: Any, configs: list[Any]) -> list[float]:
    apart = _without_weights(optimizer)
    # What a scheduler refers to of the run is not copied with it.
    known = {id(optimizer): apart, id(trainer): trainer, id(trainer.lightning_module): trainer.lightning_module}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # steps of a scheduler without any of its optimizer
        schedulers = copy.deepcopy([config.scheduler for config in configs], known)
        highest = current_rates(apart)
        for update in range(1, _updates_ahead(trainer) + 1):
            for config, scheduler in zip(configs, schedulers, strict=True):
                every = config.frequency * (1.0 if config.interval == "step" else updates_an_epoch(trainer))
                if update % every < 1.0 <= every:
                    scheduler.step()
            rates = current_rates(apart)
            highest = max(highest, rates, key=lambda found: found[0])
    return highest


def _updates_ahead(trainer: Any) -> int:
    horizon = plan(trainer)
    if not horizon.known or math.isnan(horizon.updates):
        return _AHEAD
    return int(min(max(horizon.updates - trainer.global_step, 0), _AHEAD))


def _without_weights(optimizer: Any) -> torch.optim.Optimizer:
    """An optimizer with the same groups and one number in each."""
    groups = []
    for group in optimizer.param_groups:
        settings = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        groups.append({**settings, "params": [torch.zeros((), requires_grad=True)]})
    return torch.optim.SGD(groups, lr=1.0)
