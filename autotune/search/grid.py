"""A search on a fixed grid: what the same number of trials is worth without Bayesian optimization.

Notation: as in :mod:`autotune.search.surrogate`.
"""

from __future__ import annotations

import math

from autotune.errors import ConfigurationError
from autotune.search.acquisition import Proposal
from autotune.search.space import LOCAL_FACTOR, LogSpace
from autotune.search.state import NOTHING, Outcome, Recommendation, SearchState, begin, progress_fraction, record


class GridSearch:
    """The same number of trials on a fixed grid of log learning rates; the best finished one is recommended.

    Args:
        space: Bounds.
        candidates: Grid points; with a current learning rate it is the first and the rest lie around it.
        drift: The recommendation is shifted by ``(h / H)^drift``, as :class:`LRSearch` expects beforehand.
        seed: Has no influence.

    Raises:
        ConfigurationError: There is no candidate.
    """

    def __init__(
        self, space: LogSpace | None = None, *, candidates: int = 7, drift: float = 0.1, seed: int = 0
    ) -> None:
        if candidates < 1:
            raise ConfigurationError(f"GridSearch: candidates must be at least 1; got {candidates!r}")
        self.space = space or LogSpace()
        self.candidates = candidates
        self.drift = drift
        self.seed = seed

    def init(
        self,
        initial_loss: float,
        horizon_steps: int,
        target_horizon_steps: int,
        current_log_lr: float | None = None,
        history: tuple[Outcome, ...] = (),
        loss_noise: float = 0.0,
    ) -> SearchState:
        """As :meth:`LRSearch.init`; the history is kept and not used."""
        return begin(initial_loss, horizon_steps, target_horizon_steps, current_log_lr, tuple(history), loss_noise)

    def ask(self, state: SearchState) -> Proposal | None:
        """The next grid point, from the smallest up; None when all were tried."""
        done = len(state.outcomes)
        if done >= self.candidates:
            return None
        if state.current_log_lr is None:
            return Proposal(_fractions(self.space, self.candidates)[done], "grid")
        if done == 0:
            return Proposal(self.space.clip(state.current_log_lr), "the current learning rate")
        return Proposal(_ladder(self.space, state.current_log_lr, self.candidates - 1)[done - 1], "grid")

    def tell(self, state: SearchState, outcome: Outcome) -> SearchState:
        """The state after a trial."""
        return record(state, outcome)

    def recommend(self, state: SearchState) -> Recommendation:
        """The best finished trial, shifted by the fixed drift."""
        return best_observed(state, self.space, self.drift)


def best_observed(state: SearchState, space: LogSpace, drift: float) -> Recommendation:
    """The finished trial with the lowest loss, shifted to the target horizon by a fixed drift."""
    best, fraction = state.best, progress_fraction(state)
    if best is None:
        return NOTHING
    log_lr = space.clip(best.log_lr - drift * math.log(state.target_horizon_steps / state.horizon_steps))
    reason = f"lowest loss of {len(state.outcomes)} trials"
    return Recommendation(best.log_lr, log_lr, 0.0, math.nan, fraction > 0, fraction, math.nan, math.nan, reason)


def _fractions(space: LogSpace, points: int) -> list[float]:
    """Middles of equal parts: the ends of an interval are rarely worth a trial."""
    return [space.log_low + space.width * (k + 0.5) / points for k in range(points)]


def _ladder(space: LogSpace, current: float, points: int) -> list[float]:
    """Even steps from ``current`` down to and up to the ends of its neighbourhood, which lies inside the space."""
    around, current = space.around(current, LOCAL_FACTOR), space.clip(current)
    below = round(points * (current - around.log_low) / around.width)
    down = [current + (around.log_low - current) * (k + 1) / below for k in range(below)]
    above = points - below
    return down + [current + (around.log_high - current) * (k + 1) / above for k in range(above)]
