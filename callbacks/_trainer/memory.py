"""How large a micro-batch the device can hold."""

from __future__ import annotations

from typing import Any

import torch

from autotune.batch.plan import micro_limit_from_memory
from autotune.noise.ranks import Ranks


def micro_limit(trainer: Any, micro: int, known: int | None) -> int | None:
    """The largest micro-batch on any rank's device; None where no end is known.

    Every rank must call this together: the smallest of their limits counts.

    Args:
        trainer: The trainer, after an update.
        micro: Present micro-batch, examples.
        known: What a micro-batch that did not fit has taught this rank.
    """
    device = trainer.strategy.root_device
    limits = [] if known is None else [known]
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
        peak, fixed = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        limits.append(micro_limit_from_memory(peak, fixed, micro, int(total * fraction)))
    limit = min(limits) if limits else 0
    ranks = Ranks.here() if trainer.world_size > 1 else None
    if ranks is not None:
        # 0 stands for "no end known"; the smallest positive limit is the largest of the reciprocals.
        inverse = ranks.worst(1.0 / limit if limit else 0.0, device)
        limit = round(1.0 / inverse) if inverse else 0
    return limit or None


def forget_peak(trainer: Any) -> None:
    """The next :func:`micro_limit` reads the peak from here on."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
