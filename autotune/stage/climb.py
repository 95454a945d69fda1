"""The rate while its peak is held: higher while the training loss gets better, lower while it gets worse.

A search's trials are short, and the best rate of a short run is another one than that of a long run, by half a decade
either way and with nothing in the trials to tell which (``examples/benchmark/FINDINGS.md``). The run itself tells: so
it begins below what the trials say, and from then on windows of the training loss, which cost nothing, move the rate.
Below what the trials say it rises unless the loss gets worse, above it only while the loss gets better; worse is what
the noise of both windows does not explain. This is the greedy rule of feedback schedulers, begun where a search points
instead of at a default, kept between a decade and a half below what the search says and half a decade above, and ended
when the decay begins, which no feedback disturbs. Most of what it gains over a rate that is held a slow rise without
feedback gains too; the feedback pays where the search points far too low. With answers that go half of the way back to
what is usual (:mod:`autotune.search.bracket`) it gains nothing in the mean over workloads: what is gained where an
answer is too low is lost elsewhere.

Where the loss has not come down from the run's first losses by more than the noise explains in a fifth of the run, the
trials have told little and there is nothing to lose: on such a plateau one window that is not worse than those first
losses is enough for a step up, as far as the highest rate that did a trial no harm, and to a decade above what the
search says at most. (The best of many windows on level ground is a lucky one: against it most others look worse.)

=============  =============================================================  ===================
symbol         meaning                                                        unit
=============  =============================================================  ===================
``progress``   share of the run that is done                                  1
``loss``       mean training loss of the window that is over                  as the user's
``error``      standard error of that mean, from the spread in the window     as ``loss``
``gain``       the rate over what the search says                             1
=============  =============================================================  ===================
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class ClimbState:
    """What evolves; primitives only.

    Attributes:
        due: Progress at which the present window is over.
        best: Lowest mean loss of a window so far.
        best_error: Its standard error.
        first: Mean of the run's first losses; infinite before they are read.
        first_error: Its standard error.
        reach: On a plateau the rate rises while the gain is below this, up to which it has done no trial harm; the last
            step may end above it.
        better: Windows in a row that spoke for a higher rate.
        worse: Windows in a row that spoke for a lower one.
        gain: See the module.
        capped: Whether the rate may no longer rise: it went too far once, and was taken back.
    """

    due: float = 0.0
    best: float = math.inf
    best_error: float = 0.0
    first: float = math.inf
    first_error: float = 0.0
    reach: float = 1.0
    better: int = 0
    worse: int = 0
    gain: float = 1.0
    capped: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The state as a dictionary of primitives."""
        return asdict(self)


@dataclass(frozen=True)
class Climb:
    """Configuration of the rule.

    Attributes:
        begin: Progress at which the first window begins: the warm-up is over.
        end: Progress at which the rule rests: the decay begins.
        window: A window's length, in progress.
        factor: Of one step up; a step down is its inverse.
        patience: Windows in a row that it takes for a step, less one.
        doubt: A window is worse than the best (on a plateau, than the run's first losses) by more than so many standard
            errors of their difference, or it is not.
        start: The gain with which a run begins.
        lowest: The gain stays above this.
        highest: The gain stays below this, but on a plateau.
        sure: A window that is better than the run's first losses by so many standard errors of the difference ends a
            plateau.
        moved: So does one that is better by this share of them, however noisy both are.
        lasting: A plateau counts from this progress on: many runs leave theirs by themselves.
        plateau: The most that :attr:`ClimbState.reach` counts for.
    """

    begin: float = 0.02
    end: float = 0.5
    window: float = 1.0 / 40.0
    factor: float = 1.0 / 0.7
    patience: int = 1
    doubt: float = 1.5
    start: float = 10**-0.5
    lowest: float = 10**-1.5
    highest: float = 10**0.5
    sure: float = 3.0
    moved: float = 0.25
    lasting: float = 0.2
    plateau: float = 10.0

    def first_due(self, progress: float) -> float:
        """When a window is over that begins now, or with :attr:`begin`."""
        return max(progress, self.begin) + self.window

    def start_at(self, progress: float) -> float:
        """The gain with which a run begins; where it begins late, one that it can come back from."""
        if progress <= self.begin:
            return self.start
        moves = max(int((self.end - progress) / self.window), 0) // (self.patience + 1)
        return max(self.start, self.factor**-moves)

    def init(self, gain: float, progress: float = 0.0, reach: float = 1.0) -> ClimbState:
        """Nothing is known of the loss yet."""
        return ClimbState(due=self.first_due(progress), gain=gain, reach=reach)

    def begun(self, state: ClimbState, loss: float, error: float) -> ClimbState:
        """The run's first losses are read, and stand for a first window; not finite, they tell of no plateau."""
        if not (math.isfinite(loss) and math.isfinite(error)):
            return replace(state, first=-math.inf)
        return replace(state, first=loss, first_error=error, best=loss, best_error=error)

    def is_due(self, state: ClimbState, progress: float) -> bool:
        """Whether a window is over, before the decay has begun."""
        return state.due <= progress < self.end

    def on_plateau(self, state: ClimbState, progress: float) -> bool:
        """Whether no window is better than the run's first losses, as far as their noise lets one say, for long now."""
        if progress < self.lasting or not math.isfinite(state.first):
            return False
        margin = min(self.sure * math.hypot(state.first_error, state.best_error), self.moved * abs(state.first))
        return state.best >= state.first - margin

    def step(
        self, state: ClimbState, loss: float, error: float, progress: float, *, rise: bool = True
    ) -> tuple[ClimbState, float]:
        """A window is over.

        Args:
            state: Before it.
            loss: Mean over it; the window is worse where it is NaN.
            error: Its standard error; taken for 0 where it is not finite.
            progress: Now.
            rise: Whether the rate may rise now.

        Returns:
            The state after it, and the factor by which the rate changes (1 where it stays).

        >>> climb = Climb(begin=0.0, window=0.1, factor=2.0)
        >>> state = climb.init(climb.start)
        >>> for loss in (3.0, 2.0, 2.1, 2.1, 2.4, 2.4):
        ...     state, factor = climb.step(state, loss, 0.1, state.due)
        ...     print(factor)
        1.0
        2.0
        1.0
        2.0
        1.0
        0.5
        """
        error = error if math.isfinite(error) else 0.0
        improved = loss < state.best
        worse = not loss <= state.best + self.doubt * math.hypot(error, state.best_error)
        due = max(state.due, progress - 0.5 * self.window) + self.window
        if improved:
            state = replace(state, best=loss, best_error=error)
        stuck = self.on_plateau(state, progress)
        if stuck:
            worse = not loss <= state.first + self.doubt * math.hypot(error, state.first_error)
        top = max(1.0, min(self.plateau, state.reach)) if stuck else 1.0
        better = improved or (not worse and state.gain < top - 1e-9)
        state = replace(state, due=due, better=state.better + 1 if better else 0, worse=state.worse + 1 if worse else 0)
        if state.better <= (0 if stuck else self.patience) and state.worse <= self.patience:
            return state, 1.0
        wanted = self.factor if better else 1.0 / self.factor
        if wanted > 1.0 and (state.capped or not rise):
            wanted = 1.0
        # A gain outside, where others have taken the rate, is not brought back.
        low, high = min(self.lowest, state.gain), max(self.highest, top, state.gain)
        gain = min(max(state.gain * wanted, low), high)
        return replace(state, better=0, worse=0, gain=gain), gain / state.gain
