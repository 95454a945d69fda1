"""Searches for a learning rate by trials: ask for one, tell what became of it, and read the recommendation.

Notation: as in :mod:`autotune.search.surrogate`.

:class:`LRSearch` is this project's: informative prior, horizon-aware surrogate, current learning rate first.
The same trials on a fixed grid, for the ablation, are in :mod:`autotune.search.grid`, AutoLRS's own search in
:mod:`autotune.search.published`. All three keep configuration in the object and what evolves in a
:class:`~autotune.search.state.SearchState`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from autotune.errors import ConfigurationError
from autotune.search._model import Hyperparameters
from autotune.search.acquisition import MIN_GAP, Proposal, acquisition_values, propose
from autotune.search.space import LOCAL_FACTOR, LogSpace
from autotune.search.state import (
    NOTHING,
    Outcome,
    PosteriorRow,
    Recommendation,
    SearchState,
    begin,
    progress_fraction,
    record,
)
from autotune.search.surrogate import Posterior, Surrogate, SurrogatePrior, fit_surrogate

#: Where good learning rates lie before anything is known: around 1e-3, one and a half decades to each side.
_TYPICAL_LR = 1e-3
_TYPICAL_REACH = 1.5 * math.log(10.0)
_INNER = 0.35  # of the interval's width: an initial design stays this close to its middle
_GRID = 161
_TABLE = 41


class LRSearch:
    """Bayesian optimization over log learning rate with a lower confidence bound.

    Args:
        space: Bounds.
        candidates: Trials of one search, the current learning rate's included.
        beta: Weight of the uncertainty in the bound.
        initial_points: Learning rates of the first search's initial design; None for three around 1e-3. Where
            one diverges, larger ones are left out.
        min_progress: Share of the starting loss that the best trial must have taken off to be believed, in a
            search without a current learning rate.
        prior: Of the surrogate.
        seed: Has no influence: nothing here is drawn at random. Kept so that all searches are built alike.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self,
        space: LogSpace | None = None,
        *,
        candidates: int = 7,
        beta: float = 1.0,
        initial_points: Sequence[float] | None = None,
        min_progress: float = 0.02,
        prior: SurrogatePrior | None = None,
        seed: int = 0,
    ) -> None:
        if candidates < 1:
            raise ConfigurationError(f"LRSearch: candidates must be at least 1; got {candidates!r}")
        if not (math.isfinite(beta) and beta >= 0):
            raise ConfigurationError(f"LRSearch: beta must be finite and at least 0; got {beta!r}")
        self.space = space or LogSpace()
        self.candidates = candidates
        self.beta = beta
        self.min_progress = min_progress
        self.prior = prior or SurrogatePrior()
        self.seed = seed
        self._design = _initial_design(self.space, initial_points)

    def init(
        self,
        initial_loss: float,
        horizon_steps: int,
        target_horizon_steps: int,
        current_log_lr: float | None = None,
        history: tuple[Outcome, ...] = (),
        loss_noise: float = 0.0,
    ) -> SearchState:
        """A search with no trial yet.

        Args:
            initial_loss: Loss before any step.
            horizon_steps: Of each trial.
            target_horizon_steps: Of the training that follows.
            current_log_lr: The learning rate in use, which becomes the first candidate; None without one.
            history: Trials of earlier searches; ``SearchState.earlier`` gives them.
            loss_noise: Standard deviation of a trial's result, in units of the loss, if it was measured.
        """
        return begin(initial_loss, horizon_steps, target_horizon_steps, current_log_lr, tuple(history), loss_noise)

    def ask(self, state: SearchState) -> Proposal | None:
        """The next trial, or None when all candidates were tried or the space holds no new one."""
        if len(state.outcomes) >= self.candidates:
            return None
        if state.current_log_lr is not None:
            if not state.outcomes:
                return Proposal(self.space.clip(state.current_log_lr), "the current learning rate")
        else:
            point = self._next_of_design(state)
            if point is not None:
                return Proposal(point, "initial design")
        return propose(
            self.surrogate(state).posterior,
            self._reach(state).grid(_GRID),
            _observed(state),
            horizon_steps=state.horizon_steps,
            beta=self.beta,
        )

    def tell(self, state: SearchState, outcome: Outcome) -> SearchState:
        """The state after a trial; its hyperparameters are those of a fit to all trials so far."""
        state = record(state, outcome)
        if len(state.history) + len(state.outcomes) < self.prior.learn_from:
            return state
        fitted = self.surrogate(state)
        if fitted.fit in ("map", "restart"):
            return replace(state, hyperparameters=fitted.hyperparameters.values(), fit=fitted.fit)
        return replace(state, fit=fitted.fit)

    def recommend(self, state: SearchState) -> Recommendation:
        """What the trials say; without progress the largest learning rate that did no harm, or the current one.

        A search that knows what is usual (:mod:`~autotune.search.bracket`) answers with that instead.
        """
        fraction = progress_fraction(state)
        fitted = self.surrogate(state)
        # Late in a run a local search can gain little; its gap and sd say whether that little is worth anything.
        enough = fraction > 0 if state.current_log_lr is not None else fraction >= self.min_progress
        if fitted.posterior is None or not enough:
            return self._without_progress(state, fitted, fraction)
        posterior, reach = fitted.posterior, self._reach(state)
        optimum = _lowest(posterior, reach, state.horizon_steps)
        answer, shift = self._answer(posterior, state, optimum)
        log_lr = self.space.clip(answer)
        mean, sd = posterior.predict(torch.tensor([log_lr], dtype=torch.float64), state.target_horizon_steps)
        gap, trial_gap = (math.nan, math.nan), (math.nan, math.nan)
        if state.current_log_lr is not None:
            gap = posterior.difference(state.current_log_lr, log_lr, state.target_horizon_steps)
            trial_gap = posterior.difference(state.current_log_lr, optimum, state.horizon_steps)
        reason = (
            f"lowest posterior mean at {math.exp(optimum):.3g} after {state.horizon_steps} steps, {shift} "
            f"({fitted.reason})"
        )
        table = self._table(posterior, state, reach.grid(_TABLE))
        return Recommendation(optimum, log_lr, float(mean), float(sd), True, fraction, *gap, reason, table, *trial_gap)

    def surrogate(self, state: SearchState) -> Surrogate:
        """The surrogate fitted to all trials of this search and of earlier ones."""
        last = None if state.hyperparameters is None else Hyperparameters(*state.hyperparameters)
        return fit_surrogate(
            [o.observation for o in (*state.history, *state.outcomes)],
            initial_loss=state.initial_loss,
            horizon_steps=state.horizon_steps,
            target_horizon_steps=state.target_horizon_steps,
            prior=self.prior,
            last=last,
            loss_noise=state.loss_noise,
        )

    def _answer(self, posterior: Posterior, state: SearchState, optimum: float) -> tuple[float, str]:
        """From the optimum of the trials' horizon to the log learning rate to train with, and why."""
        # Downwards only: an answer that is shifted up crosses the edge of stability, where losses grow tenfold.
        drift = max(posterior.drift, 0.0)
        log_lr = optimum - drift * math.log(state.target_horizon_steps / state.horizon_steps)
        return log_lr, f"shifted by drift {drift:.2f} to {state.target_horizon_steps} steps"

    def _reach(self, state: SearchState) -> LogSpace:
        if state.current_log_lr is None:
            return self.space
        return self.space.around(state.current_log_lr, LOCAL_FACTOR)

    def _next_of_design(self, state: SearchState) -> float | None:
        """The first point of the initial design that is neither tried nor above a diverged one."""
        ceiling = min((o.log_lr for o in state.outcomes if o.status == "diverged"), default=math.inf)
        tried = _observed(state)
        for point in self._design:
            if point < ceiling and all(abs(point - x) >= MIN_GAP for x in tried):
                return point
        return None

    def _without_progress(self, state: SearchState, fitted: Surrogate, fraction: float) -> Recommendation:
        harmless = [o for o in state.outcomes if o.status == "finished" and o.loss <= state.initial_loss]
        said = f"the best trial took {100 * fraction:.1f} % off the loss, too little to rank by ({fitted.reason})"
        if state.current_log_lr is not None:
            log_lr, why = self.space.clip(state.current_log_lr), f"{said}: the current learning rate stays"
        elif harmless:
            log_lr, why = max(o.log_lr for o in harmless), f"{said}: the largest that did no harm"
        else:
            return replace(NOTHING, reason=said)
        return replace(NOTHING, log_lr_trial_optimum=log_lr, log_lr=log_lr, progress_fraction=fraction, reason=why)

    def _table(self, posterior: Posterior, state: SearchState, grid: Tensor) -> tuple[PosteriorRow, ...]:
        mean, sd = posterior.predict(grid, state.horizon_steps)
        value = acquisition_values(posterior, grid, state.horizon_steps, self.beta)
        rows = zip(grid.exp().tolist(), mean.tolist(), sd.tolist(), value.tolist(), strict=True)
        return tuple(PosteriorRow(*row) for row in rows)


