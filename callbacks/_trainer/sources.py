"""Where a run's gradients can be had in more than one piece: which source of noise serves, and which does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from torch import nn

from autotune.errors import UnsupportedSetupError
from autotune.noise import layers
from autotune.noise.microbatch import Extras
from autotune.noise.per_example import PerExampleMeter

Source: TypeAlias = Literal["auto", "microbatch", "ranks", "per_example", "consecutive"]
SOURCES = ("auto", "microbatch", "ranks", "per_example", "consecutive")
#: Below this share of the parameters, per-example norms say too little about the whole.
LEAST_SHARE = 0.5


def refuse_shards(parameters: Iterable[nn.Parameter]) -> None:
    """Says no to parameters of which each process holds a part.

    Raises:
        UnsupportedSetupError: With what to do instead.
    """
    if any(hasattr(parameter, "to_local") for parameter in parameters):
        raise UnsupportedSetupError(
            "parameters are sharded (FSDP), and no source measures shards yet; use strategy='ddp', or leave "
            "the callback out"
        )


def refuse_missing(source: Source, trainer: Any, examples: PerExampleMeter | None, extras: Extras) -> None:
    """Says no to a source that was asked for by name and does not exist here.

    Args:
        source: As it was asked for.
        trainer: As a fit starts.
        examples: The meter of single examples; None where no layer tells them apart and nobody has asked for it.
        extras: Further statistics that are wanted.

    Raises:
        UnsupportedSetupError: With what to do instead.
    """
    if source == "microbatch" and trainer.accumulate_grad_batches * trainer.world_size < 2:
        raise UnsupportedSetupError(
            "source='microbatch' compares the micro-batches of an accumulation window, and there is one: set "
            "Trainer(accumulate_grad_batches=2) or more, or leave source='auto'"
        )
    if source == "ranks" and trainer.world_size < 2:
        raise UnsupportedSetupError(
            "source='ranks' compares the gradients of several processes, and there is one: train with "
            "Trainer(devices=2, strategy='ddp') or more, or leave source='auto'"
        )
    if source == "per_example" and examples is not None:
        examples.refuse_coupled()
        if (extras.inner or extras.coordinate) and trainer.accumulate_grad_batches > 1:
            raise UnsupportedSetupError(
                "the inner-product, augmented and coordinate rules read per-example gradients of a whole update "
                "in one micro-batch; with accumulate_grad_batches above 1 take source='microbatch'"
            )


def chosen(source: Source, trainer: Any, examples: PerExampleMeter | None) -> str:
    """The source that serves now: ``"microbatch"``, ``"per_example"`` or ``"consecutive"``.

    Args:
        source: As it was asked for.
        trainer: Its accumulation may have changed since the last time.
        examples: As for :func:`refuse_missing`.
    """
    if source != "auto":
        return "microbatch" if source == "ranks" else source
    if trainer.accumulate_grad_batches * trainer.world_size >= 2:
        return "microbatch"
    return "consecutive" if examples is None or not _separable(examples) else "per_example"


def _separable(examples: PerExampleMeter) -> bool:
    """Whether single examples say enough about the whole."""
    if examples.coupled() is not None:
        return False
    covered = 0
    for module in examples.model.modules():
        if layers.is_supported(module):
            covered += sum(p.numel() for p in module.parameters(recurse=False) if p.requires_grad)
    total = sum(p.numel() for p in examples.wanted.parameters)
    return covered >= LEAST_SHARE * total and examples.coverage().share >= LEAST_SHARE
