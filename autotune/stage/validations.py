"""What the run's own validations say: which of its weights were best, and whether it has left them behind for good.

A trainer that validates often, say after every epoch, tells more than any probe: on all that the run will be judged by,
and at no cost to the search budget. While it does, its validations choose the weights that a rollback goes to, and
where the rate has come down they say, in the place of probes, whether the run got worse. What a rate that is still high
makes of the loss heals when the rate falls, so before that they undo nothing.

Where the trainer does not validate often, and a probe of the run's own is of nearly all that validation would be of,
such probes take the place of validations towards the end: as many looks as what searching has left over pays for.

=============  =================================================================  ===================
symbol         meaning                                                            unit
=============  =================================================================  ===================
``loss``       the monitored value as the trainer logs it, lower is better        as the user's
``progress``   share of the run that is done                                      1
``level``      share of its peak to which the rate has come down; 0 at the end    1
``scatter``    what neighbouring validations differ by, over the square root of   as ``loss``
               two: a validation's noise, if nothing else moved the loss
=============  =================================================================  ===================
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

_ROUNDING = 1e-9  # progress is a quotient


@dataclass(frozen=True)
class ValidationState:
    """What evolves; primitives only.

    Attributes:
        start: Progress at which the run came under our control.
        first: Progress at the first validation; infinite before it.
        last: Progress at the latest that counted.
        best: The lowest loss since they serve.
        best_step: Real updates there.
        best_level: Share of its peak at which the rate was there.
        recent: The latest losses, oldest first; after going back, those of the best weights and since.
        resigned: Whether going back has not helped, and nothing better has come since.
        look_due: Progress at which the next look is due; infinite where none is planned.
        look_every: Progress from one look to the next.
        looking: Whether looks have taken the place of validations, which do not count any more.
    """

    start: float = 0.0
    first: float = math.inf
    last: float = -math.inf
    best: float = math.inf
    best_step: int = 0
    best_level: float = 1.0
    recent: tuple[float, ...] = ()
    resigned: bool = False
    look_due: float = math.inf
    look_every: float = math.inf
    looking: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The state as a dictionary of primitives."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> ValidationState:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**saved, "recent": tuple(saved["recent"])})


@dataclass(frozen=True)
class Validations:
    """Configuration of the rule.

    Attributes:
        often: The first validation comes after so much progress at the latest, or probes go on to do the work; they
            take it up again where so much passes without one.
        apart: One that comes sooner than this after another does not count. Neighbours a few updates apart are alike,
            so that their scatter is no measure of noise, and the more looks the more often noise is taken for a loss.
        settled: The rate has come down where it is at this share of its peak, as for a late check of the stage machine.
        errors: A validation is worse than the best by more than so many times the standard error of a difference, made
            of the scatter. The best of many is low by chance, so noise alone sends most runs back that have stopped
            learning at a rate that is still felt; stricter rules see what is real too late, and lose on the whole.
        least: Nor does a run go back for less than this share of the best loss, whatever the scatter.
        kept: Losses of which the scatter is.
        fewest: Looks below this number are not begun with.
        span: So much of the run, its end, they are spread over where there are few; many go back further.
    """

    often: float = 0.125
    apart: float = 0.025
    settled: float = 0.5
    errors: float = 2.0
    least: float = 0.0025
    kept: int = 6
    fewest: int = 3
    span: float = 0.3

    def planned(self, state: ValidationState, count: int) -> ValidationState:
        """So many looks can be paid: when they come, one ``look_every`` before the run's end at the latest.

        >>> rule = Validations()
        >>> for count in (2, 6, 20, 100):
        ...     state = rule.planned(ValidationState(), count)
        ...     print(round(state.look_due, 3), round(state.look_every, 3))
        inf inf
        0.7 0.05
        0.5 0.025
        0.125 0.025
        """
        if count < self.fewest:
            return replace(state, look_due=math.inf, look_every=math.inf)
        every = max(self.apart, self.span / count)
        # By then it is known whether the trainer validates often.
        return replace(state, look_due=max(state.start + self.often, 1.0 - count * every), look_every=every)

    def is_due(self, state: ValidationState, progress: float) -> bool:
        """Whether a look is to be made now: not while validations serve that cost nothing."""
        if progress < state.look_due - _ROUNDING:
            return False
        return self.counts(state, progress) if state.looking else not self.current(state, progress)

    def begun(self, state: ValidationState, loss: float, step: int) -> ValidationState:
        """Looks take over, at the best probe so far; what validations have said before no longer counts."""
        return replace(
            state, looking=True, last=-math.inf, best=loss, best_step=step, best_level=1.0, recent=(), resigned=False
        )

    def looked(self, state: ValidationState, progress: float) -> ValidationState:
        """The look that was due has been made, or could not be paid."""
        due = state.look_due + state.look_every
        return replace(state, look_due=due if due > progress else progress + state.look_every)

    def counts(self, state: ValidationState, progress: float) -> bool:
        """Whether a validation that is made now is far enough from the one before."""
        return progress >= state.last + self.apart - _ROUNDING

    def seen(
        self, state: ValidationState, loss: float, step: int, progress: float, level: float = 1.0
    ) -> ValidationState:
        """A validation has been made of the weights after ``step`` updates, at such a share of the rate's peak.

        >>> rule, state = Validations(), ValidationState()
        >>> for number, loss in enumerate((3.0, 1.0, 2.0), start=1):
        ...     state = rule.seen(state, loss, 10 * number, 0.1 * number)
        >>> state.best, state.best_step
        (1.0, 20)
        """
        recent = (*state.recent, loss)[-self.kept :]
        state = replace(state, first=min(state.first, progress), last=progress, recent=recent)
        if not self.serve(state) or not loss < state.best:
            return state
        return replace(state, best=loss, best_step=step, best_level=level, resigned=False)

    def serve(self, state: ValidationState) -> bool:
        """Whether the first one came early enough, or looks are made."""
        return state.looking or state.first <= state.start + self.often + _ROUNDING

    def current(self, state: ValidationState, progress: float) -> bool:
        """Whether the run is judged by its validations now."""
        return state.looking or (self.serve(state) and progress <= state.last + self.often + _ROUNDING)

    def lost(self, state: ValidationState, level: float) -> bool:
        """Whether the latest validation says that the run is worse for good than it was.

        Args:
            state: After :meth:`seen`.
            level: See the module.
        """
        if not self.serve(state) or not state.recent or not math.isfinite(state.best):
            return False
        # A rate that is higher than it was at the best, as on a cycle's way up, will come down again.
        if level > min(self.settled, state.best_level) + _ROUNDING or (state.resigned and level > 0.0):
            return False
        loss = state.recent[-1]
        noise = self.errors * math.sqrt(2.0) * scatter(state.recent)
        return not math.isfinite(loss) or loss > state.best + max(noise, self.least * abs(state.best))

    def moved(self, state: ValidationState, scale: float, *, known: bool = True) -> ValidationState:
        """On a clock on which the same work is ``scale`` times as much progress.

        Args:
            state: On the clock before.
            scale: As it says.
            known: Whether the end is known; looks are made before an end alone.
        """
        scaled = {name: scale * getattr(state, name) for name in ("start", "first", "last", "look_due", "look_every")}
        state = replace(state, **scaled)
        if not known:
            return replace(state, look_due=math.inf, look_every=math.inf)
        return replace(state, look_every=max(state.look_every, self.apart))

    def went_back(self, state: ValidationState) -> ValidationState:
        """The weights are the best ones again, and a validation of them would say the same again."""
        return replace(state, recent=(state.best,))


def scatter(losses: tuple[float, ...]) -> float:
    """A validation's noise, from the differences between neighbours; 0 where there is none to take it from.

    >>> round(scatter((1.0, 1.2, 1.0)), 6), scatter((1.0,))
    (0.141421, 0.0)
    """
    steps = [after - before for before, after in pairwise(losses) if math.isfinite(after - before)]
    return math.sqrt(math.fsum(step * step for step in steps) / (2.0 * len(steps))) if steps else 0.0
