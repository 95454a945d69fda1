"""Every rung of the fallback ladder, reached by failures that are real."""

import random

import pytest
import torch

from autotune.search._model import AlignedGP, Hyperparameters
from autotune.search.observation import Observation
from autotune.search.surrogate import SurrogatePrior, fit_surrogate


def observed(n, seed=0, wiggle=0.05):
    rng = random.Random(seed)
    points = [rng.uniform(-9, -1) for _ in range(n)]
    return [Observation(x, 100, 2 + min((x + 5) ** 2 / 4, 3) + wiggle * rng.gauss(0, 1)) for x in points]


def fit(obs, **more):
    return fit_surrogate(obs, initial_loss=5.0, horizon_steps=100, target_horizon_steps=100, **more)


def test_below_eight_observations_the_prior_stands():
    result = fit(observed(7))
    assert result.fit == "prior"
    assert result.hyperparameters == Hyperparameters()


def test_from_eight_observations_they_are_learned():
    result = fit(observed(8))
    assert result.fit == "map"
    assert result.hyperparameters != Hyperparameters()


def test_noise_is_learned():
    loud, quiet = (fit(observed(25, wiggle=w)).hyperparameters.noise for w in (0.5, 0.0))
    assert loud > 2 * quiet


def test_map_stays_near_its_prior():
    """Twelve points on a line far from any bowl must not teach the surrogate an absurd length scale."""
    flat = [Observation(-9.0 + 0.7 * i, 100, 4.0 - 0.01 * i) for i in range(12)]
    result = fit(flat)
    assert result.fit == "map"
    for learned, centre in zip(result.hyperparameters.values(), Hyperparameters().values(), strict=True):
        assert centre / 4 < learned < 4 * centre


def test_an_optimizer_that_runs_out_of_iterations_is_restarted():
    result = fit(observed(12), prior=SurrogatePrior(max_iterations=(1, 200)))
    assert result.fit == "restart"
    assert result.reason.startswith("map: ")
    reference = fit(observed(12))
    assert result.hyperparameters.values() == pytest.approx(reference.hyperparameters.values(), rel=0.02)


def test_after_two_failures_the_last_good_values_stand():
    last = Hyperparameters(1.1, 0.4, 0.05)
    result = fit(observed(12), prior=SurrogatePrior(max_iterations=(1, 1)), last=last)
    assert (result.fit, result.hyperparameters) == ("last", last)
    assert result.posterior is not None


def test_without_them_the_prior_stands():
    result = fit(observed(12), prior=SurrogatePrior(max_iterations=(1, 1)))
    assert (result.fit, result.hyperparameters) == ("prior", Hyperparameters())
    assert result.posterior is not None


def test_incredible_values_are_no_fit():
    """Without a prior to speak of, equal results teach a length scale and a signal without bounds."""
    same = [Observation(-9.0 + 0.7 * i, 100, 4.0) for i in range(12)]
    result = fit(same, prior=SurrogatePrior(spread=(60.0, 60.0, 60.0)))
    assert result.fit == "prior"
    assert "not credible" in result.reason
    assert result.posterior is not None


def test_last_values_that_are_nonsense_are_not_kept():
    for bad in (Hyperparameters(1e9, 0.5, 0.03), Hyperparameters(float("nan"), 0.5, 0.03)):
        result = fit(observed(12), prior=SurrogatePrior(max_iterations=(1, 1)), last=bad)
        assert (result.fit, result.hyperparameters) == ("prior", Hyperparameters())


def test_a_start_that_cannot_be_fitted_from_is_restarted():
    """A length scale of 1e200 has no gradient: the optimizer stays there, and elsewhere it does not."""
    result = fit(observed(12), last=Hyperparameters(1e200, 0.5, 0.03))
    assert result.fit == "restart"


@pytest.mark.parametrize("centre", [Hyperparameters(), Hyperparameters(0.7, 0.9, 0.1)])
def test_the_priors_have_their_modes_at_the_fixed_values(centre):
    def log_prior(values):
        x = torch.tensor([[-5.0, 0.0], [-4.0, 0.0]], dtype=torch.float64)
        one = torch.ones(2, dtype=torch.float64)
        model = AlignedGP(x, one, 0 * one, values, centre, (0.3, 0.3, 0.5), 0.3)
        return sum(float(prior.log_prob(read(module))) for _, module, prior, read, _ in model.named_priors())

    top = log_prior(centre)
    for factors in ((1.05, 1, 1), (0.95, 1, 1), (1, 1.05, 1), (1, 0.95, 1), (1, 1, 1.05), (1, 1, 0.95)):
        assert log_prior(centre.scaled(factors)) < top
