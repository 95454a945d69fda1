"""One evaluation of the weights, and how two of them compare."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Probe:
    """One evaluation on the probe batches.

    Attributes:
        loss: The monitored value, lower is better.
        batches: The value on every single batch where it is a mean over batches, else empty.
        share: The share of what the run is validated on that it is of; 0 where it is not known.
    """

    loss: float
    batches: tuple[float, ...] = ()
    share: float = 0.0

    @classmethod
    def from_dict(cls, saved: dict[str, Any] | None) -> Probe | None:
        """A probe that was saved as a dictionary of primitives; None where there was none."""
        return None if saved is None else cls(saved["loss"], tuple(saved["batches"]), saved["share"])


def compare(now: Probe, before: Probe) -> tuple[float, float]:
    """The paired difference ``now - before`` and its standard error (NaN where it cannot be told)."""
    difference = now.loss - before.loss
    count = len(now.batches)
    if count < 2 or count != len(before.batches):
        return difference, math.nan
    pairs = [a - b for a, b in zip(now.batches, before.batches, strict=True)]
    if not all(map(math.isfinite, pairs)):
        return difference, math.nan
    try:
        mean = math.fsum(pairs) / count
        variance = math.fsum((pair - mean) ** 2 for pair in pairs) / (count - 1)
    except OverflowError:
        return difference, math.nan
    return difference, math.sqrt(variance / count)
