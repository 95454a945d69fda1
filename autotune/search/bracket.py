"""A local search around the rate in force: a bracket of three, a parabola, and rules against being fooled.

Notation:
    c         log learning rate in force                                     | nats
    g         gap of the bracket, 0.375 decades                              | nats
    y_c, y    probe losses of the trial at c and of another; lower is better | units of the loss
    L0        probe loss before any of the trials

Three trials: c, then c + g, then c + 2g if that was better and c - g if not. Up comes first because a search from
the first weights errs towards low rates more often than towards high ones. Then

1. the best must beat c by the paired noise where it was measured, else c stays;
2. an interior best is moved to the parabola's vertex, at most half a gap; at an edge the vertex counts only as far as
   the edge: what lies beyond was not tried;
3. of trials that end within ``tie`` of the best one (a share of L0), the largest rate is taken: where losses hardly
   differ, the difference is noise that the final decay takes out anyway, and a plateau is left sooner;
4. when no trial took ``plateau`` (a share of L0) off the loss, the rate is not lowered.

Against a surrogate's local search this needs no prior of how sharp the bowl is; the figures are in
``examples/benchmark/FINDINGS.md``.
"""

from __future__ import annotations

import math

import numpy as np

from autotune.errors import ConfigurationError
from autotune.search.acquisition import Proposal
from autotune.search.space import LogSpace
from autotune.search.state import Outcome, Recommendation, SearchState, begin, progress_fraction, record


class BracketSearch:
    """Three trials around the current rate; see the module.

    Args:
        space: Bounds.
        gap: Between neighbours, in decades.
        tie: Share of the starting loss within which trials count as equal.
        plateau: Share of the starting loss that some trial must take off before the rate may be lowered.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    candidates = 3

    def __init__(
        self, space: LogSpace | None = None, *, gap: float = 0.375, tie: float = 0.0025, plateau: float = 0.03
    ) -> None:
        if not (gap > 0 and tie >= 0 and plateau >= 0):
            raise ConfigurationError(
                f"BracketSearch: gap above 0, tie and plateau at least 0; got {gap!r}, {tie!r}, {plateau!r}"
            )
        self.space = space or LogSpace()
        self.gap = gap * math.log(10.0)
        self.tie = tie
        self.plateau = plateau

    def init(
        self,
        initial_loss: float,
        horizon_steps: int,
        target_horizon_steps: int,
        current_log_lr: float | None = None,
        history: tuple[Outcome, ...] = (),
    ) -> SearchState:
        """As :meth:`autotune.search.LRSearch.init`; there has to be a current rate.

        Raises:
            ConfigurationError: There is none.
        """
        if current_log_lr is None:
            raise ConfigurationError(
                "BracketSearch searches around a current learning rate; use LRSearch for the first"
            )
        return begin(initial_loss, horizon_steps, target_horizon_steps, self.space.clip(current_log_lr), tuple(history))

    def ask(self, state: SearchState) -> Proposal | None:
        """The next trial; None after three, or where the space ends."""
        assert state.current_log_lr is not None
        tried = [outcome.log_lr for outcome in state.outcomes]
        if not tried:
            return Proposal(state.current_log_lr, "the current learning rate")
        if len(tried) >= self.candidates:
            return None
        up, down = state.current_log_lr + self.gap, state.current_log_lr - self.gap
        if len(tried) == 1:
            return self._inside(up, "one gap up") or self._inside(down, "one gap down")
        if tried[-1] < state.current_log_lr:
            return None
        if _loss(state.outcomes[1]) < _loss(state.outcomes[0]):
            return self._inside(up + self.gap, "up was better: further up") or self._inside(down, "one gap down")
        return self._inside(down, "up was no better: one gap down")

    def tell(self, state: SearchState, outcome: Outcome) -> SearchState:
        """The state after a trial."""
        return record(state, outcome)

    def recommend(self, state: SearchState) -> Recommendation:
        """What the bracket says, with the gain over the current rate in shares of the best trial's progress."""
        assert state.current_log_lr is not None
        current, fraction = state.outcomes[0], progress_fraction(state)
        finished = sorted((o for o in state.outcomes if o.status == "finished"), key=lambda o: o.log_lr)
        if not finished:
            return _recommendation(state.current_log_lr, fraction, 0.0, "no trial finished: the rate stays")
        best = min(finished, key=lambda o: o.loss)
        worth = max(state.initial_loss - best.loss, 1e-12)
        gain = (current.loss - best.loss) / worth if current.status == "finished" else 1.0
        tie = self.tie * abs(state.initial_loss)
        equal = max((o for o in finished if o.loss <= best.loss + tie), key=lambda o: o.log_lr)
        if equal.log_lr > best.log_lr and equal.log_lr >= current.log_lr:
            return _recommendation(equal.log_lr, fraction, gain, "as good as the best within the tie: the largest")
        if best is current and current.status == "finished" and len(finished) < 3:
            return _recommendation(current.log_lr, fraction, 0.0, "the current rate did best")
        log_lr = self._vertex([o for o in state.outcomes if math.isfinite(o.loss)], best)
        if fraction < self.plateau and log_lr < current.log_lr:
            said = f"the best trial took {fraction:.1%} off the loss, a plateau: the rate is not lowered"
            return _recommendation(current.log_lr, fraction, 0.0, said)
        said = f"best of the bracket at {math.exp(best.log_lr):.3g}, vertex of the parabola at {math.exp(log_lr):.3g}"
        return _recommendation(self.space.clip(log_lr), fraction, gain, said)

    def _vertex(self, trials: list[Outcome], best: Outcome) -> float:
        points = sorted(trials, key=lambda o: o.log_lr)
        if len(points) < 3:
            return best.log_lr
        x = np.array([o.log_lr for o in points])
        curvature, slope, _ = np.polyfit(x - x[1], [o.loss for o in points], 2)
        interior = best.log_lr == points[1].log_lr
        half = 0.5 * self.gap
        if not curvature > 0:
            return best.log_lr if interior else float(x[1] + math.copysign(half, best.log_lr - x[1]))
        vertex = float(x[1] - slope / (2.0 * curvature))
        low, high = (x[1] - half, x[1] + half) if interior else sorted((float(x[1]), best.log_lr))
        return min(max(vertex, float(low)), float(high))

    def _inside(self, log_lr: float, reason: str) -> Proposal | None:
        return Proposal(log_lr, reason) if self.space.contains(log_lr) else None


def _loss(outcome: Outcome) -> float:
    """A loss to compare by; a trial that did not finish is worse than any that did."""
    return outcome.loss if outcome.status == "finished" and math.isfinite(outcome.loss) else math.inf


def _recommendation(log_lr: float, fraction: float, gain: float, reason: str) -> Recommendation:
    return Recommendation(log_lr, log_lr, math.nan, math.nan, fraction > 0, fraction, gain, math.nan, reason)
