"""Noise across processes: what adds up is added up, by one all-reduce of a few numbers.

Each rank's chunks are chunks like any other: a hook on a leaf tensor sees the rank's own gradient before it
is averaged (:mod:`autotune.noise.microbatch`), so ranks and the micro-batches within them are measured
together, and ``M`` counts all of them. With one micro-batch a rank this is ``V = b/(M-1) (sum_m |g_m|^2 -
M|g|^2)``.

The variance is taken over the chunks' own means with M - 1 degrees of freedom; the released AdAdaGrad code
counts it over workers and then over their examples, which is too much by 1 + (J-1)/(J b).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.errors import UnsupportedSetupError
from autotune.noise.statistics import ChunkSums


@dataclass(frozen=True)
class Ranks:
    """The processes that share an update.

    Attributes:
        group: Process group; None for the default one.
    """

    group: Any = None

    @classmethod
    def here(cls, group: Any = None) -> Ranks | None:
        """The processes of ``group``, or None where this process is alone."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return None
        return cls(group)

    @property
    def size(self) -> int:
        """How many there are.

        Raises:
            UnsupportedSetupError: No process group is up.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise UnsupportedSetupError(
                "source='ranks' compares the gradients of several processes, and no process group is up: "
                "train with Trainer(devices=2, strategy='ddp') or more, or leave source='auto'"
            )
        return dist.get_world_size(self.group)

    def join(self, sums: ChunkSums) -> ChunkSums:
        """The sums of all ranks' chunks: one all-reduce of ``3 + G`` numbers."""
        return ChunkSums.unpack(self.add(sums.pack()))

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, the same on each."""
        total = tensor.clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.group)
        return total

    def worst(self, value: float, device: torch.device) -> float:
        """The largest value on any rank."""
        tensor = torch.tensor(value, device=device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return float(tensor)
