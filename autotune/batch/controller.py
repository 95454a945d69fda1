"""When the batch grows, and to what: measurements in, a target out (init/step).

==============  ===================================================================  ========
symbol          meaning                                                              unit
==============  ===================================================================  ========
``batch``       present global batch                                                 examples
``examples``    trained on so far, in the whole run                                  examples
``ceiling``     largest batch still allowed; falls when a growth had to be undone    examples
``rest``        least updates between two changes                                    updates
==============  ===================================================================  ========

Batches only grow. Our rule doubles at the most, when the smoothed noise scale's lower end says so, the last change is
``rest`` updates ago (so that its effect is in the measurements) and the step up is worth its change. Where the rate
decays, the batch grows in the decay's place (see :func:`autotune.batch.rules.decay_test`): growing earlier costs loss.
The published rules jump to what their one measurement asks for, as published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

from autotune.arguments import is_count, is_number
from autotune.batch.rules import RULES, Rule, Tolerances, Verdict, decay_test, noise_scale_test, published
from autotune.errors import ConfigurationError, StateError
from autotune.noise.smoothing import NoiseEstimate
from autotune.noise.statistics import GradientRecord

#: A change of less than this factor is not worth a change.
LEAST_GROWTH = 1.25


@dataclass(frozen=True)
class BatchState:
    """What evolves.

    Attributes:
        batch: Global batch, examples.
        ceiling: Largest allowed, examples.
        changed_at: Updates done when it last changed.
        growths: How often it has grown.
        undone: How often a growth was taken back; after the first the noise scale is no longer believed, and in a
            decay the batch only grows as far as the rate stays below its peak; after the second it does not grow, or,
            where that is the controller's to choose, without a higher rate.
    """

    batch: int
    ceiling: int
    changed_at: int = 0
    growths: int = 0
    undone: int = 0

    def state_dict(self) -> dict[str, int]:
        """Primitives only."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, int]) -> BatchState:
        """The inverse of :meth:`state_dict`.

        Raises:
            StateError: Keys are missing or unknown.
        """
        if set(state) != set(cls.__dataclass_fields__):
            raise StateError(f"a batch state has the keys {sorted(cls.__dataclass_fields__)}; got {sorted(state)}")
        return cls(**state)


@dataclass(frozen=True)
class Decay:
    """A scheduled rate that falls.

    Attributes:
        base: Batch that the schedule's peak was meant for, examples.
        level: The rate that is scheduled now, in units of that peak.
    """

    base: int
    level: float


@dataclass(frozen=True)
class Target:
    """A batch to grow to, and why.

    Attributes:
        batch: Examples wanted.
        most: Examples at the most, should ``batch`` have to be rounded.
        reason: In words, given the batch that it comes to once rounded.
        numbers: What the test read.
    """

    batch: int
    most: int
    reason: Callable[[int], str]
    numbers: dict[str, float]


