"""The GPyTorch model behind :mod:`autotune.search.surrogate`; its notation table holds here too.

Inputs of the model have two columns: z, the aligned log learning rate, and the index of the group (0 for the
search at hand, whose offset is zero by definition).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    # linear_operator compiles helpers with torch.jit.script, which newer versions of torch deprecate.
    warnings.simplefilter("ignore")
    import gpytorch
    from botorch.acquisition.analytic import UpperConfidenceBound
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.gpytorch import GPyTorchModel
    from botorch.models.model import Model
    from botorch.optim.core import OptimizationStatus
    from botorch.optim.fit import fit_gpytorch_mll_scipy
    from botorch.posteriors.gpytorch import GPyTorchPosterior
    from gpytorch.constraints import GreaterThan
    from gpytorch.distributions import MultivariateNormal
    from gpytorch.kernels import Kernel, MaternKernel, ScaleKernel
    from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
    from gpytorch.means import ConstantMean
    from gpytorch.mlls import ExactMarginalLogLikelihood
    from gpytorch.models import ExactGP
    from gpytorch.priors import LogNormalPrior

__all__ = [
    "AlignedGP",
    "ExactMarginalLogLikelihood",
    "GPyTorchPosterior",
    "Hyperparameters",
    "Model",
    "MultivariateNormal",
    "SingleTaskGP",
    "UpperConfidenceBound",
    "fit_gpytorch_mll",
    "fit_map",
    "quiet",
]

#: Smallest variance that GPyTorch takes as fixed noise without a warning; far below any noise here.
_FIXED_NOISE_FLOOR = 1e-6
_NOISE_VARIANCE_FLOOR = 1e-5


@dataclass(frozen=True)
class Hyperparameters:
    """What may be learned.

    Attributes:
        length_scale: Of the Matern-5/2 kernel, in nats of log learning rate.
        signal: Prior standard deviation of the bowl, in u.
        noise: Standard deviation of a trial's result, in u.
    """

    length_scale: float = 1.3
    signal: float = 0.5
    noise: float = 0.03

    def values(self) -> tuple[float, float, float]:
        """The three numbers, in the order of the attributes."""
        return self.length_scale, self.signal, self.noise

    def scaled(self, factors: tuple[float, float, float]) -> Hyperparameters:
        """Each number times its factor."""
        return Hyperparameters(*(v * f for v, f in zip(self.values(), factors, strict=True)))


class _OffsetKernel(Kernel):  # type: ignore[misc]
    """Covariance of the groups' offsets: ``variance`` within a group, none between, none for group 0."""

    is_stationary = False

    def __init__(self, variance: float) -> None:
        super().__init__(active_dims=(1,))
        self.variance = variance

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_: object) -> Tensor:
        if diag:
            return self.variance * ((x1 == x2) & (x1 != 0)).squeeze(-1).to(x1.dtype)
        return self.variance * ((x1 == x2.transpose(-1, -2)) & (x1 != 0)).to(x1.dtype)


class AlignedGP(ExactGP, GPyTorchModel):  # type: ignore[misc]
    """u = 1 + bowl(z) + offset(group) + noise.

    Args:
        x: Columns z and group, shape (..., n, 2).
        u: Progress, shape (..., n).
        extra_sd: Noise known beforehand, shape (..., n), in u.
        start: Values to begin with, or to keep.
        centre: Modes of the log-normal priors.
        spread: Standard deviations of their logarithms.
        offset_sd: Of a group's offset, in u.
    """

    _num_outputs = 1

    def __init__(
        self,
        x: Tensor,
        u: Tensor,
        extra_sd: Tensor,
        start: Hyperparameters,
        centre: Hyperparameters,
        spread: tuple[float, float, float],
        offset_sd: float,
    ) -> None:
        length, signal, noise = (
            # The mode of a log-normal is exp(mu - sd^2). A variance has twice the log-spread of its root.
            LogNormalPrior(power * math.log(value) + (power * sd) ** 2, power * sd)
            for value, sd, power in zip(centre.values(), spread, (1, 2, 2), strict=True)
        )
        likelihood = FixedNoiseGaussianLikelihood(
            extra_sd.square().clamp_min(_FIXED_NOISE_FLOOR),
            learn_additional_noise=True,
            noise_prior=noise,
            noise_constraint=GreaterThan(_NOISE_VARIANCE_FLOOR),
        )
        super().__init__(x, u, likelihood)
        self.mean_module = ConstantMean()
        self.mean_module.initialize(constant=1.0)
        self.mean_module.constant.requires_grad_(False)
        self.bowl = ScaleKernel(
            MaternKernel(nu=2.5, active_dims=(0,), lengthscale_prior=length), outputscale_prior=signal
        )
        self.covar_module = self.bowl + _OffsetKernel(offset_sd**2)
        self.to(x)
        self.bowl.base_kernel.lengthscale = start.length_scale
        self.bowl.outputscale = start.signal**2
        likelihood.second_noise = max(start.noise**2 - _FIXED_NOISE_FLOOR, 2 * _NOISE_VARIANCE_FLOOR)

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior at ``x``."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The present values."""
        noise = float(self.likelihood.second_noise) + _FIXED_NOISE_FLOOR
        return Hyperparameters(
            float(self.bowl.base_kernel.lengthscale),
            math.sqrt(float(self.bowl.outputscale)),
            math.sqrt(noise),
        )

    def log_evidence(self) -> Tensor:
        """Logarithm of p(u | x), shape (...,), without the priors of the hyperparameters."""
        self.train()
        with torch.no_grad():
            value: Tensor = self.likelihood(self(*self.train_inputs)).log_prob(self.train_targets)
        return value

    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (..., m) and covariance (..., m, m) of the bowl at ``x``, shape (..., m, 2)."""
        self.eval()
        # debug(False): asking at a point that was observed is not a mistake here.
        with torch.no_grad(), gpytorch.settings.debug(False):
            distribution = self(x)
            return distribution.mean, distribution.covariance_matrix


def fit_map(model: AlignedGP, max_iterations: int) -> Hyperparameters:
    """Maximises the posterior of the hyperparameters by L-BFGS from their present values.

    Raises:
        Exception: Whatever BoTorch, GPyTorch or LAPACK raise; the caller climbs down its ladder.
    """
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    with quiet():
        # One attempt: BoTorch's own restarts draw from the global generator.
        fit_gpytorch_mll(
            likelihood,
            optimizer=_converged,
            max_attempts=1,
            optimizer_kwargs={"options": {"maxiter": max_iterations}},
        )
    return model.hyperparameters


def _converged(*args: Any, **kwargs: Any) -> Any:
    """BoTorch's L-BFGS, which passes a run that ran out of iterations as a fit; here it is a failure."""
    result = fit_gpytorch_mll_scipy(*args, **kwargs)
    if result.status is not OptimizationStatus.SUCCESS:
        raise ArithmeticError(result.message)
    return result


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings of the numerical libraries are answered by the fallback ladder, not shown to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
