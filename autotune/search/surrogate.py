"""What the trials say about every learning rate: a GP whose axis is aligned across horizons.

Notation (tensors are float64 on the CPU):
    y, L0     loss at a trial's end; loss before its first step             | units of the loss
    u         progress left: (y - best) / (L0 - best) within a group        | 0 best, 1 none; clipped to 1.2
    group     trials of equal horizon from the same start; 0 is the search at hand
    h, H      horizon of a trial; horizon that is asked about               | optimizer steps
    H_ref     horizon of the search at hand, at which z is log_lr           | optimizer steps
    s         drift: the best learning rate falls as h^-s                   | 1
    z         log_lr + s log(h / H_ref): the best z is the same at every horizon | nats
    S, n, m   nodes of the grid over s, observations, points asked about

Model: u = 1 + bowl(z) + offset(group) + noise, bowl ~ GP(0, signal^2 Matern-5/2), offset ~ N(0, offset_sd^2)
and 0 for group 0. Given hyperparameters, s is integrated over a grid with weights evidence x prior of s; the
answer is the mixture's mean and standard deviation.

Sources: the informative prior and the range of s are this project's measurements. AutoLRS (arXiv 2105.10762)
fits a GP to forecast losses by marginal likelihood, anew in each stage; six trials cannot teach a GP its
hyperparameters, so here they are fixed below ``learn_from`` observations and found by MAP under tight priors
above it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from autotune.errors import ConfigurationError
from autotune.search._model import AlignedGP, Hyperparameters, fit_map, quiet
from autotune.search.observation import Data, Noise, Observation, best_loss, grouped, made_progress, standardised

Rung = Literal["map", "restart", "last", "prior"]


@dataclass(frozen=True)
class SurrogatePrior:
    """What is believed before any trial; the defaults were measured over a dozen workloads.

    Attributes:
        centre: Hyperparameters below ``learn_from`` observations, and modes of their priors above.
        spread: Standard deviations of the priors of their logarithms.
        drift: Mean of s.
        drift_sd: Standard deviation of s; 0 fixes it.
        offset_sd: Standard deviation of a group's offset, in u.
        horizon_noise: Extra noise of a group, in u per nat by which its horizon lies farther from the one
            asked about than the nearest group's.
        stopped_noise: Extra noise of a stopped trial, in u.
        learn_from: Observations from which hyperparameters are learned.
        max_iterations: Of L-BFGS, on the rungs ``"map"`` and ``"restart"``.
    """

    centre: Hyperparameters = field(default_factory=Hyperparameters)
    spread: tuple[float, float, float] = (0.3, 0.3, 0.5)
    drift: float = 0.1
    drift_sd: float = 0.15
    offset_sd: float = 0.3
    horizon_noise: float = 0.05
    stopped_noise: float = 0.15
    learn_from: int = 8
    max_iterations: tuple[int, int] = (50, 200)


#: A learned value this many times off its prior's mode is a failed fit, not a discovery.
_CREDIBLE_FACTOR = 8.0
_DRIFT_NODES = 15
_DRIFT_REACH = 5.0  # standard deviations to each side
_AT_ONCE = 64
_RESTART = (0.6, 1.4, 2.0)


@dataclass(frozen=True)
class Posterior:
    """The mixture over the drift.

    Attributes:
        drift: Posterior mean of s.
        drift_sd: Its standard deviation.
    """

    drift: float
    drift_sd: float
    _model: AlignedGP
    _nodes: Tensor  # (S,)
    _weight: Tensor  # (S,), sums to 1
    _log_reference: float

    def _joint(self, log_lr: Tensor, horizon_steps: float) -> tuple[Tensor, Tensor]:
        shift = self._nodes[:, None] * (math.log(horizon_steps) - self._log_reference)
        z = log_lr.to(self._nodes)[None, :] + shift
        if self._model.train_targets.shape[0] == z.shape[0]:
            return self._model.joint(torch.stack([z, torch.zeros_like(z)], dim=-1))
        # One horizon was observed: every drift sees the same trials, and at that horizon asks the same question.
        rows = z if bool(shift.any()) else z[:1]
        flat = rows.reshape(1, -1)
        mean, covariance = self._model.joint(torch.stack([flat, torch.zeros_like(flat)], dim=-1))
        blocks = covariance.reshape(*rows.shape, *rows.shape).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return mean.reshape(rows.shape).expand_as(z), blocks.expand(z.shape[0], -1, -1)

    def predict(self, log_lr: Tensor, horizon_steps: float) -> tuple[Tensor, Tensor]:
        """Progress left, u, of learning rates at a horizon, without the noise of a trial.

        Args:
            log_lr: Shape (m,).
            horizon_steps: In steps; need not have been observed. It moves the bowl along the axis by the
                drift; the level stays that of the search at hand.

        Returns:
            Mean and standard deviation, each of shape (m,).
        """
        # In parts, because GPyTorch computes all covariances of the points it is asked about.
        parts = []
        for part in torch.split(log_lr, _AT_ONCE):
            mean, covariance = self._joint(part, horizon_steps)
            variance = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)
            parts.append(_moments(self._weight, mean, variance))
        means, deviations = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(deviations)

    def difference(self, log_lr: float, other: float, horizon_steps: float) -> tuple[float, float]:
        """u(log_lr) - u(other), which are correlated: mean and standard deviation."""
        mean, cov = self._joint(torch.tensor([log_lr, other], dtype=torch.float64), horizon_steps)
        variance = (cov[:, 0, 0] + cov[:, 1, 1] - 2.0 * cov[:, 0, 1]).clamp_min(0.0)
        centre, sd = _moments(self._weight, (mean[:, 0] - mean[:, 1])[:, None], variance[:, None])
        return float(centre), float(sd)


def _moments(weight: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd of a mixture over the first dimension."""
    centre = weight @ mean
    return centre, (weight @ (variance + (mean - centre).square())).clamp_min(0.0).sqrt()


