"""The loss forecast of AutoLRS as its authors released it, kept as a baseline.

Notation:
    t      index of a step in the observed series, from 0
    y_t    raw mini-batch loss at step t
    L(t)   = a exp(b t) + c, with b < 0; a and c free, so that c may be negative and a too
    tau    step at which the loss is asked for, counted from the series' first; ten times its length as published

Source: Jin et al., AutoLRS, ICLR 2021 (arXiv 2105.10762), section 4.2 and the released code. The steps are theirs:
a quadratic smoothing spline; ten times, the 3 % of points farthest from it are dropped where they lie in the first
half (once, and only the farthest, for validation losses); b by a simplex search on log(-b) with a and c eliminated by
least squares. The code is ours. It differs in one thing: where theirs raises, this returns NaN.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import UnivariateSpline
from scipy.optimize import minimize

_Array = NDArray[np.float64]
_SPLINE_DEGREE = 2
_OUTLIER_SHARE = 0.03
_ROUNDS = 10


def published_forecast(losses: Sequence[float], tau: int, *, training: bool = True) -> float:
    """The loss that AutoLRS expects at step ``tau``.

    Args:
        losses: Raw losses of consecutive steps at a constant learning rate.
        tau: The step to extrapolate to, in steps from the first loss.
        training: Training losses (True) or validation losses, which are cleaned more gently.

    Returns:
        The forecast, which nothing bounds: it may be negative for a loss that cannot be. NaN where a loss is
        not finite, the series is too short for the spline, or the fit fails.
    """
    y = np.asarray(losses, dtype=np.float64)
    if y.ndim != 1 or not np.isfinite(y).all():
        return math.nan
    x = np.arange(y.size, dtype=np.float64)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            kept_x, kept_y = _without_outliers(x, y, training)
            smooth = np.asarray(UnivariateSpline(kept_x, kept_y, k=_SPLINE_DEGREE)(x), dtype=np.float64)
            return _extrapolate(x, smooth, float(tau))
    # FITPACK and LAPACK report failure in several types; as published they kill the server.
    except Exception:
        return math.nan


def _without_outliers(x: _Array, y: _Array, training: bool) -> tuple[_Array, _Array]:
    """Drops points far from a smoothing spline; only the noisy first half of the series may lose any."""
    limit = x[(x.size - 1) // 2]
    for _ in range(_ROUNDS if training else 1):
        distance = np.abs(y - UnivariateSpline(x, y, k=_SPLINE_DEGREE)(x))
        count = round(x.size * _OUTLIER_SHARE) if training else 1
        # As released: a slice from -0 takes every point, so short series lose their whole first half.
        farthest = np.argsort(distance, kind="stable")[-count:]
        keep = np.ones(x.size, dtype=bool)
        keep[farthest[farthest < limit]] = False
        x, y = x[keep], y[keep]
    return x, y


def _extrapolate(x: _Array, y: _Array, tau: float) -> float:
    def linear(log_rate: float) -> tuple[_Array, float]:
        basis = np.stack([np.exp(-math.exp(log_rate) * x), np.ones_like(x)], axis=1)
        solution, *_ = np.linalg.lstsq(basis, y, rcond=None)
        return solution, float(np.sum((basis @ solution - y) ** 2))

    found = minimize(
        lambda rate: linear(float(rate[0]))[1],
        x0=[0.0],
        method="Nelder-Mead",
        options={"xatol": 1e-5, "fatol": 1e-5},
    )
    log_rate = float(found.x[0])
    (a, c), _ = linear(log_rate)
    value = float(a * math.exp(-math.exp(log_rate) * tau) + c)
    return value if math.isfinite(value) else math.nan
