"""What searching may cost, at any moment.

Units: optimizer steps; an evaluation counts a third of a step for every batch of training size.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What one evaluated batch of training size costs, in optimizer steps (a forward pass against forward and backward).
EVALUATION_STEPS = 1.0 / 3.0


@dataclass(frozen=True)
class Budget:
    """The hard cap on search.

    At any moment the cost is at most ``share * planned``; and, so that a run which ends early has not spent it
    all up front, at most ``2 * share * done`` plus the cost of the first search.

    Attributes:
        share: ``search_budget``, in (0, 1).
        planned_steps: Optimizer steps of the whole run, or the most it can make; infinite where nothing limits them.

    >>> Budget(0.1, 1000).left(spent=60, done_steps=0, first_cost=60)
    0.0
    >>> Budget(0.1, 1000).left(spent=60, done_steps=500, first_cost=60)
    40.0
    """

    share: float
    planned_steps: float

    def first(self, assumed_steps: float) -> float:
        """What the first search may cost, in steps, given the run's (assumed) length."""
        return self.share * min(self.planned_steps, assumed_steps)

    def earned(self, done_steps: float) -> float:
        """What so many updates let a run spend beyond its first search, in steps."""
        return 2.0 * self.share * done_steps

    def left(self, spent: float, done_steps: float, first_cost: float) -> float:
        """Steps that may still be spent now."""
        whole = self.share * self.planned_steps
        gradual = self.earned(done_steps) + first_cost
        return max(0.0, min(whole, gradual) - spent)
