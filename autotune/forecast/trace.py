"""A loss curve of any length in bounded memory: means over equal spans of steps."""

from __future__ import annotations

import math
from typing import Any


class LossTrace:
    """Keeps a run's losses as at most ``bins`` means; when they are full, neighbours are merged.

    >>> trace = LossTrace(bins=2)
    >>> for step, loss in enumerate([4.0, 2.0, 1.0, 1.0]):
    ...     trace.add(step, loss)
    >>> trace.curve()[:2]
    ([0.5, 2.5], [3.0, 1.0])
    """

    def __init__(self, bins: int = 256) -> None:
        self._limit = bins
        self._span = 1
        self._bins: list[list[float]] = []  # count, sum of steps, sum of losses, sum of squared losses

    def add(self, step: int, loss: float) -> None:
        """Adds one finite loss; others are left out."""
        if not math.isfinite(loss):
            return
        if not self._bins or self._bins[-1][0] >= self._span:
            if len(self._bins) >= self._limit:
                self._merge()
            if not self._bins or self._bins[-1][0] >= self._span:
                self._bins.append([0.0, 0.0, 0.0, 0.0])
        last = self._bins[-1]
        for index, amount in enumerate((1.0, float(step), loss, loss * loss)):
            last[index] += amount

    def _merge(self) -> None:
        pairs = [self._bins[index : index + 2] for index in range(0, len(self._bins), 2)]
        self._bins = [[math.fsum(column) for column in zip(*pair, strict=True)] for pair in pairs]
        self._span *= 2

    def curve(self) -> tuple[list[float], list[float]]:
        """Mean step and mean loss of every bin."""
        return [b[1] / b[0] for b in self._bins], [b[2] / b[0] for b in self._bins]

    def recent(self, steps: int) -> tuple[float, float]:
        """Mean loss over the bins that cover the last ``steps`` steps, and its standard error."""
        taken: list[list[float]] = []
        for item in reversed(self._bins):
            taken.append(item)
            if sum(b[0] for b in taken) >= steps:
                break
        count, _, total, squares = (math.fsum(column) for column in zip(*taken, strict=True)) if taken else (0, 0, 0, 0)
        if count < 2:
            return math.nan, math.nan
        mean = total / count
        return mean, math.sqrt(max(squares / count - mean * mean, 0.0) / (count - 1))

    def __len__(self) -> int:
        return len(self._bins)

    def state_dict(self) -> dict[str, Any]:
        """The bins as primitives."""
        return {"span": self._span, "bins": [list(item) for item in self._bins]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._span = int(saved["span"])
        self._bins = [list(item) for item in saved["bins"]]
