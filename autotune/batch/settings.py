"""What a user sets of the batch controller."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.batch.controller import BatchController
from autotune.batch.rules import Rule, Tolerances
from autotune.batch.scaling import Scaling


@dataclass(frozen=True)
class BatchSettings:
    """The arguments of ``AdaptiveBatchSize``."""

    max_batch_size: int | None
    rule: Rule
    lr_scaling: Scaling
    every_n_steps: int
    noise_multiple: float
    tolerances: Tolerances
    rest_updates: int
    decay_growth: float

    def controller(self) -> BatchController:
        """The rule at these settings.

        Raises:
            ConfigurationError: A value is out of range.
        """
        return BatchController(
            self.rule, self.tolerances, self.noise_multiple, self.rest_updates, decay_growth=self.decay_growth
        )
