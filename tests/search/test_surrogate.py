"""The surrogate against a slow twin, its laws, and its refusals."""

import math
import random

import numpy as np
import pytest
import torch

from autotune.errors import ConfigurationError
from autotune.search.observation import Observation
from autotune.search.surrogate import SurrogatePrior, fit_surrogate

GRID = torch.linspace(-12.0, 2.0, 57, dtype=torch.float64)


def matern(a, b, length):
    r = math.sqrt(5) * np.abs(a[:, None] - b[None, :]) / length
    return (1 + r + r**2 / 3) * np.exp(-r)


def twin(obs, start, horizon, target, at, at_horizon, prior):
    """The mixture written out with dense NumPy algebra; one group of starts, all trials finished."""
    x = np.array([o.log_lr for o in obs])
    h = np.array([o.horizon_steps for o in obs], dtype=float)
    y = np.array([o.loss for o in obs])
    u = np.empty_like(y)
    for value in np.unique(h):
        of = h == value
        u[of] = np.minimum((y[of] - y[of].min()) / (start - y[of].min()), 1.2)
    far = np.abs(np.log(h / target))
    extra = np.maximum((prior.horizon_noise * (far - far.min())) ** 2, 1e-6)
    length, signal, noise = prior.centre.values()
    offset = prior.offset_sd**2 * ((h[:, None] == h[None, :]) & (h[:, None] != horizon))
    logs, means, variances = [], [], []
    for k in np.linspace(-5, 5, 15):
        s = prior.drift + prior.drift_sd * k
        z = x + s * np.log(h / horizon)
        q = at + s * math.log(at_horizon / horizon)
        cov = signal**2 * matern(z, z, length) + offset + np.diag(extra + noise**2 - 1e-6)
        inverse = np.linalg.inv(cov)
        logs.append(-0.5 * (u - 1) @ inverse @ (u - 1) - 0.5 * np.linalg.slogdet(cov)[1] - 0.5 * k**2)
        cross = signal**2 * matern(q, z, length)
        means.append(1 + cross @ inverse @ (u - 1))
        variances.append(signal**2 - np.einsum("ij,jk,ik->i", cross, inverse, cross))
    weight = np.exp(np.array(logs) - max(logs))
    weight /= weight.sum()
    mean = weight @ np.array(means)
    return mean, np.sqrt(weight @ (np.array(variances) + (np.array(means) - mean) ** 2))


def bowl(log_lr, horizon, drift=0.0, scale=1.0, shift=0.0):
    left = 1 - math.exp(-0.5 * ((log_lr + 5.0 + drift * math.log(horizon / 100)) / 1.8) ** 2)
    return shift + scale * (2.0 + 3.0 * left)


def trials(points, drift=0.0, scale=1.0, shift=0.0, move=0.0):
    return [Observation(x + move, h, bowl(x, h, drift, scale, shift)) for x, h in points]


POINTS = [(-9.0, 50), (-5.5, 50), (-2.0, 50), (-7.0, 100), (-4.0, 100), (-5.0, 100)]


def fit(obs, start=5.0, horizon=100, target=400, **more):
    return fit_surrogate(obs, initial_loss=start, horizon_steps=horizon, target_horizon_steps=target, **more)


@pytest.mark.parametrize("at_horizon", [50, 100, 400])
def test_agrees_with_the_slow_twin(at_horizon):
    obs, prior = trials(POINTS, drift=0.3), SurrogatePrior()
    mean, sd = fit(obs).posterior.predict(GRID, at_horizon)
    slow_mean, slow_sd = twin(obs, 5.0, 100, 400, GRID.numpy(), at_horizon, prior)
    # Nodes of the drift that weigh less than 1e-4 are left out.
    assert mean.numpy() == pytest.approx(slow_mean, abs=2e-3)
    assert sd.numpy() == pytest.approx(slow_sd, abs=2e-3)


def test_one_horizon_without_offsets_is_a_plain_gp():
    obs = trials([(x, 100) for x in (-9.0, -6.0, -3.0)])
    posterior = fit(obs).posterior
    mean, sd = posterior.predict(GRID, 100)
    slow_mean, slow_sd = twin(obs, 5.0, 100, 100, GRID.numpy(), 100, SurrogatePrior())
    assert mean.numpy() == pytest.approx(slow_mean, abs=1e-6)
    assert sd.numpy() == pytest.approx(slow_sd, abs=1e-6)