class BatchController:
    """Decides; the callback carries it out.

    Args:
        rule: One of the five.
        tolerances: Of the published tests.
        multiple: Our rule's ``multiple``: the batch aimed at, in noise scales.
        rest_updates: ``rest``.
        most_growth: Largest factor of one change under our rule.
        decay_growth: Largest factor of all changes together that take a decay's place.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        rule: Rule = "noise_scale",
        tolerances: Tolerances | None = None,
        multiple: float = 0.25,
        rest_updates: int = 20,
        most_growth: float = 2.0,
        decay_growth: float = 3.0,
    ) -> None:
        if rule not in RULES:
            raise ConfigurationError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")
        if not (is_number(multiple) and multiple > 0):
            raise ConfigurationError(f"noise_multiple must be a positive number; got {multiple!r}. Try 0.25.")
        if not is_count(rest_updates, least=0):
            raise ConfigurationError(f"rest_updates counts updates, 0 or more; got {rest_updates!r}. Try 20.")
        if not most_growth > LEAST_GROWTH:
            raise ConfigurationError(f"most_growth must be above {LEAST_GROWTH}; got {most_growth!r}")
        self.rule = rule
        self.tolerances = tolerances or Tolerances()
        self.multiple = multiple
        self.rest_updates = rest_updates
        if not (is_number(decay_growth) and decay_growth >= 1.0):
            raise ConfigurationError(
                f"decay_growth is a finite factor of the batch, 1 or more; got {decay_growth!r}. Try 3, or 1 for a "
                "batch that stays while the rate decays."
            )
        self.most_growth, self.decay_growth = most_growth, decay_growth

    def init(self, batch: int, max_batch: int) -> BatchState:
        """Nothing decided yet; ``max_batch`` below the start means that the batch stays."""
        return BatchState(batch=batch, ceiling=max(batch, max_batch))

    def step(
        self,
        state: BatchState,
        record: GradientRecord,
        estimate: NoiseEstimate,
        updates: int,
        decay: Decay | None = None,
    ) -> Target | None:
        """Looks at one measurement.

        Args:
            state: The present state.
            record: The measurement, on the host.
            estimate: What smoothing makes of it and the earlier ones.
            updates: Real updates done.
            decay: Where the rate stands in its schedule; None where there is none.

        Returns:
            What to grow to; None to stay. The state changes by :meth:`grown`, once the change is made.
        """
        if state.batch >= state.ceiling:
            return None
        if self.rule == "noise_scale":
            if updates - state.changed_at < self.rest_updates:
                return None
            verdict = self._verdict(state, estimate, decay)
            wanted = min(verdict.wanted, self.most_growth * state.batch)
            least = LEAST_GROWTH
        else:
            verdict = published(self.rule, record, self.tolerances)
            wanted, least = verdict.wanted, 1.0
        if verdict.passes or math.isnan(wanted):
            return None
        batch = int(min(wanted, state.ceiling))
        if batch <= state.batch or (batch < least * state.batch and batch < state.ceiling):
            return None
        most = state.ceiling
        if self.rule == "noise_scale" and decay is not None:
            # After a growth that failed a batch that is rounded up would raise the rate above its peak.
            most = batch if state.undone else min(most, int(self.decay_growth * decay.base))
        return Target(batch, most, partial(self._reason, state, verdict, decay), verdict.numbers)

    def _verdict(self, state: BatchState, estimate: NoiseEstimate, decay: Decay | None) -> Verdict:
        if decay is None:
            return noise_scale_test(estimate, state.batch, self.multiple)
        if not state.undone:
            return decay_test(estimate, state.batch, self.multiple, decay.base, decay.level, self.decay_growth)
        verdict = decay_test(estimate, state.batch, 0.0, decay.base, decay.level, self.decay_growth)
        # In whole multiples of the base, rounded down, for the same reason.
        wanted = verdict.wanted // decay.base * decay.base
        return replace(verdict, wanted=wanted, passes=not wanted > state.batch)

    def _reason(self, state: BatchState, verdict: Verdict, decay: Decay | None, batch: int) -> str:
        capped = ", the most allowed" if batch >= state.ceiling else ""
        if self.rule == "noise_scale" and decay is not None:
            kept = "the rate as scheduled, because higher ones were not borne"
            return (
                f"the scheduled rate is at {decay.level:.2f} of its peak: from {state.batch} grow to {batch}{capped}, "
                f"{kept if self.leaves_rate(state) else 'in the place of as much decay'}"
            )
        if self.rule == "noise_scale":
            low, high = verdict.numbers["noise_scale_low"], verdict.numbers["noise_scale_high"]
            return (
                f"the noise scale, {low:.0f} to {high:.0f} examples, times {self.multiple:g} is above the batch of "
                f"{state.batch}: grow to {batch}{capped}"
            )
        return f"the {self.rule} test fails at {state.batch} and asks for {verdict.wanted:g}: grow to {batch}{capped}"

    def grown(self, state: BatchState, batch: int, updates: int) -> BatchState:
        """The batch is ``batch`` now."""
        return replace(state, batch=batch, changed_at=updates, growths=state.growths + 1)

    def undone(
        self, state: BatchState, batch: int, updates: int, decay: Decay | None = None, *, may_leave_rate: bool = False
    ) -> BatchState:
        """The last growth was taken back to ``batch``, and is not tried again.

        Where the rate decays, a first growth that failed may have raised the rate above its peak; without that it may
        grow on. A second may have raised it to what only a smaller batch bears; where the caller may leave the rate as
        scheduled (``may_leave_rate``, and then :meth:`leaves_rate` says so), it may grow on without.
        """
        attempts = 0 if decay is None or self.rule != "noise_scale" else 2 if may_leave_rate else 1
        ceiling = batch if state.undone >= attempts else state.ceiling
        return replace(state, batch=batch, ceiling=ceiling, changed_at=updates, undone=state.undone + 1)

    @staticmethod
    def leaves_rate(state: BatchState) -> bool:
        """Whether higher rates have failed so often that a growth is to leave the rate as it is scheduled."""
        return state.undone > 1