@dataclass(frozen=True)
class Surrogate:
    """A fitted surrogate, or the word that there is nothing to fit.

    Attributes:
        progress: Whether a trial ended below the loss it started from.
        fit: Rung of the ladder the hyperparameters came from.
        reason: How the fit went, as a sentence.
        hyperparameters: In use, and the last good ones for the next fit.
        best_loss: Lowest loss of the search at hand, NaN without one.
        posterior: None without progress.
    """

    progress: bool
    fit: Rung
    reason: str
    hyperparameters: Hyperparameters
    best_loss: float
    posterior: Posterior | None


def fit_surrogate(
    observations: Sequence[Observation],
    *,
    initial_loss: float,
    horizon_steps: int,
    target_horizon_steps: int,
    prior: SurrogatePrior | None = None,
    last: Hyperparameters | None = None,
    loss_noise: float = 0.0,
) -> Surrogate:
    """Fits the surrogate to the trials of this search and of earlier ones.

    Args:
        observations: In any order.
        initial_loss: Loss before any step of this search's trials.
        horizon_steps: Of this search's trials.
        target_horizon_steps: The horizon that will be asked about; farther horizons count less.
        prior: What to believe beforehand.
        last: Hyperparameters of the last good fit.
        loss_noise: Standard deviation of a result of this search, in units of the loss, where it was measured
            (paired probe losses give one); it is added to the learned one.

    Raises:
        ConfigurationError: A horizon is not positive. Losses may be anything.
    """
    prior = prior or SurrogatePrior()
    if min(horizon_steps, target_horizon_steps, *(o.horizon_steps for o in observations), math.inf) <= 0:
        raise ConfigurationError("fit_surrogate: horizons are optimizer steps and must be above 0")
    centre = last or prior.centre
    groups, current = grouped(observations, initial_loss, horizon_steps), (horizon_steps, initial_loss)
    best = best_loss(groups.get(current, []))
    if current in groups and not made_progress(groups[current], initial_loss):
        return Surrogate(False, "prior", "no trial ended below its start", centre, best, None)
    noise = Noise(max(loss_noise, 0.0), prior.horizon_noise, prior.stopped_noise)
    data = standardised(groups, current, target_horizon_steps, noise)
    if data is None:
        return Surrogate(False, "prior", "no trial to learn from", centre, best, None)
    with quiet():
        values, fit, reason = _learn(data, prior, last)
        try:
            posterior = _integrate(data, prior, values, horizon_steps)
        # As in _learn: the answer to a broken posterior is a search without one.
        except Exception as failure:
            return Surrogate(True, fit, f"{reason}; the posterior failed: {failure}", values, best, None)
    return Surrogate(True, fit, reason, values, best, posterior)