def test_far_from_all_trials_nothing_is_promised():
    posterior = fit(trials([(-9.0, 100), (-6.0, 100)])).posterior
    mean, sd = posterior.predict(torch.tensor([30.0]), 100)
    assert (float(mean), float(sd)) == pytest.approx((1.0, 0.5), abs=1e-6)


@pytest.mark.parametrize(("scale", "shift"), [(1e-30, 0.0), (1e30, 0.0), (1.0, -50.0), (3.0, 1e3)])
def test_scale_and_shift_of_the_loss_do_not_matter(scale, shift):
    one = fit(trials(POINTS, 0.2)).posterior.predict(GRID, 400)
    other = fit(trials(POINTS, 0.2, scale, shift), start=5.0 * scale + shift).posterior.predict(GRID, 400)
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_moving_all_learning_rates_moves_the_posterior():
    one = fit(trials(POINTS, 0.2)).posterior.predict(GRID, 400)
    other = fit(trials(POINTS, 0.2, move=3.0)).posterior.predict(GRID + 3.0, 400)
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_order_does_not_matter():
    obs = trials(POINTS, 0.2)
    one, other = fit(obs).posterior.predict(GRID, 400), fit(obs[::-1]).posterior.predict(GRID, 400)
    assert torch.allclose(one[0], other[0], atol=1e-9)


@pytest.mark.parametrize("drift", [-0.3, 0.1, 0.4])
def test_drift_is_learned_from_several_horizons(drift):
    rng = random.Random(1)
    points = [(rng.uniform(-9, -1), h) for h in (25, 100, 400) for _ in range(6)]
    posterior = fit(trials(points, drift), horizon=400, target=4000).posterior
    # The prior pulls towards 0.1.
    assert posterior.drift == pytest.approx(drift, abs=0.12)
    assert abs(posterior.drift - drift) < 3 * posterior.drift_sd < 0.3
    mean, _ = posterior.predict(GRID, 400)
    assert float(GRID[mean.argmin()]) == pytest.approx(-5.0 - drift * math.log(4), abs=0.5)


def test_with_one_horizon_the_drift_stays_at_its_prior():
    posterior = fit(trials([(x, 100) for x in (-8.0, -6.0, -4.0)]), target=4000).posterior
    assert (posterior.drift, posterior.drift_sd) == pytest.approx((0.1, 0.15), abs=1e-3)


