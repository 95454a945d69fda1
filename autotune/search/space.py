"""The interval of learning rates, on a logarithmic axis.

Notation:
    lr        learning rate of the optimizer's first group, > 0
    log_lr    its natural logarithm, in nats; every distance in the search is one of these
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from autotune.errors import ConfigurationError

#: A search that starts from a current learning rate stays within this factor of it.
LOCAL_FACTOR = 8.0


@dataclass(frozen=True)
class LogSpace:
    """Learning rates between two bounds, both inside.

    Args:
        low: Smallest learning rate.
        high: Largest learning rate.

    Raises:
        ConfigurationError: A bound is not finite and positive, or they do not stand in order.

    >>> LogSpace(1e-4, 1.0).clip(math.log(10.0))
    0.0
    """

    low: float = 1e-6
    high: float = 10.0

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigurationError(f"LogSpace: {name} must be a number; got {value!r}")
            if not (math.isfinite(value) and value > 0):
                raise ConfigurationError(
                    f"LogSpace: {name} must be finite and above 0; got {value!r}. LogSpace(1e-6, 10.0) is the default"
                )
        if not self.low < self.high:
            raise ConfigurationError(f"LogSpace: low must be below high; got low={self.low!r}, high={self.high!r}")

    @property
    def log_low(self) -> float:
        """Lower end, in nats."""
        return math.log(self.low)

    @property
    def log_high(self) -> float:
        """Upper end, in nats."""
        return math.log(self.high)

    @property
    def width(self) -> float:
        """Length of the interval, in nats."""
        return self.log_high - self.log_low

    def contains(self, log_lr: float) -> bool:
        """Whether ``log_lr`` lies inside, ends included."""
        return self.log_low <= log_lr <= self.log_high

    def clip(self, log_lr: float) -> float:
        """The point of the interval nearest to ``log_lr``; a NaN goes to the middle."""
        if math.isnan(log_lr):
            return 0.5 * (self.log_low + self.log_high)
        return min(max(log_lr, self.log_low), self.log_high)

    def around(self, log_lr: float, factor: float) -> LogSpace:
        """The part of the interval within a factor of one learning rate.

        Args:
            log_lr: The centre; clipped to the interval first.
            factor: Above 1.
        """
        centre, reach = self.clip(log_lr), math.log(factor)
        low = math.exp(max(centre - reach, self.log_low))
        high = math.exp(min(centre + reach, self.log_high))
        return LogSpace(max(low, self.low), min(high, self.high))

    def grid(self, points: int = 161) -> Tensor:
        """Equally spaced log learning rates.

        Args:
            points: How many, at least 2.

        Returns:
            Float64, shape (points,), ascending, ends included.
        """
        if points < 2:
            raise ConfigurationError(f"LogSpace.grid: points must be at least 2; got {points}")
        return torch.linspace(self.log_low, self.log_high, points, dtype=torch.float64)
