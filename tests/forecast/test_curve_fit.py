"""Closed forms, laws, refusals and stress of the curve fit."""

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from autotune.errors import ConfigurationError
from autotune.forecast import fit_curve

FAMILIES = ("exponential", "power")


def exponential(t, c=0.5, a=2.0, t0=30.0):
    return c + a * np.exp(-np.asarray(t, dtype=float) / t0)


def power(t, c=0.5, a=2.0, t0=20.0, p=0.7):
    return c + a * (1 + np.asarray(t, dtype=float) / t0) ** -p


def noisy(clean, sd, seed=0):
    return clean + sd * np.random.default_rng(seed).normal(size=len(clean))


def test_exact_exponential_is_recovered():
    t = np.arange(60)
    fit = fit_curve(t, exponential(t))
    assert fit.trusted, fit.reason
    assert (fit.a, fit.c, fit.t0) == pytest.approx((2.0, 0.5, 30.0), rel=1e-6)
    forecast = fit.predict(200)
    assert forecast.trusted
    assert forecast.value == pytest.approx(float(exponential(200)), rel=1e-6)
    assert forecast.low <= forecast.value <= forecast.high
    assert forecast.high - forecast.low < 1e-6


def test_exact_power_law_is_recovered():
    t = np.arange(100)
    fit = fit_curve(t, power(t), family="power")
    assert fit.trusted, fit.reason
    assert (fit.c, fit.t0, fit.p) == pytest.approx((0.5, 20.0, 0.7), rel=1e-4)
    assert fit.predict(400).value == pytest.approx(float(power(400)), rel=1e-6)


def test_agrees_with_nonlinear_least_squares():
    """The slow twin: SciPy's Levenberg-Marquardt on the same weighted residuals."""
    t = np.arange(80)
    se = np.linspace(0.01, 0.05, 80)
    y = exponential(t) + se * np.random.default_rng(3).normal(size=80)
    (c, a, t0), _ = curve_fit(lambda t, c, a, t0: c + a * np.exp(-t / t0), t, y, p0=(0.4, 1.5, 20.0), sigma=se)
    fit = fit_curve(t, y, se=se)
    assert (fit.c, fit.a, fit.t0) == pytest.approx((c, a, t0), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 7.0, 1e30])
def test_scaling_the_loss_scales_the_forecast(family, scale):
    t = np.arange(50)
    y = noisy(exponential(t), 0.05)
    one, other = (fit_curve(t, k * y, family=family).predict(100) for k in (1.0, scale))
    assert (other.value, other.low, other.high) == pytest.approx(
        (scale * one.value, scale * one.low, scale * one.high), rel=1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_shifting_the_loss_shifts_the_forecast(family):
    t = np.arange(50)
    y = noisy(exponential(t), 0.05)
    one, other = (fit_curve(t, y + k, family=family, lower_bound=None).predict(100) for k in (0.0, -40.0))
    assert (other.value, other.low, other.high) == pytest.approx(
        (one.value - 40, one.low - 40, one.high - 40), rel=1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_units_and_origin_of_the_steps_do_not_matter(family):
    t = np.arange(50)
    y = noisy(exponential(t), 0.05)
    one = fit_curve(t, y, family=family).predict(100)
    other = fit_curve(1000 + 16 * t, y, family=family).predict(1000 + 16 * 100)
    assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high), rel=1e-9)


def test_order_of_the_observations_does_not_matter():
    t = np.arange(50)
    y = noisy(exponential(t), 0.05)
    turned = np.random.default_rng(1).permutation(50)
    assert fit_curve(t, y).predict(90) == fit_curve(t[turned], y[turned]).predict(90)


def test_errors_weigh():
    """A stretch that is marked as a hundred times noisier hardly moves the fit."""
    t = np.arange(60)
    y = exponential(t)
    y[20:30] += 1.0
    se = np.ones(60)
    se[20:30] = 100.0
    assert fit_curve(t, y, se=se).predict(120).value == pytest.approx(float(exponential(120)), abs=1e-3)
    assert abs(fit_curve(t, y).predict(120).value - float(exponential(120))) > 0.05


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(10))
def test_limit_stays_between_its_bounds(family, seed):
    t = np.arange(25)
    y = np.abs(noisy(2.0 - 0.06 * t, 0.2, seed))  # a straight descent: the free limit would be far below zero
    fit = fit_curve(t, y, family=family)
    assert fit.trusted, fit.reason
    assert 0.0 <= fit.c <= y[-6:].mean() + 1e-12
    for step in (25, 60, 120):
        forecast = fit.predict(step)
        assert 0.0 <= forecast.low <= forecast.value <= forecast.high


