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
they do not, what is usual does. Where f is below 0.05 w itself is within reach, whatever the bracket; where no trial
ended below the starting loss, as at a saddle or in a model that was trained before, w is the answer. Neither goes above
a gap below the lowest rate that did clear harm: that exploded, or raised the loss by a tenth while no higher one was
harmless. Almost half of the excess loss over the best rate came from such stretches, and a w half a decade off serves
nearly as well (``examples/benchmark/FINDINGS.md``).

What is best for a whole run is half a decade (one standard deviation) off what its trials say, however sharply these
tell rates apart, and about as far from w. So the answer then goes ``shrink`` of the way back to w, as the mean of two
such witnesses does (over 34 workloads the slope of that regression is .55), but .4 decades at most: where trials say
that a problem is unlike others, it is. On the way up it stops at that gap below clear harm. Bounds that leave w out say
that the problem is unlike others too: then it stays where it is.

No trial is made at or above a rate that exploded before.

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
_SHRUNK = 0.4  # decades by which an answer goes back to what is usual, at most


class BracketSearch(LRSearch):
    """:class:`~autotune.search.LRSearch` around a centre; see the module.

    Args:
        centre: Learning rate to start from where there is none in use; the one in use otherwise.
        space: Bounds.
        candidates: Trials.
        gap: Between neighbours, in decades.
        level: Share of the progress within which two trials count as equal, so that the walk goes on down.
        usual: Learning rate that is usual for the optimizer's family, as the peak of a trial; None where none is known.
        pull: Weight of the squared distance from it, a decade away, in units of the best trial's progress.
        shrink: Share of what is left of that distance by which the answer then goes back to it, in [0, 1].
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
        shrink: float = 0.5,
        beta: float = 0.5,
        prior: SurrogatePrior | None = None,
    ) -> None:
        super().__init__(space, candidates=candidates, beta=beta, min_progress=0.0, prior=prior)
        rates = 0 < centre < math.inf and (usual is None or 0 < usual < math.inf)
        if not (rates and gap > 0 and pull >= 0 and 0 <= shrink <= 1):
            raise ConfigurationError(
                "BracketSearch: centre, usual and gap above 0, pull at least 0, shrink in [0, 1]; "
                f"got {centre!r}, {usual!r}, {gap!r}, {pull!r}, {shrink!r}"
            )
        self.centre = self.space.clip(math.log(centre))
        self.gap = gap * math.log(10.0)
        self.level = level
        self.usual = None if usual is None else math.log(usual)
        self.pull = pull
        self.shrink = shrink

    def ask(self, state: SearchState) -> Proposal | None:
        """The next trial, or None when all candidates were tried or the space holds no new one."""
        tried = state.outcomes
        if len(tried) >= self.candidates:
            return None
        exploded = _lowest_exploded(state)
        start, why = self._start(state, exploded)
        if not tried:
            return Proposal(start, why)
        for point, reason in self._walk(start, state):
            new = all(abs(point - outcome.log_lr) > 0.1 for outcome in tried)
            if point < exploded and self.space.contains(point) and new:
                return Proposal(point, reason)
        grid = self.space.around(min(tried, key=_loss).log_lr, math.exp(self.gap)).grid(_GRID)
        grid = grid[grid < exploded]
        if not grid.numel():
            return None
        return propose(
            self.surrogate(state).posterior,
            grid,
            [outcome.log_lr for outcome in tried],
            horizon_steps=state.horizon_steps,
            beta=self.beta,
        )

    def _start(self, state: SearchState, exploded: float) -> tuple[float, str]:
        if state.outcomes:
            return state.outcomes[0].log_lr, ""
        if state.current_log_lr is not None:
            return self.space.clip(state.current_log_lr), "the rate in use"
        if self.centre >= exploded:
            return self.space.clip(exploded - self.gap), "half a decade below a shorter trial that exploded"
        usual = self.usual is not None and self.centre == self.space.clip(self.usual)
        return self.centre, "what is usual for the optimizer" if usual else "where the shorter trials point"

    def _walk(self, start: float, state: SearchState) -> list[tuple[float, str]]:
        """The bracket's next points, the wanted one first; none once it has three."""
        tried = state.outcomes
        up = self.usual is not None and self.usual > start
        gap, ahead, behind = (self.gap, "up", "down") if up else (-self.gap, "down", "up")
        back = (start - gap, f"half a decade {behind}")
        if all(outcome.status == "diverged" for outcome in tried):
            return [(min(o.log_lr for o in tried) - len(tried) * self.gap, "all that was tried exploded: further down")]
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
        as_usual = "" if log_lr == self.usual else ", as near as harm and bounds allow"
        reason = (
            f"no trial ended below the starting loss: {math.exp(log_lr):.3g}, what is usual for the optimizer{as_usual}"
        )
        return replace(NOTHING, log_lr_trial_optimum=log_lr, log_lr=log_lr, progress_fraction=fraction, reason=reason)

    def _reach(self, state: SearchState) -> LogSpace:
        finished = [outcome for outcome in state.outcomes if outcome.status == "finished"]
        if not finished:
            return super()._reach(state)
        margin = _MARGIN * math.log(10.0)
        places = [outcome.log_lr for outcome in finished]
        if self.usual is not None and progress_fraction(state) < _LITTLE:
            best = min(finished, key=_loss).log_lr
            top = max(best, self._ceiling(state))
            places = [place for place in places if place <= top] + [min(self.usual, top)]
        low, high = max(min(places) - margin, self.space.log_low), min(max(places) + margin, self.space.log_high)
        return LogSpace(math.exp(low), math.exp(high)) if low < high else self.space

    def _ceiling(self, state: SearchState) -> float:
        """A gap below the lowest log learning rate that did clear harm: as far up as what is usual may go."""
        trials = _trials(state)
        harmless = [o.log_lr for o in trials if o.status == "finished" and not _harmful(o, state)]
        most = max(harmless, default=-math.inf)
        harmful = [o.log_lr for o in trials if _harmful(o, state) and (o.status == "diverged" or o.log_lr > most)]
        return min(harmful, default=math.inf) - self.gap

    def _answer(self, posterior: Posterior, state: SearchState, optimum: float) -> tuple[float, str]:
        if self.usual is None:
            return optimum, "the answer"
        grid = self._reach(state).grid(_GRID)
        mean, _ = posterior.predict(grid, state.horizon_steps)
        unsure = 1.0 + (_LITTLE / max(progress_fraction(state), 1e-4)) ** 2
        decades = (grid - self.usual) / math.log(10.0)
        said = float(grid[int((mean + self.pull * unsure * decades.square()).argmin())])
        usual = f"what is usual, {math.exp(self.usual):.3g}"
        reason = f"{math.exp(said):.3g} with the weight of {usual}"
        if not self.space.contains(self.usual):
            return said, reason
        way = self.shrink * (self.usual - said)
        way = math.copysign(min(abs(way), _SHRUNK * math.log(10.0)), way)
        answer = min(said + way, max(said, self._ceiling(state)))
        return answer, f"{reason}, {math.exp(answer):.3g} on the way back to it"


def _loss(outcome: Outcome) -> float:
    """A loss to compare by; a trial that did not finish is worse than any that did."""
    return outcome.loss if outcome.status == "finished" and math.isfinite(outcome.loss) else math.inf


def _trials(state: SearchState) -> tuple[Outcome, ...]:
    """This search's, and before training those of the shorter leg: weights that were trained since bear other rates."""
    return state.outcomes if state.current_log_lr is not None else (*state.history, *state.outcomes)


def _lowest_exploded(state: SearchState) -> float:
    return min((o.log_lr for o in _trials(state) if o.status == "diverged"), default=math.inf)


def _harmful(outcome: Outcome, state: SearchState) -> bool:
    """Whether a trial exploded, or raised the loss by more than :data:`_HARM` of what it was."""
    before = state.initial_loss if outcome.initial_loss is None else outcome.initial_loss
    return outcome.status == "diverged" or outcome.loss > before + _HARM * abs(before)
