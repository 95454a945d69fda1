"""A search around a rate that is about right: a bracket walked downhill first, then the surrogate.

Notation: as in :mod:`autotune.search.surrogate`; c is the log learning rate to start from, g the bracket's gap, w the
rate that is usual for the optimizer's family, f the share of the starting loss that the best trial took off.

The trials are at c and one gap towards w (down, where no w is known); then one further in that direction if that was
better or about equal, and at the other side of c if not; any more where the surrogate's lower confidence bound is
lowest, within a gap of the best. "About equal" is within ``level`` of the progress the better of the two has made, and
within a tenth of it while w is further away than one and a half gaps: on a level stretch trials differ by as much.

The answer minimises, over the bracket, the surrogate's mean plus ``pull * (1 + (0.05 / f)^2) * d^2``, where d is the
distance from w in decades. The unit of the mean is the progress of the best trial, so at the default a decade weighs
as much as a trial that is worse by a twentieth: where trials tell rates apart, they decide; on a level stretch, where
they do not, what is usual does; and where f is below 0.05 w itself is within reach, whatever the bracket. Almost half
of the excess loss over the best rate came from such stretches, and a w half a decade off serves nearly as well
(``examples/benchmark/FINDINGS.md``).

Level stretches have two sides. A rate that is too high for a transformer takes its loss to the level of the bytes'
frequencies and leaves it there, so that all rates above the edge end equal; in a valley with a level floor short trials
end equal far below the best rate. The walk towards w crosses the edge of the first and climbs out of the second. The
drift between horizons, which the surrogate learns too, is not used: it did not pay.
"""

from __future__ import annotations

import math
from dataclasses import replace

from autotune.errors import ConfigurationError
from autotune.search.acquisition import Proposal, propose
from autotune.search.optimizer import LRSearch
from autotune.search.space import LogSpace
from autotune.search.state import NOTHING, Outcome, Recommendation, SearchState, progress_fraction
from autotune.search.surrogate import Posterior, Surrogate, SurrogatePrior

_GRID = 81
_MARGIN = 0.01  # decades by which an answer may lie outside the bracket: a range of one trial is one
_DOUBT = 0.1  # share of the progress within which trials are about equal far from what is usual
_HARM = 0.1  # above the starting loss, as a share of it, at which a trial has done clear harm
_LITTLE = 0.05  # progress, as a share of the starting loss, at which what is usual weighs twice as much


class BracketSearch(LRSearch):
    """:class:`~autotune.search.LRSearch` around a centre; see the module.

    Args:
        centre: Learning rate to start from where there is none in use; the one in use otherwise.
        space: Bounds.
        candidates: Trials.
        gap: Between neighbours, in decades.
        level: Share of the progress within which two trials count as equal, so that the walk goes on down.
        usual: Learning rate that is usual for the optimizer's family; None where none is known.
        pull: Weight of the squared distance from it, a decade away, in units of the best trial's progress.
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
        usual: float | None = None,
        pull: float = 0.05,
        beta: float = 0.5,
        prior: SurrogatePrior | None = None,
    ) -> None:
        super().__init__(space, candidates=candidates, beta=beta, min_progress=0.0, prior=prior)
        if not (gap > 0 and pull >= 0 and 0 < centre < math.inf and (usual is None or 0 < usual < math.inf)):
            raise ConfigurationError(
                "BracketSearch: centre, usual and gap above 0, pull at least 0; "
                f"got {centre!r}, {usual!r}, {gap!r}, {pull!r}"
            )
        self.centre = self.space.clip(math.log(centre))
        self.gap = gap * math.log(10.0)
        self.level = level
        self.usual = None if usual is None else math.log(usual)
        self.pull = pull

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
        up = self.usual is not None and self.usual > start
        gap, ahead, behind = (self.gap, "up", "down") if up else (-self.gap, "down", "up")
        back = (start - gap, f"half a decade {behind}")
        if len(tried) == 1:
            return [(start + gap, f"half a decade {ahead}"), back]
        if len(tried) != 2:
            return []
        first, second = _loss(tried[0]), _loss(tried[1])
        far = self.usual is not None and abs(self.usual - start) > 1.5 * self.gap
        equal = max(self.level, _DOUBT) if far else self.level
        level = equal * max(state.initial_loss - min(first, second), 0.0)
        if (tried[1].log_lr - start) * gap > 0 and second < first + level:
            return [(start + 2.0 * gap, f"{ahead} was no worse: further {ahead}"), back]
        return [back]

    def _without_progress(self, state: SearchState, fitted: Surrogate, fraction: float) -> Recommendation:
        finished = any(outcome.status == "finished" for outcome in state.outcomes)
        if self.usual is None or state.current_log_lr is not None or not finished:
            return super()._without_progress(state, fitted, fraction)
        log_lr = self.space.clip(min(self.usual, self._ceiling(state)))
        reason = f"no trial ended below the starting loss: {math.exp(log_lr):.3g}, by what is usual for the optimizer"
        return replace(NOTHING, log_lr_trial_optimum=log_lr, log_lr=log_lr, progress_fraction=fraction, reason=reason)

    def _reach(self, state: SearchState) -> LogSpace:
        finished = [outcome.log_lr for outcome in state.outcomes if outcome.status == "finished"]
        if not finished:
            return super()._reach(state)
        margin = _MARGIN * math.log(10.0)
        if self.usual is not None and progress_fraction(state) < _LITTLE:
            finished = [*finished, min(self.usual, self._ceiling(state))]
        low, high = max(min(finished) - margin, self.space.log_low), min(max(finished) + margin, self.space.log_high)
        return LogSpace(math.exp(low), math.exp(high)) if low < high else self.space

    def _ceiling(self, state: SearchState) -> float:
        """A gap below the lowest log learning rate that exploded or did clear harm: as far as what is usual may go."""
        limit = state.initial_loss + _HARM * abs(state.initial_loss)
        harmful = [o for o in state.outcomes if o.status == "diverged" or not o.loss <= limit]
        exploded = [o for o in state.history if o.status == "diverged"]
        return min((o.log_lr for o in (*harmful, *exploded)), default=math.inf) - self.gap

    def _answer(self, posterior: Posterior, state: SearchState, optimum: float) -> tuple[float, str]:
        if self.usual is None:
            return optimum, "the answer"
        grid = self._reach(state).grid(_GRID)
        mean, _ = posterior.predict(grid, state.horizon_steps)
        unsure = 1.0 + (_LITTLE / max(progress_fraction(state), 1e-4)) ** 2
        decades = (grid - self.usual) / math.log(10.0)
        answer = float(grid[int((mean + self.pull * unsure * decades.square()).argmin())])
        return answer, f"{math.exp(answer):.3g} with the weight of what is usual, {math.exp(self.usual):.3g}"


def _loss(outcome: Outcome) -> float:
    """A loss to compare by; a trial that did not finish is worse than any that did."""
    return outcome.loss if outcome.status == "finished" and math.isfinite(outcome.loss) else math.inf