def test_bound_is_dropped_where_the_loss_is_negative():
    t = np.arange(60)
    fit = fit_curve(t, exponential(t, c=-3.0))
    assert fit.c == pytest.approx(-3.0, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_interval_widens_with_distance_and_level(family):
    t = np.arange(40)
    fit = fit_curve(t, noisy(exponential(t), 0.05), family=family)
    widths = [fit.predict(s).high - fit.predict(s).low for s in (40, 80, 190)]
    assert widths == sorted(widths)
    assert fit.predict(80, 0.95).high > fit.predict(80, 0.8).high > fit.predict(80, 0.8, noisy=False).high


def test_long_series_are_averaged_in_blocks():
    t = np.arange(5000)
    fit = fit_curve(t, noisy(exponential(t, t0=1500.0), 0.1))
    assert fit.trusted
    # The noise is that of one observation, not of a block's mean.
    assert fit.noise == pytest.approx(0.1, rel=0.05)
    assert fit.predict(8000, noisy=False).value == pytest.approx(float(exponential(8000, t0=1500.0)), abs=0.03)


REFUSALS = {
    "points": ([0, 1, 2], [3.0, 2.0, 1.0]),
    "not finite": (range(10), [3.0] * 9 + [math.nan]),
    "equal": (range(10), [1.0] * 10),
    "descent": (range(30), np.linspace(1, 2, 30)),
    "5 steps, 6 losses": (range(5), range(6)),
    "overflow": (range(10), [1e308, -1e308] * 5),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_refusals_are_values_with_a_reason(why):
    steps, losses = REFUSALS[why]
    fit = fit_curve(steps, losses)
    assert not fit.trusted
    assert why in fit.reason
    forecast = fit.predict(20)
    assert not forecast.trusted
    assert (forecast.low, forecast.high) == (-math.inf, math.inf)


def test_noise_without_descent_is_refused():
    t = np.arange(50)
    trusted = [
        fit_curve(t, 1 + noisy(np.zeros(50), 0.1, seed), family=f).trusted for seed in range(100) for f in FAMILIES
    ]
    assert sum(trusted) <= 4


def test_errors_that_are_no_errors_are_refused():
    t = np.arange(30)
    for bad in (0.0, -1.0, math.nan, math.inf):
        assert "standard error" in fit_curve(t, exponential(t), se=[1.0] * 29 + [bad]).reason


def test_far_horizons_are_not_trusted_but_answered():
    fit = fit_curve(range(50), exponential(range(50)))
    assert fit.predict(49 + 4 * 49).trusted
    far = fit.predict(49 + 5 * 49)
    assert not far.trusted
    assert "beyond" in far.reason
    assert far.value == pytest.approx(float(exponential(49 + 5 * 49)), rel=1e-6)
    for step in (-1.0, math.nan, math.inf):
        assert not fit.predict(step).trusted


def test_unknown_settings_are_named():
    with pytest.raises(ConfigurationError, match="family"):
        fit_curve(range(9), range(9), family="cubic")
    with pytest.raises(ConfigurationError, match="level"):
        fit_curve(range(50), exponential(range(50))).predict(60, level=1.0)


SHAPES = {
    "exponential": lambda t: np.exp(-t / 7),
    "step": lambda t: (t < 5) * 1.0,
    "spike": lambda t: (t == 11) * 1.0,
    "rise": lambda t: t,
    "fall": lambda t: -t,
    "zigzag": lambda t: (-1.0) ** t,
    "explosion": lambda t: np.exp(np.minimum(t**2, 600)),
    "constant": lambda t: np.ones_like(t),
    "denormal": lambda t: np.exp(-t) * 5e-324,
    "wide": lambda t: 10.0 ** (-20 * t),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_never_raises_on_numbers(family, shape):
    t = np.arange(24, dtype=float)
    for scale in (1e-300, 1e-30, 1.0, -1.0, 1e30, 1e300):
        for offset in (0.0, 1.0, -1e30):
            with np.errstate(all="ignore"):
                y = scale * SHAPES[shape](t) + offset
            for poison in (None, math.nan, math.inf, -math.inf):
                values = y.copy()
                if poison is not None:
                    values[7] = poison
                fit = fit_curve(t, values, family=family)
                assert fit.reason
                forecast = fit.predict(40)
                if forecast.trusted:
                    assert -math.inf < forecast.low <= forecast.value <= forecast.high < math.inf
    assert fit_curve([], [], family=family).reason
    assert not fit_curve([1e-320 * k for k in range(24)], np.exp(-t), family=family).predict(1.0).trusted
