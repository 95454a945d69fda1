"""Base shapes of the learning rate over a run, and over a trial.

=============  ==========================================================  ==============================
symbol         meaning                                                     unit
=============  ==========================================================  ==============================
``progress``   share of the run that is done before the coming update     1; in [0, 1), or >= 0 unbounded
``warmup``     share of the run over which the rate rises                  1
``resolution`` progress of one update: the first update is not at rate 0   1
=============  ==========================================================  ==============================

The rate of an update is ``peak * shape(progress)``; shapes are 1 at the end of the warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Linear warm-up, a hold, then linear decay to zero at progress 1, or a hold for ever where the end is not known.

    Attributes:
        warmup: Share of the run that is warm-up.
        decay: Whether the rate falls to zero at progress 1; without it the peak is held.
        resolution: Progress of one update.
        decay_from: Progress at which the decay begins; at the warm-up's end where that is later.

    The decay reaches zero only *after* the last update, so no update is made at rate 0.

    >>> shape = Shape(warmup=0.5, resolution=0.25)
    >>> [round(shape(progress), 3) for progress in (0.0, 0.25, 0.5, 0.75)]
    [0.5, 1.0, 1.0, 0.5]
    """

    warmup: float = 0.02
    decay: bool = True
    resolution: float = 0.0
    decay_from: float = 0.0

    def __call__(self, progress: float) -> float:
        """The share of the peak at ``progress``."""
        rising = progress + self.resolution
        if rising < self.warmup:
            return rising / self.warmup
        if not self.decay:
            return 1.0
        # The last update's rate is that of its start, however far a time limit is overrun.
        left = max(1.0 - progress, self.resolution, 1e-6)
        return min(1.0, left / (1.0 - max(self.warmup, self.decay_from)))

    def mean(self, progress: float = 0.0) -> float:
        """Mean share of the peak over the run, or what is left of it after its warm-up; 1 where the end is not known.

        >>> round(Shape(warmup=0.0).mean(), 3), round(Shape(warmup=0.0, decay_from=0.5).mean(), 3)
        (0.5, 0.75)
        >>> round(Shape(decay_from=0.5).mean(0.4), 3), round(Shape(decay_from=0.5).mean(0.6), 3)
        (0.583, 0.4)
        """
        held_until = max(self.warmup, self.decay_from)
        if not self.decay:
            return 1.0
        if progress <= self.warmup:
            return 0.5 * (1.0 + held_until - self.warmup)
        falling = 1.0 - max(held_until, progress)
        area = max(held_until - progress, 0.0) + 0.5 * falling * falling / (1.0 - held_until)
        return area / max(1.0 - progress, 1e-6)


@dataclass(frozen=True)
class TrialShape:
    """A trial's rate: the decay of the run that remains, on a smaller scale.

    Attributes:
        steps: Optimizer steps of the whole trial.
        constant: Hold the rate instead of annealing it: AutoLRS as published.
        shares: What each step's rate is multiplied by besides (:mod:`autotune.search.strides`); empty for nothing.
        idle: First steps that come before the decay begins, because they say nothing.
    """

    steps: int
    constant: bool = False
    shares: tuple[float, ...] = ()
    idle: int = 0

    def __call__(self, step: int) -> float:
        """The share of the candidate's rate at trial step ``step`` (from 0)."""
        share = self.shares[step] if self.shares else 1.0
        steps = max(1, self.steps - self.idle)
        return share if self.constant else share * Shape(0.0, True, 1.0 / steps)(max(0, step - self.idle) / steps)
