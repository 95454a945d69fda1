"""Which learning rate to try next.

Notation:
    beta      weight of the uncertainty: the lower confidence bound is mean - sqrt(beta) sd     | 1
    gap       smallest distance to a trial of the same horizon that a proposal keeps            | nats
    m         points of the grid

The bound is BoTorch's ``UpperConfidenceBound`` with ``maximize=False``; its value is the *negated* lower confidence
bound, so larger is better. Ties go to the smallest learning rate.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autotune.search._model import GPyTorchPosterior, Model, MultivariateNormal, UpperConfidenceBound, quiet
from autotune.search.surrogate import Posterior

#: Closer than this two trials of one horizon tell the same thing: a tenth of a length scale.
MIN_GAP = 0.1


@dataclass(frozen=True)
class Proposal:
    """The next trial.

    Attributes:
        log_lr: Natural logarithm of its learning rate.
        reason: How it was chosen, as a sentence.
    """

    log_lr: float
    reason: str


class MixtureModel(Model):  # type: ignore[misc]
    """A :class:`Posterior` at one horizon as a BoTorch model, for its analytic acquisition functions.

    Args:
        posterior: The mixture; its marginals are matched by a normal distribution.
        horizon_steps: Horizon that is asked about.
    """

    def __init__(self, posterior: Posterior, horizon_steps: int) -> None:
        super().__init__()
        self._mixture = posterior
        self._horizon_steps = horizon_steps

    @property
    def num_outputs(self) -> int:
        """One: u."""
        return 1

    @property
    def batch_shape(self) -> torch.Size:
        """Empty: one model, not a batch."""
        return torch.Size()

    def posterior(self, X: Tensor, *_: Any, **__: Any) -> GPyTorchPosterior:
        """Marginals of u at log learning rates ``X``, shape (..., 1, 1)."""
        mean, sd = self._mixture.predict(X.reshape(-1), self._horizon_steps)
        shape = X.shape[:-1]
        covariance = torch.diag_embed(sd.square().clamp_min(1e-12).reshape(shape))
        return GPyTorchPosterior(MultivariateNormal(mean.reshape(shape), covariance))


def acquisition_values(posterior: Posterior, grid: Tensor, horizon_steps: int, beta: float) -> Tensor:
    """The negated lower confidence bound of u over ``grid``, shape (m,); larger is better."""
    with torch.no_grad(), quiet():
        bound = UpperConfidenceBound(MixtureModel(posterior, horizon_steps), beta=beta, maximize=False)
        bound.to(grid)
        values: Tensor = bound(grid[:, None, None])
    return values


def propose(
    posterior: Posterior | None,
    grid: Tensor,
    observed: Sequence[float],
    *,
    horizon_steps: int,
    beta: float = 1.0,
    min_gap: float = MIN_GAP,
) -> Proposal | None:
    """The best grid point that is not next to an observed one.

    Args:
        posterior: None, or one that answers with numbers that are not finite, gives the largest gap.
        grid: Log learning rates, ascending, shape (m,).
        observed: Log learning rates tried at this horizon.
        horizon_steps: Of the trial to propose.
        beta: Weight of the uncertainty, at least 0.
        min_gap: In nats.

    Returns:
        None where every grid point lies within ``min_gap`` of an observed one.
    """
    free = _distance(grid, observed) >= min_gap
    if not bool(free.any()):
        return None
    if posterior is not None:
        values = acquisition_values(posterior, grid, horizon_steps, beta)
        if bool(values.isfinite().all()):
            best = int(values.masked_fill(~free, -torch.inf).argmax())
            return Proposal(float(grid[best]), f"lower confidence bound {-float(values[best]):.3f} of u")
    return largest_gap(grid, observed, min_gap=min_gap)


def largest_gap(grid: Tensor, observed: Sequence[float], *, min_gap: float = MIN_GAP) -> Proposal | None:
    """The middle of the widest stretch without a trial; the ends of the grid count as trials once one exists.

    Args:
        grid: Log learning rates, ascending, shape (m,).
        observed: Log learning rates tried.
        min_gap: In nats.
    """
    low, high = float(grid[0]), float(grid[-1])
    inside = sorted({x for x in observed if low <= x <= high})
    edges = [low, *inside, high]
    start, end = max(itertools.pairwise(edges), key=lambda pair: pair[1] - pair[0])
    middle = grid[(grid - 0.5 * (start + end)).abs().argmin()]
    if float(_distance(middle[None], observed)) < min_gap:
        return None
    return Proposal(float(middle), f"middle of the largest gap, {end - start:.2f} nats wide")


def _distance(grid: Tensor, observed: Sequence[float]) -> Tensor:
    """From each grid point to the nearest observed one, shape (m,)."""
    if not observed:
        return torch.full_like(grid, torch.inf)
    return (grid[:, None] - torch.tensor(list(observed), dtype=grid.dtype)).abs().amin(dim=1)
