"""The published forecast: right where it is right, and wrong in the ways it is known to be."""

import math

import numpy as np
import pytest

from autotune.forecast import fit_curve, published_forecast


def series(n=100, c=0.5, sd=0.0, seed=0):
    return c + 2.0 * np.exp(-np.arange(n) / 30.0) + sd * np.random.default_rng(seed).normal(size=n)


def test_clean_exponential_is_extrapolated_where_its_spline_can_follow():
    """The spline's smoothing is absolute: a loss in the thousands is followed, a loss of 2.5 becomes a parabola."""
    assert published_forecast(1000 * series(), 1000) == pytest.approx(500.0, rel=0.1)
    assert published_forecast(series(), 1000) < 0.4


def test_it_goes_below_zero_where_ours_cannot():
    """Ten times the observed length from a nearly straight descent: the free limit is negative."""
    t = np.arange(100)
    losses = 2.5 - 0.01 * t + 0.05 * np.random.default_rng(2).normal(size=100)
    assert published_forecast(losses, 1000) < 0.0
    ours = fit_curve(t, losses).predict(400)
    assert ours.low >= 0.0


@pytest.mark.parametrize("n", [0, 1, 3, 10, 16])
def test_short_series_give_nan(n):
    assert math.isnan(published_forecast(series(n), 10 * n))


def test_values_that_are_not_finite_give_nan():
    losses = series()
    losses[50] = math.inf
    assert math.isnan(published_forecast(losses, 1000))


def test_outliers_of_the_first_half_are_dropped():
    losses = series(sd=0.01)
    losses[10] += 20.0
    assert published_forecast(losses, 1000) == pytest.approx(published_forecast(series(sd=0.01), 1000), abs=0.05)


def test_validation_losses_are_cleaned_once():
    losses = series(40, sd=0.05)
    losses[[3, 9]] += 5.0
    assert published_forecast(losses, 400, training=False) != published_forecast(losses, 400)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_never_raises(scale):
    for losses in (scale * series(sd=0.1), np.full(60, scale), -scale * series()):
        assert isinstance(published_forecast(losses, 600), float)
