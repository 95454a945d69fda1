"""Fits a falling loss curve and says where it will be, how sure that is, or that it should not be trusted.

Notation (all arrays float64):
    t, L      step and loss of an observation, shape (n,)          | steps, units of the loss
    x         (t - t_first) / (t_last - t_first), in [0, 1]         | spans
    y         (L - min L) / (max L - min L), in [0, 1]              | ranges
    w         weight of an observation, (smallest se / se)^2        | 1
    theta     shape of the curve: (log t0,) or (log t0, log p)      | t0 in spans
    phi       basis of the falling part: exp(-x/t0), or (1 + x/t0)^-p
    a, c      its size and the limit: y = c + a phi, a >= 0, c >= bound, c <= the last smoothed loss if a > 0
    K         number of nodes of the grid over theta that the interval integrates over
    r         lag-1 autocorrelation of the residuals, at least 0

Given theta the curve is linear in (a, c): they are eliminated (variable projection: Golub and Pereyra, 1973)
by a least-squares problem with bounds, small enough to be solved by listing its faces. Theta has one or two
dimensions, so a grid that zooms in on the profile likelihood finds its maximum and serves as quadrature for the
interval. Where AutoLRS (arXiv 2105.10762) extrapolates with free a and c, these are bounded here, and every
answer carries an interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from autotune.errors import ConfigurationError
from autotune.forecast._profile import Array, Family, Mixture, Problem, last_smoothed, profile

#: Fewest distinct steps, for one more degree of freedom than parameters twice over.
MIN_POINTS = {"exponential": 6, "power": 8}
#: How far beyond the data a forecast is still trusted, in spans of the data.
MAX_HORIZON_SPANS = 4.0
#: Drop in the residual sum of squares, in noise variances, that counts as a descent. On pure noise the three
#: parameters gain less than this in about 99 runs of 100.
_DESCENT_GAIN = 12.0
_MAX_POINTS = 400  # longer series are averaged in blocks: nothing is lost and the fit stays at milliseconds


@dataclass(frozen=True)
class Forecast:
    """What a fit expects at one step.

    Attributes:
        value: The fitted curve there, in units of the loss.
        low: Lower end of the central interval for a loss observed there.
        high: Upper end.
        trusted: False where the fit or the distance forbids to act on it.
        reason: Why, as a sentence.
    """

    value: float
    low: float
    high: float
    trusted: bool
    reason: str


@dataclass(frozen=True)
class CurveFit:
    """A fitted loss curve, or the refusal to fit one.

    Attributes:
        trusted: Whether the fit may be acted on.
        reason: Why not, or what was fitted, as a sentence.
        family: ``"exponential"`` or ``"power"``.
        a: Size of the falling part, in units of the loss (0 in a refusal).
        c: Limit of the loss; in a refusal the last smoothed loss, or NaN.
        t0: Time constant, in steps (NaN in a refusal).
        p: Exponent of the power law (NaN for the exponential).
        noise: Standard deviation of one observation about the curve, in units of the loss.
        first_step: First observed step.
        last_step: Last observed step.
    """

    trusted: bool
    reason: str
    family: Family = "exponential"
    a: float = 0.0
    c: float = math.nan
    t0: float = math.nan
    p: float = math.nan
    noise: float = math.nan
    first_step: float = math.nan
    last_step: float = math.nan
    _mixture: Mixture | None = None

    def predict(self, step: float, level: float = 0.8, *, noisy: bool = True) -> Forecast:
        """The loss expected at ``step``.

        Args:
            step: On the axis of the fitted steps; may lie inside the data.
            level: Probability of the central interval, in (0, 1).
            noisy: True for the interval of an observed loss, False for that of the curve itself.

        Returns:
            A forecast; untrusted, with infinite ends, where there is no fit, and untrusted beyond
            ``MAX_HORIZON_SPANS`` times the observed span.

        Raises:
            ConfigurationError: ``level`` is not inside (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ConfigurationError(f"predict: level must be inside (0, 1), such as 0.8; got {level!r}")
        if self._mixture is None:
            return Forecast(self.c, -math.inf, math.inf, False, self.reason)
        span = self.last_step - self.first_step
        x = (step - self.first_step) / span
        if not math.isfinite(x) or x < 0:
            return Forecast(self.c, -math.inf, math.inf, False, f"step {step!r} is before the data or not finite")
        value, low, high = self._mixture.at(x, level, noisy)
        if not (math.isfinite(value) and math.isfinite(low) and math.isfinite(high)):
            return Forecast(self.c, -math.inf, math.inf, False, "the forecast is not finite")
        if x - 1.0 > MAX_HORIZON_SPANS:
            reason = f"step {step:g} is {x - 1.0:.1f} spans beyond the data, more than {MAX_HORIZON_SPANS:g}"
            return Forecast(value, low, high, False, reason)
        return Forecast(value, low, high, True, self.reason)


def fit_curve(
    steps: Sequence[float],
    losses: Sequence[float],
    *,
    se: Sequence[float] | None = None,
    family: Family = "exponential",
    lower_bound: float | None = 0.0,
) -> CurveFit:
    """Fits ``c + a exp(-t/t0)`` or ``c + a (1 + t/t0)^-p``; never raises on numbers.

    Args:
        steps: Where the losses were seen, shape (n,); any order, any unit.
        losses: The losses, shape (n,); raw ones will do, their noise is estimated.
        se: Standard error of each, shape (n,), if they differ; only their ratios matter.
        family: ``"exponential"`` or ``"power"``.
        lower_bound: What the loss cannot be below (0 for a cross-entropy); None for a loss that may be
            negative. Dropped where an observed loss lies below it.

    Returns:
        A fit, or a refusal with ``trusted=False`` and the reason: too few points, a value that is not finite,
        no descent, or a fit that failed.

    Raises:
        ConfigurationError: The family is unknown.
    """
    if family not in get_args(Family):
        raise ConfigurationError(f"fit_curve: family must be 'exponential' or 'power'; got {family!r}")
    t, y, error = _arrays(steps, losses, se)
    with np.errstate(all="ignore"):
        refusal = _unusable(t, y, error, family)
        if refusal is not None:
            return refusal
        order = np.argsort(t, kind="stable")
        t, y, error = (v[order] for v in (t, y, error))
        try:
            return _fit(t, y, error, family, lower_bound)
        except (ArithmeticError, ValueError, np.linalg.LinAlgError) as failure:
            return CurveFit(False, f"the fit failed: {failure}", family, c=last_smoothed(y))


def _arrays(steps: Sequence[float], losses: Sequence[float], se: Sequence[float] | None) -> tuple[Array, Array, Array]:
    t, y = (np.asarray(v, dtype=np.float64).reshape(-1) for v in (steps, losses))
    return t, y, np.ones_like(y) if se is None else np.asarray(se, dtype=np.float64).reshape(-1)


def _unusable(t: Array, y: Array, error: Array, family: Family) -> CurveFit | None:
    """Why these numbers cannot be fitted, as a refusal, or None."""
    finite = y[np.isfinite(y)]
    last = last_smoothed(finite) if finite.size else math.nan
    if not t.size == y.size == error.size:
        return CurveFit(False, f"{t.size} steps, {y.size} losses, {error.size} errors", family, c=last)
    if not (np.isfinite(t).all() and np.isfinite(y).all()):
        return CurveFit(False, "a step or a loss is not finite", family, c=last)
    if not (np.isfinite(error).all() and (error > 0).all()):
        return CurveFit(False, "a standard error is not finite and positive", family, c=last)
    distinct = np.unique(t).size
    if distinct < MIN_POINTS[family]:
        return CurveFit(False, f"{distinct} points, at least {MIN_POINTS[family]} are needed", family, c=last)
    if not (math.isfinite(float(np.ptp(t))) and math.isfinite(float(np.ptp(y)))):
        return CurveFit(False, "the range of the steps or losses overflows", family, c=last)
    if not (float(np.ptp(y)) > 0 and np.isfinite((y - y.min()) / np.ptp(y)).all()):
        return CurveFit(False, "no descent: the losses are all equal", family, c=last)
    return None


def _blocks(values: Array) -> Array:
    """Means of consecutive blocks, so that at most ``_MAX_POINTS`` remain."""
    size = -(-values.size // _MAX_POINTS)
    starts = np.arange(0, values.size, size)
    counts = np.diff(np.append(starts, values.size))
    # Divided before they are added: a sum of losses near the largest float would overflow.
    return np.asarray(np.add.reduceat(values / np.repeat(counts, counts), starts), dtype=np.float64)


def _fit(t: Array, loss: Array, error: Array, family: Family, lower_bound: float | None) -> CurveFit:
    all_t, all_loss = t, loss
    t, loss, error = (_blocks(v) for v in (t, loss, error))
    shift, scale, span = float(loss.min()), float(np.ptp(loss)), float(t[-1] - t[0])
    floor = -math.inf
    if lower_bound is not None and math.isfinite(lower_bound) and shift >= lower_bound:
        floor = lower_bound
    w = (error.min() / error) ** 2
    problem = Problem((t - t[0]) / span, (loss - shift) / scale, w / w.mean(), family, (floor - shift) / scale)
    dof = loss.size - MIN_POINTS[family] // 2
    nodes, log_weight, inflation = profile(problem, dof)
    best = int(np.argmin(nodes.rss))
    rss = float(nodes.rss[best])
    gain = float(np.sum(problem.w * (problem.y - np.average(problem.y, weights=w)) ** 2)) - rss
    if not math.isfinite(rss):
        return CurveFit(False, "the fit failed: residuals are not finite", family, c=last_smoothed(loss))
    if nodes.a[best] <= 0 or gain * dof < _DESCENT_GAIN * inflation * rss:
        return CurveFit(False, "no descent beyond the noise", family, c=last_smoothed(loss))
    mixture = Mixture(nodes, log_weight, best, family, rss / dof, inflation, dof, shift, scale, floor)
    if all_t.size > t.size:
        # Blocks are less noisy than what they are made of.
        mixture = replace(mixture, future=mixture.spread((all_t - t[0]) / span, (all_loss - shift) / scale))
    elif w.min() < 1.0:
        mixture = replace(mixture, future=rss / dof * float(np.median(1.0 / problem.w)))
    return CurveFit(
        True,
        f"{family} fit to {all_t.size} points",
        family,
        scale * float(nodes.a[best]),
        max(shift + scale * float(nodes.c[best]), floor),
        span * math.exp(nodes.theta[best, 0]),
        math.exp(nodes.theta[best, 1]) if family == "power" else math.nan,
        scale * math.sqrt(mixture.noise),
        float(t[0]),
        float(t[-1]),
        mixture,
    )