def _lowest(posterior: Posterior, reach: LogSpace, horizon_steps: int) -> float:
    """Log learning rate with the lowest posterior mean: on the grid, then between its points."""
    grid = reach.grid(_GRID)
    mean, _ = posterior.predict(grid, horizon_steps)
    best, step = float(grid[int(mean.argmin())]), float(grid[1] - grid[0])
    near = best + step * torch.linspace(-1.0, 1.0, 21, dtype=torch.float64)
    near = near.clamp(reach.log_low, reach.log_high)
    mean, _ = posterior.predict(near, horizon_steps)
    return float(near[int(mean.argmin())])


def _initial_design(space: LogSpace, points: Sequence[float] | None) -> tuple[float, ...]:
    """Log learning rates of the first trials: the middle, above, below."""
    if points is not None:
        if not all(math.isfinite(p) and space.low <= p <= space.high for p in points):
            raise ConfigurationError(
                f"LRSearch: initial_points are learning rates inside {space.low:g} … {space.high:g}; got {points!r}"
            )
        return tuple(math.log(p) for p in points)
    middle, inner = 0.5 * (space.log_low + space.log_high), _INNER * space.width
    reach = min(_TYPICAL_REACH, inner)
    centre = min(max(math.log(_TYPICAL_LR), middle - inner + reach), middle + inner - reach)
    return (centre, centre + reach, centre - reach)


def _observed(state: SearchState) -> list[float]:
    """Log learning rates already tried at this horizon in this search."""
    return [o.log_lr for o in state.outcomes if o.horizon_steps == state.horizon_steps]
