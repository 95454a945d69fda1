"""The search of AutoLRS as published, behind this package's interface, as a baseline.

Notation:
    k         candidates of a search, 10
    kappa     weight of the standard deviation in the lower confidence bound, 1e6: the mean is irrelevant
    x         position of a log learning rate in the space, in [0, 1]

Source: Jin et al., AutoLRS, ICLR 2021 (arXiv 2105.10762), section 4.1 and the released code: one random learning
rate, then a GP over log learning rate, built anew in each search and fitted by marginal likelihood, proposes the
minimiser of the lower confidence bound of the *forecast* losses; a NaN counts as 1e6; the best candidate is the one
with the lowest forecast; the current learning rate is not a candidate, and there is no drift. The released code
fits with scikit-optimize; here the GP is BoTorch's default one, and the bound is maximised over a grid.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from autotune.errors import ConfigurationError
from autotune.search._model import (
    ExactMarginalLogLikelihood,
    SingleTaskGP,
    UpperConfidenceBound,
    fit_gpytorch_mll,
    quiet,
)
from autotune.search.acquisition import Proposal, largest_gap
from autotune.search.grid import best_observed
from autotune.search.space import LogSpace
from autotune.search.state import Outcome, Recommendation, SearchState, begin, record

_GRID = 161
_NAN_LOSS = 1e6


class PublishedSearch:
    """AutoLRS's Bayesian optimization; ``Outcome.loss`` is to be the forecast at the stage's end.

    Args:
        space: Bounds.
        candidates: k of a search.
        kappa: Weight of the standard deviation.
        seed: Of the first, random learning rate of each search.

    Raises:
        ConfigurationError: There is no candidate.
    """

    def __init__(
        self, space: LogSpace | None = None, *, candidates: int = 10, kappa: float = 1e6, seed: int = 0
    ) -> None:
        if candidates < 1:
            raise ConfigurationError(f"PublishedSearch: candidates must be at least 1; got {candidates!r}")
        self.space = space or LogSpace()
        self.candidates = candidates
        self.kappa = kappa
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
        """As :meth:`LRSearch.init`; history and current learning rate are kept and play no part."""
        return begin(initial_loss, horizon_steps, target_horizon_steps, current_log_lr, tuple(history), loss_noise)

    def ask(self, state: SearchState) -> Proposal | None:
        """The next trial, or None after k."""
        if len(state.outcomes) >= self.candidates:
            return None
        if not state.outcomes:
            # A generator of its own: the global ones belong to the training. Each search draws anew.
            draw = random.Random(f"{self.seed}:{len(state.history)}").random()
            return Proposal(self.space.log_low + draw * self.space.width, "random")
        grid = self.space.grid(_GRID)
        observed = [o.log_lr for o in state.outcomes]
        values = self._bound(state, grid)
        if values is None:
            return largest_gap(grid, observed, min_gap=0.0)
        # The released code asks again when it is given a learning rate it has tried.
        tried = (grid[:, None] - torch.tensor(observed, dtype=grid.dtype)).abs().amin(dim=1) < 1e-9
        return Proposal(float(grid[int(values.masked_fill(tried, -torch.inf).argmax())]), "lower confidence bound")

    def tell(self, state: SearchState, outcome: Outcome) -> SearchState:
        """The state after a trial."""
        return record(state, outcome)

    def recommend(self, state: SearchState) -> Recommendation:
        """The finished trial with the lowest forecast."""
        return best_observed(state, self.space, drift=0.0)

    def _bound(self, state: SearchState, grid: Tensor) -> Tensor | None:
        """The negated lower confidence bound over the grid, or None when the fit fails."""
        x = torch.tensor([[o.log_lr] for o in state.outcomes], dtype=torch.float64)
        losses = [o.loss if math.isfinite(o.loss) else _NAN_LOSS for o in state.outcomes]
        # BoTorch's fit draws new starting points from the global generator when the first one fails.
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(self.seed)
            try:
                model = SingleTaskGP(self._unit(x), torch.tensor(losses, dtype=torch.float64)[:, None])
                fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
                with torch.no_grad():
                    bound = UpperConfidenceBound(model, beta=self.kappa**2, maximize=False).to(x)
                    values: Tensor = bound(self._unit(grid[:, None, None]))
            # As published a failure ends the run; here it ends in the fallback.
            except Exception:
                return None
        return values if bool(values.isfinite().all()) else None

    def _unit(self, log_lr: Tensor) -> Tensor:
        return (log_lr - self.space.log_low) / self.space.width
