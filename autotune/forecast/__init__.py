"""Forecasts of loss curves: a fit with an interval and a refusal, and the published one as a baseline."""

from autotune.forecast.curve import CurveFit, Forecast, fit_curve
from autotune.forecast.published import published_forecast

__all__ = ["CurveFit", "Forecast", "fit_curve", "published_forecast"]
