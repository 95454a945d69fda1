"""What decides the order of a trainer's training data: its loaders' generators, the global ones, and its samplers."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler

from autotune.randomness import random_state, set_random_state


def training_loaders(trainer: Any) -> list[Any]:
    """The training loaders in use; none before they are set up."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def generators_of(trainer: Any) -> list[torch.Generator]:
    """The generators of the training loaders and of their samplers."""
    return generators_in(training_loaders(trainer))


def set_epoch(trainer: Any, epoch: int) -> None:
    """Tells the samplers that shuffle by epoch which one it is."""
    for sampler in _samplers(trainer):
        if callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(epoch)


def distributed_samplers(trainer: Any) -> list[Any]:
    """The samplers that deal the data out to ranks."""
    return [sampler for sampler in _samplers(trainer) if isinstance(sampler, DistributedSampler)]


def _samplers(trainer: Any) -> list[Any]:
    loaders = training_loaders(trainer)
    own = [getattr(loader, "sampler", None) for loader in loaders]
    return own + [getattr(getattr(loader, "batch_sampler", None), "sampler", None) for loader in loaders]


def generators_in(loaders: Any) -> list[torch.Generator]:
    """Those of a combined loader, or of any collection of loaders; each once."""
    found: list[torch.Generator] = []
    for loader in tree_leaves(getattr(loaders, "flattened", loaders)):
        if not isinstance(loader, DataLoader):
            continue
        holders = [loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
        for holder in holders:
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator) and not any(generator is one for one in found):
                found.append(generator)
    return found


def capture(generators: list[torch.Generator]) -> dict[str, Any]:
    """The states of the global generators and of these."""
    return {"global": random_state(), "loaders": [generator.get_state() for generator in generators]}


def put_back(saved: dict[str, Any] | None, generators: list[torch.Generator]) -> None:
    """The inverse of :func:`capture`; nothing where nothing was saved."""
    if saved is None:
        return
    set_random_state(saved["global"])
    for generator, state in zip(generators, saved["loaders"], strict=False):
        generator.set_state(state.cpu())
