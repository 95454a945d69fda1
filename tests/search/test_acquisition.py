"""Proposals: the bound against its formula, distances, gaps."""

import torch

from autotune.search.acquisition import acquisition_values, largest_gap, propose
from autotune.search.observation import Observation
from autotune.search.surrogate import fit_surrogate

GRID = torch.linspace(-12.0, 0.0, 121, dtype=torch.float64)


def posterior(points=(-9.0, -6.0, -3.0)):
    obs = [Observation(x, 100, 2 + min((x + 5) ** 2 / 8, 2.9)) for x in points]
    return fit_surrogate(obs, initial_loss=5.0, horizon_steps=100, target_horizon_steps=100).posterior


def test_values_are_the_negated_lower_confidence_bound():
    p = posterior()
    mean, sd = p.predict(GRID, 100)
    for beta in (0.0, 1.0, 4.0):
        assert torch.allclose(acquisition_values(p, GRID, 100, beta), -(mean - beta**0.5 * sd), atol=1e-5)


def test_the_proposal_minimises_the_bound():
    p = posterior()
    mean, sd = p.predict(GRID, 100)
    assert propose(p, GRID, [], horizon_steps=100).log_lr == float(GRID[(mean - sd).argmin()])


def test_a_curious_proposal_goes_where_nothing_is_known():
    p = posterior((-6.0, -5.0))
    found = propose(p, GRID, [-6.0, -5.0], horizon_steps=100, beta=1e6)
    assert min(abs(found.log_lr + 6.0), abs(found.log_lr + 5.0)) > 3.0


def test_no_proposal_next_to_an_observed_point():
    p = posterior()
    observed = [-9.0, -6.0, -3.0]
    for _ in range(200):
        found = propose(p, GRID, observed, horizon_steps=100)
        if found is None:
            break
        assert min(abs(found.log_lr - x) for x in observed) >= 0.1
        observed.append(found.log_lr)
    assert found is None
    assert len(observed) > 50
    gaps = torch.tensor(sorted([-12.0, *observed, 0.0])).diff()
    assert float(gaps.max()) < 0.31  # it ended because nothing is left, not before


def test_without_a_posterior_the_largest_gap_is_filled():
    found = propose(None, GRID, [-11.0, -4.0], horizon_steps=100)
    assert found.log_lr == -7.5
    assert "gap" in found.reason
    assert largest_gap(GRID, []).log_lr == -6.0
    assert largest_gap(GRID, [-20.0, 5.0]).log_lr == -6.0


def test_a_posterior_that_answers_nan_is_not_used():
    class Broken:
        def predict(self, log_lr, horizon_steps):
            return torch.full_like(log_lr, torch.nan), torch.ones_like(log_lr)

    assert "gap" in propose(Broken(), GRID, [-11.0, -4.0], horizon_steps=100).reason


def test_a_crowded_interval_has_no_gap():
    narrow = torch.linspace(-6.0, -5.95, 11, dtype=torch.float64)
    assert largest_gap(narrow, [-6.0]) is None
    assert propose(None, narrow, [-5.98], horizon_steps=100) is None
