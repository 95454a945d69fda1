"""A search around a rate that is about right: a bracket walked downhill first, then the surrogate.

Notation: as in :mod:`autotune.search.surrogate`; c is the log learning rate to start from, g the bracket's gap.

The trials are at c and c - g; then at c - 2g if that was better or about equal and at c + g if not; any more where the
surrogate's lower confidence bound is lowest, within a gap of the best. "About equal" is within ``level`` of the
progress the better of the two has made.

The answer is the surrogate's minimum near the best trial; where a higher rate's trial ended within ``tie`` of the best,
the middle between the two. Of rates that do equally well in a short trial, the higher ones are better over a long run
for networks with a level valley (perceptrons, BatchNorm, fine-tuning) and worse for those on a level stretch above an
edge (transformers), and nothing in the trials tells which. The drift between horizons, which the surrogate learns too,
is not used: it did not pay (``examples/benchmark/FINDINGS.md``).

Down comes first because of what lies above: a rate that is too high for a transformer takes its loss to the level of
the bytes' frequencies and leaves it there, so that all rates above the edge end equal. A surrogate that starts on such
a level stretch finds nothing to go by and stays; a measured step across the edge costs one trial.
"""

from __future__ import annotations

import math

from autotune.errors import ConfigurationError
from autotune.search.acquisition import Proposal, propose
from autotune.search.optimizer import LRSearch
from autotune.search.space import LogSpace
from autotune.search.state import Outcome, SearchState
from autotune.search.surrogate import Posterior, SurrogatePrior

_GRID = 81


class BracketSearch(LRSearch):
    """:class:`~autotune.search.LRSearch` around a centre; see the module.

    Args:
        centre: Learning rate to start from where there is none in use; the one in use otherwise.
        space: Bounds.
        candidates: Trials.
        gap: Between neighbours, in decades.
        level: Share of the progress within which two trials count as equal, so that the walk goes on down.
        near: The surrogate's minimum is looked for this close to the best trial, in decades.
        tie: Share of the best trial's progress that a trial at a higher rate may be worse by and still count as equal.
        beta: Weight of the uncertainty in the bound.
        prior: Of the surrogate.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self,
        centre: float,
        space: LogSpace | None = None,
        *,
        candidates: int = 3,
        gap: float = 0.5,
        level: float = 0.03,
        near: float = 0.25,
        tie: float = 0.03,
        beta: float = 0.5,
        prior: SurrogatePrior | None = None,
    ) -> None:
        super().__init__(space, candidates=candidates, beta=beta, min_progress=0.0, prior=prior)
        if not (gap > 0 and near >= 0 and tie >= 0 and 0 < centre < math.inf):
            raise ConfigurationError(
                "BracketSearch: centre and gap above 0, near and tie at least 0; "
                f"got {centre!r}, {gap!r}, {near!r}, {tie!r}"
            )
        self.centre = self.space.clip(math.log(centre))
        self.gap = gap * math.log(10.0)
        self.level = level
        self.near = near * math.log(10.0)
        self.tie = tie

    def ask(self, state: SearchState) -> Proposal | None:
        """The next trial, or None when all candidates were tried or the space holds no new one."""
        tried = state.outcomes
        if len(tried) >= self.candidates:
            return None
        start = self.centre if state.current_log_lr is None else self.space.clip(state.current_log_lr)
        if not tried:
            return Proposal(
                start, "where the shorter trials point" if state.current_log_lr is None else "the rate in use"
            )
        for point, reason in self._walk(start, state):
            if self.space.contains(point) and all(abs(point - outcome.log_lr) > 0.1 for outcome in tried):
                return Proposal(point, reason)
        best = min(tried, key=_loss)
        return propose(
            self.surrogate(state).posterior,
            self.space.around(best.log_lr, math.exp(self.gap)).grid(_GRID),
            [outcome.log_lr for outcome in tried],
            horizon_steps=state.horizon_steps,
            beta=self.beta,
        )

    def _walk(self, start: float, state: SearchState) -> list[tuple[float, str]]:
        """The bracket's next points, the wanted one first; none once it has three."""
        tried = state.outcomes
        down, up = (start - self.gap, "half a decade down"), (start + self.gap, "half a decade up")
        if len(tried) == 1:
            return [down, up]
        if len(tried) != 2:
            return []
        first, second = _loss(tried[0]), _loss(tried[1])
        level = self.level * max(state.initial_loss - min(first, second), 0.0)
        if tried[1].log_lr < start and second < first + level:
            return [(start - 2.0 * self.gap, "down was no worse: further down"), up]
        return [up]

    def _reach(self, state: SearchState) -> LogSpace:
        finished = [outcome for outcome in state.outcomes if outcome.status == "finished"]
        if not finished or not self.near:
            return super()._reach(state)
        return self.space.around(min(finished, key=_loss).log_lr, math.exp(self.near))

    def _answer(self, posterior: Posterior, state: SearchState, optimum: float) -> tuple[float, str]:
        finished = [outcome for outcome in state.outcomes if outcome.status == "finished"]
        if not finished:
            return optimum, "the answer"
        best = min(outcome.loss for outcome in finished)
        level = best + self.tie * max(state.initial_loss - best, 0.0)
        highest = max(outcome.log_lr for outcome in finished if outcome.loss <= level)
        if highest <= optimum:
            return optimum, "the answer"
        middle = 0.5 * (optimum + highest)
        return (
            middle,
            f"half-way to {math.exp(highest):.3g}, which did as well within {self.tie:.0%} of a trial's progress",
        )


def _loss(outcome: Outcome) -> float:
    """A loss to compare by; a trial that did not finish is worse than any that did."""
    return outcome.loss if outcome.status == "finished" and math.isfinite(outcome.loss) else math.inf