def _model(data: Data, s: Tensor, prior: SurrogatePrior, start: Hyperparameters) -> AlignedGP:
    """The GP at drifts ``s`` of any shape, batched over them."""
    z = data.log_lr + s[..., None] * data.log_ratio
    x = torch.stack([z, data.group.expand_as(z)], dim=-1)
    return AlignedGP(
        x,
        data.u.expand_as(z),
        data.extra_sd.expand_as(z),
        start,
        prior.centre,
        prior.spread,
        prior.offset_sd,
    )


def _drift_nodes(data: Data, prior: SurrogatePrior) -> tuple[Tensor, Tensor]:
    """Nodes over s, shape (S,), and the logarithm of their prior weights."""
    if prior.drift_sd == 0:
        return torch.tensor([prior.drift], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    units = torch.linspace(-_DRIFT_REACH, _DRIFT_REACH, _DRIFT_NODES, dtype=torch.float64)
    return prior.drift + prior.drift_sd * units, -0.5 * units.square()


def _learn(data: Data, prior: SurrogatePrior, last: Hyperparameters | None) -> tuple[Hyperparameters, Rung, str]:
    """The ladder: L-BFGS, again from elsewhere, the last good values, the prior's."""
    n = data.u.numel()
    if n < prior.learn_from:
        return prior.centre, "prior", f"{n} observations, hyperparameters are learned from {prior.learn_from}"
    failures = []
    starts: tuple[tuple[Rung, Hyperparameters, int], ...] = (
        ("map", last or prior.centre, prior.max_iterations[0]),
        ("restart", prior.centre.scaled(_RESTART), prior.max_iterations[1]),
    )
    for rung, start, iterations in starts:
        try:
            s = _likeliest_drift(data, prior, start)
            found = fit_map(_model(data, s, prior, start), iterations)
        # BoTorch, GPyTorch, SciPy and LAPACK fail in many types; training must not die of any.
        except Exception as failure:
            failures.append(f"{rung}: {type(failure).__name__}")
            continue
        if _credible(found, prior.centre):
            return found, rung, "; ".join([*failures, f"{rung}: fitted to {n} observations"])
        failures.append(f"{rung}: not credible")
    if last is not None and _credible(last, prior.centre):
        return last, "last", "; ".join([*failures, "last good values kept"])
    return prior.centre, "prior", "; ".join([*failures, "prior values used"])


def _likeliest_drift(data: Data, prior: SurrogatePrior, values: Hyperparameters) -> Tensor:
    nodes, log_prior = _drift_nodes(data, prior)
    if not data.log_ratio.any():
        return nodes[nodes.numel() // 2]
    return nodes[(_model(data, nodes, prior, values).log_evidence() + log_prior).argmax()]


def _credible(values: Hyperparameters, centre: Hyperparameters) -> bool:
    return all(
        math.isfinite(v) and c / _CREDIBLE_FACTOR <= v <= c * _CREDIBLE_FACTOR
        for v, c in zip(values.values(), centre.values(), strict=True)
    )


def _integrate(data: Data, prior: SurrogatePrior, values: Hyperparameters, steps: int) -> Posterior:
    nodes, log_weight = _drift_nodes(data, prior)
    if data.log_ratio.any():
        log_weight = log_weight + _model(data, nodes, prior, values).log_evidence()
    weight = torch.softmax(log_weight, dim=0)
    # Nodes that carry nothing would only cost time.
    keep = weight > 1e-4
    nodes, weight = nodes[keep], weight[keep] / weight[keep].sum()
    if not bool(weight.isfinite().all()) or nodes.numel() == 0:
        raise ArithmeticError("the evidence is not finite")
    drift, drift_sd = _moments(weight, nodes[:, None], torch.zeros_like(nodes)[:, None])
    model = _model(data, nodes if data.log_ratio.any() else nodes[:1], prior, values)
    return Posterior(float(drift), float(drift_sd), model, nodes, weight, math.log(steps))
