"""What the processes of a run agree on; alone, every question is answered at once.

A decision is the same on every rank by construction when it is made from numbers that have come through here: means
over all ranks (a NaN on one is a NaN on all), what rank zero says, or what all have in common. Every call is
collective: it stands where all ranks pass, never behind a condition on a rank's own numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Agreement:
    """The processes that train together.

    Args:
        trainer: In a running fit.
    """

    def __init__(self, trainer: Any) -> None:
        self._strategy = trainer.strategy
        alone = trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized())
        self.size = 1 if alone else int(trainer.world_size)

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean over ranks of each value; all ranks must hand over equally many."""
        if self.size == 1:
            return list(values)
        total = self._sum(torch.tensor(list(values), dtype=torch.float64, device=self._strategy.root_device))
        return [float(value) / self.size for value in total]

    def total(self, value: float) -> float:
        """The sum over ranks."""
        return self.mean([value])[0] * self.size

    def mean_loss(self, loss: Tensor | None) -> Tensor | None:
        """The mean of the losses that ranks have, on its device and without a wait; None where no rank has one."""
        if self.size == 1:
            return loss
        device = self._strategy.root_device
        mine = torch.zeros(2, device=device) if loss is None else torch.stack([loss.float(), loss.new_ones(()).float()])
        total = self._sum(mine.to(device))
        # No rank has one: 0 / 0 is NaN, which is what a step without a loss is.
        return total[0] / total[1]

    def _sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def of_zero(self, value: T) -> T:
        """What rank zero has."""
        if self.size == 1:
            return value
        told: T = self._strategy.broadcast(value, src=0)
        return told

    def any(self, value: bool) -> bool:
        """Whether it holds on some rank."""
        return self.mean([float(value)])[0] > 0.0

    def gather(self, value: T) -> list[T]:
        """Every rank's, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def common(self, names: Sequence[str]) -> list[str]:
        """The names that all ranks have, in this rank's order."""
        everywhere = set.intersection(*map(set, self.gather(list(names))))
        return [name for name in names if name in everywhere]