def test_a_fixed_drift_moves_the_bowl_by_exactly_that_much():
    prior = SurrogatePrior(drift=0.2, drift_sd=0.0)
    posterior = fit(trials([(x, 100) for x in (-8.0, -6.0, -4.0)]), target=4000, prior=prior).posterior
    near = posterior.predict(GRID, 100)
    far = posterior.predict(GRID - 0.2 * math.log(40), 4000)
    for a, b in zip(near, far, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_a_horizon_that_is_wrong_about_the_level_is_taken_up_by_its_offset():
    """Three trials that miss the bowl's floor look as good as the best; the offset keeps them from winning."""
    obs = trials([(-6.0, 100), (-5.0, 100), (-4.0, 100)])
    missed = [Observation(x, 50, bowl(x, 50)) for x in (-10.0, -9.5, -9.0)]
    mean, _ = fit(obs + missed).posterior.predict(GRID, 100)
    assert float(GRID[mean.argmin()]) == pytest.approx(-5.0, abs=0.5)


def test_far_horizons_count_less():
    """Contradictory far trials: the nearer to the target, the more they move the answer."""
    obs = trials([(-6.0, 100), (-5.0, 100), (-4.0, 100)])

    def pull(h, noise):
        other = [Observation(x, h, bowl(x + 1.5, 100)) for x in (-8.0, -6.5, -5.0)]
        prior = SurrogatePrior(drift_sd=0.0, drift=0.0, horizon_noise=noise)
        mean, _ = fit(obs + other, target=100, prior=prior).posterior.predict(GRID, 100)
        base, _ = fit(obs, target=100, prior=prior).posterior.predict(GRID, 100)
        return float((mean - base).abs().max())

    assert pull(5, 0.05) < 0.8 * pull(5, 0.0)
    assert pull(5, 0.05) < pull(50, 0.05)


def test_divergence_and_explosion_are_clipped_alike():
    obs = trials([(-6.0, 100), (-5.0, 100)])
    answers = [
        fit([*obs, Observation(-3.0, 100, loss, status)]).posterior.predict(GRID, 100)[0]
        for loss, status in ((math.nan, "diverged"), (1e30, "finished"), (-7.0, "diverged"), (math.inf, "finished"))
    ]
    for other in answers[1:]:
        assert torch.equal(answers[0], other)
    assert float(answers[0][(GRID + 3.0).abs().argmin()]) == pytest.approx(1.2, abs=0.05)


def test_a_stopped_trial_is_a_vague_bad_one():
    obs = trials([(-6.0, 100), (-5.0, 100)])
    stopped = fit([*obs, Observation(-3.0, 100, 1.0, "stopped")])
    assert stopped.best_loss == pytest.approx(min(o.loss for o in obs))
    at = torch.tensor([-3.0], dtype=torch.float64)
    for loss in (1.0, math.nan):
        mean, sd = fit([*obs, Observation(-3.0, 100, loss, "stopped")]).posterior.predict(at, 100)
        assert 0.12 < float(mean) < 1.0
        assert float(sd) > 0.1
    mean, sd = fit([*obs, Observation(-3.0, 100, 1.0, "finished")], start=5.0).posterior.predict(at, 100)
    assert float(sd) < 0.05


def test_measured_noise_widens_the_posterior():
    obs = trials([(-6.0, 100), (-5.0, 100), (-4.0, 100)])
    quiet, loud = fit(obs), fit(obs, loss_noise=0.5)
    at = torch.tensor([-5.0], dtype=torch.float64)
    assert float(loud.posterior.predict(at, 100)[1]) > 2 * float(quiet.posterior.predict(at, 100)[1])
    assert fit(obs, loss_noise=1e300).posterior is not None


def test_difference_knows_that_neighbours_are_correlated():
    posterior = fit(trials([(-6.0, 100), (-5.0, 100)])).posterior
    _, sd = posterior.predict(torch.tensor([-2.5, -2.4], dtype=torch.float64), 400)
    gap, gap_sd = posterior.difference(-2.5, -2.4, 400)
    mean, _ = posterior.predict(torch.tensor([-2.5, -2.4], dtype=torch.float64), 400)
    assert gap == pytest.approx(float(mean[0] - mean[1]), abs=1e-9)
    assert gap_sd < 0.3 * float(sd[0])
    assert posterior.difference(-3.0, -3.0, 400) == pytest.approx((0.0, 0.0), abs=1e-6)


@pytest.mark.parametrize("start", [1.0, math.nan, math.inf, -math.inf])
def test_without_progress_there_is_no_posterior(start):
    result = fit(trials([(-6.0, 100), (-5.0, 100)]), start=start)
    assert not result.progress
    assert result.posterior is None
    assert result.reason


def test_nothing_observed_is_a_value():
    for obs in ([], [Observation(-3.0, 100, math.nan, "diverged")]):
        assert fit(obs).posterior is None


def test_history_speaks_before_the_first_trial():
    history = [Observation(x, 50, bowl(x, 50), "finished", 5.0) for x in (-8.0, -6.5, -5.0, -3.5)]
    posterior = fit(history, start=2.5).posterior
    mean, _ = posterior.predict(GRID, 100)
    assert float(GRID[mean.argmin()]) == pytest.approx(-5.0, abs=0.5)


@pytest.mark.parametrize("horizon", [0, -5])
def test_horizons_are_validated(horizon):
    with pytest.raises(ConfigurationError, match="above 0"):
        fit([], horizon=horizon)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_stress_of_losses_never_raises(scale):
    rng = random.Random(3)
    for kind in range(4):
        losses = [
            [rng.uniform(-1, 1) for _ in range(12)],
            [1.0] * 12,
            [math.nan, math.inf, -math.inf] * 4,
            [10.0 ** rng.uniform(-8, 8) for _ in range(12)],
        ][kind]
        obs = [Observation(-6.0, 20 * 2 ** (i % 3), loss * scale) for i, loss in enumerate(losses)]
        result = fit(obs, start=2 * scale, horizon=40)
        if result.posterior is not None:
            mean, sd = result.posterior.predict(GRID, 4000)
            assert bool(mean.isfinite().all() & sd.isfinite().all())
